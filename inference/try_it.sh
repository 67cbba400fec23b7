#!/usr/bin/env bash
# Starts the API, waits until it is healthy, asks it one question with curl, and stops it.
# PORT: the port to use; a free one without it, or where another program has it.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ${PORT:=0} =~ ^[0-9]{1,5}$ ]] && ((10#$PORT < 65536)) ||
  { echo "error: PORT=$PORT: expected a number, at most 65535" >&2; exit 1; }
command -v curl >/dev/null || { echo "error: curl is needed" >&2; exit 1; }
free='import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", int(sys.argv[1], 10)))
    print(probe.getsockname()[1])'
port=$(python -c "$free" "$PORT" 2>/dev/null) ||
  { port=$(python -c "$free" 0); echo "port $PORT cannot be used; using $port"; }
url=http://127.0.0.1:$port
python -m uvicorn inference.app:app --host 127.0.0.1 --port "$port" --http h11 --log-level warning &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
health=
for _ in $(seq 120); do
  kill -0 $server 2>/dev/null || exit 1  # it has said why
  sleep 0.5
  if health=$(curl -fsS --noproxy '*' "$url/health" 2>/dev/null); then break; fi
done
[ -n "$health" ] || { echo "error: the API was not healthy within a minute" >&2; exit 1; }
checkpoint=${CHECKPOINT_DIR:-checkpoints}/distilbert_agnews.pt
digits='import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest()[:12])'
if [ -e "$checkpoint" ] && ! grep -q "$(python -c "$digits" "$checkpoint")" <<<"$health"; then
  echo "error: another server answers at $url: $health" >&2; exit 1
fi
printf '$ curl %s/health\n%s\n' "$url" "$health"
question='{"text": "Shares rose after the bank raised its forecast"}'
printf "\$ curl %s/predict -H 'Content-Type: application/json' -d '%s'\n" "$url" "$question"
curl -fsS --noproxy '*' "$url/predict" -H 'Content-Type: application/json' -d "$question"
printf '\nto keep it running: make serve\n'
