#!/usr/bin/env bash
# One host's part of a run on several, started by MindSpore's own msrun. On each host:
#   MASTER_ADDR=192.168.1.1 HOSTS=2 bash scripts/cluster/msrun_hosts.sh NODE_RANK PROGRAM [ARGUMENTS]
# with NODE_RANK 0 on the host of MASTER_ADDR and 1, 2, … on the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ $# -lt 2 ]; then
  sed -n '2,4s/^# //p' "scripts/cluster/msrun_hosts.sh" >&2
  exit 2
fi
NODE_RANK=$1
shift
: "${MASTER_ADDR:?address of the host with NODE_RANK 0}" "${HOSTS:?how many hosts there are}"
DEVICES=${DEVICES:-8} # processes on each host

# HCCL's own 120 s and half an hour are less than a slow start may take.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-7200}
export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-7200}

exec msrun --worker_num=$((HOSTS * DEVICES)) --local_worker_num="$DEVICES" \
  --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-8118}" --node_rank="$NODE_RANK" \
  --log_dir="${LOG_DIR:-output/msrun_log}" --join=True --cluster_time_out=7200 \
  --bind_core="${BIND_CORE:-True}" "$@"
