#!/bin/sh
# Creates or updates the virtual environment of `make test-tpu`: vLLM for TPU with JAX, and what the tests need, at the
# versions of deploy/constraints-tpu.txt. No TPU is needed, 10 GB of disk are: vllm-tpu asks for PyTorch, and what PyPI
# has is the build for CUDA. The project itself is installed by `make`.
# usage: deploy/setup_tpu.sh PYTHON VENV   (from the top folder)
set -eu
python=$1 venv=$2
pins=deploy/constraints-tpu.txt

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || {
    echo "vllm-tpu needs Python >= 3.12 (its JAX does); '$python' is $("$python" --version 2>&1 || true)." \
        "Say: make test-tpu PYTHON_TPU=/path/to/python3.12" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^uv==' $pins)"

# vllm-tpu is published as source; without this it would be built for CUDA.
export VLLM_TARGET_DEVICE=tpu
"$venv/bin/uv" pip install --python "$venv/bin/python" --constraint $pins --override deploy/overrides-tpu.txt \
    --requirements pyproject.toml --extra tpu --extra demo --extra test
