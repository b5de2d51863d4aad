"""Parents: finished runs that another run starts from.

A parent is named by its path: WORKDIR for the last step of that run, WORKDIR@STEP or
WORKDIR@best for another step that it kept. It is refused unless it is finished, uses the
same tokenizer and has the expected architecture and head.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from instructax import sharding
from instructax.checkpoints.manifest import (
    check_parent,
    config_difference,
    read_manifest,
    stored_manifest_hash,
)
from instructax.checkpoints.restore import load_params
from instructax.checkpoints.steps import best_step, committed_steps, files_hash
from instructax.config import construct, require
from instructax.data.tokenizer import Tokenizer, load_tokenizer
from instructax.models.config import ModelConfig
from instructax.models.lora import LoraConfig, add_lora, merge_lora
from instructax.types import Params

# What a network predicts: the next token, or one score.
Head = Literal["tokens", "scalar"]


@dataclasses.dataclass(frozen=True)
class ExpectedParent:
    """A run that a config names, and the network that it must have saved."""

    # WORKDIR, WORKDIR@STEP or WORKDIR@best; "" = none.
    path: str
    model: ModelConfig
    head: Head


@dataclasses.dataclass(frozen=True)
class Parent:
    """A finished run whose parameters another run starts from."""

    workdir: Path
    # The step whose parameters are loaded; not always the last one.
    step: int
    manifest: Mapping[str, Any]

    def load(self, abstract: Params) -> Params:
        """Its saved parameters, read directly into the shapes and shardings of `abstract`.

        LoRA factors are merged into the kernels.
        """
        values = self.manifest["config"].get("lora")
        if not values or not values["rank"]:
            return load_params(self.workdir, abstract, step=self.step)
        # The stored tree also has the LoRA factors. Only its shapes are computed here, so
        # the random key does not matter.
        lora = construct(LoraConfig, values, "lora")
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        shapes = jax.eval_shape(
            lambda params: add_lora(params, lora, jax.random.key(0)), abstract
        )
        stored = load_params(
            self.workdir, sharding.abstract_arrays(shapes, mesh), step=self.step
        )
        # The merged kernels get the shardings that the caller asked for.
        layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(merge_lora, out_shardings=layouts)(stored)

    def lineage(self) -> dict[str, Any]:
        """The entry for this run in the manifest of its child."""
        return {
            "workdir": str(self.workdir),
            "stage": self.manifest["stage"],
            "step": self.step,
            "manifest_hash": stored_manifest_hash(self.workdir),
            "files_hash": files_hash(self.workdir, self.step),
        }


def is_finished(workdir: Path) -> bool:
    """Whether the run in `workdir` has finished: its summary is written last."""
    return (workdir / "summary.json").exists()


def tokenizer_of(path: str, model: ModelConfig) -> Tokenizer:
    """The tokenizer at `path`. Raises ConfigError unless the model has the same vocabulary
    size."""
    tokenizer = load_tokenizer(path)
    require(
        tokenizer.size == model.vocab_size,
        f"config.model.vocab_size = {model.vocab_size}, but the tokenizer {path} has "
        f"{tokenizer.size} ids; set config.model.vocab_size to that",
    )
    return tokenizer


def open_parent(path: str | Path, named: str) -> Parent:
    """Opens the finished run at `path`.

    Args:
      path: WORKDIR, WORKDIR@STEP or WORKDIR@best.
      named: the config field or flag that names the run, for error messages.

    Returns:
      The run. Raises ConfigError or ValueError if it cannot be used.
    """
    path = str(path)
    folder, _, suffix = path.rpartition("@")
    # A folder whose own name ends in `@7` or `@best` is taken as it is.
    names_step = suffix == "best" or suffix.isdecimal()
    if not names_step or Path(path).exists():
        folder = path
        suffix = ""
    workdir = Path(folder)

    require(
        is_finished(workdir),
        f"{named} = {path!r} is not a finished run: train it first, or change the path",
    )
    # Runs of stages without a network, such as a world, have no manifest.
    manifest = None
    if (workdir / "manifest.json").exists():
        manifest = read_manifest(workdir)
    require(
        manifest is not None and manifest["head"] is not None,
        f"{named} = {path!r} is a run that trained no network: name a run of a stage that "
        "trains one",
    )
    assert manifest is not None  # for type checkers
    steps = committed_steps(workdir)
    require(
        bool(steps), f"{named} = {path!r} has no checkpoint: delete it and train it again"
    )

    # None if the run has no best step.
    step = best_step(workdir) if suffix == "best" else int(suffix or steps[-1])
    # Deleted steps cannot be named, so the message lists those that are left.
    kept = f"{named} = {path!r}: it kept the steps {', '.join(map(str, steps))}"
    advice = "name one of these, or no step for the last one"
    require(
        step is not None,
        f"{kept}, and its run.best_metric named none as the best: {advice}",
    )
    require(step in steps, f"{kept}: {advice}")
    return Parent(workdir, int(step or 0), manifest)


def open_parents(
    expected: Mapping[str, ExpectedParent], tokenizer: Tokenizer, tokenizer_path: str
) -> dict[str, Parent]:
    """Opens the runs that a config starts from.

    Args:
      expected: config field -> the parent that it names; empty paths are skipped.
      tokenizer: the tokenizer of this run; each parent must have the same.
      tokenizer_path: its path, for errors.

    Returns:
      Config field -> parent. Raises ConfigError or ValueError for a parent that is not
      finished, or has another tokenizer, head or architecture.
    """
    # All paths are opened first: a missing run is the commonest mistake.
    parents: dict[str, Parent] = {}
    for name, wanted in expected.items():
        if wanted.path:
            parents[name] = open_parent(wanted.path, f"config.{name}")
    for name, parent in parents.items():
        check_parent(
            parent.manifest,
            named=f"config.{name} = {expected[name].path!r}",
            tokenizer_hash=tokenizer.hash,
            tokenizer_path=tokenizer_path,
        )
        _check_model(name, parent, expected[name])
    return parents


def _check_model(name: str, parent: Parent, wanted: ExpectedParent) -> None:
    manifest = parent.manifest
    require(
        manifest["head"] == wanted.head,
        f"config.{name} = {wanted.path!r} is a run of the stage {manifest['stage']!r} with "
        f"a {manifest['head']} head; it must have a {wanted.head} head",
    )
    # Field by field: parameters of another architecture may have the same shapes.
    difference = config_difference(manifest["model"], dataclasses.asdict(wanted.model))
    require(
        not difference,
        f"config.{name} = {wanted.path!r} has another model: {'; '.join(difference)}",
    )
