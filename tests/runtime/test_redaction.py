"""Redaction: what counts as a secret, and that secrets are never shown."""

import pytest

from instructax.runtime.redaction import HIDDEN, is_secret, printable, redact, redact_text

SECRET = [
    "token",
    "hf_token",
    "HF_TOKEN",
    "accessToken",
    "api_key",
    "api-key",
    "apiKey",
    "APIKEY",
    "secret",
    "password",
]
SECRET += ["wandb_key", "openai_key", "ssh_key", "auth", "pwd"]
SECRET += [
    "client_secret",
    "Authorization",
    "config.data.api_key",
    "aws_secret_access_key",
    "credentials",
]
OPEN = [
    "num_tokens",
    "tokens",
    "tokenizer",
    "pad_token_id",
    "pad_token",
    "eos_token",
    "bos_token",
    "prompt_tokens",
    "",
]
OPEN += [
    "tokens_per_second_per_device",
    "first_token",
    "token_count",
    "key",
    "rng_key",
    "num_kv_heads",
    "keep",
    "author",
]


@pytest.mark.parametrize("name", SECRET)
def test_secrets_are_recognized_by_name(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", OPEN)
def test_what_sounds_like_a_secret_is_none(name):
    assert not is_secret(name)


def test_a_config_without_its_secrets():
    config = {
        "steps": 3,
        "hub": {
            "hf_token": "hunter2",
            "pad_token_id": 0,
            "password": None,
            "api_key": "",
            "secret": ("hunter2",),
        },
        "tokenizer": "https://me:hunter2@host/t@1.json",
        "files": ("gs://hunter2@host/a", "a@b"),
        "flag": True,
        "api_key": {"value": "hunter2"},
    }
    assert redact(config) == {
        "steps": 3,
        "hub": {
            "hf_token": HIDDEN,
            "pad_token_id": 0,
            "password": None,
            "api_key": "",
            "secret": HIDDEN,
        },
        "tokenizer": f"https://{HIDDEN}@host/t@1.json",
        "files": (f"gs://{HIDDEN}@host/a", "a@b"),
        "flag": True,
        "api_key": HIDDEN,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("flag --config.api_key=hunter2: no int", f"flag --config.api_key={HIDDEN} no int"),
        ("config.hf_token = 'hunter2 x' must be", f"config.hf_token = {HIDDEN} must be"),
        ("{'password': 'hunter2', 'steps': 3}", f"{{'password': {HIDDEN}, 'steps': 3}}"),
        ("Authorization: Bearer hunter2", f"Authorization: Bearer {HIDDEN}"),
        ("no https://me:hunter2@host/x here", f"no https://{HIDDEN}@host/x here"),
        ("--config.folder='s3://a:p@hunter2@b/c'", f"--config.folder='s3://{HIDDEN}@b/c'"),
        ("password: hunter2 and more", f"password: {HIDDEN} and more"),
        ("x-api-key: hunter2", f"x-api-key: {HIDDEN}"),
        (
            "train.py --hf_token hunter2 --steps 3",
            f"train.py --hf_token {HIDDEN} --steps 3",
        ),
        ("Authorization: Token hunter2", f"Authorization: Token {HIDDEN}"),
        ("{'password': ['a', 'hunter2'], 'x': 1}", f"{{'password': {HIDDEN}, 'x': 1}}"),
        (r"api_key='a\'hunter2' x", f"api_key={HIDDEN} x"),
        ("a password of letters", "a password of letters"),
        (
            "num_tokens=3, one end token: name another",
            "num_tokens=3, one end token: name another",
        ),
    ],
)
def test_a_message_without_its_secrets(text, shown):
    assert redact_text(text) == shown


def test_control_characters_are_escaped():
    assert printable("a\x1b[2J\n\u202e\ud800é ") == "a\\x1b[2J\\n\\u202e\\ud800é "
