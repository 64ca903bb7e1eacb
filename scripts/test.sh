#!/usr/bin/env bash
# Installs the package with what the tests need, then lints and tests it.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ] || [ "${1:-}" = "-h" ]; then
  cat <<'HELP'
usage: bash scripts/test.sh [PYTEST OPTIONS]

Makes .venv when it is missing, installs mixtral-ms[test] into it, and mixtral-ms[mindformers] into
.venv-mindformers; checks lint and format with ruff and types with mypy, and runs pytest with the
options given.

  bash scripts/test.sh                        everything but the tests marked long
  bash scripts/test.sh --long                 those too
  bash scripts/test.sh tests/unit -k config   a part
HELP
  exit 0
fi

source "$ROOT/scripts/venv.sh"
cd "$ROOT"
prepare_venv test
prepare_venv mindformers .venv-mindformers
export MINDFORMERS_PYTHON

echo "== lint and format"
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
echo "== types"
"$VENV_PYTHON" scripts/check_types.py
echo "== tests"
exec "$VENV_PYTHON" -m pytest "$@"
