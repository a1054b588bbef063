#!/usr/bin/env bash
# Install the browser for the report's tests from Debian's packages, as root.
# Elsewhere those tests are skipped, unless HPC_RLHF_REQUIRE_CHROMIUM=1.
set -euo pipefail

command -v chromium >/dev/null && exit 0

if ! command -v apt-get >/dev/null || ((EUID != 0)); then
    echo "The report's tests need chromium; this script installs it only on Debian, as root." >&2
    [[ ${HPC_RLHF_REQUIRE_CHROMIUM:-} != 1 ]] || exit 1
    echo "Continuing without: tests that need a browser are skipped." >&2
    exit 0
fi

export DEBIAN_FRONTEND=noninteractive
apt-get --option DPkg::Lock::Timeout=120 --quiet update
apt-get --option DPkg::Lock::Timeout=120 --quiet install --yes --no-install-recommends chromium fonts-dejavu-core
