"""Requests of many clients in batches of one engine, on a thread of its own.

Requests that come within `WINDOW_SECONDS` of each other, or while a batch runs, share the
next batch; the oldest request decides of which group it is. What nobody waits for any more
gives its place to the next batch.
"""

import asyncio
import collections
import dataclasses
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from instructax.serving.engine import Draw, Engine, Piece, Scores

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 0.003


class Busy(Exception):
    """So many requests wait already that no more are taken."""


class Stopping(Exception):
    """The server is being shut down."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-probabilities of a text that are wanted."""

    tokens: np.ndarray  # i32[n]
    first: int  # token to score


@dataclasses.dataclass(eq=False)
class _Job:
    group: Any  # jobs of one group can share a batch
    work: Draw | Score
    put: Callable[
        [Any], Any
    ]  # gives the client a Piece, Scores or an exception; of any thread
    dropped: bool = False  # nobody waits for it any more


class Batcher:
    """Runs jobs on `engine`; the functions that take them are those of one asyncio loop.

    `ends` b[V]: tokens that end an answer in a conversation besides the end token.
    `queue_limit`: samples and scores that may wait.
    """

    def __init__(self, engine: Engine, *, ends: np.ndarray, queue_limit: int, top: int):
        self._engine, self._ends, self._top, self.queue_limit = (
            engine,
            ends,
            top,
            queue_limit,
        )
        self._waiting: collections.deque[_Job] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="batcher")
        self.batches: list[int] = []  # sizes of those that ran

    def begin(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the piece that it draws; whoever waits gets Stopping. May
        be called again."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def draw(
        self, draws: Sequence[Draw], *, chat: bool
    ) -> AsyncGenerator[tuple[int, Piece, Callable[[], None]]]:
        """(index of the sample, its next tokens, a function that says that no more are
        wanted), until all are over.

        Raises Busy at once if they cannot wait, and what the engine raises.
        """
        return self._results(draws, ("draw", chat))

    async def score(self, texts: Sequence[Score], *, top: bool) -> list[Scores]:
        """Scores of each text, with the likeliest tokens if `top`. Raises as `draw`."""
        found: dict[int, Scores] = {}
        async for index, scores, _ in self._results(texts, ("score", top)):
            found[index] = scores
        return [found[index] for index in range(len(texts))]

    async def _results(
        self, work: Sequence[Draw | Score], group: Any
    ) -> AsyncGenerator[tuple[int, Any, Any]]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

        def put_of(index: int) -> Callable[[Any], Any]:
            return lambda found: loop.call_soon_threadsafe(queue.put_nowait, (index, found))

        jobs = [_Job(group, one, put_of(index)) for index, one in enumerate(work)]
        self._submit(jobs)
        try:
            while not all(job.dropped for job in jobs):
                index, found = await queue.get()
                if isinstance(found, Exception):
                    raise found
                job = jobs[index]
                if not job.dropped:
                    job.dropped = not isinstance(found, Piece) or found.over
                    yield index, found, lambda job=job: setattr(job, "dropped", True)
        finally:
            for job in jobs:
                job.dropped = True

    def _submit(self, jobs: list[_Job]) -> None:
        with self._changed:
            if self._stopping:
                raise Stopping
            waiting = sum(not job.dropped for job in self._waiting)
            if waiting + len(jobs) > self.queue_limit:
                raise Busy(
                    f"{waiting} requests wait already, of {self.queue_limit} that may: try again later"
                )
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                self._run(batch)
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                self._give(batch, error)
        with self._changed:
            self._give(list(self._waiting), Stopping())

    def _next_batch(self) -> list[_Job]:
        """The next jobs of one group; none if there will not be any more."""

        def full() -> bool:
            return len(self._waiting) >= self._engine.rows or self._stopping

        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                self._changed.wait_for(full, timeout=WINDOW_SECONDS)
                if self._stopping:
                    return []
                live = [job for job in self._waiting if not job.dropped]
                batch = [job for job in live if job.group == live[0].group][
                    : self._engine.rows
                ]
                self._waiting = collections.deque(job for job in live if job not in batch)
                if batch:
                    return batch

    def _run(self, batch: list[_Job]) -> None:
        self.batches.append(len(batch))
        kind, chat_or_top = batch[0].group
        if kind == "score":
            texts = [
                (job.work.tokens, job.work.first)
                for job in batch
                if isinstance(job.work, Score)
            ]
            for job, scores in zip(
                batch,
                self._engine.score(texts, self._top if chat_or_top else 0),
                strict=True,
            ):
                self._give([job], scores)
            return
        draws = [job.work for job in batch if isinstance(job.work, Draw)]
        over = [False] * len(batch)
        for pieces in self._engine.stream(draws, self._ends if chat_or_top else None):
            for place, (job, piece) in enumerate(zip(batch, pieces, strict=True)):
                if not over[place]:
                    self._give([job], piece)
                over[place] |= piece.over
            if self._stopping:
                self._give(
                    [job for place, job in enumerate(batch) if not over[place]], Stopping()
                )
                return
            if all(done or job.dropped for done, job in zip(over, batch, strict=True)):
                return

    def _give(self, jobs: Sequence[_Job], found: Any) -> None:
        for job in jobs:
            if not job.dropped:
                try:
                    job.put(found)
                except RuntimeError:  # the client's loop has been closed
                    job.dropped = True
