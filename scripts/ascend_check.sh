#!/usr/bin/env bash
# What a machine with Ascend devices shows of mixtral-ms: kernels, losses, memory, time. See --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The device's own MindSpore and CANN lie where the user installed them: no environment is made.
python=${PYTHON:-}
[ -n "$python" ] || { [ -x "$ROOT/.venv/bin/python" ] && python="$ROOT/.venv/bin/python"; } ||
  python=$(command -v python3 || true)
[ -n "$python" ] || {
  echo "error: no Python: name the one that has MindSpore: PYTHON=/path/to/python bash $0" >&2
  exit 2
}
export PYTHON="$python" PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$ROOT/scripts/ascend_check.py" "$@"
