"""Cancelled requests leave the queue, and closing the batcher reaches all clients."""

import asyncio

import numpy as np
import pytest
from tests.support.openai_server import BYTES, GatedEngine

from instructax.serving.engine import SampleRequest

pytest.importorskip("starlette")
from instructax.serving.server.batcher import Batcher
from instructax.serving.server.errors import QueueFullError, ShuttingDownError

REQUEST = SampleRequest(
    prompt=BYTES.encode("ab"), seed=1, sample_index=0, temperature=1.0, max_new_tokens=8
)


async def sample(batcher):
    """The tokens of one sample."""
    chunks = []
    async for _, chunk, _ in batcher.sample([REQUEST], chat=False):
        chunks.append(chunk.tokens)
    return np.concatenate(chunks)


def test_a_cancelled_request_leaves_the_queue(policy):
    engine = GatedEngine(policy.engine)
    stop_token_mask = np.zeros((BYTES.size,), bool)
    batcher = Batcher(engine, turn_end_mask=stop_token_mask, queue_limit=3, top=1)

    async def session():
        batcher.start()
        first = asyncio.create_task(sample(batcher))
        assert await asyncio.to_thread(engine.entered.acquire, timeout=100)

        # Three requests fill the queue while the first one runs.
        waiting = [asyncio.create_task(sample(batcher)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await sample(batcher)

        # One of them is cancelled, which makes room for another one.
        waiting[1].cancel()
        await asyncio.wait({waiting[1]})
        extra = asyncio.create_task(sample(batcher))
        await asyncio.sleep(0)
        engine.release.release(2)
        rest = asyncio.gather(first, waiting[0], waiting[2], extra)
        samples = await asyncio.wait_for(rest, 100)
        for tokens in samples:
            np.testing.assert_array_equal(tokens, samples[0])

        engine.release.release()
        await asyncio.to_thread(batcher.close)
        with pytest.raises(ShuttingDownError):
            await sample(batcher)

    asyncio.run(session())
    assert batcher.batch_sizes == [1, 3]
