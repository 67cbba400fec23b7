"""Each mark taken out of train_ddp.py, and what then breaks: pytest tests/test_marks.py"""

import json

import pytest
import torch
from ranks import ROOT, environment, observe

SCRIPT = (ROOT / "training" / "train_ddp.py").read_text()


def part(start: str, end: str) -> str:
    """The lines of the script from the one that starts so to before the one that starts so."""
    begin = SCRIPT.index(f"    {start}")
    return SCRIPT[begin : SCRIPT.index(f"    {end}", begin)]


GROUP, PREPARE = part("dist.init_process_group(", "rank = "), part("data = ", "# the processes")


@pytest.fixture
def train(calm_backbone, news_folder, tmp_path):
    """Trains with two ranks after replacing parts of train_ddp.py's text; returns the ranks."""

    def run(*replaced: tuple[str, str], more=(), status=0, **extra):
        text, folder = SCRIPT, tmp_path / f"variant{len(list(tmp_path.glob('variant*')))}"
        for old, new in replaced:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in train_ddp.py"
            text = text.replace(old, new)
        folder.mkdir()
        (folder / "train_ddp.py").write_text(text)
        path = f"{folder}:{environment()['PYTHONPATH']}"
        flags = ["--model", calm_backbone, "--data", news_folder, "--checkpoint-dir", folder / "c",
                 "--precision", "fp32", "--global-batch-size", 8, "--max-eval-samples", 20,
                 "--epochs", 2, "--lr", "1e-3", "--report", folder / "report.json"]  # fmt: skip
        ranks = observe(2, [*map(str, flags), *map(str, more)], folder, status, PYTHONPATH=path,
                        **extra)  # fmt: skip
        return ranks, folder

    return run


def rows_of(rank, epoch):
    return {row for rows in rank.seen["rows"][epoch] for row in rows if row >= 0}


def test_1_a_process_that_believes_to_be_the_only_one_finds_no_share_for_its_rank(train):
    (_, one), _ = train(("world_size = utils.torchrun_world_size()", "world_size = 1"), status=1)
    assert "Invalid rank 1" in one.stderr


def test_2_data_prepared_in_the_group_outlasts_a_collective(train):
    # the usual recipe: one rank prepares, the others wait for it in a barrier
    waits = "    if dist.get_rank() == 0:\n        import time\n        time.sleep(8)\n"
    usual = GROUP + waits + "    dist.barrier()\n" + PREPARE
    ranks, _ = train((GROUP, ""), (PREPARE, usual), status=1, TIMEOUT="4")
    assert "did not come to a collective within 4 s" in ranks[1].stderr


def test_3_without_set_epoch_every_epoch_has_the_same_order(train):
    (zero, _), _ = train(("sampler.set_epoch(epoch)", "pass"))
    assert zero.seen["rows"][0] == zero.seen["rows"][1]


def test_3_without_the_sampler_both_ranks_train_on_the_same_rows(train):
    sampler = "DistributedSampler(data.train, world_size, rank, seed=args.seed)"
    (zero, one), _ = train((sampler, sampler.replace("rank,", "0,")))
    assert rows_of(zero, 0) == rows_of(one, 0)


def test_4_without_the_wrapper_the_ranks_part(train):
    wrapper = part("model = DistributedDataParallel(", "watch = ")
    (zero, one), _ = train((wrapper, "    model = raw_model\n"))
    assert not all(map(torch.equal, zero.seen["weights"], one.seen["weights"]))


def test_5_without_no_sync_every_micro_batch_is_all_reduced(train):
    more = ("--micro-batch-size", 1)  # four a step
    (right, _), _ = train(more=more)
    (zero, _), _ = train(("nullcontext() if last else model.no_sync()", "nullcontext()"), more=more)
    assert zero.seen["buckets"][0] == 4 * right.seen["buckets"][0]


def test_6_without_the_sum_over_ranks_the_accuracy_is_of_half_the_rows(train):
    (_, _), right = train()
    (_, _), wrong = train(("loss_sum, correct = utils.reduce_sum(totals.tolist())",
                           "loss_sum, correct = totals.tolist()"))  # fmt: skip
    right, wrong = (
        json.loads((folder / "report.json").read_text())["epochs"][1] for folder in (right, wrong)
    )
    assert wrong["train_loss"] < 0.7 * right["train_loss"]  # one share's sum over all rows
    assert wrong["train_accuracy"] < 0.7 * right["train_accuracy"]


def test_7_the_wrapper_saved_has_another_name_for_every_weight(train):
    (_, _), folder = train(('"distilbert_agnews.pt", raw_model', '"distilbert_agnews.pt", model'))
    assert all(name.startswith("module.")
               for name in torch.load(folder / "c" / "distilbert_agnews.pt")["model"])  # fmt: skip


def test_7_the_wrong_rank_saves_and_nobody_reports(train):
    last = SCRIPT[SCRIPT.rindex("    if master_process:") :].splitlines()[1]
    (zero, one), _ = train(("    if master_process:\n" + last, "    if rank == 1:\n" + last))
    assert one.seen["saves"] == 1  # on a second host it would be on the wrong disk
    assert "test: loss" not in zero.stdout
