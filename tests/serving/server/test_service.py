"""What the server answers: completions, chats, streams and log-probabilities."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest
from tests.support import stages, tiny_models
from tests.support.openai_server import (
    BATCH_SIZE,
    BYTES,
    CONFIG,
    MESSAGES,
    GatedEngine,
    draw_sample,
    post_chat,
    post_completion,
    stream_events,
)

from instructax.data.chat_template import make_template
from instructax.models.transformer import Transformer
from instructax.serving.engine import Engine
from instructax.serving.text_stream import TextStream

pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")
from instructax.serving.server.app import make_app  # noqa: E402


def test_models_are_listed(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/health").status_code == 200


def test_a_completion_is_what_the_engine_samples(client, policy):
    reply = post_completion(client, n=2, max_tokens=11, temperature=0.8)
    num_tokens = 0
    for index, choice in enumerate(reply["choices"]):
        sample = draw_sample(
            policy, "ab", max_new_tokens=11, temperature=0.8, sample_index=index
        )
        assert choice["text"] == sample.text
        assert choice["finish_reason"] == sample.finish_reason
        num_tokens += sample.num_tokens
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": num_tokens,
        "total_tokens": 2 + num_tokens,
    }


def test_a_completion_has_16_tokens_at_temperature_1_by_default(client, policy):
    (choice,) = post_completion(client)["choices"]
    assert choice["text"] == draw_sample(policy, "ab").text


def test_the_seed_matters_unless_decoding_is_greedy(client, policy):
    for seed in (1, 2):
        (choice,) = post_completion(client, temperature=0, seed=seed)["choices"]
        assert choice["text"] == draw_sample(policy, "ab", temperature=0.0).text
    texts = set()
    for _ in range(3):
        texts.add(post_completion(client, seed=None)["choices"][0]["text"])
    assert len(texts) == 3


def test_prompts_are_strings_or_token_ids(client):
    strings = post_completion(client, prompt=["ab", "xyz"])["choices"]
    ids = post_completion(client, prompt=[[97, 98], [120, 121, 122]])["choices"]
    assert ids == strings
    assert post_completion(client)["choices"] == strings[:1]
    assert post_completion(client, prompt=[97, 98])["choices"] == strings[:1]


def test_a_chat_is_a_completion_of_its_prompt(client, policy):
    reply = post_chat(client)
    (choice,) = reply["choices"]
    sample = draw_sample(policy, "Hi\n\n", max_new_tokens=9)
    assert choice["message"] == {
        "role": "assistant",
        "content": sample.text,
        "refusal": None,
    }
    assert choice["finish_reason"] == sample.finish_reason
    assert reply["object"] == "chat.completion"

    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    messages = [{"role": "user", "content": parts}]
    assert post_chat(client, messages=messages)["choices"] == reply["choices"]
    longest = post_chat(client, max_tokens=None)
    assert longest["usage"]["total_tokens"] <= CONFIG.max_length


def test_a_chat_template_is_used(policy):
    template = make_template(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:", BYTES
    )
    app = make_app(dataclasses.replace(policy, template=template), "tiny", queue_limit=16)
    with testclient.TestClient(app) as client:
        (choice,) = post_chat(client)["choices"]
        sample = draw_sample(policy, "<user>Hi:", max_new_tokens=9)
        assert choice["message"]["content"] == sample.text

        messages = [{"role": "user", "content": "<|endoftext|>"}]
        refused = post_chat(client, 400, messages=messages)
        assert "which is a token of this model" in refused["error"]["message"]


def test_a_stop_string_ends_the_text(client):
    whole = post_completion(client, max_tokens=30)
    text = whole["choices"][0]["text"]
    stop = text[5:7]
    before_stop = text[: text.index(stop)]
    reply = post_completion(client, max_tokens=30, stop=["never there", stop])
    assert reply["choices"][0] == {
        **whole["choices"][0],
        "text": before_stop,
        "finish_reason": "stop",
    }
    assert reply["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    chunks = stream_events(client, "/v1/completions", prompt="ab", max_tokens=30, stop=stop)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == before_stop


def test_a_streamed_completion_joins_to_the_whole_text(client):
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 20, "echo": True}
    whole = post_completion(client, **body)
    options = {"include_usage": True}
    *chunks, last = stream_events(client, "/v1/completions", **body, stream_options=options)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len(chunks) > 8

    choices = [chunk["choices"][0] for chunk in chunks]
    for index, expected in enumerate(whole["choices"]):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == expected["text"]
        finish_reasons = [choice["finish_reason"] for choice in own]
        assert finish_reasons.pop() == expected["finish_reason"]
        assert not any(finish_reasons)


def test_a_streamed_chat_joins_to_the_whole_message(client):
    opening, *chunks = stream_events(
        client, "/v1/chat/completions", messages=MESSAGES, max_tokens=9
    )
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == post_chat(client)["choices"][0]["message"]["content"]


def test_echoed_logprobs_are_those_of_the_network(client):
    prompts = ["a", "some text", "b" * 63 + "c"]
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    expected = stages.plain_logprobs(
        model,
        tiny_models.random_params(model),
        [BYTES.encode(prompt) for prompt in prompts],
    )
    reply = post_completion(client, prompt=prompts, echo=True, logprobs=2, max_tokens=0)
    assert reply["usage"] == {
        "prompt_tokens": 74,
        "completion_tokens": 0,
        "total_tokens": 74,
    }
    for prompt, choice, logprobs in zip(prompts, reply["choices"], expected, strict=True):
        found = choice["logprobs"]
        assert choice["text"] == prompt == "".join(found["tokens"])
        assert found["text_offset"] == list(range(len(prompt)))
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        np.testing.assert_allclose(found["token_logprobs"][1:], logprobs[1:], atol=2e-5)

    without_top = post_completion(
        client, prompt=prompts, echo=True, logprobs=0, max_tokens=0
    )
    for plain, choice in zip(without_top["choices"], reply["choices"], strict=True):
        assert plain["logprobs"]["top_logprobs"] is None
        np.testing.assert_allclose(
            plain["logprobs"]["token_logprobs"][1:],
            choice["logprobs"]["token_logprobs"][1:],
            atol=1e-5,
        )


def test_greedy_tokens_have_the_highest_logprobs(client):
    reply = post_completion(client, logprobs=3, max_tokens=6, temperature=0, echo=True)
    found = reply["choices"][0]["logprobs"]
    assert len(found["tokens"]) == 8
    sampled = zip(found["token_logprobs"][2:], found["top_logprobs"][2:], strict=True)
    for logprob, top in sampled:
        assert logprob == pytest.approx(max(top.values()), abs=1e-5)
        assert sum(np.exp(list(top.values()))) <= 1

    reply = post_chat(client, logprobs=True, top_logprobs=2, temperature=0)
    for entry in reply["choices"][0]["logprobs"]["content"]:
        first, second = (top["logprob"] for top in entry["top_logprobs"])
        assert entry["logprob"] == pytest.approx(first, abs=1e-5)
        assert first >= second


def test_logprobs_are_at_temperature_1_whatever_the_sampling_temperature(client):
    body = {"logprobs": 1, "max_tokens": 6, "temperature": 2}
    sampled = post_completion(client, **body)["choices"][0]["logprobs"]
    echoed = post_completion(client, **body, echo=True)["choices"][0]["logprobs"]
    assert sampled["token_logprobs"] == echoed["token_logprobs"][2:]
    assert sampled["tokens"] == echoed["tokens"][2:]


def test_an_answer_does_not_depend_on_other_requests_in_its_batch(client, policy):
    bodies = []
    for i in range(4):
        bodies.append(
            {
                "prompt": "abc"[: 1 + i % 3],
                "seed": i,
                "max_tokens": 5 + 4 * i,
                "temperature": i / 3,
            }
        )
    alone = [post_completion(client, **body)["choices"] for body in bodies]

    engine = GatedEngine(policy.engine)
    gated = dataclasses.replace(policy, engine=engine)
    app = make_app(gated, "tiny", queue_limit=BATCH_SIZE)
    with (
        testclient.TestClient(app) as other,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        # While the first request runs, the others wait and form one batch.
        first = threads.submit(post_completion, other)
        assert engine.entered.acquire(timeout=100)
        futures = [threads.submit(post_completion, other, **body) for body in bodies]
        while len(app.state.batcher._waiting) < len(bodies):
            assert not any(future.done() for future in futures)
        refused = post_completion(other, 429)["error"]["message"]
        assert "4 requests are waiting and at most 4 may" in refused

        engine.release.release(2)
        assert [future.result()["choices"] for future in futures] == alone
        assert first.result()["choices"] == post_completion(client)["choices"]
        assert app.state.batcher.batch_sizes == [1, 4]


def run_together(policy, engine_of, posts):
    """(status, body) of requests that share one batch."""
    engine = engine_of(policy.engine)
    app = make_app(dataclasses.replace(policy, engine=engine), "tiny", queue_limit=8)
    with (
        testclient.TestClient(app, raise_server_exceptions=False) as client,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        # While the first request runs, the others wait and form one batch.
        first = threads.submit(client.post, "/v1/completions", json=posts[0][1])
        assert engine.entered.acquire(timeout=100)
        futures = [threads.submit(client.post, path, json=body) for path, body in posts]
        engine.release.release(20)
        replies = [future.result(timeout=100) for future in futures]
        first.result(timeout=100)
    return [(reply.status_code, reply.json()) for reply in replies]


def test_an_empty_chat_changes_no_other_request(policy):
    body = {"model": "tiny", "seed": 1, "max_tokens": 5}
    valid = ("/v1/chat/completions", {**body, "messages": MESSAGES})
    posts = [("/v1/completions", {**body, "prompt": "ab"}), valid, valid]
    for content in ("", []):
        message = {"role": "user", "content": content}
        posts.append(("/v1/chat/completions", {**body, "messages": [message]}))
    replies = run_together(policy, GatedEngine, posts)
    assert [status for status, _ in replies] == [200, 200, 200, 400, 400]
    assert replies[1][1]["choices"] == replies[2][1]["choices"]


class FailingEngine(GatedEngine):
    """Fails for batches with a certain prompt."""

    def stream(self, requests, stop_token_mask=None):
        if any(len(request.prompt) == 7 for request in requests):
            raise ZeroDivisionError
        return super().stream(requests, stop_token_mask)


def test_a_request_that_fails_in_a_batch_fails_alone(policy, client):
    body = {"model": "tiny", "seed": 1, "max_tokens": 5}
    prompts = ("ab", "abcdefg", "abc")
    posts = [("/v1/completions", {**body, "prompt": prompt}) for prompt in prompts]
    replies = run_together(policy, FailingEngine, posts)
    assert [status for status, _ in replies] == [200, 500, 200]
    for (_, reply), prompt in zip(replies, prompts, strict=True):
        if prompt != "abcdefg":
            alone = post_completion(client, prompt=prompt, max_tokens=5)
            assert reply["choices"] == alone["choices"]


def test_bytes_and_offsets_of_tokens_inside_a_character(client):
    """The policy's tokens are bytes, and "é" has two of them."""
    echo = {"prompt": "é!a", "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = post_completion(client, **echo)["choices"][0]
    assert choice["text"] == "é!a"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
    # U+2028 takes three bytes.
    echo["prompt"] = "a\u2028b"
    assert post_completion(client, **echo)["choices"][0]["logprobs"]["text_offset"] == [
        *(0, 1, 1, 1, 2),
    ]
    sampled = post_chat(client, logprobs=True, top_logprobs=2, max_tokens=20)
    for entry in sampled["choices"][0]["logprobs"]["content"]:
        for token in (entry, *entry["top_logprobs"]):
            assert len(token["bytes"]) == 1 or token["token"] == "<|endoftext|>"


def test_events_have_no_line_breaks_but_their_own(client, monkeypatch):
    monkeypatch.setattr(TextStream, "add", lambda *_, **__: "a\u2028b\u0085c")
    body = {"model": "tiny", "prompt": "ab", "stream": True, "max_tokens": 2}
    reply = client.post("/v1/completions", json=body)
    for line in reply.text.splitlines():
        assert not line or line.startswith("data: ")
    assert reply.content.isascii()


def test_an_internal_error_is_reported_without_details(client, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "stream", lambda *_: 1 / 0)
        error = post_completion(client, 500)["error"]
        assert error["message"] == "internal error; see the server's log"
        assert error["type"] == "server_error"
        assert "ZeroDivisionError" in caplog.text
    assert post_completion(client)["choices"]  # the server still runs
