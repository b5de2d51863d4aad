"""The server, in this process and as a command: what clients get, alone and in company, and
what they may not ask."""

import asyncio
import concurrent.futures
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.data.chat_template import make_template
from instructax.data.tokenizer import load_tokenizer, save_tokenizer
from instructax.models import Transformer
from instructax.serving.chat import Policy
from instructax.serving.engine import Draw, Engine
from instructax.serving.text_stream import TextStream

pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")
from instructax.serving.server.app import make_app  # noqa: E402
from instructax.serving.server.batcher import Batcher, Busy, Stopping  # noqa: E402

pytest_plugins = ("tests.support.pipeline_fixture",)

ROOT = Path(__file__).resolve().parents[3]
BYTES = load_tokenizer("bytes")
CONFIG = tiny_models.gpt_config(vocab_size=257, max_length=64)
ROWS = 4


@pytest.fixture(scope="module")
def policy():
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    engine = Engine(model, tiny_models.random_params(model), eos_id=BYTES.eos_id, rows=ROWS)
    return Policy(engine=engine, tokenizer=BYTES, template=None)


@pytest.fixture
def client(policy):
    with testclient.TestClient(
        make_app(policy, "tiny", queue_limit=16), raise_server_exceptions=False
    ) as client:
        yield client


def completion(client, status=200, **fields):
    reply = client.post(
        "/v1/completions", json={"model": "tiny", "prompt": "ab", "seed": 1, **fields}
    )
    assert reply.status_code == status, reply.text
    return reply.json()


def conversation(client, status=200, **fields):
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "tiny", "messages": messages, "seed": 1, "max_tokens": 9, **fields}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def events(client, path, **fields):
    """The events of a stream; it must end with [DONE]."""
    with client.stream(
        "POST", path, json={"model": "tiny", "seed": 1, "stream": True, **fields}
    ) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(
            "text/event-stream"
        )
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def drawn(policy, prompt, **changes):
    """(text, tokens, reason of the end) of a sample, from the engine itself."""
    values = {"seed": 1, "number": 0, "temperature": 1.0, "limit": 16, **changes}
    draw, stream = Draw(prompt=BYTES.encode(prompt), **values), TextStream(BYTES)
    for (piece,) in policy.engine.stream([draw]):
        stream.add(piece.tokens, over=piece.over, ended=piece.ended)
    return stream.text, stream.tokens, stream.finish


def test_the_models_are_listed(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/health").status_code == 200


def test_a_completion_is_what_the_engine_draws(client, policy):
    reply = completion(client, n=2, max_tokens=11, temperature=0.8)
    wanted = [
        drawn(policy, "ab", limit=11, temperature=0.8, number=number) for number in (0, 1)
    ]
    assert [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]] == [
        (text, finish) for text, _, finish in wanted
    ]
    tokens = sum(tokens for _, tokens, _ in wanted)
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": tokens,
        "total_tokens": 2 + tokens,
    }
    assert (
        completion(client)["choices"][0]["text"] == drawn(policy, "ab")[0]
    )  # 16 tokens at temperature 1
    likeliest = [
        completion(client, temperature=0, seed=seed)["choices"][0]["text"]
        for seed in (1, 2)
    ]
    assert likeliest == [drawn(policy, "ab", temperature=0.0)[0]] * 2
    assert len({completion(client, seed=None)["choices"][0]["text"] for _ in range(3)}) == 3


def test_prompts_are_texts_or_tokens(client):
    texts = completion(client, prompt=["ab", "xyz"])
    assert (
        completion(client, prompt=[[97, 98], [120, 121, 122]])["choices"]
        == texts["choices"]
    )
    assert (
        completion(client, prompt=[97, 98])["choices"]
        == completion(client)["choices"]
        == texts["choices"][:1]
    )


def test_a_chat_is_a_completion_of_its_prompt(client, policy):
    reply = conversation(client)
    (choice,) = reply["choices"]
    text, _, finish = drawn(policy, "Hi\n\n", limit=9)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert (choice["finish_reason"], reply["object"]) == (finish, "chat.completion")
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
        }
    ]
    assert conversation(client, messages=parts)["choices"] == reply["choices"]
    assert (
        conversation(client, max_tokens=None)["usage"]["total_tokens"] <= CONFIG.max_length
    )


def test_a_template_is_used(policy):
    template = make_template(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:", BYTES
    )
    app = make_app(dataclasses.replace(policy, template=template), "tiny", queue_limit=16)
    with testclient.TestClient(app) as client:
        assert (
            conversation(client)["choices"][0]["message"]["content"]
            == drawn(policy, "<user>Hi:", limit=9)[0]
        )
        refused = conversation(
            client, 400, messages=[{"role": "user", "content": "<|endoftext|>"}]
        )
        assert "which is a token of this model" in refused["error"]["message"]


def test_a_stop_string_ends_a_text(client):
    whole = completion(client, max_tokens=30)
    text = whole["choices"][0]["text"]
    stop = text[5:7]
    reply = completion(client, max_tokens=30, stop=["never there", stop])
    assert reply["choices"][0] == {
        **whole["choices"][0],
        "text": text[: text.index(stop)],
        "finish_reason": "stop",
    }
    assert reply["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    pieces = events(client, "/v1/completions", prompt="ab", max_tokens=30, stop=stop)
    assert (
        "".join(piece["choices"][0]["text"] for piece in pieces) == text[: text.index(stop)]
    )


def test_a_stream_is_the_text_in_pieces(client):
    whole = completion(client, prompt=["ab", "c"], n=2, max_tokens=20, echo=True)
    asked = {
        "prompt": ["ab", "c"],
        "n": 2,
        "max_tokens": 20,
        "echo": True,
        "stream_options": {"include_usage": True},
    }
    *pieces, last = events(client, "/v1/completions", **asked)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len(pieces) > 8
    for index, choice in enumerate(whole["choices"]):
        own = [
            piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == index
        ]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [
            choice["finish_reason"]
        ]
    chat = conversation(client)
    messages = [{"role": "user", "content": "Hi"}]
    opening, *pieces = events(
        client, "/v1/chat/completions", messages=messages, max_tokens=9
    )
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == chat["choices"][0]["message"]["content"]


def test_echoed_log_probabilities_are_those_of_the_scorer(client, policy):
    prompts = ["a", "some text", "b" * 63 + "c"]
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    wanted = stages.plain_logprobs(
        model,
        tiny_models.random_params(model),
        [BYTES.encode(prompt) for prompt in prompts],
    )
    reply = completion(client, prompt=prompts, echo=True, logprobs=2, max_tokens=0)
    assert reply["usage"] == {
        "prompt_tokens": 74,
        "completion_tokens": 0,
        "total_tokens": 74,
    }
    for prompt, choice, logprobs in zip(prompts, reply["choices"], wanted, strict=True):
        found = choice["logprobs"]
        assert choice["text"] == prompt == "".join(found["tokens"])
        assert found["text_offset"] == list(range(len(prompt)))
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        np.testing.assert_allclose(found["token_logprobs"][1:], logprobs[1:], atol=2e-5)
    plain = completion(client, prompt=prompts, echo=True, logprobs=0, max_tokens=0)
    for without, choice in zip(plain["choices"], reply["choices"], strict=True):
        assert without["logprobs"]["top_logprobs"] is None
        np.testing.assert_allclose(
            without["logprobs"]["token_logprobs"][1:],
            choice["logprobs"]["token_logprobs"][1:],
            atol=1e-5,
        )


def test_log_probabilities_of_what_is_drawn_are_at_temperature_1(client):
    reply = completion(
        client, prompt="ab", logprobs=3, max_tokens=6, temperature=0, echo=True
    )
    found = reply["choices"][0]["logprobs"]
    assert len(found["tokens"]) == 8
    for logprob, top in zip(
        found["token_logprobs"][2:], found["top_logprobs"][2:], strict=True
    ):
        assert logprob == pytest.approx(
            max(top.values()), abs=1e-5
        )  # the likeliest was taken
        assert sum(np.exp(list(top.values()))) <= 1
    warm = completion(client, prompt="ab", logprobs=1, max_tokens=6, temperature=2)[
        "choices"
    ][0]["logprobs"]
    again = completion(
        client, prompt="ab", logprobs=1, max_tokens=6, temperature=2, echo=True
    )["choices"][0]["logprobs"]
    assert (
        warm["token_logprobs"] == again["token_logprobs"][2:]
        and warm["tokens"] == again["tokens"][2:]
    )
    entries = conversation(client, logprobs=True, top_logprobs=2, temperature=0)["choices"][
        0
    ]["logprobs"]["content"]
    for entry in entries:
        first, second = (top["logprob"] for top in entry["top_logprobs"])
        assert entry["logprob"] == pytest.approx(first, abs=1e-5) and first >= second


MALFORMED = [
    ("/v1/completions", b"{", 400, "the body is not JSON"),
    ("/v1/completions", b"\xff", 400, "the body is not JSON"),
    ("/v1/completions", b"[" * 100000, 400, "the body is not JSON"),
    ("/v1/completions", b"[1]", 400, "the body must be a JSON object"),
    ("/v1/completions", {}, 400, "model must be the name of a model"),
    (
        "/v1/completions",
        {"model": "gpt-4"},
        404,
        "there is no model 'gpt-4' here, only 'tiny'",
    ),
    ("/v1/completions", {"model": "tiny"}, 400, "prompt must be a text"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt has no token"),
    ("/v1/completions", {"prompt": []}, 400, "prompt must be a text"),
    ("/v1/completions", {"prompt": ["a", 3]}, 400, "prompt must be a text"),
    (
        "/v1/completions",
        {"prompt": [[1, "a"]]},
        400,
        'prompt holds "a"; token ids are integers from 0 to 256',
    ),
    (
        "/v1/completions",
        {"prompt": [1, 257]},
        400,
        "prompt holds 257; token ids are integers from 0 to 256",
    ),
    ("/v1/completions", {"prompt": "\ud800"}, 400, "lone surrogate"),
    (
        "/v1/completions",
        {"prompt": "a" * 60},
        400,
        "longest text is 64 tokens, but 76 were asked for (60 of the prompt",
    ),
    (
        "/v1/completions",
        {"max_tokens": 0},
        400,
        "max_tokens = 0 must be an integer from 1 to 64",
    ),
    ("/v1/completions", {"max_tokens": "9"}, 400, 'max_tokens = "9" must be an integer'),
    ("/v1/completions", {"max_tokens": True}, 400, "max_tokens = true must be an integer"),
    (
        "/v1/completions",
        {"temperature": -1},
        400,
        "temperature = -1 must be a number from 0 to 2",
    ),
    (
        "/v1/completions",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        400,
        "NaN is no number of JSON",
    ),
    ("/v1/completions", {"n": 0}, 400, "n = 0 must be an integer from 1 to 16"),
    (
        "/v1/completions",
        {"n": 9, "prompt": ["a", "b"]},
        400,
        "n = 9 of 2 prompts are more than 16 samples",
    ),
    (
        "/v1/completions",
        {"seed": 2**31},
        400,
        "seed = 2147483648 must be an integer from 0 to 2147483647",
    ),
    (
        "/v1/completions",
        {"stop": [""]},
        400,
        'stop = [""] must be a text or up to 4 of them, none empty',
    ),
    ("/v1/completions", {"stop": list("abcde")}, 400, "stop = ["),
    (
        "/v1/completions",
        {"logprobs": 6},
        400,
        "logprobs = 6 must be an integer from 0 to 5",
    ),
    ("/v1/completions", {"logprobs": 1, "stream": True}, 400, "logprobs are not streamed"),
    ("/v1/completions", {"echo": 1}, 400, "echo = 1 must be true or false"),
    ("/v1/completions", {"top_p": 0.9}, 400, "top_p is not supported here: leave it out"),
    ("/v1/completions", {"best_of": 3}, 400, "best_of is not supported here"),
    (
        "/v1/completions",
        {"tempreature": 1},
        400,
        "tempreature is not a field of this request",
    ),
    ("/v1/chat/completions", {}, 400, "messages must be a list of messages"),
    (
        "/v1/chat/completions",
        {"messages": []},
        400,
        "messages must be a list with one message",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user"}]},
        400,
        "messages[0] must be an object with role",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "x", "content": "a"}]},
        400,
        "messages[0].role = 'x' must be",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"image": 1}]}]},
        400,
        "a part that is not a",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a" * 64}]},
        400,
        "longest text is 64 tokens",
    ),
    (
        "/v1/chat/completions",
        {"top_logprobs": 1, "messages": [{"role": "user", "content": "a"}]},
        400,
        "goes with",
    ),
    (
        "/v1/chat/completions",
        {"tools": [{}], "messages": []},
        400,
        "tools is not supported here",
    ),
    ("/v1/completions", b" " * (8 * 2**20 + 1), 413, "the body is larger than"),
    ("/v1/nowhere", {}, 404, "Not Found"),
    ("/v1/models", {}, 405, "Method Not Allowed"),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    MALFORMED,
    ids=[case[3][:30] for case in MALFORMED],
)
def test_a_malformed_request_is_refused_in_one_line(client, path, body, status, message):
    if isinstance(body, dict) and status == 400 and body:
        defaults = {"model": "tiny"} | (
            {"prompt": "ab"}
            if path == "/v1/completions" and body != {"model": "tiny"}
            else {}
        )
        body = {**defaults, **body}
    elif body == {} and path == "/v1/chat/completions":
        body = {"model": "tiny"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = client.post(path, content=content)
    error = reply.json()["error"]
    assert reply.status_code == status and message in error["message"]
    assert "\n" not in error["message"] and set(error) == {
        "message",
        "type",
        "param",
        "code",
    }


class Held:
    """An engine whose batches wait until they are let go."""

    def __init__(self, engine):
        self._engine, self.rows = engine, engine.rows
        self.entered, self.let_go = threading.Semaphore(0), threading.Semaphore(0)

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def stream(self, *arguments):
        self.entered.release()
        assert self.let_go.acquire(timeout=100)
        return self._engine.stream(*arguments)


@pytest.fixture
def held(policy):
    """(the application, its engine)."""
    engine = Held(policy.engine)
    app = make_app(dataclasses.replace(policy, engine=engine), "tiny", queue_limit=ROWS)
    return app, engine


def test_an_answer_is_the_same_in_company(client, held):
    asked = [
        {
            "prompt": "abc"[: 1 + i % 3],
            "seed": i,
            "max_tokens": 5 + 4 * i,
            "temperature": i / 3,
        }
        for i in range(4)
    ]
    alone = [completion(client, **fields)["choices"] for fields in asked]
    app, engine = held
    with (
        testclient.TestClient(app) as other,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        first = threads.submit(completion, other)
        assert engine.entered.acquire(timeout=100)
        futures = [threads.submit(completion, other, **fields) for fields in asked]
        while len(app.state.batcher._waiting) < len(asked):
            assert not any(future.done() for future in futures)
        # One more than may wait.
        assert (
            "4 requests wait already, of 4 that may"
            in completion(other, 429)["error"]["message"]
        )
        engine.let_go.release(2)
        assert [future.result()["choices"] for future in futures] == alone
        assert first.result()["choices"] == completion(client)["choices"]
        assert app.state.batcher.batches == [1, 4]


def test_who_has_left_gives_up_the_place(policy):
    engine = Held(policy.engine)
    draw = Draw(prompt=BYTES.encode("ab"), seed=1, number=0, temperature=1.0, limit=8)

    async def tokens(batcher):
        return [piece.tokens async for _, piece, _ in batcher.draw([draw], chat=False)]

    async def session(batcher):
        batcher.begin()
        first = asyncio.create_task(tokens(batcher))
        assert await asyncio.to_thread(engine.entered.acquire, timeout=100)
        # Three wait while the first is drawn, and one of them leaves.
        later = [asyncio.create_task(tokens(batcher)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await tokens(batcher)
        later[1].cancel()
        await asyncio.wait({later[1]})
        extra = asyncio.create_task(tokens(batcher))  # there is room again
        await asyncio.sleep(0)
        engine.let_go.release(2)
        found = await asyncio.wait_for(
            asyncio.gather(first, later[0], later[2], extra), 100
        )
        assert all(
            np.array_equal(np.concatenate(own), np.concatenate(found[0])) for own in found
        )
        # Whoever asks while the server stops is told so.
        engine.let_go.release()
        await asyncio.to_thread(batcher.close)
        with pytest.raises(Stopping):
            await tokens(batcher)

    batcher = Batcher(engine, ends=np.zeros((257,), bool), queue_limit=3, top=1)
    asyncio.run(session(batcher))
    assert batcher.batches == [1, 3]


def test_a_fault_of_the_program_is_told_without_its_insides(
    client, policy, monkeypatch, caplog
):
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "stream", lambda *_: 1 / 0)
        error = completion(client, 500)["error"]
        assert (
            error["message"] == "the server has failed; its log says how"
            and error["type"] == "server_error"
        )
        assert "ZeroDivisionError" in caplog.text
    assert completion(client)["choices"]  # and goes on


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the process, its address) of a server with a random policy."""
    workdir = tmp_path_factory.mktemp("served") / "tiny"
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    stages.fabricated(workdir, CONFIG, tiny_models.random_params(model), "bytes")
    save_tokenizer(BYTES, str(workdir / "tokenizer.json"))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "serve.py"),
        f"--workdir={workdir}",
        "--port=0",
        "--rows=2",
    ]
    # A shell lets what it starts in the background ignore Ctrl-C, and what this process
    # ignores the server would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    signal.signal(signal.SIGINT, before)
    line = process.stdout.readline()
    assert line.startswith("tiny is served on http://127.0.0.1:"), process.stderr.read()
    yield process, line.split()[4].rstrip(",")
    if process.poll() is None:
        process.kill()
        process.wait()


def test_openais_client_is_served_and_ctrl_c_ends_it(served, policy):
    openai = pytest.importorskip("openai")
    process, address = served
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "seed": 1}
        text = drawn(policy, "ab", limit=12)[0]
        assert client.completions.create(**asked).choices[0].text == text
        with client.completions.create(**asked, stream=True) as pieces:
            assert "".join(piece.choices[0].text for piece in pieces) == text
        messages = [{"role": "user", "content": "Hi"}]
        asked = {"model": "tiny", "messages": messages, "max_tokens": 9, "seed": 1}
        text = drawn(policy, "Hi\n\n", limit=9)[0]
        assert client.chat.completions.create(**asked).choices[0].message.content == text
        with client.chat.completions.create(**asked, stream=True) as pieces:
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
            client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError, match="longest text is 64 tokens"):
            client.completions.create(model="tiny", prompt="x" * 64)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: give --workdir=FOLDER of a finished run\n"),
        (("--workdir=/nowhere",), "error: --workdir = '/nowhere' is not a finished run"),
        (
            ("--workdir=/nowhere", "--rows=3", "--queue=2"),
            "error: --queue = 2 must be at least --rows = 3\n",
        ),
        (("--port=70000",), "port"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments, message):
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1
