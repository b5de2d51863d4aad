"""Completions, chats and batch files from the command line's functions."""

import dataclasses
import json

import pytest

from instructax.config import ConfigError
from instructax.runtime.redaction import printable
from instructax.serving import chat, policy

pytest_plugins = ("tests.support.pipeline_fixture",)

SAMPLING = chat.SamplingParams(
    max_new_tokens=8, temperature=1.0, seed=0, num_samples=1, stop_strings=()
)
TOO_LONG = dataclasses.replace(SAMPLING, max_new_tokens=96)


@pytest.fixture
def printed(chain, capsys):
    """A function that completes prompts and returns the printed lines."""

    def complete(prompts, *, run="sft", **changes):
        sampling = dataclasses.replace(SAMPLING, **changes)
        capsys.readouterr()
        chat.print_completions(chain / run, prompts, sampling, dtype="float32")
        return capsys.readouterr().out.splitlines()

    return complete


def test_prompts_are_completed_reproducibly(printed):
    prompts = ["List two animals.\n", "List two animals.\n", "", "word " * 100]
    first, second, empty, long = printed(prompts)
    assert first != second  # each prompt has its own random key
    assert empty == "(the prompt has 0 tokens; between 1 and 88 are possible)"
    assert long.endswith("between 1 and 88 are possible)")
    assert printed(prompts[:2]) == [first, second]
    assert printed(prompts[:1], seed=1) != [first]


def test_greedy_completions_do_not_depend_on_the_seed(printed):
    prompts = ["Name a fruit.\n"]
    first = printed(prompts, run="ppo", temperature=0.0, seed=0)
    assert printed(prompts, run="ppo", temperature=0.0, seed=1) == first


def test_completions_that_leave_no_room_for_a_prompt_are_refused(chain, tmp_path):
    message = "max_new_tokens = 96 must be below the model's 96 tokens"
    with pytest.raises(ConfigError, match=message):
        chat.print_completions(chain / "sft", ["a"], TOO_LONG, dtype="float32")
    with pytest.raises(ConfigError, match=message):
        chat.run_chat(chain / "sft", ["a"], TOO_LONG, dtype="float32", system="")
    with pytest.raises(ConfigError, match=message):
        complete_lines([{"prompt": "a"}], tmp_path, chain, 1, max_new_tokens=96)


def complete_lines(lines, folder, chain, batch_size, **changes):
    """The completed lines of a JSONL file with `lines`."""
    source = folder / "prompts.jsonl"
    target = folder / f"completed-{batch_size}.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampling = dataclasses.replace(SAMPLING, **changes)
    chat.complete_file(
        chain / "sft", source, target, sampling, dtype="float32", batch_size=batch_size
    )
    # Not `splitlines`, which also splits at U+2028.
    return [json.loads(line) for line in target.read_text().split("\n") if line]


def test_a_file_is_completed_line_by_line(chain, tmp_path, printed):
    lines = [
        {"prompt": "List two animals.\n", "id": 7},
        {"prompt": "word " * 100},
        {"messages": [{"role": "user", "content": "Name a fruit."}]},
        {"prompt": "Name a fruit."},
        {"prompt": "List two animals.\n"},
    ]
    completed = complete_lines(lines, tmp_path, chain, 4, num_samples=2)
    for line, original in zip(completed, lines, strict=True):
        assert original.items() <= line.items()
    too_long = completed.pop(1)
    assert "between 1 and 88 are possible" in too_long["error"]
    assert "answers" not in too_long

    for line in completed:
        assert len(line["answers"]) == len(set(line["answers"])) == 2
        for finish, tokens in zip(line["finish"], line["tokens"], strict=True):
            assert finish == "stop" or tokens == 8
    assert completed[0]["answers"] != completed[-1]["answers"]

    # The batch size changes nothing, and single prompts get the same completions.
    one_by_one = complete_lines(lines, tmp_path, chain, 1, num_samples=2)
    assert one_by_one == [completed[0], too_long, *completed[1:]]
    answers = [printable(answer) for answer in completed[0]["answers"]]
    assert printed([lines[0]["prompt"]], num_samples=2) == answers

    with pytest.raises(ConfigError, match=r"completed-4\.jsonl exists already"):
        complete_lines(lines, tmp_path, chain, 4)


def test_lines_that_utf8_cannot_write_lose_no_other_line(chain, tmp_path):
    """A lone surrogate in a prompt is an error of its line, elsewhere it is kept."""
    lines = [
        {"prompt": "Name a fruit.", "note": "\ud800"},
        {"prompt": "\udfff"},
        {"prompt": "Name a fruit.", "note": "a\u2028b", "é": 1},
    ]
    completed = complete_lines(lines, tmp_path, chain, 2)
    for line, original in zip(completed, lines, strict=True):
        assert original.items() <= line.items()
    assert "lone surrogate" in completed[1]["error"]
    assert len(completed[0]["answers"]) == len(completed[2]["answers"]) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b"}')
    assert [line["prompt"] for line in chat._read_lines(source)] == ["a", "b"]


def test_an_interrupted_file_is_continued(chain, tmp_path, monkeypatch):
    lines = [{"prompt": f"Name {number} fruits."} for number in range(5)]
    (tmp_path / "whole").mkdir()
    whole = complete_lines(lines, tmp_path / "whole", chain, 2)

    complete_batch = chat._complete_batch
    batches = []

    def interrupted(policy, batch, sampling, first):
        batches.append(first)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return complete_batch(policy, batch, sampling, first)

    monkeypatch.setattr(chat, "_complete_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        complete_lines(lines, tmp_path, chain, 2)
    partial = tmp_path / "completed-2.jsonl.partial"
    # As if the process had been killed while it wrote a line.
    with partial.open("a") as file:
        file.write('{"prompt": "Na')
    with pytest.raises(ConfigError, match=r"partial was written with other flags"):
        complete_lines(lines, tmp_path, chain, 2, seed=77)
    assert complete_lines(lines, tmp_path, chain, 2) == whole
    assert batches == [0, 2, 2, 4]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:2: not JSON: "),
        ("[1]", r"prompts.jsonl:2: not a JSON object \('\[1\]'\)"),
        ('{"text": "x"}', "prompts.jsonl:2: give either prompt or messages"),
        ('{"prompt": 3}', "prompts.jsonl:2: prompt must be a string"),
        (
            '{"messages": []}',
            "prompts.jsonl:2: messages must be a list of at least one message",
        ),
        (
            '{"prompt": "a", "x": NaN}',
            "prompts.jsonl:2: not JSON: NaN is not a JSON number",
        ),
        ('{"prompt": "a", "x": -Infinity}', "prompts.jsonl:2: not JSON: -Infinity is not"),
        (
            '{"prompt": "a", "x": ' + "[" * 200_000,
            "prompts.jsonl:2: JSON is nested too deeply",
        ),
        (
            '{"prompt": "a", "tokens": 3}',
            "prompts.jsonl:2: the field 'tokens' would be overwritten by the results",
        ),
        ('{"prompt": "a", "answers": []}', "prompts.jsonl:2: the field 'answers' would be"),
    ],
)
def test_a_malformed_line_is_named_before_anything_is_sampled(line, message, tmp_path):
    source = tmp_path / "prompts.jsonl"
    target = tmp_path / "completed.jsonl"
    source.write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        chat.complete_file(
            "no workdir is read", source, target, SAMPLING, dtype="float32", batch_size=1
        )
    assert not target.exists()


def test_a_chat_continues_and_restarts(chain, capsys, monkeypatch):
    conversations = []
    encode = policy.encode_messages

    def record(messages, *rest):
        conversations.append(messages)
        return encode(messages, *rest)

    monkeypatch.setattr(policy, "encode_messages", record)
    user_turns = ["Name a fruit.", " ", "And another.", "/new", "Name a fruit."]
    chat.run_chat(chain / "sft", user_turns, SAMPLING, dtype="float32", system="")
    first, empty, second, _ = capsys.readouterr().out.splitlines()
    message = "the message ' ' is empty: type a question"
    assert empty == f"({message}; /new starts a new conversation)"
    assert conversations[0] == conversations[2]
    assert conversations[0] == [{"role": "user", "content": "Name a fruit."}]
    roles = [message["role"] for message in conversations[1]]
    assert roles == ["user", "assistant", "user"]
    assert printable(conversations[1][1]["content"]) == first
    assert second


class ControlCharacterTokenizer:
    """A tokenizer whose every token clears the screen."""

    def decode(self, ids):
        return "\x1b[2J\r\u202e" * len(ids)


def test_completions_cannot_control_the_terminal(chain, capsys):
    opened = policy.open_served(chain / "sft", dtype="float32", batch_size=1)
    prompt = opened.tokenizer.encode("Name a fruit.\n\n")
    hostile = dataclasses.replace(opened, tokenizer=ControlCharacterTokenizer())
    (text,) = chat._print_streamed(hostile, prompt, SAMPLING, 0, None)
    out = capsys.readouterr().out
    assert "\x1b" in text
    assert "\x1b" not in out
    assert out == f"{printable(text)}\n"
