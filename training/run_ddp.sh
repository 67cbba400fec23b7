#!/usr/bin/env bash
# DDP training through torchrun; every flag goes to train_ddp.py (--help lists them).
#
#   bash training/run_ddp.sh                          one process per GPU, or two on a CPU
#   NPROC_PER_NODE=3 bash training/run_ddp.sh         that many
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash training/run_ddp.sh    on each of two hosts
#   TIMEOUT=60 bash training/run_ddp.sh               end when a rank keeps the others waiting, s
#   MAX_RESTARTS=3 bash training/run_ddp.sh           go on from last.pt when a rank is killed
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
nproc=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}

# torchrun gives each process one thread, which leaves cores idle on a CPU
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
if [ "${NNODES:-1}" = 1 ]; then
  meet=(--standalone)  # a free port, so that two runs on one host do not collide
  # gloo would look up the host's own name, which on a laptop without network can fail or hang
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$([ "$(uname)" = Darwin ] && echo lo0 || echo lo)}
else
  # the first host keeps the store, at an address that need not be what its own name resolves to
  TIMEOUT=${TIMEOUT:-600}
  first=$([ "${NODE_RANK:?is 0 on the first host, 1 on the next}" = 0 ] && echo 1 || echo 0)
  meet=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
    --rdzv-backend c10d --rdzv-id distrinews
    --rdzv-conf "is_host=$first,read_timeout=$((TIMEOUT < 60 ? TIMEOUT : 60))"
    --rdzv-endpoint "${MASTER_ADDR:?is the address of the first host}:${MASTER_PORT:-29500}")
  if [ "$first" = 1 ]; then meet+=(--local-addr "$MASTER_ADDR"); fi
fi
exec python "$here/launch.py" "${meet[@]}" --nproc-per-node "$nproc" \
  --max-restarts "${MAX_RESTARTS:-0}" "$here/train_ddp.py" "$@"
