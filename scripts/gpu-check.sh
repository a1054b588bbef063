#!/usr/bin/env bash
# Check this machine's GPU in under 8 minutes, without network: gpu-check.sh [OUTPUT_FOLDER]. It needs a Python with
# torch and transformers ($PYTHON, .venv's or python3); what else is missing it takes from gpu-wheels/ for this run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=$(realpath "${1:-gpu-check}")
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
site=$(mktemp --directory)
trap 'rm -rf "$site"' EXIT

mapfile -t missing < <("$python" - gpu-wheels/*.whl <<'PYTHON'
import importlib.metadata, os, sys

for wheel in filter(os.path.exists, sys.argv[1:]):
    try:
        importlib.metadata.version(os.path.basename(wheel).split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PYTHON
)
if ((${#missing[@]})); then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${missing[@]}"
fi
PYTHONPATH="$site:$PWD" HF_HUB_OFFLINE=1 "$python" -m tests.gpu --out "$output"
