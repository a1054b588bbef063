#!/usr/bin/env bash
# Install Apptainer for the tests of containers and of the sandbox of the code reward, on Debian as root. Elsewhere, or if
# this fails, they are skipped.
# Debian has it only in unstable, with a newer C library than a stable system's. So it is unpacked with its libraries
# into .venv/apptainer, and its programs are patched to find them there.
set -euo pipefail

into=$(realpath "$(dirname "$0")/..")/.venv/apptainer
libraries="$into/usr/lib/x86_64-linux-gnu"
if command -v apptainer >/dev/null || [[ -x $into/usr/bin/apptainer ]]; then
    exit 0
fi

install() {
    local patchelf=(apt-get --option DPkg::Lock::Timeout=120 --quiet install --yes --no-install-recommends patchelf)
    "${patchelf[@]}" || { apt-get --quiet update && "${patchelf[@]}"; } || return
    local apt=(
        timeout 120 apt-get --quiet --option APT::Sandbox::User=root
        --option "Dir::Etc::SourceList=$work/sources.list" --option Dir::Etc::SourceParts=/dev/null
        --option "Dir::State::Lists=$work/lists" --option "Dir::Cache=$work/cache"
    )
    mkdir -p "$work"/{lists,cache/archives}/partial "$work/unpacked/usr/lib/var/lib/apptainer/mnt/session"
    local mirror
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 'Component: main')
    [[ -n $mirror ]] || return
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror%%$'\n'*} sid main" >"$work/sources.list"
    "${apt[@]}" update || return
    (cd "$work" && "${apt[@]}" download apptainer libc6 libseccomp2 libsqlite3-0) || return
    for package in "$work"/*.deb; do
        dpkg --extract "$package" "$work/unpacked" || return
    done
    ln -s ../etc "$work/unpacked/usr/etc"
    for program in usr/bin/apptainer usr/lib/x86_64-linux-gnu/apptainer/bin/starter; do
        patchelf --set-interpreter "$libraries/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$libraries" \
            "$work/unpacked/$program" || return
    done
    rm -rf "$into"
    mv "$work/unpacked" "$into"
    # Some sandboxes do not allow containers.
    mkdir -p "$work"/image/{bin,usr}
    ln -s usr/lib "$work/image/lib"
    ln -s usr/lib64 "$work/image/lib64"
    cp /bin/sh "$work/image/bin"
    APPTAINER_NO_PRIVS=1 "$into/usr/bin/apptainer" --silent exec --bind /usr "$work/image" /usr/bin/true ||
        { rm -rf "$into"; return 1; }
}

if command -v apt-get >/dev/null && ((EUID == 0)) && [[ $(uname -m) == x86_64 ]]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    install && exit 0
fi
echo "Continuing without Apptainer: its tests are skipped." >&2
