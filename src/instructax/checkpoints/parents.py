"""The runs that a run starts from: found by path, and refused unless they are finished and
of the same kind.

A path is WORKDIR, for the last step of that run, or WORKDIR@STEP or WORKDIR@best, for
another step that it kept.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from instructax import sharding
from instructax.checkpoints.checkpoint import (
    best_step,
    committed_steps,
    files_hash,
    load_params,
)
from instructax.checkpoints.manifest import (
    check_parent,
    config_difference,
    manifest_hash,
    read_manifest,
)
from instructax.config import construct, require
from instructax.data.tokenizer import Tokenizer, load_tokenizer
from instructax.models import LoraConfig, ModelConfig, add_lora, merge_lora
from instructax.types import Params

Head = Literal["tokens", "scalar"]
STAGES = {
    "tokens": ("supervised", "ppo", "pretrained"),
    "scalar": ("reward",),
}  # whose runs have a network with this head


def is_finished(workdir: Path) -> bool:
    """Whether the run in `workdir` has come to its end."""
    return (workdir / "summary.json").exists()


def tokenizer_of(path: str, model: ModelConfig) -> Tokenizer:
    """The tokenizer at `path`; raises ConfigError unless the model's vocabulary is its own."""
    tokenizer = load_tokenizer(path)
    require(
        tokenizer.size == model.vocab_size,
        f"config.model.vocab_size = {model.vocab_size}, but the tokenizer {path} has {tokenizer.size} ids; "
        "set config.model.vocab_size to that",
    )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Parent:
    """A finished run whose parameters another one starts from."""

    workdir: Path
    step: int
    manifest: Mapping[str, Any]

    def load(self, wanted: Params) -> Params:
        """Its exported parameters, straight into the shapes and layouts of `wanted`; what
        adapters of the run have learned is in the kernels."""
        values = self.manifest["config"].get("lora")
        if not values or not values["rank"]:
            return load_params(self.workdir, wanted, step=self.step)
        lora, mesh = (
            construct(LoraConfig, values, "lora"),
            jax.tree.leaves(wanted)[0].sharding.mesh,
        )
        shapes = jax.eval_shape(
            lambda params: add_lora(params, lora, jax.random.key(0)), wanted
        )
        stored = load_params(
            self.workdir, sharding.abstract_arrays(shapes, mesh), step=self.step
        )
        layouts = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        return jax.jit(merge_lora, out_shardings=layouts)(stored)

    def lineage(self) -> dict[str, Any]:
        """What the child's manifest says of it."""
        return {
            "workdir": str(self.workdir),
            "stage": self.manifest["stage"],
            "step": self.step,
            "manifest_hash": manifest_hash(self.manifest),
            "files_hash": files_hash(self.workdir, self.step),
        }


def open_parent(path: str | Path, named: str) -> Parent:
    """The finished run at `path`; `named` is what the user calls it. Raises ConfigError or
    ValueError."""
    path = str(path)
    folder, _, suffix = path.rpartition("@")
    if not (suffix == "best" or suffix.isdecimal()) or Path(path).exists():
        folder, suffix = path, ""
    workdir = Path(folder)
    require(
        is_finished(workdir),
        f"{named} = {path!r} is not a finished run: train it first, or change the path",
    )
    trained = (workdir / "manifest.json").exists()
    require(
        trained,
        f"{named} = {path!r} is a run that trained no network: give one of a stage that does",
    )
    manifest, steps = read_manifest(workdir), committed_steps(workdir)
    require(
        bool(steps), f"{named} = {path!r} has no checkpoint: delete it and train it again"
    )
    step = best_step(workdir) if suffix == "best" else int(suffix or steps[-1])
    require(
        step in steps,
        f"{named} = {path!r}: it kept the steps {', '.join(map(str, steps))}"
        + (", and its run.best_metric named none as the best" if step is None else ""),
    )
    return Parent(workdir, int(step or 0), manifest)


def open_parents(
    paths: Mapping[str, str],
    models: Mapping[str, tuple[ModelConfig, Head]],
    tokenizer: Tokenizer,
    tokenizer_path: str,
) -> dict[str, Parent]:
    """The runs to start from, by config field, those with an empty path left out.

    Each must be finished, of this tokenizer, and of the architecture and head in `models`.
    Raises ConfigError or ValueError.
    """
    parents = {
        name: open_parent(path, f"config.{name}") for name, path in paths.items() if path
    }
    for name, parent in parents.items():
        check_parent(
            parent.manifest, tokenizer_hash=tokenizer.hash, tokenizer_path=tokenizer_path
        )
        model, head = models[name]
        found = parent.manifest["stage"]
        require(
            found in STAGES[head],
            f"config.{name} = {paths[name]!r} is a run of stage {found!r}; it must be of {' or '.join(STAGES[head])}",
        )
        difference = config_difference(parent.manifest["model"], dataclasses.asdict(model))
        require(
            not difference,
            f"the model of config.{name} = {paths[name]!r} is another: {'; '.join(difference)}",
        )
    return parents
