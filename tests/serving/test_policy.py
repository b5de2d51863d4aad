"""Which runs and steps can be opened as a policy, and which are refused."""

import json
import shutil

import numpy as np
import pytest

from instructax.checkpoints.steps import committed_steps
from instructax.config import ConfigError
from instructax.models.config import ComputeConfig
from instructax.serving.policy import open_policy

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


def test_a_kept_step_can_be_opened(chain):
    workdir = chain / "sft"
    first, last = committed_steps(workdir)

    def embedding(suffix):
        _, params, _ = open_policy(f"{workdir}{suffix}", COMPUTE)
        return np.asarray(params["embedding"])

    np.testing.assert_array_equal(embedding(""), embedding(f"@{last}"))
    assert not np.array_equal(embedding(""), embedding(f"@{first}"))


@pytest.mark.parametrize(
    ("suffix", "more"),
    [("@7777", ""), ("@best", ", and its run.best_metric named none as the best")],
)
def test_a_step_that_was_not_kept_is_refused(chain, suffix, more):
    first, last = committed_steps(chain / "sft")
    kept = f"it kept the steps {first}, {last}"
    with pytest.raises(
        ConfigError, match=f"{suffix}': {kept}{more}: name one of these, or no"
    ):
        open_policy(f"{chain / 'sft'}{suffix}", COMPUTE)


def test_only_finished_policies_with_their_tokenizer_are_opened(chain, tmp_path):
    with pytest.raises(
        ConfigError,
        match="the stage 'reward_model' with a scalar head; only runs with a tokens head",
    ):
        open_policy(chain / "reward", COMPUTE)

    copy = tmp_path / "sft"
    shutil.copytree(chain / "sft", copy, ignore=shutil.ignore_patterns("summary.json"))
    with pytest.raises(ConfigError, match="is not a finished run"):
        open_policy(copy, COMPUTE)

    (copy / "summary.json").write_text("{}")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["hash"] = "other"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has changed since"):
        open_policy(copy, COMPUTE)
