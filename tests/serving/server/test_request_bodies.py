"""Malformed and unsupported requests are refused; neutral values are accepted."""

import json

import pytest
from tests.support.openai_server import MESSAGES, post_chat, post_completion

# Bodies that are not a valid request at all: (path, body, status, part of the message).
INVALID_BODIES = [
    ("/v1/completions", b"{", 400, "the body is not JSON"),
    ("/v1/completions", b"\xff", 400, "the body is not JSON"),
    ("/v1/completions", b"[" * 100000, 400, "the body is not JSON"),
    ("/v1/completions", b"[1]", 400, "the body must be a JSON object"),
    (
        "/v1/completions",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        400,
        "NaN is not a JSON number",
    ),
    ("/v1/completions", b" " * (8 * 2**20 + 1), 413, "the body is larger than"),
    ("/v1/nowhere", b"{}", 404, "Not Found"),
    ("/v1/models", b"{}", 405, "Method Not Allowed"),
]

# Changes to a valid body of /v1/completions: (changes, param, part of the message).
# None removes a field.
INVALID_COMPLETIONS = [
    ({"model": None}, "model", "model is required"),
    ({"model": 3}, "model", "model = 3 must be a valid string"),
    ({"prompt": None}, "prompt", "prompt must be a string"),
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "prompt must be a string"),
    ({"prompt": ["a", 3]}, "prompt", "prompt must be a string"),
    (
        {"prompt": [[1, "a"]]},
        "prompt",
        'prompt contains "a"; token ids are integers from 0 to 256',
    ),
    (
        {"prompt": [1, 257]},
        "prompt",
        "prompt contains 257; token ids are integers from 0 to 256",
    ),
    ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
    (
        {"prompt": "a" * 60},
        "max_tokens",
        "context length is 64 tokens, but 76 were requested (60 of the prompt, 16 of",
    ),
    ({"max_tokens": 0}, "max_tokens", "max_tokens = 0 must be an integer from 1 to 64"),
    ({"max_tokens": "9"}, "max_tokens", 'max_tokens = "9" must be a valid integer'),
    ({"max_tokens": True}, "max_tokens", "max_tokens = true must be a valid integer"),
    (
        {"temperature": -1},
        "temperature",
        "temperature = -1 must be greater than or equal to 0",
    ),
    (
        {"temperature": 2.5},
        "temperature",
        "temperature = 2.5 must be less than or equal to 2",
    ),
    ({"temperature": True}, "temperature", "temperature = true must be a valid number"),
    ({"n": 0}, "n", "n = 0 must be an integer from 1 to 16"),
    ({"n": 1.0}, "n", "n = 1.0 must be a valid integer"),
    ({"n": 9, "prompt": ["a", "b"]}, "n", "n = 9 for 2 prompts is more than 16 samples"),
    ({"seed": 2**31}, "seed", "seed = 2147483648 must be less than 2147483648"),
    ({"stop": [""]}, "stop", 'stop[0] = "" must have at least 1 character'),
    ({"stop": list("abcde")}, "stop", "must have at most 4 items, not 5"),
    ({"stop": 3}, "stop", "stop = 3 must be a string or a list of up to 4 strings"),
    ({"logprobs": 6}, "logprobs", "logprobs = 6 must be less than or equal to 5"),
    ({"logprobs": 1, "stream": True}, "logprobs", "logprobs cannot be streamed"),
    ({"echo": 1}, "echo", "echo = 1 must be a valid boolean"),
    ({"stream_options": []}, "stream_options", "stream_options = [] must be a valid dict"),
    (
        {"stream_options": {"include_usage": "false"}},
        "stream_options",
        'stream_options.include_usage = "false" must be a valid boolean',
    ),
    (
        {"stream_options": {"usage": True}},
        "stream_options",
        "stream_options.usage is not a field of this request",
    ),
    ({"\ud800": 1}, None, 'the field name "\\ud800" is not valid Unicode'),
    (
        {"stream_options": {"\udfff": 1}},
        "stream_options",
        'stream_options = "\\udfff" must be a valid string',
    ),
    ({"top_p": 0.9}, "top_p", "top_p is not supported here: leave it out"),
    ({"top_p": True}, "top_p", "top_p is not supported here: leave it out"),
    ({"best_of": 3}, "best_of", "best_of is not supported here"),
    ({"tempreature": 1}, "tempreature", "tempreature is not a field of this request"),
    ({"tools": []}, "tools", "tools is not a field of this request"),
]

# Changes to a valid body of /v1/chat/completions.
INVALID_CHATS = [
    ({"messages": None}, "messages", "messages must be a list of messages"),
    ({"messages": []}, "messages", "messages must be a list of at least one message"),
    (
        {"messages": [{"role": "user"}]},
        "messages",
        "messages[0] must be an object with role",
    ),
    (
        {"messages": [{"role": "x", "content": "a"}]},
        "messages",
        "messages[0].role = 'x' must be",
    ),
    (
        {"messages": [{"role": "user", "content": [{"image": 1}]}]},
        "messages",
        'messages contain the part {"image": 1}; only parts {"type": "text", "text"',
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "text": "a", "image_url": {}}],
                }
            ]
        },
        "messages",
        'messages contain the part {"type": "image_url"',
    ),
    (
        {"messages": [{"role": "user", "content": ""}]},
        "messages",
        "messages have no text; they need at least one token",
    ),
    (
        {"messages": [{"role": "user", "content": []}]},
        "messages",
        "messages have no text; they need at least one token",
    ),
    (
        {"messages": [{"role": "user", "content": "a" * 64}]},
        "max_tokens",
        "context length is 64 tokens",
    ),
    (
        {"max_completion_tokens": 0},
        "max_completion_tokens",
        "max_completion_tokens = 0 must be an integer from 1 to 64",
    ),
    ({"top_logprobs": 1}, "top_logprobs", "top_logprobs requires logprobs = true"),
    (
        {"top_logprobs": 21, "logprobs": True},
        "top_logprobs",
        "top_logprobs = 21 must be less than or equal to 20",
    ),
    ({"logprobs": True, "stream": True}, "logprobs", "logprobs cannot be streamed"),
    ({"tools": [{}]}, "tools", "tools is not supported here"),
    ({"echo": True}, "echo", "echo is not a field of this request"),
]


def check_error(reply, status, message, **fields):
    """Checks an error object; returns it."""
    error = reply.json()["error"]
    assert reply.status_code == status and message in error["message"]
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    for name, value in fields.items():
        assert error[name] == value


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    INVALID_BODIES,
    ids=[case[3][:30] for case in INVALID_BODIES],
)
def test_an_invalid_body_gets_a_one_line_error(client, path, body, status, message):
    check_error(client.post(path, content=body), status, message, param=None)


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    INVALID_COMPLETIONS,
    ids=[case[2][:30] for case in INVALID_COMPLETIONS],
)
def test_a_malformed_completion_gets_a_one_line_error(client, changes, param, message):
    body = {"model": "tiny", "prompt": "ab", **changes}
    body = {name: value for name, value in body.items() if value is not None}
    # json.dumps escapes lone surrogates, which the client's own encoder refuses.
    reply = client.post("/v1/completions", content=json.dumps(body).encode())
    check_error(reply, 400, message, param=param, type="invalid_request_error")


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    INVALID_CHATS,
    ids=[case[2][:30] for case in INVALID_CHATS],
)
def test_a_malformed_chat_gets_a_one_line_error(client, changes, param, message):
    body = {"model": "tiny", "messages": MESSAGES, **changes}
    body = {name: value for name, value in body.items() if value is not None}
    reply = client.post("/v1/chat/completions", json=body)
    check_error(reply, 400, message, param=param, type="invalid_request_error")


def test_another_model_is_not_found(client):
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = client.post(path, json={"model": "gpt-4"})
        check_error(
            reply,
            404,
            "there is no model 'gpt-4' here, only 'tiny'",
            param="model",
            code="model_not_found",
        )


def test_null_and_neutral_values_change_nothing(client):
    neutral = {
        "top_p": 1.0,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "somebody",
        "metadata": {"a": "b"},
        "stop": None,
        "n": None,
        "temperature": None,
        "stream": None,
    }
    completion = post_completion(client, **neutral, best_of=1, suffix="", logprobs=None)
    assert completion["choices"] == post_completion(client)["choices"]
    response_format = {"type": "text"}
    chat = post_chat(
        client, **neutral, tools=[], response_format=response_format, store=True
    )
    assert chat["choices"] == post_chat(client)["choices"]


def test_the_last_of_duplicate_fields_counts(client):
    body = b'{"model": "tiny", "prompt": "x", "prompt": "ab", "seed": 1}'
    reply = client.post("/v1/completions", content=body)
    assert reply.json()["choices"] == post_completion(client)["choices"]
