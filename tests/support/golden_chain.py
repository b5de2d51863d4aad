"""Fingerprints of every stage at size tiny, to check that a change keeps all numbers.

    python tests/support/golden_chain.py record golden.json     # before the change
    python tests/support/golden_chain.py check golden.json      # after it

Runs the alignment experiment at size `tiny`, the SFT baseline, SFT with low-rank adapters,
and PPO with sampled `old_logprobs`. It records the sha256 and the Euclidean norm of every
array in the latest checkpoints (parameters and optimizer state); the sha256 of all values
and the last value of every logged metric except `time/…`; and the sha256 of samples,
summaries and data files. Hashes are comparable only on one kind of machine with one version
of jaxlib. Norms and last values are comparable everywhere, up to rounding.
"""

import argparse
import gzip
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# Relative tolerance, for the entries in ROUNDED and between kinds of machines.
TOLERANCE = 1e-6

# Current name -> recorded name, for leaves, metrics and summary entries. Matches whole path
# components.
RENAMED: dict[str, str] = {
    "validation_loss": "held_out_loss",
    "validation_accuracy": "held_out_accuracy",
    "validation_pairs": "held_out_pairs",
}
# Prefix of entries that may differ within TOLERANCE -> the reason.
ROUNDED: dict[str, str] = {}
# Validation means in training logs are float64 sums over rows on the host; they used to be
# float32 sums over batches on the device.
for _run in (
    "pretrain",
    "sft",
    "sft-baseline",
    "sft-lora",
    "reward",
    "reward-early",
    "ppo",
    "ppo-ptx",
    "ppo-early",
    "ppo-sampled",
):
    for _metric in (
        "text_loss",
        "demonstrations_loss",
        "held_out_loss",
        "held_out_accuracy",
    ):
        for _kind in ("metrics", "summary"):
            ROUNDED[f"{_run}/{_kind}/{_metric}"] = "sums in float64"


def extra_runs(root: str) -> list[Any]:
    """Variants of stages that the experiment does not contain."""
    from instructax.experiment import RunSpec

    data = {"tokenizer": f"{root}/world/tokenizer.json", "data.folder": f"{root}/rows"}
    text = {"data.text": (f"{root}/world/text.jsonl.gz",)}
    demonstrations = {"data.demonstrations": (f"{root}/world/demonstrations.jsonl.gz",)}
    prompts = {"data.prompts": (f"{root}/world/prompts.jsonl.gz",)}
    pretrain = {"parent": f"{root}/pretrain"}
    parents = {"policy_parent": f"{root}/sft", "reward_parent": f"{root}/reward"}
    baseline = data | demonstrations | pretrain | {"epochs": 1.0}
    adapters = (
        data
        | text
        | demonstrations
        | pretrain
        | {"epochs": 1.0, "lora.rank": 4, "accumulate": 2}
    )
    sampled = data | text | prompts | parents | {"old_logprobs": "sampled", "steps": 2}
    return [
        RunSpec("sft-baseline", "configs/sft.py:tiny,baseline", baseline),
        RunSpec("sft-lora", "configs/sft.py:tiny", adapters),
        RunSpec("ppo-sampled", "configs/ppo.py:tiny", sampled),
    ]


def make_runs(root: Path) -> None:
    """Runs everything under `root`; skips finished runs."""
    from instructax import experiment

    experiment.run_experiment("experiments/alignment.py:tiny", root, report_only=False)
    for run in extra_runs(str(root)):
        experiment.run_stage(experiment.load_config(run), root / run.name)


def fingerprints(root: Path) -> dict[str, dict[str, Any]]:
    """Name of an array, metric or file -> its hash and, for numbers, a value to compare up
    to rounding."""
    found: dict[str, dict[str, Any]] = {}
    for workdir in sorted(path.parent for path in root.glob("*/config.json")):
        found |= array_prints(workdir)
        found |= metric_prints(workdir)
        found |= file_prints(workdir, str(root))
    return {renamed(name): entry for name, entry in sorted(found.items())}


def array_prints(workdir: Path) -> dict[str, dict[str, Any]]:
    """Fingerprints of each array of the newest checkpoint."""
    from instructax.checkpoints.restore import read_arrays
    from instructax.checkpoints.steps import committed_steps

    steps = committed_steps(workdir)
    if not steps:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, value in read_arrays(workdir / "checkpoints" / str(steps[-1])).items():
        array = np.asarray(value)
        head = f"{array.dtype} {array.shape} ".encode()
        norm = float(np.linalg.norm(array.astype(np.float64)))
        found[f"{workdir.name}/{name}"] = {
            "sha256": short_hash(head + array.tobytes()),
            "value": norm,
        }
    return found


def metric_prints(workdir: Path) -> dict[str, dict[str, Any]]:
    """Fingerprints of each metric except times, and of each entry of `summary.json`."""
    series: dict[str, list[Any]] = {}
    log = workdir / "metrics.jsonl"
    for line in log.read_text().splitlines() if log.exists() else []:
        row = json.loads(line)
        for name, value in row.items():
            if not name.startswith("time/"):
                series.setdefault(f"{workdir.name}/metrics/{name}", []).append(
                    [row.get("step"), value]
                )
    found: dict[str, dict[str, Any]] = {}
    for name, values in series.items():
        last = values[-1][1]
        number = last if isinstance(last, int | float) else None
        found[name] = {"sha256": short_hash(json.dumps(values).encode()), "value": number}
    summary = json.loads((workdir / "summary.json").read_text())
    for name, value in flatten(summary, f"{workdir.name}/summary"):
        number = value if isinstance(value, int | float) else None
        # Times differ between runs, and parents are paths.
        if "/time/" in name or "/parents/" in name or name.endswith("/stage"):
            continue
        found[name] = {
            "sha256": short_hash(json.dumps(value).encode()),
            "value": number,
        }
    return found


def file_prints(workdir: Path, root: str) -> dict[str, dict[str, Any]]:
    """Fingerprints of samples, tokenizers and data files, with the root folder's name
    removed."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(workdir.iterdir()):
        compressed = path.name.endswith(".jsonl.gz")
        if path.name not in ("samples.jsonl", "tokenizer.json") and not compressed:
            continue
        data = path.read_bytes()
        if compressed:
            # The gzip header may differ; the text must not.
            data = gzip.decompress(data)
        data = data.replace(root.encode(), b"ROOT")
        found[f"{workdir.name}/{path.name}"] = {"sha256": short_hash(data), "value": None}
    return found


def flatten(tree: Any, name: str) -> list[tuple[str, Any]]:
    """(path, leaf) pairs of nested dicts and lists."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return [(name, tree)]
    found: list[tuple[str, Any]] = []
    for key, value in items:
        found += flatten(value, f"{name}/{key}")
    return found


def renamed(name: str) -> str:
    """The name under which an entry was recorded."""
    for new, old in RENAMED.items():
        name = f"/{name}/".replace(f"/{new}/", f"/{old}/")[1:-1]
    return name


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def differences(
    expected: dict[str, Any], found: dict[str, Any], *, exact: bool
) -> list[str]:
    """One line for each missing, new or different entry."""
    lines: list[str] = []
    for name in sorted(expected | found):
        if name not in found or name not in expected:
            lines.append(f"{name}: {'missing' if name in expected else 'new'}")
            continue
        old = expected[name]
        new = found[name]
        if old["sha256"] == new["sha256"]:
            continue
        rounded = not exact or any(name.startswith(prefix) for prefix in ROUNDED)
        numbers = old["value"] is not None and new["value"] is not None
        if (
            rounded
            and numbers
            and np.isclose(old["value"], new["value"], rtol=TOLERANCE, atol=TOLERANCE)
        ):
            continue
        lines.append(f"{name}: {old['value']} -> {new['value']} (hashes differ)")
    return lines


def main() -> int:
    """Records or checks; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--root", type=Path, help="where the runs are kept; default: a temporary folder"
    )
    arguments = parser.parse_args()
    file = arguments.file.resolve()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="golden-chain-") as folder:
        root = (arguments.root or Path(folder)).resolve()
        make_runs(root)
        found = fingerprints(root)
    if arguments.task == "record":
        lines = [
            f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items()
        ]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{len(found)} fingerprints written to {file}")
        return 0
    lines = differences(json.loads(file.read_text()), found, exact=True)
    print("\n".join(lines[:100]))
    print(f"{len(found)} fingerprints, {len(lines)} differences")
    return 1 if lines else 0


if __name__ == "__main__":
    from instructax import cli

    cli.enable_compilation_cache()
    sys.exit(main())
