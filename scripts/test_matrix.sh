#!/usr/bin/env bash
# Fast tests on each MindSpore and Python that setup.py allows; each pair in an environment of its own.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FOLDER=.venv-matrix
MINDSPORES="2.7.2 2.9.0 2.10.0" PYTHONS="3.10 3.11 3.12" MINUTES=30
MINDFORMERS='' REMOVE=''

usage() {
  cat <<'HELP'
usage: bash scripts/test_matrix.sh [--mindspore VERSIONS] [--python VERSIONS] [--mindformers]
                                   [--minutes N] [--remove] [PYTEST OPTIONS]

For every MindSpore and every Python asked for: makes .venv-matrix/VERSIONS with mixtral-ms[test] and
runs pytest --fast in it, or pytest with the options given. Ends with a table, and with status 1 when
a pair failed or its Python is not there. Logs are beside the environments.

  --mindspore VERSIONS  "2.7.2 2.9.0 2.10.0" unless given
  --python VERSIONS     "3.10 3.11 3.12" unless given; each is PYTHON310 (PYTHON311 ...) when that
                        variable names one, else python3.10 of the PATH
  --mindformers         tests/integrations, with the MindFormers that belongs to the MindSpore: 1.8
                        to 2.7 and 1.9 to 2.9
  --minutes N           ends the tests of a pair after so long (30)
  --remove              removes each environment (4 GB) after its tests

  bash scripts/test_matrix.sh
  bash scripts/test_matrix.sh --mindspore 2.9.0 --python "3.11 3.12" tests/unit/kernels
  PYTHON310=~/.pyenv/versions/3.10.13/bin/python bash scripts/test_matrix.sh --python 3.10
HELP
}

while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --mindformers) MINDFORMERS=yes ;;
    --remove) REMOVE=yes ;;
    --mindspore | --python | --minutes)
      [ $# -gt 1 ] || {
        echo "error: $1 needs a value; --help shows an example" >&2
        exit 2
      }
      case $1 in
        --mindspore) MINDSPORES=$2 ;;
        --python) PYTHONS=$2 ;;
        --minutes) MINUTES=$2 ;;
      esac
      shift
      ;;
    *) break ;;
  esac
  shift
done
if [ $# -eq 0 ]; then
  set -- --fast
  [ -z "$MINDFORMERS" ] || set -- tests/integrations
fi

source "$ROOT/scripts/venv.sh"
cd "$ROOT"
mkdir -p "$FOLDER"

# The Python of a version, or nothing.
python_of() {
  local variable="PYTHON${1//./}" candidate
  for candidate in "${!variable:-}" "python$1"; do
    [ -n "$candidate" ] || continue
    if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = \
      "$1" ]; then
      echo "$candidate"
      return
    fi
  done
}

# What the tests of a pair came to; makes its environment first.
run_pair() {
  local mindspore=$1 version=$2 name="mindspore-$1-python-$2"
  shift 2
  local log="$FOLDER/$name.log"
  PYTHON=$(python_of "$version")
  if [ -z "$PYTHON" ]; then
    result="no Python $version: neither PYTHON${version//./} nor the PATH has it"
    return 1
  fi
  if ! prepare_venv test "$FOLDER/$name" "$mindspore" >"$log" 2>&1; then
    result="not installed: $(tail -1 "$log")"
    return 1
  fi
  if [ -n "$MINDFORMERS" ]; then
    if ! prepare_venv mindformers "$FOLDER/$name-mindformers" "$mindspore" >>"$log" 2>&1; then
      result="MindFormers is not installed: $(tail -1 "$log")"
      return 1
    fi
    export MINDFORMERS_PYTHON="$ROOT/$FOLDER/$name-mindformers/bin/python"
  else
    unset MINDFORMERS_PYTHON
  fi
  local status=0
  timeout "$((MINUTES * 60))" "$FOLDER/$name/bin/python" -m pytest \
    "${PYTEST_AT_ONCE[@]}" "$@" >>"$log" 2>&1 || status=$?
  result=$(tail -1 "$log" | tr -d '=')
  [ $status -ne 124 ] || result="not done after $MINUTES minutes"
  [ -z "$REMOVE" ] || rm -r "${FOLDER:?}/$name" "$FOLDER/$name-mindformers" 2>/dev/null || true
  return $status
}

rows=() failed=0
for mindspore in $MINDSPORES; do
  for version in $PYTHONS; do
    echo "== MindSpore $mindspore on Python $version: $FOLDER/mindspore-$mindspore-python-$version.log"
    verdict=passed
    run_pair "$mindspore" "$version" "$@" || verdict=FAILED failed=1
    rows+=("$(printf '%-10s %-7s %-7s %s' "$mindspore" "$version" "$verdict" "$result")")
    echo "   $verdict: $result"
  done
done
echo
printf '%-10s %-7s %-7s %s\n' MindSpore Python result detail
printf '%s\n' "${rows[@]}"
exit "$failed"
