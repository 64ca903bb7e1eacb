#!/usr/bin/env bash
# Starts the processes of a distributed run on this machine and watches them. See --help.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

WORKER_NUM=8
LOCAL_WORKER=8
MASTER_ADDR=127.0.0.1
MASTER_PORT=8118
NODE_RANK=0
LOG_DIR=output/msrun_log
JOIN=False
CLUSTER_TIME_OUT=7200

usage() {
  cat <<'HELP'
usage, with 1, 2, 6 or 9 arguments:
  bash scripts/msrun_launcher.sh EXECUTE_ORDER
  bash scripts/msrun_launcher.sh EXECUTE_ORDER WORKER_NUM
  bash scripts/msrun_launcher.sh EXECUTE_ORDER WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
  bash scripts/msrun_launcher.sh EXECUTE_ORDER WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT \
      NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT

Starts WORKER_NUM processes of a Python program, LOCAL_WORKER of them on this machine, shows the
first one's output and watches all of them. When one fails, its last lines are shown, the others
are ended and its exit status is returned. Ctrl-C and SIGTERM end all.

  EXECUTE_ORDER     the program and its arguments, in one string, quoted as in a shell:
                    "run_mindformer.py --config a.yaml --predict_data \"I love Beijing, because\""
  WORKER_NUM        processes on all machines together (default: 8)
  LOCAL_WORKER      processes on this machine (default: WORKER_NUM)
  MASTER_ADDR       address of the machine with NODE_RANK 0 (default: 127.0.0.1)
  MASTER_PORT       a free port of that machine (default: 8118)
  NODE_RANK         0 on the machine of MASTER_ADDR, 1, 2, … on the others (default: 0)
  LOG_DIR           worker_RANK.log and scheduler.log go here (default: output/msrun_log)
  JOIN              True shows every process's output, False the first one's (default: False)
  CLUSTER_TIME_OUT  seconds to wait until all processes have met (default: 7200)

environment:
  PYTHON              the interpreter (default: .venv of this project, then python3 on the PATH)
  MF_LOG_SUFFIX       is appended, after a _, to LOG_DIR
  PLOG_REDICT_TO_OUTPUT  True puts Ascend's own logs under output/plog
  GLOG_v              what MindSpore logs: 3 errors, 2 warnings, 1 everything (default: 3)
  MSRUN_TIME_LIMIT    end the run with status 124 after so many seconds (default: none)
  MSRUN_GRACE         seconds between SIGTERM and SIGKILL when the run is ended (default: 30)
  MSRUN_BIND_CORE     True gives each process an equal share of this machine's cores to itself
                      (default: False)
  HCCL_CONNECT_TIMEOUT, HCCL_EXEC_TIMEOUT
                      seconds that Ascend's ranks wait for one another, to connect and in a
                      collective (default: 7200 each; HCCL's own would be 120 and about 1800)

examples:
  bash scripts/msrun_launcher.sh "run_mindformer.py --config a.yaml --use_parallel True" 4
  on two machines of 8 devices, the first of them 192.168.1.1; the second has NODE_RANK 1:
  bash scripts/msrun_launcher.sh "run_mindformer.py --config a.yaml --use_parallel True" \
      16 8 192.168.1.1 8118 0 output/msrun_log False 300
HELP
}

die() {
  echo "error: $*" >&2
  exit 2
}

if [ "${1:-}" = "--help" ] || [ "${1:-}" = "-h" ]; then
  usage
  exit
fi
case $# in
  1) ;;
  2) WORKER_NUM=$2 LOCAL_WORKER=$2 ;;
  6) WORKER_NUM=$2 LOCAL_WORKER=$2 MASTER_PORT=$3 LOG_DIR=$4 JOIN=$5 CLUSTER_TIME_OUT=$6 ;;
  9)
    WORKER_NUM=$2 LOCAL_WORKER=$3 MASTER_ADDR=$4 MASTER_PORT=$5
    NODE_RANK=$6 LOG_DIR=$7 JOIN=$8 CLUSTER_TIME_OUT=$9
    ;;
  *)
    echo "error: $# arguments given; there must be 1, 2, 6 or 9" >&2
    usage >&2
    exit 2
    ;;
esac

# The words of the order as the shell itself reads them; ; | & < > ( ) outside quotes are refused.
ORDER=()
if ! eval "ORDER=($1"$'\n'")" 2>/dev/null || [ ${#ORDER[@]} -eq 0 ]; then
  die "EXECUTE_ORDER must be one command, with quotes in pairs and | & ; < > ( ) inside quotes," \
    "but is: $1"
fi

python=""
for candidate in "${PYTHON:-}" "$ROOT/.venv/bin/python" python3 python; do
  [ -n "$candidate" ] && python=$(command -v "$candidate") && break
done
[ -n "$python" ] || die "no Python: make .venv with 'bash scripts/test.sh', or set PYTHON"

suffix=${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export LOG_MF_PATH="$PWD/output/log$suffix"
if [ "${PLOG_REDICT_TO_OUTPUT:-False}" != False ]; then
  export ASCEND_PROCESS_LOG_PATH="$PWD/output/plog$suffix"
fi
ulimit -u unlimited 2>/dev/null || true # many threads a process; not every user may raise it

exec "$python" -m mixtral_ms.cli.commands.launch "$WORKER_NUM" "$LOCAL_WORKER" "$MASTER_ADDR" \
  "$MASTER_PORT" "$NODE_RANK" "$LOG_DIR$suffix" "$JOIN" "$CLUSTER_TIME_OUT" "${ORDER[@]}"
