"""Batches the requests of many clients on one engine, which runs on its own thread.

Requests that arrive within `WINDOW_SECONDS` of each other, or while a batch runs, share the
next batch. Only jobs of one group can share a batch; the oldest job decides which group
runs next. Cancelled jobs leave the queue.
"""

import asyncio
import collections
import dataclasses
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Literal

import numpy as np

from instructax.config import ConfigError
from instructax.serving.engine import (
    Chunk,
    Engine,
    SampleRequest,
    ScoreRequest,
    TokenScores,
)
from instructax.serving.server.errors import (
    QueueFullError,
    RequestError,
    ShuttingDownError,
)

logger = logging.getLogger(__name__)

# Time to wait for more requests before a batch starts.
WINDOW_SECONDS = 0.003


@dataclasses.dataclass(frozen=True)
class _Group:
    """Jobs with equal groups can share a batch."""

    kind: Literal["sample", "score"]
    # Samples: whether turn tokens end them. Scores: whether top tokens are wanted.
    flag: bool


@dataclasses.dataclass(eq=False)
class _Job:
    group: _Group
    request: SampleRequest | ScoreRequest
    # Hands the client a Chunk, TokenScores or an exception. May be called on any thread.
    send: Callable[[Any], Any]
    # No client waits for it any more. Written by the event loop and read by the thread;
    # a late read only costs a chunk.
    cancelled: bool = False
    # Whether the client has got a part of the result; the job cannot be repeated then.
    started: bool = False


class Batcher:
    """Runs jobs on an engine.

    `sample` and `score` must be called on one asyncio loop. The engine runs on the
    batcher's thread.

    Attributes:
      queue_limit: number of samples and scores that may wait.
      batch_sizes: sizes of the batches that ran.
    """

    def __init__(
        self, engine: Engine, *, turn_end_mask: np.ndarray, queue_limit: int, top: int
    ):
        """Creates a batcher that is not running yet.

        Args:
          engine: the engine; nobody else may call it.
          turn_end_mask: tokens that end an answer in a chat, b[V].
          queue_limit: number of samples and scores that may wait.
          top: number of most likely tokens to return if a score asks for them.
        """
        self._engine = engine
        self._turn_end_mask = turn_end_mask
        self._top = top
        self.queue_limit = queue_limit
        self.batch_sizes: list[int] = []

        # `_changed` guards `_waiting` and `_stopping`.
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Job] = collections.deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="batcher")

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops the thread after its current chunk; all clients get ShuttingDownError.

        May be called more than once.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def sample(
        self, requests: Sequence[SampleRequest], *, chat: bool
    ) -> AsyncGenerator[tuple[int, Chunk, Callable[[], None]]]:
        """Draws samples.

        Args:
          requests: the samples to draw.
          chat: whether turn tokens end a sample.

        Returns:
          A generator of (index of the sample, its next chunk, a function that cancels the
          sample), until all samples are done. It raises QueueFullError if the samples
          cannot wait, ShuttingDownError, and what the engine raises.
        """
        return self._results(requests, _Group("sample", chat))

    async def score(
        self, requests: Sequence[ScoreRequest], *, top: bool
    ) -> list[TokenScores]:
        """Scores texts, with the most likely tokens if `top`. Raises as `sample`."""
        scores: dict[int, TokenScores] = {}
        async for index, found, _ in self._results(requests, _Group("score", top)):
            scores[index] = found
        return [scores[index] for index in range(len(requests))]

    async def _results(
        self, requests: Sequence[SampleRequest | ScoreRequest], group: _Group
    ) -> AsyncGenerator[tuple[int, Any, Callable[[], None]]]:
        loop = asyncio.get_running_loop()
        results = asyncio.Queue[tuple[int, Any]]()

        # The thread must not touch the queue itself: asyncio queues are not thread-safe.
        def sender(index: int) -> Callable[[Any], Any]:
            def send(result: Any) -> None:
                loop.call_soon_threadsafe(results.put_nowait, (index, result))

            return send

        def canceller(job: _Job) -> Callable[[], None]:
            def cancel() -> None:
                job.cancelled = True

            return cancel

        # Before they are queued: in a batch, an error would be that of every request.
        for request in requests:
            self._check(request)
        jobs = []
        for index, request in enumerate(requests):
            jobs.append(_Job(group, request, sender(index)))
        self._submit(jobs)

        try:
            while not all(job.cancelled for job in jobs):
                index, result = await results.get()
                if isinstance(result, Exception):
                    raise result
                job = jobs[index]
                # Results that were sent before the job was cancelled are dropped here.
                if job.cancelled:
                    continue
                # A finished job counts as cancelled: nobody waits for it any more.
                job.cancelled = not isinstance(result, Chunk) or result.done
                yield index, result, canceller(job)
        finally:
            # Also when the client has left and the generator is closed.
            for job in jobs:
                job.cancelled = True

    def _check(self, request: SampleRequest | ScoreRequest) -> None:
        try:
            if isinstance(request, SampleRequest):
                self._engine.check_fits(len(request.prompt), request.max_new_tokens)
            else:
                self._engine.check_score(len(request.tokens))
        except ConfigError as error:
            raise RequestError(str(error)) from None

    def _submit(self, jobs: list[_Job]) -> None:
        with self._changed:
            # Otherwise the thread might be gone, and the job would wait forever.
            if self._stopping:
                raise ShuttingDownError
            waiting = sum(not job.cancelled for job in self._waiting)
            if waiting + len(jobs) > self.queue_limit:
                raise QueueFullError(
                    f"{waiting} requests are waiting and at most {self.queue_limit} may: "
                    "try again later"
                )
            # All jobs of a request or none.
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def _work(self) -> None:
        """The thread: runs batches until the batcher is closed."""
        while batch := self._next_batch():
            self._run_or_fail(batch)
        # Nothing is added to the queue any more.
        with self._changed:
            self._send(list(self._waiting), ShuttingDownError())

    def _run_or_fail(self, batch: list[_Job]) -> None:
        """Runs a batch. If it fails, the jobs that have no result yet run one by one, so
        that only those which fail alone get the error."""
        try:
            self._run(batch)
        except Exception as error:
            # One failed batch must not stop the server.
            logger.exception("a batch of %d failed", len(batch))
            if len(batch) == 1:
                self._send(batch, error)
                return
            for job in batch:
                if job.started:
                    self._send([job], error)
                elif not job.cancelled:
                    self._run_or_fail([job])

    def _next_batch(self) -> list[_Job]:
        """Waits for the next jobs of one group; empty when the batcher is closed."""

        def full() -> bool:
            return len(self._waiting) >= self._engine.batch_size or self._stopping

        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                # Give other requests a chance to share the batch.
                self._changed.wait_for(full, timeout=WINDOW_SECONDS)
                if self._stopping:
                    return []

                # The oldest job decides the group, so that none waits forever.
                live = [job for job in self._waiting if not job.cancelled]
                batch = [job for job in live if job.group == live[0].group]
                batch = batch[: self._engine.batch_size]
                self._waiting = collections.deque(job for job in live if job not in batch)
                # Empty if all clients have left.
                if batch:
                    return batch

    def _run(self, batch: list[_Job]) -> None:
        self.batch_sizes.append(len(batch))
        if batch[0].group.kind == "score":
            self._run_scores(batch)
        else:
            self._run_samples(batch)

    def _run_scores(self, batch: list[_Job]) -> None:
        requests = [job.request for job in batch if isinstance(job.request, ScoreRequest)]
        top = self._top if batch[0].group.flag else 0
        for job, scores in zip(batch, self._engine.score(requests, top), strict=True):
            self._send([job], scores)

    def _run_samples(self, batch: list[_Job]) -> None:
        requests = [job.request for job in batch if isinstance(job.request, SampleRequest)]
        stop_token_mask = self._turn_end_mask if batch[0].group.flag else None
        # Places in the batch whose samples are not done.
        running = list(range(len(batch)))
        for chunks in self._engine.stream(requests, stop_token_mask):
            for place in running:
                self._send([batch[place]], chunks[place])
            running = [place for place in running if not chunks[place].done]
            if self._stopping:
                self._send([batch[place] for place in running], ShuttingDownError())
                return
            # Stop early once every remaining client has left.
            if all(batch[place].cancelled for place in running):
                return

    def _send(self, jobs: Sequence[_Job], result: Any) -> None:
        for job in jobs:
            if job.cancelled:
                continue
            job.started = True
            try:
                job.send(result)
            except RuntimeError:
                # The client's event loop is closed.
                job.cancelled = True
