#!/usr/bin/env bash
# DDP training: starts torchrun, which starts one copy of train_ddp.py per GPU. Each copy (a rank)
# finds its place in the environment that torchrun sets: WORLD_SIZE (the number of ranks), RANK (its
# own number, from 0), LOCAL_RANK (its number on this host, which picks its GPU), MASTER_ADDR and
# MASTER_PORT (where the ranks meet). All flags go to train_ddp.py; --help lists them.
#
#   bash training/run_ddp.sh                       one process per GPU, or two on the CPU
#   NPROC_PER_NODE=3 bash training/run_ddp.sh      three processes
#   MAX_RESTARTS=3 bash training/run_ddp.sh        resume from last.pt when a rank is killed
#   TIMEOUT=60 bash training/run_ddp.sh            fail when a rank keeps the others waiting, seconds
#   PYTHON=python3.12 bash training/run_ddp.sh     this interpreter
#
# On each of two hosts (the second with NODE_RANK=1), with the address of the first:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash training/run_ddp.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh run_ddp.sh
set -euo pipefail
trap 'exit 130' INT  # else bash continues after a Ctrl-C that a command in this script handled
here=$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")  # it may be a link
here=$(CDPATH='' cd "$(dirname "$here")" && pwd)

fail() { echo "error: $1" >&2 && exit 2; }

check() {  # NAME VALUE LOWEST HIGHEST
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
    fail "$1=$2: expected a whole number from $3 to $4"
  fi
}

candidates=(python python3 "$here/../.venv/bin/python")  # .venv: `make` created it, not activated
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
needs='import importlib.util as u; [u.find_spec(name).name for name in ("torch", "transformers")]'
for python in "${candidates[@]}" ''; do
  "$python" -c "$needs" &>/dev/null && break
done
[ -n "$python" ] || fail "no torch and transformers in ${candidates[*]}: activate their environment, \
or set PYTHON"

nproc=${NPROC_PER_NODE:-2} nnodes=${NNODES:-1} restarts=${MAX_RESTARTS:-0}
if [ -z "${NPROC_PER_NODE:-}" ] &&  # torch takes seconds to say that there is no GPU
    { command -v nvidia-smi || compgen -G '/dev/nvidia[0-9]*' || [ -e /dev/kfd ]; } >/dev/null; then
  nproc=$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
export TIMEOUT=${TIMEOUT:-600}
check NPROC_PER_NODE "$nproc" 1 1024
check NNODES "$nnodes" 1 1024
check MAX_RESTARTS "$restarts" 0 1000
check TIMEOUT "$TIMEOUT" 1 86400
if [ "$nnodes" = 1 ]; then
  rendezvous=(--standalone --nnodes 1)  # on a free port: several runs on one host do not collide
  # gloo looks up the host's own name, which can fail or hang on a laptop without a network
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$([ "$(uname)" = Darwin ] && echo lo0 || echo lo)}
else
  check NODE_RANK "${NODE_RANK:-}" 0 $((nnodes - 1))
  check MASTER_PORT "${MASTER_PORT:=29500}" 1 65535
  [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR is not set: expected the address of the first host"
  # restarted ranks would find the addresses of the dead ones in the store that the hosts share
  [ "$restarts" = 0 ] || fail "MAX_RESTARTS=$restarts: expected 0 with NNODES=$nnodes; to resume, \
start the same command again on every host"
  # the static rendezvous, because it numbers the hosts by NODE_RANK: rank 0 is on the first
  rendezvous=(--nnodes "$nnodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT" --rdzv-conf "timeout=$TIMEOUT")
fi

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarted ranks meet in a new, empty store
block="env --block-signal=INT"  # Python's own start would answer Ctrl-C with a traceback
$block true 2>/dev/null || block=env  # as on macOS
trap - INT  # else a Ctrl-C during exec would be lost
unset PYTHONSAFEPATH  # it hides what lies beside a script
# through sh: env would take a path with a = in it for a variable
exec $block sh -c 'exec "$@"' sh "$python" "$here/torchrun.py" "${rendezvous[@]}" \
  --nproc-per-node "$nproc" --max-restarts "$restarts" "$here/train_ddp.py" "$@"
