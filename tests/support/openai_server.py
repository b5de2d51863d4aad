"""A tiny policy behind the server, and short requests to it."""

import json
import threading

from tests.support import tiny_models

from instructax.data.tokenizer import load_tokenizer
from instructax.models.transformer import Transformer
from instructax.serving.engine import Engine, SampleRequest
from instructax.serving.policy import Policy
from instructax.serving.text_stream import TextStream

BYTES = load_tokenizer("bytes")
CONFIG = tiny_models.gpt_config(vocab_size=257, max_length=64)
BATCH_SIZE = 4
MESSAGES = [{"role": "user", "content": "Hi"}]


def make_policy() -> Policy:
    """A random policy over bytes."""
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    params = tiny_models.random_params(model)
    engine = Engine(model, params, eos_id=BYTES.eos_id, batch_size=BATCH_SIZE)
    return Policy(engine=engine, tokenizer=BYTES, template=None)


def post_completion(client, status=200, **fields):
    """The JSON reply of /v1/completions."""
    body = {"model": "tiny", "prompt": "ab", "seed": 1, **fields}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def post_chat(client, status=200, **fields):
    """The JSON reply of /v1/chat/completions."""
    body = {"model": "tiny", "messages": MESSAGES, "seed": 1, "max_tokens": 9, **fields}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def stream_events(client, path, **fields):
    """The events of a stream, without the final [DONE]."""
    body = {"model": "tiny", "seed": 1, "stream": True, **fields}
    with client.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def draw_sample(policy, prompt, *, sample_index=0, temperature=1.0, max_new_tokens=16):
    """The stream of a sample drawn by the engine directly, without the server."""
    request = SampleRequest(
        prompt=BYTES.encode(prompt),
        seed=1,
        sample_index=sample_index,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
    stream = TextStream(BYTES)
    for (chunk,) in policy.engine.stream([request]):
        stream.add(chunk.tokens, done=chunk.done, hit_eos=chunk.hit_eos)
    return stream


class GatedEngine:
    """An engine whose batches wait until the test releases them."""

    def __init__(self, engine):
        self._engine = engine
        self.entered = threading.Semaphore(0)
        self.release = threading.Semaphore(0)

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def stream(self, *arguments):
        self.entered.release()
        assert self.release.acquire(timeout=100)
        return self._engine.stream(*arguments)
