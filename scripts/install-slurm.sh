#!/usr/bin/env bash
# Install the programs of the test cluster (tests/cluster/) from Debian's packages, as root.
# Elsewhere it prints what is missing, and tests that need Slurm are skipped, unless HPC_RLHF_REQUIRE_SLURM=1.
set -euo pipefail

PATH="$PATH:/usr/sbin:/sbin"
missing=()
for program in munged mariadbd slurmdbd slurmctld slurmd sbatch srun; do
    command -v "$program" >/dev/null || missing+=("$program")
done
((${#missing[@]} == 0)) && exit 0

if ! command -v apt-get >/dev/null || ((EUID != 0)); then
    echo "The test cluster needs ${missing[*]}; this script installs them only on Debian, as root." >&2
    [[ ${HPC_RLHF_REQUIRE_SLURM:-} != 1 ]] || exit 1
    echo "Continuing without: tests that need Slurm are skipped." >&2
    exit 0
fi

# The packages start their services on installation. The tests start their own, so keep those down.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get --option DPkg::Lock::Timeout=120 --quiet update
apt-get --option DPkg::Lock::Timeout=120 --quiet install --yes --no-install-recommends \
    munge mariadb-server slurm-client slurm-wlm-mysql-plugin slurmctld slurmd slurmdbd
