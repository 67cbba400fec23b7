"""Corrupts checkpoints in a hundred ways, and sees each refused with one line.

python -m tests.faults.corrupt [--times 100] [--seed 0] [--out FILE]       (make faults)

Truncated, bytes flipped, pages zeroed, last.pt and distilbert_agnews.pt swapped, keys of an older
version, a pickle that wants to run code. The last two get a valid hash, so that what is behind the
hash is tried too.
"""

import json
import pickle
import random
import shutil
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from benchmarks.figures import record_header, write_record
from inference.model_loader import LoadError, torch_engine
from tests import fakes
from tests.ranks import run
from training import checkpoint

WAYS = ("truncated", "flipped", "zeroed", "swapped", "older", "code")
LAST_KEYS = checkpoint.LAST_KEYS


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def unfinished(folder: Path, backbone: Path, news: Path) -> None:
    """The folder of a run that was killed at its very end: a model, last.pt, the save before it."""
    code = "import checkpoint; checkpoint.release_folder = lambda path: None; "
    code += "import train_single; train_single.main()"
    flags = f"--model {backbone} --data {news} --checkpoint-dir {folder} --max-steps 8 "
    flags += "--save-every 2 --epochs 2 --global-batch-size 8"
    run([sys.executable, "-c", code, *flags.split()], folder.parent).check_returncode()


def corrupt(path: Path, other: Path, way: str, chance: random.Random, trace: Path) -> str:
    """Corrupts the file; returns what exactly was done."""
    content = bytearray(path.read_bytes())
    if way == "truncated":
        cut = chance.randrange(len(content))
        path.write_bytes(content[:cut])
        return f"cut to {cut} of {len(content)} bytes"
    if way == "flipped":
        places = [chance.randrange(len(content)) for _ in range(chance.choice([1, 1, 8]))]
        for place in places:
            content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        return f"bits flipped at {places}"
    if way == "zeroed":
        start = chance.randrange(0, len(content), 4096)
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        path.write_bytes(content)
        return f"4 KiB of zeros at {start}"
    if way == "swapped":
        shutil.copy(other, path)
        return f"{other.name} in its place"
    state = torch.load(path)
    if way == "older":
        gone = chance.choice([key for key in state if key != "metrics"])
        del state[gone]
        checkpoint.save_checkpoint(state, path)
        return f"no {gone}"
    state[chance.choice(list(state))] = Evil(trace)
    if chance.random() < 0.5:
        checkpoint.save_checkpoint(state, path)
        return "code in a sealed file"
    path.write_bytes(pickle.dumps(state))
    return "code in a bare pickle"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args, header = parser.parse_args(), record_header()
    found = []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        backbone = fakes.make_backbone(place / "tiny", 0.1)
        news = fakes.make_news(place / "news")
        whole = place / "whole"
        unfinished(whole, backbone, news)
        recipe = checkpoint.load_checkpoint(whole / "last.pt", LAST_KEYS)["recipe"]
        for number in range(args.times):
            chance = random.Random(1000 * args.seed + number)
            folder, trace = place / "corrupted", place / "it_ran"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            files = [folder / "last.pt", folder / "distilbert_agnews.pt"]
            path, other = files if number % 2 else files[::-1]
            way = WAYS[number // 2 % len(WAYS)]
            done = corrupt(path, other, way, chance, trace)
            one = {"seed": 1000 * args.seed + number, "file": path.name, "way": way, "what": done}
            if path.name == "last.pt":
                bad, before = path.read_bytes(), checkpoint.previous_path(path)
                before = checkpoint.load_checkpoint(before, LAST_KEYS)
                previous = checkpoint.read_last(path, recipe)  # falls back, and says so
                one["fell_back"] = previous["step"] == before["step"]
                path.write_bytes(bad)  # and now without one to fall back to
            try:
                if path.name == "last.pt":
                    checkpoint.read_last(path, recipe)
                else:
                    torch_engine(folder)
                one["refused"] = ""
            except (checkpoint.CheckpointError, LoadError) as error:
                one["refused"] = str(error).replace(str(place), "")
            one["code_ran"] = trace.exists()
            found.append(one)
            print(json.dumps(one), flush=True)
    good = sum(
        bool(one["refused"])
        and "\n" not in one["refused"]
        and not one["code_ran"]
        and one.get("fell_back", True)
        for one in found
    )
    print(f"{good} of {len(found)} refused with one line; no code ran")
    if args.out:
        write_record(args.out, header | {"files": found})
    sys.exit(good != len(found))


if __name__ == "__main__":
    main()
