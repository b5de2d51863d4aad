"""A finished policy answers prompts, the same ones in the same way; what it cannot read it says."""

import json
import shutil

import numpy as np
import pytest

from instructax import chat
from instructax.checkpoint import committed_steps
from instructax.configuration import ConfigError
from instructax.model import ComputeConfig

pytest_plugins = ("chain",)
pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.xdist_group("chain")]

COMPUTE = ComputeConfig(
    dtype="float32", decoding="float32", remat="none", head_chunk=8, part_rows=1, part_halvings=0, slots=1
)
SAMPLING = {"length": 8, "temperature": 1.0, "seed": 0}


def test_a_policy_answers(chain, capsys):
    prompts = ["List two animals.\n", "List two animals.\n", "", "word " * 100]
    chat.talk(chain / "sft", prompts, **SAMPLING, dtype="float32")
    first, second, empty, long = capsys.readouterr().out.splitlines()
    assert first != second  # each sample has its own key
    assert empty == "(the prompt has 0 tokens; between 1 and 88 are possible)"
    assert long.endswith("between 1 and 88 are possible)")
    chat.talk(chain / "sft", prompts[:2], **SAMPLING, dtype="float32")
    assert capsys.readouterr().out.splitlines() == [first, second]
    chat.talk(chain / "sft", prompts[:1], **{**SAMPLING, "seed": 1}, dtype="float32")
    assert capsys.readouterr().out.splitlines() != [first]


def test_the_likeliest_answer_does_not_depend_on_the_seed(chain):
    model, params, tokenizer = chat.open_policy(chain / "ppo", COMPUTE)
    answers = {
        chat.answerer(model, params, tokenizer, length=8, temperature=0.0, seed=seed)("Name a fruit.\n", 0)
        for seed in (0, 1)
    }
    assert len(answers) == 1


def test_a_step_that_was_kept_is_named(chain):
    steps = committed_steps(chain / "sft")
    assert len(steps) == 2
    kernels = {
        suffix: np.asarray(chat.open_policy(f"{chain / 'sft'}{suffix}", COMPUTE)[1]["embedding"])
        for suffix in ("", *(f"@{step}" for step in steps))
    }
    assert np.array_equal(kernels[""], kernels[f"@{steps[-1]}"])
    assert not np.array_equal(kernels[""], kernels[f"@{steps[0]}"])
    kept = f"it kept the steps {steps[0]}, {steps[1]}"
    for suffix, more in (("@7777", "$"), ("@best", ", and its run.best_metric named none as the best")):
        with pytest.raises(ConfigError, match=f"{suffix}': {kept}{more}"):
            chat.open_policy(f"{chain / 'sft'}{suffix}", COMPUTE)


def test_what_is_no_policy_is_refused(chain, tmp_path):
    with pytest.raises(ConfigError, match="stage 'reward'; only supervised and ppo runs answer prompts"):
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
    model, params, tokenizer = chat.open_policy(chain / "sft", COMPUTE)
    with pytest.raises(ConfigError, match="length = 96 must be below the model's 96 tokens"):
        chat.answerer(model, params, tokenizer, length=96, temperature=1.0, seed=0)
