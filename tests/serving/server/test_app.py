"""The server as a command: OpenAI's client, Ctrl-C, and mistakes in the command line."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import stages, tiny_models
from tests.support.openai_server import BYTES, CONFIG, MESSAGES, draw_sample

from instructax.data.tokenizer import save_tokenizer
from instructax.models.transformer import Transformer

pytest.importorskip("uvicorn")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(process, base URL) of a server with a random policy."""
    workdir = tmp_path_factory.mktemp("served") / "tiny"
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    stages.write_finished_run(workdir, CONFIG, tiny_models.random_params(model), "bytes")
    save_tokenizer(BYTES, str(workdir / "tokenizer.json"))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "serve.py"),
        f"--workdir={workdir}",
        "--port=0",
        "--batch_size=2",
    ]
    # A process inherits ignored signals, and a shell lets background jobs ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    signal.signal(signal.SIGINT, before)
    with process:
        line = process.stdout.readline()
        if not line.startswith("serving tiny on http://127.0.0.1:"):
            pytest.fail(process.stderr.read())
        yield process, line.split()[3]
        if process.poll() is None:
            process.kill()


def test_openais_client_is_served_until_ctrl_c(served, policy):
    openai = pytest.importorskip("openai")
    process, base_url = served
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]

        body = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "seed": 1}
        text = draw_sample(policy, "ab", max_new_tokens=12).text
        assert client.completions.create(**body).choices[0].text == text
        with client.completions.create(**body, stream=True) as chunks:
            assert "".join(chunk.choices[0].text for chunk in chunks) == text

        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "seed": 1}
        text = draw_sample(policy, "Hi\n\n", max_new_tokens=9).text
        assert client.chat.completions.create(**body).choices[0].message.content == text
        with client.chat.completions.create(**body, stream=True) as chunks:
            pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == text

        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
            client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError, match="context length is 64 tokens"):
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
            ("--workdir=/nowhere", "--batch_size=3", "--queue_limit=2"),
            "error: --queue_limit = 2 must be at least --batch_size = 3\n",
        ),
        (("--port=70000",), "port"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments, message):
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1
