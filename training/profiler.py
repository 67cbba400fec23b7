"""What a rank does in a step, and when: `--profile DIR` writes one trace per rank.

DIR/rank0.json and so on are in the format of https://ui.perfetto.dev, three steps after ten. Beside
torch's own events they have two tracks of named ranges: "compute" (data, forward, backward, clip,
optimizer) and "communication" (the all-reduce of each bucket; at the start of a step that of the
last step's metrics). On a GPU the compute ranges show when the CPU launched the work; the
communication ranges are the kernels of NCCL.
"""

import json
import os
import re
import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist

from errors import print0
from utils import UsageError

WAIT, STEPS = 10, 3
COMPUTE = {
    "data": r"enumerate\(DataLoader\).*",
    "forward": r"DistributedDataParallel\.forward",
    "backward": r".*torch/_tensor\.py\(\d+\): backward",
    "clip": r".*clip_grad\.py\(\d+\): clip_grad_norm_",
    "optimizer": r"Optimizer\.step#.*",
}
LAUNCHES = ("cuda_runtime", "cuda_driver")  # categories of events in which the CPU starts a kernel
COLLECTIVE = r"gloo:(\w+)|ncclDevKernel_([A-Za-z]+)"


def check_steps(folder: Path | None, steps: int) -> None:
    if folder and steps < WAIT + STEPS:
        raise UsageError(
            f"--profile records {STEPS} steps after {WAIT}, and this run has {steps}; use more "
            "--epochs or --max-steps"
        )


def start(folder: Path | None, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Profiles STEPS steps after the first WAIT of the `steps` to come; nothing without a folder.

    The optimizer tells when a step has ended, so the training loop needs no line for this.
    """
    if folder is None:
        return
    if steps < WAIT + STEPS:  # of a run that resumes
        return print0(f"no trace: {steps} steps are left, and {WAIT + STEPS} are needed")
    path = folder / f"rank{dist.get_rank()}.json"
    folder.mkdir(parents=True, exist_ok=True)  # on hosts other than rank 0's
    profile = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=WAIT - 1, warmup=1, active=STEPS, repeat=1),
        on_trace_ready=partial(write_trace, path),
        with_stack=True,  # where backward and clipping begin and end
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would log each start and stop
    profile.start()
    optimizer.register_step_post_hook(lambda *_: profile.step())


def write_trace(path: Path, profile: torch.profiler.profile) -> None:
    try:
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
        trace["traceEvents"] += named_ranges(trace["traceEvents"], dist.get_rank())
        path.write_text(json.dumps(trace))
    except (OSError, RuntimeError, ValueError) as error:  # a full disk, which torch may not report
        return print(f"warning: cannot write {path}: {error}", file=sys.stderr)  # on any rank
    print0(f"wrote {path}, and one per rank: open one at https://ui.perfetto.dev")


def named_ranges(events: list[dict], rank: int) -> list[dict]:
    """The events of the two tracks, from those that torch.profiler recorded."""
    spans = sorted((e for e in events if e.get("ph") == "X"), key=lambda event: event["ts"])
    compute, communication = [], []
    # A GPU runs behind the CPU: to which backward a kernel of NCCL belongs, its launch tells.
    launches = {correlation(e): e["ts"] for e in spans if e.get("cat") in LAUNCHES}
    steps = [e["ts"] + e["dur"] for e in spans if e["name"].startswith("ProfilerStep#")]
    for event in spans:
        if event["name"].startswith("Optimizer.step"):  # without our hook, which ends the step
            ends = [end for end in steps if event["ts"] < end < event["ts"] + event["dur"]]
            event = event | {"dur": ends[0] - event["ts"]} if ends else event
        name = next((n for n, regex in COMPUTE.items() if re.fullmatch(regex, event["name"])), None)
        if name and event.get("cat") != "gpu_user_annotation":
            compute.append(range_of(event, name, f"rank {rank}", "compute"))
        elif collective := re.match(COLLECTIVE, event["name"]):
            name = collective[1] or collective[2]
            launched = launches.get(correlation(event), event["ts"])
            communication.append((launched, range_of(event, name, f"rank {rank}", "communication")))
    # What is sent between the start of a backward and the next clipping are buckets, in order. With
    # sparse embeddings one bucket takes several collectives, so there only they are counted.
    communication.sort(key=itemgetter(0))
    sparse = any("gather" in event["name"].lower() for _, event in communication)
    starts = [event for event in compute if event["name"] in ("backward", "clip")]
    number, phase = 0, 0
    for launched, event in communication:
        before = [start for start in starts if start["ts"] <= launched]
        number, phase = (0 if len(before) != phase else number + 1), len(before)
        if before and before[-1]["name"] == "backward":
            event["name"] = f"{'collective' if sparse else 'bucket'} {number}: {event['name']}"
    return compute + [event for _, event in communication]


def correlation(event: dict) -> int | None:
    """What a kernel on a GPU and its launch on the CPU have in common."""
    return event.get("args", {}).get("correlation")


def range_of(event: dict, name: str, process: str, track: str) -> dict:
    fixed = {"ph": "X", "cat": "distrinews", "name": name, "pid": process, "tid": track}
    return fixed | {"ts": event["ts"], "dur": event["dur"]}
