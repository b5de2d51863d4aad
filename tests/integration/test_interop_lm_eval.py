"""lm-evaluation-harness gives the same log-likelihoods through our model class and its own
for transformers."""

import json
from typing import Any

import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.data.tokenizer import load_tokenizer, save_tokenizer
from instructax.models.transformer import Transformer
from instructax.serving.engine import Engine
from instructax.serving.policy import Policy, open_policy
from instructax.stages import pretrained

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface")
tasks = pytest.importorskip("lm_eval.tasks")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

WORDS = ("red", "green apples", "a long way home", "12 × 3")
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[answer]}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def log_likelihoods(model: Any, folder: Any) -> dict[str, list[float]]:
    """The log-likelihoods of each request of each task, in order."""
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"tiny_{name}" for name in TASKS]
    samples = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=manager, log_samples=True
    )["samples"]
    found: dict[str, list[float]] = {}
    for name in names:
        found[name] = []
        for sample in sorted(samples[name], key=lambda sample: sample["doc_id"]):
            for answers in sample["resps"]:
                found[name] += [float(np.ravel(answer)[0]) for answer in answers]
    return found


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_two_local_tasks_have_the_same_log_likelihoods(family, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = [
        {"question": f"Which is {i}?", "choices": [f" {w}" for w in WORDS], "answer": i % 4}
        for i in range(6)
    ]
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents)
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

    make = {"gpt": tiny_models.gpt_config, "llama": tiny_models.llama_config}[family]
    config = make(vocab_size=257, max_length=64, head_dim=4)
    tokenizer = load_tokenizer("bytes")
    model = Transformer(config, tiny_models.compute(), "tokens")
    run = stages.write_finished_run(
        tmp_path / "run", config, tiny_models.random_params(model), "bytes"
    )
    save_tokenizer(tokenizer, str(run / "tokenizer.json"))
    pretrained.export_run(str(run), tmp_path / "out", dtype="float32", verify=True)

    model, params, tokenizer = open_policy(run, tiny_models.compute())
    from instructax.evals.lm_eval_model import InstructaxLM

    engine = Engine(model, params, eos_id=tokenizer.eos_id, batch_size=3)
    policy = Policy(engine=engine, tokenizer=tokenizer, template=None)
    ours = InstructaxLM(policy, seed=0)
    theirs = lm_eval.models.huggingface.HFLM(
        pretrained=str(tmp_path / "out"),
        device="cpu",
        dtype="float32",
        batch_size=2,
        max_length=64,
    )
    found = log_likelihoods(ours, folder)
    wanted = log_likelihoods(theirs, folder)
    assert {name: len(values) for name, values in found.items()} == {
        "tiny_choice": 24,
        "tiny_text": 6,
    }
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[name], rtol=0, atol=1e-3, err_msg=name)
        assert np.std(values) > 1
