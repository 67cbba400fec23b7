"""Requests that wait at the same time share a forward pass: dynamic batching for one model.

While a batch runs in the model's own thread, new rows gather; the next batch forms the moment the
model is free, so a lone caller never waits for company.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np


class QueueFull(Exception):
    """No room for these rows now; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass
class Waiting:
    ids: list[int]
    done: asyncio.Future


class Batcher:
    """`await submit(rows)` -> one row of scores for each; at most `limit` rows wait."""

    def __init__(
        self,
        scores: Callable[[list[list[int]]], np.ndarray],
        limit: int = 128,
        max_rows: int = 16,
        max_spread: float = 1.25,
        on_batch: Callable[[int], None] = lambda rows: None,
    ):
        self.scores, self.on_batch = scores, on_batch
        self.limit, self.max_rows, self.max_spread = limit, max_rows, max_spread
        self.waiting: list[Waiting] = []  # oldest first
        self.arrived = asyncio.Event()
        self.seconds_per_row = 0.01  # a running mean, for Retry-After
        # one thread: the model uses all cores for one batch, two at once would only contend
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.task = asyncio.get_running_loop().create_task(self.work())

    def room(self) -> bool:
        return len(self.waiting) < self.limit

    def retry_after(self) -> int:
        """Seconds until what waits now is done."""
        return max(1, round(len(self.waiting) * self.seconds_per_row))

    async def submit(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Waits for the scores of all rows. Raises QueueFull, or what the model raised."""
        if len(self.waiting) + len(rows) > self.limit:
            raise QueueFull(self.retry_after())
        loop = asyncio.get_running_loop()
        mine = [Waiting(ids, loop.create_future()) for ids in rows]
        self.waiting += mine
        self.arrived.set()
        try:
            return await asyncio.gather(*(row.done for row in mine))
        finally:  # a caller that was cancelled, or whose other row failed, waits for nothing more
            for row in mine:
                row.done.cancel()

    def next_batch(self) -> list[Waiting]:
        """The oldest row, and those of its length that wait with it.

        Rows are padded to the longest of their batch, and a padded token costs what a real one
        does. So only rows within `max_spread` of each other go together; the oldest goes first,
        so none waits for ever.
        """
        oldest = self.waiting[0]
        near = sorted(self.waiting, key=lambda row: abs(len(row.ids) - len(oldest.ids)))
        batch, shortest, longest = [], len(oldest.ids), len(oldest.ids)
        for row in near[: self.max_rows]:
            shortest, longest = min(shortest, len(row.ids)), max(longest, len(row.ids))
            if longest > self.max_spread * shortest:
                break
            batch.append(row)
        taken = set(map(id, batch))
        self.waiting = [row for row in self.waiting if id(row) not in taken]
        return batch

    async def work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.waiting = [row for row in self.waiting if not row.done.done()]
            if not self.waiting:
                self.arrived.clear()
                await self.arrived.wait()
                continue
            batch = self.next_batch()
            self.on_batch(len(batch))
            began = time.perf_counter()
            try:
                ids = [row.ids for row in batch]
                scores = await loop.run_in_executor(self.thread, self.scores, ids)
                if not np.isfinite(scores).all():
                    raise ArithmeticError("the model's scores are no finite numbers")
            except Exception as error:  # these callers alone; the next batch is another one
                for row in batch:
                    if not row.done.done():
                        row.done.set_exception(error)
                continue
            spent = (time.perf_counter() - began) / len(batch)
            self.seconds_per_row += 0.1 * (spent - self.seconds_per_row)
            for row, one in zip(batch, scores, strict=True):
                if not row.done.done():
                    row.done.set_result(one)

    def close(self) -> None:
        self.task.cancel()
        self.thread.shutdown(wait=False, cancel_futures=True)
