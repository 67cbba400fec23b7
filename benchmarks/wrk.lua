-- What bench_inference.py has wrk do: wrk ... -s wrk.lua URL -- BODIES [RATE WARM_UP]
-- BODIES has a JSON body a line, sent in turn. With RATE requests go out at that pace, whatever
-- comes back, as long as a connection is free. Prints the figures as one line of JSON.

local ffi = require("ffi")
ffi.cdef("typedef struct { long s, us; } timeval; int gettimeofday(timeval *, void *);")
local timeval = ffi.new("timeval")
local requests, nr, threads = {}, 0, {}
sent, statuses = 0, {} -- global: done() runs in another Lua state, and asks for them by name

local function now()
  ffi.C.gettimeofday(timeval, nil)
  return tonumber(timeval.s) + tonumber(timeval.us) / 1e6
end

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local headers = {["Content-Type"] = "application/json"}
  for body in io.lines(args[1]) do
    table.insert(requests, wrk.format("POST", nil, headers, body))
  end
  pace = args[2] and 1 / tonumber(args[2])
  due = now()
  begin = due + tonumber(args[3] or 0)
end

function request()
  nr = nr + 1
  if now() > begin then sent = sent + 1 end
  return requests[nr % #requests + 1]
end

function response(status)
  if now() > begin then statuses[status] = (statuses[status] or 0) + 1 end
end

function delay() -- milliseconds until the connection that is free may send
  if not pace then return 0 end
  due = due + pace
  return math.max(0, (due - now()) * 1000)
end

function done(summary, latency)
  local thread, counts = threads[1], {}
  for status, count in pairs(thread:get("statuses")) do
    table.insert(counts, string.format('"%d": %d', status, count))
  end
  print(string.format(
    '{"seconds": %f, "sent": %d, "statuses": {%s}, "p50_ms": %f, "p99_ms": %f, "broken": %d}',
    summary.duration / 1e6, thread:get("sent"), table.concat(counts, ", "),
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
