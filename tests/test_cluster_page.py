"""docs/cluster.md holds what the cost model says: pytest tests/test_cluster_page.py"""

import pytest

from benchmarks import cluster_table


def test_the_page_is_what_the_script_writes():
    page = cluster_table.PAGE.read_text()
    assert page == cluster_table.written(page)


def test_an_efficiency_worked_out_by_hand():
    # backward of 128 rows takes two thirds of 128 x FLOPs / 104 TFLOP/s; a layer of it is ready
    # every 2.2 ms, and 28 MB take longer at 3.125 GB/s: from the second bucket on the link is busy
    first, *rest = cluster_table.buckets()
    assert first + sum(rest) == pytest.approx(267.83e6, rel=1e-4)
    compute = 128 * cluster_table.flops_per_sample(cluster_table.Config(), 52.5) / 104e12
    backward = 2 / 3 * compute
    begin = (first + rest[0]) / (first + sum(rest[:-1])) * backward
    # of two GPUs each sends and receives every byte once, in two messages of 10 microseconds
    end = begin + sum(rest) / 3.125e9 + 7 * 2 * 10e-6
    alone = compute + 5e-3
    expected = alone / (alone + end - backward)
    assert cluster_table.efficiency(2, 3.125e9, 128, 1, 1.0) == pytest.approx(expected)
