"""Requests share forward passes, and none is lost or mixed up: pytest tests/test_batcher.py"""

import asyncio
import threading
import time

import numpy as np
import pytest

from inference.batcher import Batcher, QueueFull

pytestmark = pytest.mark.anyio  # the plugin that comes with httpx and starlette runs async tests


@pytest.fixture
def anyio_backend():
    return "asyncio"


def echo(rows):
    """Scores that tell the row they belong to: its length, its first and its last id."""
    return np.array([[len(row), row[0], row[-1]] for row in rows], float)


class HeldModel:
    """`echo` that waits until it is released, and notes the rows of every batch."""

    def __init__(self):
        self.release, self.batches = threading.Event(), []

    def __call__(self, rows):
        self.batches.append([len(row) for row in rows])
        assert self.release.wait(10)
        return echo(rows)


async def test_a_lone_request_is_not_delayed_to_fill_a_batch():
    batcher = Batcher(echo)
    await batcher.submit([[1]])  # the thread has started
    t0 = time.perf_counter()
    for _ in range(50):
        await batcher.submit([[1, 2]])
    batcher.close()
    assert (time.perf_counter() - t0) / 50 < 0.02


async def let_it_work():
    for _ in range(20):
        await asyncio.sleep(0.002)


async def test_every_client_gets_its_own_answers_in_order():
    batcher, rng = Batcher(echo, limit=10_000), np.random.default_rng(0)
    calls = [
        [rng.integers(1, 999, rng.integers(1, 60)).tolist() for _ in range(n % 5 + 1)]
        for n in range(200)
    ]
    answers = await asyncio.gather(*map(batcher.submit, calls))
    batcher.close()
    for rows, scores in zip(calls, answers, strict=True):
        assert np.array_equal(np.array(scores), echo(rows))


# 10 is the oldest: with it the next in length, up to four: 10, 11, 11. Then 50 is: 52 is within a
# quarter, if twice as many tokens are allowed, 12, 13 and 100 are not. Then 12 and 13, then 100.
@pytest.mark.parametrize("max_tokens, long_rows", [(104, [[50, 52]]), (99, [[50], [52]])])
async def test_what_waits_together_is_batched_by_length_oldest_first(max_tokens, long_rows):
    held = HeldModel()
    batcher = Batcher(held, max_rows=4, max_spread=1.25, max_tokens=max_tokens)
    first = asyncio.create_task(batcher.submit([[1]]))
    await let_it_work()  # the model is busy with it while these gather
    lengths = [10, 50, 11, 12, 10, 52, 11, 13, 100]
    rest = [asyncio.create_task(batcher.submit([[1] * n])) for n in lengths]
    await let_it_work()
    held.release.set()
    await asyncio.gather(first, *rest)
    batcher.close()
    others = [batch for batch in held.batches if batch not in long_rows]
    assert others == [[1], [10, 10, 11, 11], [12, 13], [100]]
    assert [batch for batch in held.batches if batch in long_rows] == long_rows


async def test_batches_have_few_sizes():
    held = HeldModel()
    batcher = Batcher(held)
    first = asyncio.create_task(batcher.submit([[1]]))
    await let_it_work()
    rest = asyncio.create_task(batcher.submit([[1, 2]] * 31))
    await let_it_work()
    held.release.set()
    await asyncio.gather(first, rest)
    batcher.close()
    assert list(map(len, held.batches)) == [1, 16, 8, 4, 2, 1]


async def test_what_is_inside_counts_until_it_is_answered():
    held, inside = HeldModel(), []
    batcher = Batcher(held, limit=8, on_admitted=inside.append)

    async def ask(rows, tokenizing=0.0):
        with batcher.admit(rows):
            await asyncio.sleep(tokenizing)
            return await batcher.submit([[1]] * rows)

    running, tokenized = asyncio.create_task(ask(1)), asyncio.create_task(ask(5, 3600))
    await let_it_work()
    assert batcher.has_capacity(2) and not batcher.has_capacity(3)
    with pytest.raises(QueueFull) as caught:
        await ask(3)
    assert caught.value.retry_after >= 1
    last = asyncio.create_task(ask(2))
    await let_it_work()
    assert not batcher.has_capacity()
    tokenized.cancel()  # its client has hung up
    await let_it_work()
    assert batcher.has_capacity(5)
    held.release.set()
    assert list(map(len, await asyncio.gather(running, last))) == [1, 2]
    batcher.close()
    assert inside == [1, 6, 8, 3, 2, 0]


async def test_an_error_fails_the_clients_of_its_batch_alone():
    def fragile(rows):
        if any(len(row) == 7 for row in rows):
            raise ValueError("this batch")
        scores = echo(rows)
        scores[[len(row) == 9 for row in rows]] = np.nan
        return scores

    batcher = Batcher(fragile, max_spread=1)
    calls = [batcher.submit([[1] * n]) for n in (3, 7, 9, 5)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(a) for a in answers] == [list, ValueError, ArithmeticError, list]
    assert (await batcher.submit([[1] * 4]))[0][0] == 4
    batcher.close()
