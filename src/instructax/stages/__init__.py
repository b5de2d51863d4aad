"""The stages of the pipeline, and the one table that names them.

A stage is a module with five names: `Config`, `validate(config, mesh)`, `train(run)`,
`row_lengths(config)` and `memory(config, mesh)`. Its name in the table is also the name of
its config file and the `stage` entry of its manifests. Stages do not import each other.

In the order of the paper: `pretrain` trains the base model, `sft` is step 1, `collect` and
`reward_model` are step 2, `ppo` is step 3; `evaluate` and `public_tasks` measure the
results. `world` writes the simulated data that all of them can use.

Besides its fields, a Config states what its run needs: `head`, the head of the network that
the run saves (None if it saves none), `parents()`, the finished runs it starts from, and
`prepare_data(tokenizer, prompt_format)`, its data sets. `training.run.open_run` reads them.
The stages `world` and `collect`, which run no network on a mesh, have none of these.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from instructax.config import ConfigError, construct, format_value

# Name -> module. A module is imported only when a config names its stage: the serving stack
# that `collect` needs should not slow down `world`.
MODULES = {
    "world": "instructax.stages.world",
    "collect": "instructax.stages.collect",
    "pretrain": "instructax.stages.pretrain",
    "sft": "instructax.stages.sft",
    "reward_model": "instructax.stages.reward_model",
    "ppo": "instructax.stages.ppo.stage",
    "evaluate": "instructax.stages.evaluate",
    "public_tasks": "instructax.stages.public_tasks",
}


def load_stage(name: Any) -> ModuleType:
    """The module of the stage `name`. Raises ConfigError if there is no such stage."""
    # A config may have any value here, even one that cannot be hashed.
    if not isinstance(name, str) or name not in MODULES:
        raise ConfigError(
            f"config.stage = {format_value(name)} must be one of {', '.join(MODULES)}"
        )
    return importlib.import_module(MODULES[name])


def build_config(values: Mapping[str, Any]) -> Any:
    """The Config of the stage that `values` name, built from the nested dict `values`.

    Raises ConfigError for an unknown stage and for values that do not fit its Config.
    """
    return construct(load_stage(values.get("stage")).Config, values)
