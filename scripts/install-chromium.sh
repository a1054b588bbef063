#!/usr/bin/env bash
# Install the browser that the report is tried in from Debian's packages, when this user may.
# Elsewhere those tests are skipped, unless HPC_RLHF_REQUIRE_CHROMIUM=1.
set -euo pipefail

command -v chromium >/dev/null && exit 0

if ! command -v apt-get >/dev/null || ((EUID != 0)); then
    echo "The report is tried in chromium, which is installed here only on Debian, by root." >&2
    [[ ${HPC_RLHF_REQUIRE_CHROMIUM:-} != 1 ]] || exit 1
    echo "Going on without: tests that need a browser are skipped." >&2
    exit 0
fi

export DEBIAN_FRONTEND=noninteractive
apt-get --option DPkg::Lock::Timeout=120 --quiet update
apt-get --option DPkg::Lock::Timeout=120 --quiet install --yes --no-install-recommends chromium fonts-dejavu-core
