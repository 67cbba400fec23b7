"""Traces of a real two-rank run: pytest tests/test_profiler.py"""

import json

import pytest
from ranks import ROOT, run_ranks

import profiler
from benchmarks import timeline

SCRIPT = ROOT / "training" / "train_ddp.py"


@pytest.fixture(scope="module")
def traces(flags, tmp_path_factory):
    """Two ranks, two micro-batches a step."""
    folder = tmp_path_factory.mktemp("profile")
    run = flags(folder / "c", "--micro-batch-size", 2, "--max-steps", 15)
    ranks = run_ranks(2, [SCRIPT, *run, "--profile", folder / "traces"], folder)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].stderr
    return [json.loads((folder / "traces" / f"rank{rank}.json").read_text()) for rank in range(2)]


def ranges(trace, track):
    found = [e for e in trace["traceEvents"] if e.get("cat") == "distrinews" and e["tid"] == track]
    return sorted(found, key=lambda event: event["ts"])


def end(event):
    return event["ts"] + event["dur"]


def test_three_steps_have_every_named_range_in_order(traces):
    micro_batch = ["data", "forward", "backward"]
    for trace in traces:
        names = [event["name"] for event in ranges(trace, "compute")]
        assert names == 3 * [*micro_batch, *micro_batch, "clip", "optimizer"]


def test_a_trace_shows_every_bucket_in_the_last_backward_alone(traces):
    for trace in traces:
        backwards = [e for e in ranges(trace, "compute") if e["name"] == "backward"]
        sent = [e for e in ranges(trace, "communication") if e["name"].startswith("bucket ")]
        for first, last in zip(backwards[::2], backwards[1::2], strict=True):
            inside = [e for e in sent if last["ts"] < e["ts"] < end(last)]
            assert inside and not [e for e in sent if first["ts"] < e["ts"] < end(first)]
            numbers = [int(e["name"].split(":")[0].removeprefix("bucket ")) for e in inside]
            assert numbers == list(range(len(inside)))


def test_the_timeline_takes_one_step_of_each_rank_on_one_clock(traces):
    rows = timeline.step_rows(traces)
    steps = [row for row in rows if row["lane"] == "step"]
    assert [row["rank"] for row in steps] == [0, 1] and min(r["start_ms"] for r in steps) == 0
    for step in steps:
        own = [row for row in rows if row["rank"] == step["rank"] and row["lane"] == "compute"]
        assert [row["name"] for row in own].count("optimizer") == 1
        last = max(row["start_ms"] + row["ms"] for row in own)
        assert last <= step["start_ms"] + step["ms"] + 0.001
    for sent in (row for row in rows if row["lane"] == "communication"):
        exposed = [
            r
            for r in rows
            if r["lane"] == "exposed" and r["rank"] == sent["rank"] and r["name"] == sent["name"]
        ]
        assert sum(row["ms"] for row in exposed) <= sent["ms"] + 0.001


def test_on_a_gpu_a_bucket_belongs_to_the_backward_that_launched_it():
    def event(name, ts, dur, **more):
        return {"ph": "X", "name": name, "ts": ts, "dur": dur} | more

    kernel = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    events = [
        event("torch/_tensor.py(1): backward", 0, 10),
        event("x/clip_grad.py(1): clip_grad_norm_", 10, 2),
    ]
    for number in range(2):  # they run when the CPU is at the clipping already, or beyond
        same = {"args": {"correlation": number}}
        events.append(event("cudaLaunchKernelExC", 5 + number, 1, cat="cuda_runtime", **same))
        events.append(event(kernel, 11 + 9 * number, 8, cat="kernel", **same))
    names = [e["name"] for e in profiler.named_ranges(events, 0) if e["tid"] == "communication"]
    assert names == ["bucket 0: AllReduce", "bucket 1: AllReduce"]


def test_what_lies_outside_of_computation():
    work = timeline.union([(0, 10), (5, 20), (20.1, 30), (50, 60)], gap=1)
    assert work == [(0, 30), (50, 60)]
    assert timeline.outside(work, 25, 70) == [(30, 50), (60, 70)]
    assert timeline.outside(work, 35, 55) == [(35, 50)]
    assert timeline.outside(work, 5, 25) == []


@pytest.mark.parametrize(
    "more, said",
    [
        (["--max-steps", 12], "--profile records 3 steps after 10, and this run has 12"),
        (["--profile", "/dev/null/x"], "cannot write to /dev/null/x: Not a directory"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(flags, tmp_path, more, said):
    unfinished = tmp_path / "c" / "last.pt"
    unfinished.parent.mkdir()
    unfinished.touch()
    run = flags(tmp_path / "c", "--fresh", "--profile", tmp_path / "traces", *more)
    ranks = run_ranks(2, [SCRIPT, *run], tmp_path)
    assert all(rank.status for rank in ranks) and unfinished.exists()
    assert said in ranks[0].stderr and "Traceback" not in ranks[0].stderr


def test_a_run_that_resumes_near_its_end_goes_on_without_a_trace(tmp_path, capsys):
    profiler.start(tmp_path / "traces", None, 12)
    assert capsys.readouterr().out.startswith("no trace: 12 steps are left")


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    class Profile:
        def export_chrome_trace(self, path):
            open(path, "w").write('{"traceEvents": [')  # a full disk

    profiler.write_trace(tmp_path / "rank0.json", Profile())
    assert capsys.readouterr().err.startswith("warning: cannot write ")
