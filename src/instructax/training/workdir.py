"""Claiming a workdir: a folder belongs to one config, and only `run` and `mesh` may
change."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from instructax.checkpoints.manifest import config_difference, upgrade_config
from instructax.checkpoints.parents import is_finished
from instructax.checkpoints.steps import committed_steps
from instructax.config import ConfigError, require
from instructax.runtime.files import write_json
from instructax.runtime.redaction import redact

# Groups that decide how a run is kept and where it is computed, not what it computes.
FREE_GROUPS = ("run", "mesh")


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes `config` to `config.json`, unless `workdir` holds a run of another config.

    A folder with neither a checkpoint nor a summary holds no work yet, so any config may
    claim it. Raises ConfigError with the differences.
    """
    path = workdir / "config.json"
    # Files of a workdir may be shared, so they contain no credentials.
    config = redact(config)
    if path.exists() and (is_finished(workdir) or committed_steps(workdir)):
        # Workdirs of earlier versions have the field names of their time.
        stored = upgrade_config(_read_config(path))
        difference = config_difference(fixed_values(stored), fixed_values(config))
        if stored.get("stage") != config.get("stage"):
            # Hardly a field has the same name in two stages; one line says it all.
            difference = [line for line in difference if line.startswith("stage: ")]
        require(
            not difference,
            f"{workdir} holds a run with another config ({'; '.join(difference)}); "
            "give the stored values again or choose another --workdir",
        )
    # A finished run keeps its file; the free groups of a repeated command change nothing.
    if jax.process_index() == 0 and not is_finished(workdir):
        write_json(path, config)


def fixed_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that a workdir is bound to."""
    # `run` and `mesh` may change between two starts of a run.
    return {name: value for name, value in config.items() if name not in FREE_GROUPS}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_bytes())
        # Valid JSON that is not an object, such as a bare number.
        require(isinstance(stored, dict), "it is not a group of values")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): restore a copy, or choose another --workdir"
        ) from None
    return stored
