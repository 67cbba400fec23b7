#!/usr/bin/env bash
# Starts the API, waits until it is healthy, asks it one question with curl, and stops it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
url=http://127.0.0.1:${PORT:=7860}
DRAIN_SECONDS=0 python -m uvicorn inference.app:app --port "$PORT" --log-level warning &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
health=
for _ in $(seq 120); do
  kill -0 $server 2>/dev/null || exit 1  # it has said why; what answers there is another server
  sleep 0.5
  if health=$(curl -fsS "$url/health" 2>/dev/null); then break; fi
done
[ -n "$health" ] || { echo "error: the API was not healthy within a minute" >&2; exit 1; }
printf '$ curl %s/health\n%s\n' "$url" "$health"
question='{"text": "Shares rose after the bank raised its forecast"}'
printf "\$ curl %s/predict -H 'Content-Type: application/json' -d '%s'\n" "$url" "$question"
curl -fsS "$url/predict" -H 'Content-Type: application/json' -d "$question"
printf '\nto keep it running: make serve\n'
