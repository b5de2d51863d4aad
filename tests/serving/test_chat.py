"""A finished policy answers prompts, the same ones in the same way; what it cannot read it
says."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from instructax.checkpoints.steps import committed_steps
from instructax.config import ConfigError
from instructax.models import ComputeConfig
from instructax.runtime.redaction import printable
from instructax.serving import chat

pytest_plugins = ("tests.support.pipeline_fixture",)

COMPUTE = ComputeConfig(
    dtype="float32",
    decoding_dtype="float32",
    attention="jax",
    remat="none",
    head_chunk=8,
    microbatch_rows=1,
    tail_splits=0,
    slots=1,
    compaction_steps=0,
)
ASKING = chat.SamplingParams(length=8, temperature=1.0, seed=0, samples=1, stops=())


def test_a_policy_answers(chain, capsys):
    prompts = ["List two animals.\n", "List two animals.\n", "", "word " * 100]
    chat.talk(chain / "sft", prompts, ASKING, dtype="float32")
    first, second, empty, long = capsys.readouterr().out.splitlines()
    assert first != second  # each sample has its own key
    assert empty == "(the prompt has 0 tokens; between 1 and 88 are possible)"
    assert long.endswith("between 1 and 88 are possible)")
    chat.talk(chain / "sft", prompts[:2], ASKING, dtype="float32")
    assert capsys.readouterr().out.splitlines() == [first, second]
    chat.talk(
        chain / "sft", prompts[:1], dataclasses.replace(ASKING, seed=1), dtype="float32"
    )
    assert capsys.readouterr().out.splitlines() != [first]


def test_the_likeliest_answer_does_not_depend_on_the_seed(chain, capsys):
    for seed in (0, 1):
        likeliest = dataclasses.replace(ASKING, temperature=0.0, seed=seed)
        chat.talk(chain / "ppo", ["Name a fruit.\n"], likeliest, dtype="float32")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_a_step_that_was_kept_is_named(chain):
    steps = committed_steps(chain / "sft")
    assert len(steps) == 2
    kernels = {
        suffix: np.asarray(
            chat.open_policy(f"{chain / 'sft'}{suffix}", COMPUTE)[1]["embedding"]
        )
        for suffix in ("", *(f"@{step}" for step in steps))
    }
    assert np.array_equal(kernels[""], kernels[f"@{steps[-1]}"])
    assert not np.array_equal(kernels[""], kernels[f"@{steps[0]}"])
    kept = f"it kept the steps {steps[0]}, {steps[1]}"
    for suffix, more in (
        ("@7777", "$"),
        ("@best", ", and its run.best_metric named none as the best"),
    ):
        with pytest.raises(ConfigError, match=f"{suffix}': {kept}{more}"):
            chat.open_policy(f"{chain / 'sft'}{suffix}", COMPUTE)


def test_what_is_no_policy_is_refused(chain, tmp_path):
    with pytest.raises(
        ConfigError,
        match="the stage 'reward_model' with a scalar head; only runs with a tokens head answer",
    ):
        chat.open_policy(chain / "reward", COMPUTE)
    copy = tmp_path / "sft"
    shutil.copytree(chain / "sft", copy, ignore=shutil.ignore_patterns("summary.json"))
    with pytest.raises(ConfigError, match="is not a finished run"):
        chat.open_policy(copy, COMPUTE)
    (copy / "summary.json").write_text("{}")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["hash"] = "other"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has changed since"):
        chat.open_policy(copy, COMPUTE)
    endless = dataclasses.replace(ASKING, length=96)
    calls = (
        lambda: chat.talk(chain / "sft", ["a"], endless, dtype="float32"),
        lambda: chat.converse(chain / "sft", ["a"], endless, dtype="float32", system=""),
        lambda: answered([{"prompt": "a"}], tmp_path, chain, 1, length=96),
    )
    for call in calls:
        with pytest.raises(
            ConfigError, match="length = 96 must be below the model's 96 tokens"
        ):
            call()


def answered(lines, tmp_path, chain, rows, **changes):
    source, target = tmp_path / "asked.jsonl", tmp_path / f"answers-{rows}.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asking = dataclasses.replace(ASKING, **changes)
    chat.answer_file(chain / "sft", source, target, asking, dtype="float32", rows=rows)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_a_file_is_answered_line_by_line(chain, tmp_path, capsys):
    lines = [
        {"prompt": "List two animals.\n", "id": 7},
        {"prompt": "word " * 100},
        {"messages": [{"role": "user", "content": "Name a fruit."}]},
        {"prompt": "Name a fruit."},
        {"prompt": "List two animals.\n"},
    ]
    first = answered(lines, tmp_path, chain, 4, samples=2)
    assert [
        {name: line[name] for name in asked}
        for asked, line in zip(lines, first, strict=True)
    ] == lines
    assert (
        "between 1 and 88 are possible" in first[1]["error"] and "answers" not in first[1]
    )
    for line in (*first[:1], *first[2:]):
        assert len(line["answers"]) == len(set(line["answers"])) == 2
        assert all(
            finish == "stop" or tokens == 8
            for finish, tokens in zip(line["finish"], line["tokens"], strict=True)
        )
    assert first[0]["answers"] != first[4]["answers"]
    assert (
        answered(lines, tmp_path, chain, 1, samples=2) == first
    )  # a batch's size changes nothing
    capsys.readouterr()
    chat.talk(
        chain / "sft",
        [lines[0]["prompt"]],
        dataclasses.replace(ASKING, samples=2),
        dtype="float32",
    )
    assert capsys.readouterr().out.splitlines() == [
        printable(answer) for answer in first[0]["answers"]
    ]
    with pytest.raises(ConfigError, match=r"answers-4\.jsonl is there already"):
        answered(lines, tmp_path, chain, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "asked.jsonl:2: not JSON: "),
        ("[1]", r"asked.jsonl:2: not a JSON object \('\[1\]'\)"),
        ('{"text": "x"}', "asked.jsonl:2: give one of prompt and messages"),
        ('{"prompt": 3}', "asked.jsonl:2: prompt must be a string"),
        (
            '{"messages": []}',
            "asked.jsonl:2: messages must be a list of at least one message",
        ),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_anything_is_drawn(
    line, message, tmp_path
):
    source, target = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    source.write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        chat.answer_file(
            "no workdir is read", source, target, ASKING, dtype="float32", rows=1
        )
    assert not target.exists()


def test_a_conversation_goes_on_and_begins_anew(chain, capsys, monkeypatch):
    asked = []
    encode = chat.encode_messages
    monkeypatch.setattr(
        chat,
        "encode_messages",
        lambda messages, *rest: asked.append(messages) or encode(messages, *rest),
    )
    said = ["Name a fruit.", " ", "And another.", "/new", "Name a fruit."]
    chat.converse(chain / "sft", said, ASKING, dtype="float32", system="")
    first, nothing, second, _ = capsys.readouterr().out.splitlines()
    assert nothing == "(nothing was said; /new begins anew)"
    one = {"role": "user", "content": "Name a fruit."}
    assert asked[0] == asked[2] == [one]
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]
    assert printable(asked[1][1]["content"]) == first and second


def test_what_a_policy_says_cannot_drive_the_terminal(chain, capsys):
    """Policies of random bytes say control characters now and then; here the tokenizer's
    text is made of them."""
    policy = chat.open_served(chain / "sft", dtype="float32", rows=1)
    spoken = dataclasses.replace(policy, tokenizer=Speaking())
    (text,) = chat._print_answers(
        spoken, policy.tokenizer.encode("Name a fruit.\n\n"), ASKING, 0, None
    )
    out = capsys.readouterr().out
    assert "\x1b" in text and "\x1b" not in out and out == f"{printable(text)}\n"


class Speaking:
    """A tokenizer whose every token clears the screen."""

    def decode(self, ids):
        return "\x1b[2J\r\u202e" * len(ids)
