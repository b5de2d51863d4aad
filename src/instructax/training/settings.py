"""Hyperparameters as arrays: the values of a config that a sweep may vary without compiling
again."""

import dataclasses
import typing
from typing import Any, TypeVar

import jax.numpy as jnp

from instructax.types import Array, pytree

Settings = TypeVar("Settings")


@pytree
class OptimizerSettings:
    """What a sweep may vary of an OptimizerConfig."""

    # The only one: betas, clipping and decay are compiled in.
    learning_rate: Array  # f32[], the peak


def settings_from(cls: type[Settings], config: Any) -> Settings:
    """Builds the pytree `cls` from the config fields of the same names.

    A field whose type is itself a pytree of settings is built from the config group of its
    name, or, if there is no such group, from the fields of `config`. Integers become
    i32[], all other numbers f32[].
    """
    # Annotations may be strings; this resolves them, with those of base classes.
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        hint = hints[field.name]
        # A nested pytree of settings, such as OptimizerSettings.
        if dataclasses.is_dataclass(hint):
            group = getattr(config, field.name, config)
            values[field.name] = settings_from(typing.cast(Any, hint), group)
        else:
            value = getattr(config, field.name)
            # bool is an int too, but no setting is one. Explicit dtypes keep a sweep's
            # arrays and a single run's scalars alike.
            dtype = jnp.int32 if isinstance(value, int) else jnp.float32
            values[field.name] = jnp.asarray(value, dtype)
    return cls(**values)
