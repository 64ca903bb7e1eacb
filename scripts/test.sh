#!/usr/bin/env bash
# Installs the package with what the tests need, then lints and tests it.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ] || [ "${1:-}" = "-h" ]; then
  cat <<'HELP'
usage: bash scripts/test.sh [--fast] [PYTEST OPTIONS]

Makes .venv when it is missing, installs mixtral-ms[test] into it, and mixtral-ms[mindformers] into
.venv-mindformers; checks lint and format with ruff and types with mypy, and runs pytest with the
options given. Ends with the slowest tests and the seconds of each part.

  bash scripts/test.sh                        everything but the tests marked long
  bash scripts/test.sh --fast                 the unit tests, of the others those that need
                                              no job, no process and no long computation
  bash scripts/test.sh --long                 everything
  bash scripts/test.sh tests/unit -k config   a part
  bash scripts/test.sh -n 0 --pdb tests/cli   one test after the other, as a debugger needs it
HELP
  exit 0
fi

source "$ROOT/scripts/venv.sh"
cd "$ROOT"
seconds=()
# part NAME COMMAND...: runs the command and notes how long it took; ends the script if it fails.
part() {
  local name=$1 begin=$SECONDS status=0
  shift
  "$@" || status=$?
  seconds+=("$(printf '%5d s  %s' $((SECONDS - begin)) "$name")")
  [ $status -eq 0 ] || finish $status
}

finish() {
  echo "== seconds of each part"
  printf '%s\n' "${seconds[@]}"
  printf '%5d s  in all\n' "$SECONDS"
  exit "$1"
}

# Both environments at once: unpacking takes one processor and most of the time.
# shellcheck disable=SC2329 # part calls it
install() {
  local status=0 other=''
  case " $* " in
    *" --fast "*) ;; # no test of MindFormers is among the fast ones
    *)
      export MINDFORMERS_PYTHON
      prepare_venv mindformers .venv-mindformers &
      other=$!
      ;;
  esac
  prepare_venv test || status=$?
  [ -z "$other" ] || wait "$other" || status=$?
  return $status
}

part installation install "$@"
echo "== lint and format"
part lint "$VENV_PYTHON" -m ruff check .
part format "$VENV_PYTHON" -m ruff format --check .
echo "== types"
part types "$VENV_PYTHON" scripts/check_types.py
echo "== tests"
part tests "$VENV_PYTHON" -m pytest "${PYTEST_AT_ONCE[@]}" --durations=20 --durations-min=1 "$@"
finish 0
