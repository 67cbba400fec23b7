"""Requests that wait at the same time share a forward pass: dynamic batching for one model.

While a batch runs in the model's own thread, new rows gather; the next batch forms the moment the
model is free, so a lone request is never delayed to fill a batch.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np


class QueueFull(Exception):
    """No capacity for these rows now; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int):
        self.retry_after = retry_after


@dataclass
class PendingRequest:
    ids: list[int]
    done: asyncio.Future


class Batcher:
    """`with admit(n): await submit(rows)` -> one row of scores each; at most `limit` rows inside.

    `on_batch` is told the rows of each forward pass, `on_admitted` the rows that are inside now.
    """

    def __init__(
        self,
        scores: Callable[[list[list[int]]], np.ndarray],
        limit: int = 128,
        max_rows: int = 16,
        max_spread: float = 1.5,
        max_tokens: int = 1024,
        on_batch: Callable[[int], None] = lambda rows: None,
        on_admitted: Callable[[int], None] = lambda rows: None,
    ):
        self.scores, self.on_batch, self.on_admitted = scores, on_batch, on_admitted
        self.limit, self.max_rows, self.max_spread = limit, max_rows, max_spread
        self.max_tokens = max_tokens
        self.admitted = 0
        self.pending: list[PendingRequest] = []  # oldest first
        self.arrived = asyncio.Event()
        self.seconds_per_row = 0.01  # a running mean, for Retry-After
        # one thread: the model uses all cores for one batch, two at once would only contend
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.task = asyncio.get_running_loop().create_task(self.work())

    def has_capacity(self, rows: int = 1) -> bool:
        return self.admitted + rows <= self.limit

    def retry_after(self) -> int:
        """Seconds until the admitted rows are done."""
        return max(1, round(self.admitted * self.seconds_per_row))

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Counts rows from admission to the answer, so that those being tokenized count, too."""
        if not self.has_capacity(rows):
            raise QueueFull(self.retry_after())
        self.admitted += rows
        self.on_admitted(self.admitted)
        try:
            yield
        finally:
            self.admitted -= rows
            self.on_admitted(self.admitted)

    async def submit(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Waits for the scores of all rows. Raises what the model raised."""
        loop = asyncio.get_running_loop()
        mine = [PendingRequest(ids, loop.create_future()) for ids in rows]
        self.pending += mine
        self.arrived.set()
        try:
            return await asyncio.gather(*(row.done for row in mine))
        finally:  # the client disconnected, or another of its rows failed
            for row in mine:
                row.done.cancel()

    def next_batch(self) -> list[PendingRequest]:
        """The oldest row, and waiting rows of similar length.

        Rows are padded to the longest of their batch, and a padded token costs what a real one
        does. So only rows within `max_spread` of each other go together; the oldest goes first,
        so none waits forever. More than `max_tokens` would take memory and bring no speed.
        """
        oldest = self.pending[0]
        near = sorted(self.pending, key=lambda row: abs(len(row.ids) - len(oldest.ids)))
        batch, shortest, longest = [], len(oldest.ids), len(oldest.ids)
        for row in near[: self.max_rows]:
            shortest, longest = min(shortest, len(row.ids)), max(longest, len(row.ids))
            wide = longest > self.max_spread * shortest
            if wide or (batch and longest * (len(batch) + 1) > self.max_tokens):
                break
            batch.append(row)
        # 1, 2, 4, 8 or 16 rows: int8_engine is slow in shapes that it has not seen
        batch = batch[: 2 ** (len(batch).bit_length() - 1)]
        taken = set(map(id, batch))
        self.pending = [row for row in self.pending if id(row) not in taken]
        return batch

    async def work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.pending = [row for row in self.pending if not row.done.done()]
            if not self.pending:
                self.arrived.clear()
                await self.arrived.wait()
                continue
            batch = self.next_batch()
            self.on_batch(len(batch))
            t0 = time.perf_counter()
            try:
                ids = [row.ids for row in batch]
                scores = await loop.run_in_executor(self.thread, self.scores, ids)
                if not np.isfinite(scores).all():
                    raise ArithmeticError("the model's scores are not finite")
            except Exception as error:  # for these clients alone; the next batch is another one
                for row in batch:
                    if not row.done.done():
                        row.done.set_exception(error)
                continue
            seconds = (time.perf_counter() - t0) / len(batch)
            self.seconds_per_row += 0.1 * (seconds - self.seconds_per_row)
            for row, row_scores in zip(batch, scores, strict=True):
                if not row.done.done():
                    row.done.set_result(row_scores)

    def close(self) -> None:
        self.task.cancel()
        self.thread.shutdown(wait=False, cancel_futures=True)
