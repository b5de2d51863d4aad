"""lm-evaluation-harness on a tiny policy: its scores are the network's, its tasks run, also
through the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.data.chat_template import make_template
from instructax.data.tokenizer import load_tokenizer, save_tokenizer
from instructax.models import Transformer
from instructax.serving.engine import Draw, Engine

pytest.importorskip("lm_eval")
from instructax.evals.lm_eval_model import InstructaxLM

pytest_plugins = ("tests.support.pipeline_fixture",)

ROOT = Path(__file__).resolve().parents[2]
BYTES = load_tokenizer("bytes")
CONFIG = tiny_models.gpt_config(vocab_size=257, max_length=48)
EOS = BYTES.eos_id


class Instance:
    """What the harness asks with, as far as a model reads it."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def policy():
    model = Transformer(CONFIG, tiny_models.compute(), "tokens")
    return model, tiny_models.random_params(model)


@pytest.fixture(scope="module")
def lm(policy):
    return InstructaxLM(Engine(*policy, eos_id=EOS, rows=3), BYTES, None, seed=0)


def alone(policy, context, continuation):
    """(Σ log p, whether all are the likeliest) of a continuation's tokens, in float64,
    without padding."""
    tokens = np.array([*context, *continuation], np.int32)
    logits = stages.plain_outputs(*policy, [tokens[:-1]])[
        0, len(context) - 1 : len(tokens) - 1
    ]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    greedy = bool((logits.argmax(axis=1) == continuation).all())
    return float(logprobs[np.arange(len(continuation)), continuation].sum()), greedy


def encoded(text):
    return BYTES.encode(text).tolist()


def test_log_likelihoods_are_the_networks(lm, policy):
    pairs = [
        ("Who?", " Me"),
        ("", "start"),
        ("a long context " * 2, " x"),
        ("Q ", "A"),
        ("x", "yz"),
    ]
    found = lm.loglikelihood([Instance(*pair) for pair in pairs], disable_tqdm=True)
    # Blanks at the end of a context go over to the continuation; nothing before is the end
    # of a text.
    split = [(encoded(a), encoded(b)) for a, b in pairs]
    split[1], split[2], split[3] = (
        ([EOS], encoded("start")),
        (encoded(("a long context " * 2)[:-1]), encoded("  x")),
        (
            encoded("Q"),
            encoded(" A"),
        ),
    )
    for (total, greedy), (context, continuation) in zip(found, split, strict=True):
        wanted, likeliest = alone(policy, context, continuation)
        assert total == pytest.approx(wanted, abs=1e-4) and greedy == likeliest


def test_the_likeliest_continuation_is_known_as_such(lm, policy):
    draw = Draw(prompt=BYTES.encode("Go"), seed=0, number=0, temperature=0.0, limit=3)
    tokens = np.concatenate(
        [pieces[0].tokens for pieces in Engine(*policy, eos_id=EOS, rows=1).stream([draw])]
    )
    request = (None, encoded("Go"), tokens.tolist())
    other = (None, encoded("Go"), [*tokens[:-1].tolist(), (int(tokens[-1]) + 1) % 257])
    (total, greedy), (less, not_greedy) = lm._loglikelihood_tokens([request, other])
    assert (greedy, not_greedy) == (True, False) and total > less


def test_a_context_that_is_too_long_loses_its_beginning(lm, policy):
    context, continuation = "word " * 20, " end"
    ((total, _),) = lm.loglikelihood([Instance(context, continuation)], disable_tqdm=True)
    tokens = encoded(f"{context[:-1]} {continuation}")[
        -49:
    ]  # 48 that are read, and one that is predicted only
    assert total == pytest.approx(alone(policy, tokens[:-5], tokens[-5:])[0], abs=1e-4)


def test_rolling_log_likelihood_scores_every_token_once(lm, policy):
    texts = ["short", "x" + "abc" * 40]
    found = lm.loglikelihood_rolling([Instance(text) for text in texts], disable_tqdm=True)
    assert found[0] == pytest.approx(alone(policy, [EOS], encoded("short"))[0], abs=1e-4)
    tokens = encoded(texts[1])
    # Windows of 48: the first behind the end of a text, each later one behind the token
    # before it, the last one full.
    wanted = (
        alone(policy, [EOS], tokens[:48])[0]
        + alone(policy, tokens[47:48], tokens[48:96])[0]
    )
    wanted += alone(policy, tokens[len(tokens) - 49 : 96], tokens[96:])[0]
    assert found[1] == pytest.approx(wanted, abs=3e-4)


def test_answers_end_at_stop_strings_and_limits(lm, policy):
    whole = lm.generate_until([Instance("Go", {"until": [], "max_gen_toks": 12})])[0]
    stop = whole[3]
    requests = [
        Instance("Go", {"until": [stop], "max_gen_toks": 12}),
        Instance("Go", {"until": "never there", "max_gen_toks": 5}),
        Instance(
            "Somewhere else",
            {"until": [stop], "max_gen_toks": 7, "do_sample": False, "temperature": 1.0},
        ),
        Instance(
            "Go", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
        ),
        Instance("long " * 20, {"until": [], "max_gen_toks": 8}),
    ]
    found = lm.generate_until(requests)
    assert found[0] == whole[: whole.index(stop)]
    assert whole.startswith(found[1].rstrip("\ufffd")) and len(found[1]) < len(whole)
    assert found[3] != whole
    draw = Draw(
        prompt=BYTES.encode("long " * 20)[-40:], seed=0, number=4, temperature=0.0, limit=8
    )
    tokens = np.concatenate(
        [pieces[0].tokens for pieces in Engine(*policy, eos_id=EOS, rows=1).stream([draw])]
    )
    assert found[4] == BYTES.decode(tokens[tokens != EOS])
    with pytest.raises(
        ValueError,
        match="generates up to 256 tokens, and the model's longest text is 48: lower",
    ):
        lm.generate_until([Instance("Go", {"until": []})])
    with pytest.raises(
        ValueError, match=r"generates with \{'top_p': 0.9\}, which is not supported here"
    ):
        lm.generate_until([Instance("Go", {"until": [], "max_gen_toks": 4, "top_p": 0.9})])


def test_a_chat_template_is_the_models(lm, policy):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes, "}]
    assert lm.apply_chat_template(turns[:1]) == "Hi\n\n"
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "Hi\n\nYes, "
    assert lm.chat_template(True) == ""
    template = make_template(
        "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", BYTES
    )
    chats = InstructaxLM(Engine(*policy, eos_id=EOS, rows=3), BYTES, template, seed=0)
    assert chats.apply_chat_template(turns[:1]) == "Hi<|endoftext|>"
    assert chats.tok_encode("Hi<|endoftext|>") == [
        *encoded("Hi"),
        EOS,
    ]  # its tokens, as it wrote them
    assert EOS not in lm.tok_encode("Hi<|endoftext|>")
    assert chats.chat_template(True) == template.source


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
def tasks(tmp_path, monkeypatch):
    """A folder of task files whose documents are in a file beside them; nothing is
    downloaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    )
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(folder / "documents.jsonl")}}
        whole = {
            "task": f"tiny_{name}",
            "dataset_path": "json",
            "dataset_kwargs": files,
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(whole))
    return folder


@pytest.mark.slow
def test_the_command_runs_the_harness_on_local_tasks(tasks, tmp_path, policy):
    workdir, output = tmp_path / "tiny", tmp_path / "results.json"
    stages.fabricated(workdir, CONFIG, policy[1], "bytes")
    save_tokenizer(BYTES, str(workdir / "tokenizer.json"))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "lm_eval_harness.py"),
        f"--workdir={workdir}",
        f"--output={output}",
    ]
    command += [f"--include_path={tasks}", "--tasks=tiny_choice,tiny_answer", "--rows=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout and "tiny_answer" in done.stdout
    results = json.loads(output.read_text())["results"]
    right = 0
    for document in DOCUMENTS:
        totals = [
            alone(policy, encoded(document["question"]), encoded(f" {x}"))[0]
            for x in document["choices"]
        ]
        right += int(np.argmax(totals)) == document["answer"]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
    assert 0 <= results["tiny_answer"]["exact_match,none"] <= 1
    done = subprocess.run(
        [*command, "--tasks=tiny_nothing"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: --tasks: there is no tiny_nothing"
    )
