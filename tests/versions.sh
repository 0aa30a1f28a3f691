#!/usr/bin/env bash
# The suite with the oldest versions that pyproject.toml allows of what it names, or with the newest:
#   bash tests/versions.sh lowest-direct test VENV python3.11
#   bash tests/versions.sh highest parity,test VENV python3.13
# VENV, the folder of a virtual environment, is made, or what it lacks is installed; with uv, which
# knows the oldest versions that go together: pip install uv. More arguments go to pytest.
set -euo pipefail
resolution=$1 extras=$2 venv=$3 python=$4
shift 4
cd "$(dirname "$0")/.."

uv venv -q --seed --allow-existing --python "$python" "$venv"
# shellcheck disable=SC2086
uv pip install -q --python "$venv/bin/python" --resolution "$resolution" \
    -r pyproject.toml ${extras:+--extra ${extras//,/ --extra }}
uv pip list -q --python "$venv/bin/python"
PATH="$venv/bin:$PATH" PYTHONPATH=$PWD "$venv/bin/python" -m pytest "$@"
