"""lm-evaluation-harness on a tiny policy: scores, completions, and the command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.config import ConfigError
from instructax.data.chat_template import make_template
from instructax.data.tokenizer import load_tokenizer, save_tokenizer
from instructax.models.transformer import Transformer
from instructax.serving.engine import Engine, SampleRequest
from instructax.serving.policy import Policy

pytest.importorskip("lm_eval")
from instructax.evals.lm_eval_model import InstructaxLM

ROOT = Path(__file__).resolve().parents[2]
BYTES = load_tokenizer("bytes")
CONFIG = tiny_models.gpt_config(vocab_size=257, max_length=48)
EOS_ID = BYTES.eos_id


class Instance:
    """The part of the harness's request that a model reads."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def network():
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    return model, tiny_models.random_params(model)


@pytest.fixture(scope="module")
def policy(network):
    engine = Engine(*network, eos_id=EOS_ID, batch_size=3)
    return Policy(engine=engine, tokenizer=BYTES, template=None)


@pytest.fixture(scope="module")
def lm(policy):
    return InstructaxLM(policy, seed=0)


def plain_loglikelihood(network, context, continuation):
    """(Σ log p, whether all are the most likely) of a continuation, in float64."""
    tokens = np.array([*context, *continuation], np.int32)
    outputs = stages.plain_outputs(*network, [tokens[:-1]])
    logits = outputs[0, len(context) - 1 : len(tokens) - 1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    greedy = bool((logits.argmax(axis=1) == continuation).all())
    return float(logprobs[np.arange(len(continuation)), continuation].sum()), greedy


def greedy_tokens(policy, prompt, max_new_tokens):
    """What the engine samples greedily."""
    request = SampleRequest(
        prompt=prompt,
        seed=0,
        sample_index=0,
        temperature=0.0,
        max_new_tokens=max_new_tokens,
    )
    chunks = [chunk.tokens for (chunk,) in policy.engine.stream([request])]
    return np.concatenate(chunks)


def encode(text):
    return BYTES.encode(text).tolist()


def test_loglikelihoods_are_those_of_the_network(lm, network):
    long = "a long context " * 2
    pairs = [("Who?", " Me"), ("", "start"), (long, " x"), ("Q ", "A"), ("x", "yz")]
    found = lm.loglikelihood([Instance(*pair) for pair in pairs], disable_tqdm=True)

    # Spaces at the end of a context move to the continuation; the end token stands for an
    # empty context.
    split = [
        (encode("Who?"), encode(" Me")),
        ([EOS_ID], encode("start")),
        (encode(long[:-1]), encode("  x")),
        (encode("Q"), encode(" A")),
        (encode("x"), encode("yz")),
    ]
    for (total, greedy), (context, continuation) in zip(found, split, strict=True):
        expected, most_likely = plain_loglikelihood(network, context, continuation)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == most_likely


def test_the_greedy_continuation_is_marked(lm, policy):
    tokens = greedy_tokens(policy, BYTES.encode("Go"), 3).tolist()
    other = [*tokens[:-1], (tokens[-1] + 1) % 257]
    context = encode("Go")
    (total, greedy), (less, not_greedy) = lm._loglikelihood_tokens(
        [(None, context, tokens), (None, context, other)]
    )
    assert (greedy, not_greedy) == (True, False)
    assert total > less


def test_a_context_that_is_too_long_loses_its_beginning(lm, network):
    context = "word " * 20
    ((total, _),) = lm.loglikelihood([Instance(context, " end")], disable_tqdm=True)
    # 48 tokens that are read, and one that is only predicted.
    tokens = encode(f"{context[:-1]}  end")[-49:]
    expected, _ = plain_loglikelihood(network, tokens[:-5], tokens[-5:])
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("context", ["", "a", "a" * 100])
def test_a_continuation_longer_than_the_context_is_refused(lm, context):
    """Its sum over the last 48 tokens would pass for that of all 90."""
    request = (None, encode(context), encode("b" * 90))
    with pytest.raises(ConfigError, match="of 90 tokens, but the model's context is 48"):
        lm._loglikelihood_tokens([request])


@pytest.mark.parametrize("context", ["", "a" * 100])
def test_a_continuation_that_fills_the_context_is_scored_whole(lm, network, context):
    continuation = encode("b" * 48)
    ((total, _),) = lm._loglikelihood_tokens([(None, encode(context), continuation)])
    # One token stands before it: the last one of the context, or the end token.
    before = encode(context)[-1:] or [EOS_ID]
    expected, _ = plain_loglikelihood(network, before, continuation)
    assert total == pytest.approx(expected, abs=1e-3)


def test_rolling_loglikelihood_scores_every_token_once(lm, network):
    short = "short"
    long = "x" + "abc" * 40
    found = lm.loglikelihood_rolling([Instance(short), Instance(long)], disable_tqdm=True)
    expected, _ = plain_loglikelihood(network, [EOS_ID], encode(short))
    assert found[0] == pytest.approx(expected, abs=1e-4)

    # Windows of 48: the first one after the end token, later ones after the token before
    # them; the last one is full and scores only the tokens that are left.
    tokens = encode(long)
    windows = [
        ([EOS_ID], tokens[:48]),
        (tokens[47:48], tokens[48:96]),
        (tokens[len(tokens) - 49 : 96], tokens[96:]),
    ]
    expected = sum(plain_loglikelihood(network, *window)[0] for window in windows)
    assert found[1] == pytest.approx(expected, abs=3e-4)


def test_completions_end_at_stop_strings_and_limits(lm, policy):
    (whole,) = lm.generate_until([Instance("Go", {"until": [], "max_gen_toks": 12})])
    stop = whole[3]
    sampled = {"do_sample": True, "temperature": 1.0}
    greedy = {"do_sample": False, "temperature": 1.0}
    found = lm.generate_until(
        [
            Instance("Go", {"until": [stop], "max_gen_toks": 12}),
            Instance("Go", {"until": "never there", "max_gen_toks": 5}),
            Instance("Somewhere else", {"until": [stop], "max_gen_toks": 7, **greedy}),
            Instance("Go", {"until": [], "max_gen_toks": 12, **sampled}),
            Instance("long " * 20, {"until": [], "max_gen_toks": 8}),
        ]
    )
    assert found[0] == whole[: whole.index(stop)]
    assert whole.startswith(found[1].rstrip("\ufffd")) and len(found[1]) < len(whole)
    assert found[3] != whole
    # 40 tokens of the context leave room for 8 new ones.
    tokens = greedy_tokens(policy, BYTES.encode("long " * 20)[-40:], 8)
    assert found[4] == BYTES.decode(tokens[tokens != EOS_ID])


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        (
            {"until": []},
            "generates up to 256 tokens, but the model's context is 48 tokens: lower",
        ),
        (
            {"until": [], "max_gen_toks": 4, "top_p": 0.9},
            r"generates with \{'top_p': 0.9\}, which is not supported: change its gen_",
        ),
    ],
)
def test_unsupported_generation_settings_are_refused(lm, gen_kwargs, message):
    with pytest.raises(ValueError, match=message):
        lm.generate_until([Instance("Go", gen_kwargs)])


def test_the_chat_template_is_the_policys(lm, policy):
    user = {"role": "user", "content": "Hi"}
    turns = [user, {"role": "assistant", "content": "Yes, "}]
    assert lm.apply_chat_template([user]) == "Hi\n\n"
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "Hi\n\nYes, "
    assert lm.chat_template(True) == ""

    template = make_template(
        "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", BYTES
    )
    chat_lm = InstructaxLM(dataclasses.replace(policy, template=template), seed=0)
    assert chat_lm.chat_template(True) == template.source
    assert chat_lm.apply_chat_template([user]) == "Hi<|endoftext|>"
    # Only special tokens that a template wrote become their ids.
    assert chat_lm.tok_encode("Hi<|endoftext|>") == [*encode("Hi"), EOS_ID]
    assert EOS_ID not in lm.tok_encode("Hi<|endoftext|>")


TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        ],
    },
}
DOCUMENTS = [
    {"question": f"Which is {i}?", "choices": [" one", " two", " three"], "answer": i % 3}
    for i in range(7)
]


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """A folder of task files with local documents; nothing is downloaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        config = {
            "task": f"tiny_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_the_command_runs_local_tasks(task_folder, tmp_path, network):
    workdir = tmp_path / "tiny"
    output = tmp_path / "results.json"
    stages.write_finished_run(workdir, CONFIG, network[1], "bytes")
    save_tokenizer(BYTES, str(workdir / "tokenizer.json"))

    def run(*arguments):
        command = [
            sys.executable,
            str(ROOT / "scripts" / "lm_eval_harness.py"),
            f"--workdir={workdir}",
            f"--output={output}",
            f"--include_path={task_folder}",
            "--batch_size=4",
            *arguments,
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=500, cwd=ROOT
        )

    done = run("--tasks=tiny_choice,tiny_answer")
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout and "tiny_answer" in done.stdout
    results = json.loads(output.read_text())["results"]
    num_correct = 0
    for document in DOCUMENTS:
        context = encode(document["question"])
        totals = []
        for choice in document["choices"]:
            totals.append(plain_loglikelihood(network, context, encode(f" {choice}"))[0])
        num_correct += int(np.argmax(totals)) == document["answer"]
    accuracy = results["tiny_choice"]["acc,none"]
    assert accuracy == pytest.approx(num_correct / len(DOCUMENTS))
    assert 0 <= results["tiny_answer"]["exact_match,none"] <= 1

    done = run("--tasks=tiny_choice,realtoxicityprompts")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: --tasks: realtoxicityprompts is refused: it asks the Perspective API"
    )

    done = run("--tasks=tiny_nothing")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: --tasks: lm-evaluation-harness has no task tiny_nothing"
    )
