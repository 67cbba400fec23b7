"""Step k trains on the same rows at every world size: pytest tests/test_one_order.py"""

import pytest
import torch
from ranks import losses, train
from torch.nn import functional as F

import dataset
from ag_news import find_data
from model import load_backbone

STEPS = 20


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def flags(backbone, news, folder, *more):
    """10 epochs of 2 steps of 48 rows, in fp32."""
    common = ["--model", backbone, "--data", news, "--checkpoint-dir", folder, "--epochs", 10]
    common += ["--precision", "fp32", "--global-batch-size", 48]
    return [*map(str, [*common, "--lr", "1e-3", *more])]


def relative_error(grads, expected):
    """The distance between two lists of gradients, in lengths of the expected one."""
    pairs = zip(grads, expected, strict=True)
    distance = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    return float((distance / sum(b.double().square().sum() for b in expected)).sqrt())


@pytest.fixture(scope="module")
def one_process(calm_backbone, news_folder, tmp_path_factory):
    """A run of train_single.py without dropout: its losses are what all others are compared to."""
    folder = tmp_path_factory.mktemp("one")
    run = flags(calm_backbone, news_folder, folder / "c", "--micro-batch-size", 48)
    (rank,) = train(0, run, folder)
    assert len(losses(rank)) == STEPS
    return rank


@pytest.mark.parametrize(
    "world_size, micro_batches",
    [(2, 1), slow(2, 2), (2, 4), slow(3, 1), (3, 2), slow(3, 4), (4, 1), slow(4, 2), slow(4, 4)],
)
def test_losses_and_gradients_equal_those_of_one_process(
    one_process, calm_backbone, news_folder, tmp_path, world_size, micro_batches
):
    micro = 48 // world_size // micro_batches
    run = flags(calm_backbone, news_folder, tmp_path / "c", "--micro-batch-size", micro)
    ranks = train(world_size, run, tmp_path)
    assert losses(ranks[0]) == pytest.approx(losses(one_process), rel=1e-5)
    for rank in ranks:
        assert relative_error(rank.seen["grads"][0], one_process.seen["grads"][0]) < 1e-6


def test_the_gradient_is_that_of_transformers_own_model_on_the_whole_batch(
    one_process, calm_backbone, news_folder
):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    source = find_data(str(news_folder))
    data = dataset.prepare_data(source, calm_backbone, 128, None, None)
    torch.manual_seed(0)
    ours = load_backbone(calm_backbone)
    config = DistilBertConfig.from_pretrained(calm_backbone, num_labels=4)
    model = DistilBertForSequenceClassification(config)
    model.load_state_dict(ours.state_dict())
    model.train()  # the backbone's dropouts are 0
    rows = list(dataset.LengthGroupedSampler(data.train, 48))[:48]
    input_ids, mask, labels = dataset.collate([data.train[i] for i in rows])
    F.cross_entropy(model(input_ids, mask).logits, labels).backward()
    theirs = dict(model.named_parameters())
    expected = [theirs[name].grad for name, _ in ours.named_parameters()]
    assert relative_error(one_process.seen["grads"][0], expected) < 1e-6


@pytest.mark.parametrize("world_size", [0, 3, slow(4)])
def test_a_run_stopped_at_two_processes_resumes_at_another_number_of_them(
    one_process, calm_backbone, news_folder, tmp_path, world_size
):
    run = flags(calm_backbone, news_folder, tmp_path / "c")
    train(2, run, tmp_path, 143, STOP_AT_STEP="7")  # in the middle of the fourth epoch
    ranks = train(world_size, run, tmp_path)
    assert ranks[0].record["resumed_at"] == [7]
    assert losses(ranks[0]) == pytest.approx(losses(one_process), rel=1e-5)
    mine, straight = ranks[0].record["epochs"], one_process.record["epochs"]
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert [e[name] for e in mine] == pytest.approx([e[name] for e in straight], rel=1e-5)
    # of 53 test rows, which no number of processes divides
    assert ranks[0].record["test_accuracy"] == one_process.record["test_accuracy"]
    assert ranks[0].record["test_loss"] == pytest.approx(one_process.record["test_loss"], rel=1e-5)


@pytest.mark.parametrize("world_size", [0, slow(2), 3, slow(4)])  # 0: train_single.py
def test_a_resumed_run_is_bit_identical_with_dropout_on(
    tiny_backbone, news_folder, tmp_path, world_size
):
    def run(folder):
        return flags(tiny_backbone, news_folder, tmp_path / folder, "--epochs", 4)

    straight = train(world_size, run("straight"), tmp_path)
    stopped = train(world_size, run("stopped"), tmp_path, 143, STOP_AT_STEP="5")
    assert {len(rank.seen["grads"]) for rank in stopped} == {5}  # not one step more
    resumed = train(world_size, run("stopped"), tmp_path)
    for mine, other in zip(straight, resumed, strict=True):
        assert all(map(torch.equal, mine.seen["weights"], other.seen["weights"]))
    assert losses(straight[0]) == losses(resumed[0])
    names = ("train_loss", "val_loss", "val_accuracy")
    for mine, other in zip(straight[0].record["epochs"], resumed[0].record["epochs"], strict=True):
        assert all(mine[name] == other[name] for name in names)
