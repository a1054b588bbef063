#!/usr/bin/env bash
# Run a command with the Slurm of another Debian release, as root: newer-slurm.sh trixie COMMAND...
# bookworm has Slurm 22.05, trixie 24.11, forky 26.05. A release is installed once, in /var/cache/hpc-rlhf: 0.3 GB and
# two minutes. The command runs with that as its root folder, and with this checkout, its Python, the temporary folder,
# and the certificates that variables such as SSL_CERT_FILE name. The mounts are in a namespace of their own: no other
# process sees them, and they go with the last process in it, also if that is killed.
# Where this is not possible, it says so and does nothing, unless HPC_RLHF_REQUIRE_SLURM=1.
set -euo pipefail

checkout=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
python=$checkout/.venv/bin/python
# The second line is what this Python and torch need, wherever Python is from.
packages=slurmctld,slurmd,slurmdbd,slurm-client,slurm-wlm-mysql-plugin,munge,procps,\
libbz2-1.0,libexpat1,libffi8,liblzma5,libreadline8t64,libsqlite3-0,libssl3t64,zlib1g

give_up() {
    echo "$1" >&2
    [[ ${HPC_RLHF_REQUIRE_SLURM:-} != 1 ]] || exit 1
    echo "Continuing without." >&2
    exit 0
}

install() {
    local into=$1 work=$1.part
    command -v debootstrap >/dev/null ||
        DEBIAN_FRONTEND=noninteractive apt-get --option DPkg::Lock::Timeout=120 --quiet install --yes debootstrap || return
    rm -rf "$into" "$work"
    echo "installing $(basename "$into") in $into; it takes two minutes" >&2
    # debootstrap mounts /proc and may not live to unmount it. Its script "sid" is right for releases it does not know.
    unshare --mount debootstrap --variant=minbase --include="$packages" "$(basename "$into")" "$work" \
        http://deb.debian.org/debian sid >"$into.log" 2>&1 || { tail -3 "$into.log" >&2; return 1; }
    rm -rf "$work"/var/cache/apt/archives/*.deb
    echo "$packages" >"$work/packages"
    mv "$work" "$into"
}

# Inside the new namespace.
enter() {
    local root=$1 folder program
    shift
    mount --bind "$root" "$root"  # so that it can become the root
    mkdir -p "$root/host"
    for folder in /proc /sys /dev; do
        mount --rbind $folder "$root$folder"
    done
    local -a shared=("$checkout" "${TMPDIR:-/tmp}" /etc/hosts /etc/resolv.conf /etc/ssl)
    # Debian's own Python, without the rest of /usr.
    mapfile -t -O ${#shared[@]} shared < <($python -c '
import os, sys, sysconfig
system = sys.base_prefix == "/usr"
print(*[os.path.realpath(sys.executable), sysconfig.get_path("stdlib")] if system else [sys.base_prefix], sep="\n")')
    for folder in "${shared[@]}"; do
        [[ -e $folder ]] || continue
        if [[ -d $folder ]]; then mkdir -p "$root$folder"; else touch "$root$folder"; fi
        mount --rbind "$folder" "$root$folder"
    done
    # The MariaDB of newer releases and their own slurmdbd do not fit together. No compiler is installed there.
    for program in mariadbd mariadb-install-db cc; do
        printf '#!/bin/sh\nexec chroot /host %s "$@"\n' $program >"$root/usr/bin/$program.$$"
        chmod 755 "$root/usr/bin/$program.$$"
        mv "$root/usr/bin/$program.$$" "$root/usr/bin/$program"
    done
    local here=$PWD
    cd "$root"
    pivot_root . host  # Apptainer refuses to work below a mere chroot
    ldconfig  # this Python may bring libraries in /usr/local/lib
    exec env --chdir="$here" "$@"
}

[[ $1 != --enter ]] || enter "${@:2}"

root=/var/cache/hpc-rlhf/$1
{ ((EUID == 0)) && command -v apt-get >/dev/null && unshare --mount true 2>/dev/null; } ||
    give_up "A newer Slurm is installed only on Debian, as root, where mount namespaces are allowed."
mkdir -p "$(dirname "$root")"
exec {lock}>"$root.lock"
flock "$lock"
[[ $(cat "$root/packages" 2>/dev/null) == "$packages" ]] || install "$root" || give_up "No Slurm from Debian's $1."
exec {lock}>&-
exec unshare --mount --propagation private "$0" --enter "$root" "${@:2}"
