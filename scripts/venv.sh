# shellcheck shell=bash disable=SC2034 # the scripts that source it use its variables
# Sourced by the other scripts: makes the project's .venv and installs the package into it.
# Nothing outside it changes. Needs the variable ROOT, the project's folder.

# The version that everything is tested with; scripts/test_matrix.sh tries the others.
TESTED_MINDSPORE=2.7.2
VENV_PYTHON="$ROOT/.venv/bin/python"
# MindFormers pins other versions than the tests need, and so has an environment of its own.
MINDFORMERS_PYTHON="$ROOT/.venv-mindformers/bin/python"

# A Python that can make the environment: 3.11 is the tested one, the others are tried in turn.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.10 python3.12 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 or newer on the PATH; install Python 3.11 (the tested version)," \
    "or name one: PYTHON=/path/to/python3.11 bash $0" >&2
  return 2
}

# prepare_venv EXTRA [FOLDER [MINDSPORE]]: FOLDER (.venv) with mixtral-ms[EXTRA] and that version of
# MindSpore (the tested one); does nothing when it is up to date.
prepare_venv() {
  local extra=$1 folder="$ROOT/${2:-.venv}" mindspore=${3:-$TESTED_MINDSPORE} python stamp wanted
  stamp="$folder/installed-$extra"
  if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || return
    echo "== making $folder with $("$python" --version)"
    if ! "$python" -m venv "$folder"; then
      echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
      return 1
    fi
  fi
  wanted="mindspore $mindspore $(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "== $folder is up to date"
    return
  fi
  echo "== installing mixtral-ms[$extra] and MindSpore $mindspore into $folder: a few minutes, once"
  # pip before 23.1, which Python 3.10 brings, builds old packages (fschat leads to one) in a way
  # that fails by now, unless told otherwise. Most files are never imported: Python compiles those
  # that are, when they are.
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --use-pep517 --no-compile \
    -e "${ROOT}[$extra]" "mindspore==$mindspore" || return
  echo "$wanted" >"$stamp"
}

# Options of pytest for all tests: as many files at once as there are processors, at most four, for
# each takes some 3 GB. Tests that share what they make stay together: tests/conftest.py says which.
PROCESSORS=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PYTEST_AT_ONCE=(-n "$((PROCESSORS > 4 ? 4 : PROCESSORS))" --dist loadgroup)
