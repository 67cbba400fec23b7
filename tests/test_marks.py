"""Marks 1, 2, 6 and 7 taken out of train_ddp.py, and what then breaks. Without 3 and 4 the tests in
test_one_order.py fail, without 5 those in test_profiler.py."""

import pytest
import torch
from ranks import ROOT, environment, train

SCRIPT = (ROOT / "training" / "train_ddp.py").read_text()


def part(start: str, end: str) -> str:
    """The lines of the script from the one that starts so to before the one that starts so."""
    begin = SCRIPT.index(f"    {start}")
    return SCRIPT[begin : SCRIPT.index(f"    {end}", begin)]


@pytest.fixture
def variant(calm_backbone, flags, tmp_path):
    """Trains with two ranks after replacing parts of train_ddp.py's text; returns the ranks."""

    def run(*replaced: tuple[str, str], more=(), status=0, **extra):
        text, folder = SCRIPT, tmp_path / f"variant{len(list(tmp_path.glob('variant*')))}"
        for old, new in replaced:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in train_ddp.py"
            text = text.replace(old, new)
        folder.mkdir()
        (folder / "train_ddp.py").write_text(text)
        path = f"{folder}:{environment()['PYTHONPATH']}"
        same = ["--model", calm_backbone, "--precision", "fp32", "--lr", "1e-3"]
        run = flags(folder / "c", *same, *more)
        return train(2, run, folder, status, PYTHONPATH=path, **extra), folder

    return run


def test_1_a_process_that_believes_to_be_the_only_one_finds_no_share_for_its_rank(variant):
    ranks = "rank, local_rank, world_size = utils.torchrun_ranks()"
    (_, one), _ = variant((ranks, f"{ranks}; world_size = 1"), status=1)
    assert "Invalid rank 1" in one.stderr


def test_2_data_prepared_in_the_group_outlasts_a_collective(variant):
    # the usual recipe: one rank prepares, the others wait for it in a barrier
    group, prepare = part("dist.init_", "torch.manual_seed"), part("data = ", "# DDP 1")
    waits = "    if rank == 0:\n        time.sleep(8)\n    dist.barrier()\n"
    backends = part("backends = ", "dist.init_process_group(")
    usual = (prepare, ""), (backends + group, backends + group + waits + prepare)
    ranks, _ = variant(*usual, status=1, TIMEOUT="4")
    assert "did not reach a collective within 4 s" in ranks[1].stderr


def test_2_without_the_comparison_ranks_train_on_different_rows(variant):
    compare = "    rank_checks.check_same_on_all_ranks"
    cut = ("data = dataset", "args.max_train_samples = 100 - rank\n    data = dataset")
    ranks, _ = variant(cut, (compare, "    "), more=["--max-steps", 3])
    assert ranks[0].status == 0  # nothing told
    ranks, _ = variant(cut, status=1)
    assert "the data or --max-*-samples differs" in ranks[0].stderr


def test_6_without_the_sum_over_ranks_one_share_is_divided_by_all_rows(variant):
    (right, _), _ = variant()
    summed = "utils.all_reduce_sum([*running.tolist(), len(stop_signals)])"
    (wrong, _), _ = variant((summed, "(*running.tolist(), 0)"))
    right, wrong = (zero.record["epochs"][1] for zero in (right, wrong))
    assert wrong["train_loss"] < 0.7 * right["train_loss"]
    assert wrong["train_accuracy"] < 0.7 * right["train_accuracy"]


def test_7_the_wrapper_saved_has_another_name_for_every_weight(variant):
    wrapped = ("args.checkpoint_dir, raw_model,", "args.checkpoint_dir, model,")
    _, folder = variant(wrapped, more=["--max-steps", 3])
    weights = torch.load(folder / "c" / "distilbert_agnews.pt")["model"]
    assert all(name.startswith("module.") for name in weights)


def test_7_the_wrong_rank_saves_and_nobody_reports(variant):
    last = SCRIPT[SCRIPT.rindex("    if master_process:") :].splitlines()[1]
    wrong = ("    if master_process:\n" + last, "    if rank == 1:\n" + last)
    (zero, _), _ = variant(wrong, more=["--max-steps", 3])
    assert "test: loss" not in zero.stdout  # on a second host the model would be on its disk
