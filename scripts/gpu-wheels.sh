#!/usr/bin/env bash
# Collect in gpu-wheels/ the packages that scripts/gpu-check.sh may lack on a machine without network. DeepSpeed has no
# wheel on the index and is built here without its compiled operators. PYTHON_VERSION is the other machine's; further
# packages may be named as arguments, such as pyarrow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=gpu-wheels
packages=(annotated-types cloudpickle einops hjson msgpack py-cpuinfo pydantic pydantic_core submitit typing-inspection "$@")

mkdir -p "$folder"
rm -f "$folder"/*.whl
pinned=()
for package in "${packages[@]}"; do
    pinned+=("$(grep --extended-regexp --ignore-case "^$package==" constraints.txt | cut --delimiter=' ' --fields=1)")
done
platforms=()
for tag in manylinux_2_28 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${tag}_$(uname --machine)")
done
.venv/bin/python -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" "${pinned[@]}"
DS_BUILD_OPS=0 .venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" \
    "$(grep '^deepspeed==' constraints.txt)"
size=$(du --total --block-size=M "$folder"/*.whl | tail -n 1 | cut --fields=1)
echo "$folder holds $(find "$folder" -name '*.whl' | wc -l) wheels, $size" >&2
((${size%M} < 64)) || { echo "gpu-wheels: over 64 MiB" >&2; exit 1; }
