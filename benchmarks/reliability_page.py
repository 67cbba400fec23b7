"""docs/reliability.md from the records of tests/faults; see report.py."""

from collections import Counter

from benchmarks.speed import read
from benchmarks.training_pages import table


def reliability_page() -> str:
    kill, corrupt, serve = (read(f"faults_{name}") for name in ("kill", "corrupt", "serve"))
    load, overload, hostile, down = (
        serve[name] for name in ("load", "overload", "hostile", "going_down")
    )
    page = [
        "# What happens when things go wrong", "",
        "Written by `make report` from what `make faults` measured: "
        + "; ".join(f"`{one['command']}` on {one['host']}" for one in (kill, corrupt, serve))
        + ". Every fault is a real one, on real processes and files.", "",
        "## Training: killed, and resumed", "",
        f"A training of two processes and {kill['steps']} steps that saves every third step; "
        "SIGKILL to a rank or to torchrun at a random moment, or in the middle of a save. When a "
        "rank is killed torchrun restarts all ranks (`MAX_RESTARTS`); when torchrun is killed its "
        "ranks save and end, and the same command is given again.", "",
    ]  # fmt: skip
    names = {"0": "rank 0", "1": "rank 1", "torchrun": "torchrun"}
    groups = {}
    for one in kill["kills"]:
        moment = "in mid-save" if one["saving"] else "between saves"
        groups.setdefault((names.get(one["victim"], one["victim"]), moment), []).append(one)
    rows = [
        [victim, moment, str(len(kills)), share(kills, lambda k: k["status"] == 0),
         share(kills, lambda k: k.get("equal")), share(kills, lambda k: not k["left_behind"])]
        for (victim, moment), kills in sorted(groups.items())
    ]  # fmt: skip
    everyone = kill["kills"]
    rows.append(["all", "", str(len(everyone)), share(everyone, lambda k: k["status"] == 0),
                 share(everyone, lambda k: k.get("equal")),
                 share(everyone, lambda k: not k["left_behind"])])  # fmt: skip
    page += table(["killed", "when", "times", "ended by itself or by the same command",
                   "same bits as undisturbed", "no process or file left"], rows)  # fmt: skip

    page += [
        "## Checkpoints that lie", "",
        "A checkpoint is a zip file with a checksum for each tensor, which is compared before the "
        "file is read. Corrupted in these ways, each `last.pt` was refused with one line, and the "
        "save before it was used; each `distilbert_agnews.pt` was "
        "refused with one line. No code in a file ran.", "",
    ]  # fmt: skip
    ways = {"truncated": "truncated", "flipped": "bits flipped", "zeroed": "4 KiB of zeros",
            "swapped": "the other checkpoint in its place", "older": "an older version's keys",
            "code": "a pickle that wants to run code"}  # fmt: skip
    counts = Counter((one["way"], one["file"]) for one in corrupt["files"])
    refused = Counter((one["way"], one["file"]) for one in corrupt["files"] if one["refused"]
                      and not one["code_ran"] and one.get("fell_back", True))  # fmt: skip
    page += table(["how", "last.pt refused", "distilbert_agnews.pt refused"], [
        [name, *(f"{refused[way, file]} of {counts[way, file]}"
                 for file in ("last.pt", "distilbert_agnews.pt"))]
        for way, name in ways.items()
    ])  # fmt: skip
    page += [
        "A disk that fills, turns read-only or forbids writing leaves the old checkpoint whole: "
        "`tests/test_bad_input.py`. When a rank raises, runs out of memory, computes NaN, hangs or "
        "is killed, all ranks end, with the first cause last: `tests/test_faulty_rank.py`. When a "
        "network partition separates two hosts, both sides end: `tests/test_two_hosts.py`.", "",
        "## Serving", "",
        f"The {serve['model']} backbone, {serve['engine']} engine, texts of {serve['texts']}; "
        "callers share its cores.", "",
    ]  # fmt: skip
    grown = load["at_the_end_mb"] / load["after_1000_mb"] - 1
    page += table(["fault", "figure"], [
        [f"{load['requests']:,} requests from 32 callers",
         f"statuses {counted(load['statuses'])}; {load['wrong_count']} answers that were another "
         f"text's; each answered once: {load['answered_once']:,}"],
        ["memory, after the first thousand and at the end",
         f"{load['after_1000_mb']:.0f} and {load['at_the_end_mb']:.0f} MiB ({100 * grown:+.1f} %)"],
        [f"ten times too many for {overload['seconds']:.0f} s",
         f"statuses {counted(overload['statuses'])}; `/health` p99 "
         f"{overload['health_p99_ms']:.0f} ms"],
        ["200s a second before, during, and in the first second after, begun with no request "
         "under way",
         f"{overload['best_per_second']:.0f}, {overload['ok_per_second']:.0f}, "
         f"{overload['first_second_after']:.0f}"],
        [f"{hostile['idle']:,} idle connections, {hostile['slow']} slow ones, "
         f"{hostile['half_closed']} half-closed, {hostile['garbage']} with garbage, "
         f"{hostile['fuzzed']:,} fuzzed bodies, all at once",
         f"statuses {counted(hostile['statuses'])}; server errors: {hostile['server_errors']}; "
         "who has half closed is hung up on"],
        ["`/health` meanwhile, p99", f"{hostile['health_p99_ms']:.0f} ms"],
        [f"SIGTERM with {down['callers']} callers at work",
         f"{down['answered']} of {down['asked']} requests answered that came before the drain's "
         f"end; `/health` meanwhile {down['health_while_draining']}; exit status "
         f"{down['exit_status']} after {down['seconds']:.1f} s"],
    ])  # fmt: skip
    page += [
        "A second SIGTERM ends the server at once, and an error in the model fails the callers of "
        "its batch alone: `tests/test_api.py`, `tests/test_batcher.py`.",
    ]
    return "\n".join(page).rstrip() + "\n"


def share(kills: list[dict], good) -> str:
    return f"{sum(bool(good(one)) for one in kills)} of {len(kills)}"


def counted(statuses: dict) -> str:
    return ", ".join(f"{name} ({count:,} times)" for name, count in statuses.items())
