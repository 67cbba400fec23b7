"""The cost model against cases worked out by hand: pytest tests/test_cost_model.py"""

from dataclasses import replace
from functools import partial

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import Pieces
from training.model import Config


def test_flops_of_a_row():
    # dim 4, hidden 8, 2 layers, 4 classes, 10 tokens
    # layer: 2 x 10 x (4 x 16 + 2 x 32) = 2560, and 4 x 100 x 4 = 1600 for the scores: 4160
    # last: keys and values 2 x 10 x 2 x 16 = 640; one token 2 x (2 x 16 + 2 x 32) = 192;
    # scores 4 x 10 x 4 = 160: 992.  head: 2 x (16 + 16) = 64.  forward and backward: x 3
    config = Config(dim=4, hidden_dim=8, n_layers=2, num_labels=4)
    assert cost_model.flops_per_sample(config, 10) == 3 * (4160 + 992 + 64)


def test_all_reduce_of_two_and_of_four():
    # 2 messages of 4 MB at 2 GB/s: 2 x (0.001 + 0.002)
    assert cost_model.all_reduce(8e6, 2, 0.001, 2e9) == pytest.approx(0.006)
    # 6 messages of 2 MB at 2 GB/s: 6 x (0.001 + 0.001)
    assert cost_model.all_reduce(8e6, 4, 0.001, 2e9) == pytest.approx(0.012)


def test_straight_lines_between_points_extended_beyond_them():
    points = ((10, 1.0), (20, 2.0), (40, 6.0))  # 0.1 a token, then 0.2
    assert [cost_model.interpolate(points, x) for x in (10, 15, 20, 30, 40)] == [1, 1.5, 2, 4, 6]
    assert cost_model.interpolate(points, 5) == pytest.approx(0.5)
    assert cost_model.interpolate(points, 50) == pytest.approx(8.0)


def test_buckets_fill_with_the_layers_and_embeddings_come_last():
    # 30 of 100 bytes are embeddings; layers: 70. 35 of them at half of backward
    assert cost_model.ready_times([35, 35, 30], 30, 2.0) == pytest.approx([1.0, 2.0, 2.0])


def test_exposed_is_what_ends_after_backward():
    # first: 1.0 to 1.8; second waits for its bucket: 2.0 to 2.8; third for the second: 2.8 to 3.6
    assert cost_model.exposed([1.0, 2.0, 2.0], [0.8] * 3, 2.0) == pytest.approx(1.6)
    # first: 1.0 to 3.5, so that the second waits for it: 3.5 to 3.6
    assert cost_model.exposed([1.0, 2.0], [2.5, 0.1], 2.0) == pytest.approx(1.6)
    assert cost_model.exposed([0.5], [0.1], 2.0) == 0


# 0.1 s, and 0.001 a token
COMPUTE = ((100, 0.2), (400, 0.5))
PIECES = Pieces(COMPUTE, 0.05, 0.0001, 0.002, 0.1, (35, 35, 30), (0.2, 0.2, 0.3), 30)


def test_a_step_on_a_cpu_hides_no_communication():
    # compute 0.1 + 500 x 0.001 = 0.6, slowest rank 0.66; sent 0.7; update 0.05; flags 0.002;
    # data 500 x 0.0001 = 0.05
    assert cost_model.step(PIECES, 500) == pytest.approx(0.66 + 0.7 + 0.05 + 0.002 + 0.05)
    # three micro-batches, one exchange
    assert cost_model.step(PIECES, 500, 3) == pytest.approx(1.98 + 0.7 + 0.05 + 0.002 + 0.15)


def test_a_step_on_a_gpu_hides_what_fits_beside_backward():
    # backward 0.4: buckets ready at 0.2, 0.4, 0.4; sent until 0.4, 0.6, 0.9: 0.5 is exposed
    pieces = replace(PIECES, overlap=True)
    assert cost_model.step(pieces, 500) == pytest.approx(0.66 + 0.5 + 0.05 + 0.002 + 0.05)


def test_a_gpu_from_published_figures(monkeypatch):
    monkeypatch.setattr(cost_model, "EMBEDDINGS", 0)
    gpu = cost_model.Gpu(rate=1e12, fixed=0.01, bandwidth=1e9, latency=0)
    step = partial(cost_model.gpu_step, gpu, 1e9, 100, buckets=(1e8,))
    # 1e9 x 100 rows at 1e12: 0.1 s; fixed 0.01
    assert step() == pytest.approx(0.11)
    # two of them: the one bucket is ready when backward ends, 1e8 bytes at 1e9 B/s are exposed
    assert step(world_size=2) == pytest.approx(0.11 + 0.1)
    assert step(world_size=2, compressed=True) == pytest.approx(0.16)
    assert step(world_size=2, accumulation=3) == pytest.approx(0.31 + 0.1)


def test_the_efficiency_of_a_cluster_is_the_step_of_one_gpu_over_that_of_many(monkeypatch):
    monkeypatch.setattr(cost_model, "LINKS", {"a link": (1e6, 4)})  # communication is everything
    monkeypatch.setattr(cost_model, "CLUSTER_GPU", cost_model.Gpu(1e30, 5.0, 0, 0))
    how, link, cells = cost_model.cluster()[0]
    sent = 66_956_548 * 4 / 1e6  # seconds; a ring of n sends 2 (n - 1) / n of it
    assert cells == pytest.approx([5 / (5 + sent), 5 / (5 + 1.5 * sent), *[None] * 4])


def test_sparse_embeddings_send_the_touched_rows_alone():
    # a link so slow that nothing is hidden counts: bytes over bandwidth, and backward is instant
    gpu = cost_model.Gpu(rate=1e30, fixed=0, bandwidth=1e6, latency=0)
    whole, some = (
        cost_model.gpu_step(gpu, 1e9, 100, 2, touched=touched) for touched in (None, 1000)
    )
    assert whole == pytest.approx(66_956_548 * 4 / 1e6)
    assert whole - some == pytest.approx((30522 - 1000) * 768 * 4 / 1e6)


def test_the_waterfall_adds_up():
    def taken(step, imbalance=0.0):
        return {"step": step, "update": 1, "imbalance": imbalance, "world_size": 2}

    way = cost_model.waterfall(taken(10), taken(6), taken(7), taken(7.3, 0.25), taken(8))
    expected = {
        "one process": 10,
        "ideal share": 5,
        "update, done by every rank": 0.5,  # 1 - 1 / 2
        "smaller batches": 0.5,  # 6 - 5 - 0.5
        "contention for the machine": 1,  # 7 - 6
        "imbalance of the ranks": 0.25,
        "exposed communication": 0.7,  # 8 - 7.3
        "unexplained": 0.05,  # 7.3 - 7 - 0.25
        "DDP, measured": 8,
    }
    assert way == pytest.approx(expected) and list(way) == list(expected)
