"""From the nested dict of a config file to frozen dataclasses, with one clear line for every mistake."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")
SEEDS = 2**31  # what every generator of random numbers takes: seeds are below it


class ConfigError(ValueError):
    """A config value that cannot be used; the message names it, what is allowed, and where to change it."""


def construct(cls: type[Config], values: Mapping[str, Any], where: str = "config") -> Config:
    """Builds the dataclass `cls` from `values`; every field must be given, and nothing else.

    Nested dataclasses are built from nested mappings, tuples from sequences, integers are taken for floats. Raises
    ConfigError on a missing or unknown name, a wrong type, a value that is not finite or not among those allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}.{name} is unknown; {where} has: {', '.join(fields)}")
    for name in fields:
        if name not in values:
            raise ConfigError(f"{where}.{name} is missing; it must be of type {_type_name(hints[name])}")
    try:
        return cls(**{name: _convert(values[name], hints[name], f"{where}.{name}") for name in fields})
    except ConfigError:
        raise
    except ValueError as error:  # a dataclass's own check of how its fields fit together
        raise ConfigError(f"{where}: {error}") from None


def _type_name(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and typing.get_origin(hint) is None
        else str(hint).removeprefix("typing.")
    )


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that names `where`."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where} = {value!r} must be one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if value is None else _convert(value, inner, where)
    if origin is tuple:
        return _convert_tuple(value, typing.get_args(hint), where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {value!r} must be a group of values")
        return construct(typing.cast(type, hint), value, where)
    return _convert_scalar(value, hint, where)


def _convert_tuple(value: Any, item_hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"{where} = {value!r} must be a sequence such as ('a', 'b')")
    if item_hints[-1] is Ellipsis:
        item_hints = (item_hints[0],) * len(value)
    if len(item_hints) != len(value):
        raise ConfigError(f"{where} = {value!r} must have {len(item_hints)} items")
    return tuple(
        _convert(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, item_hints, strict=True))
    )


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    if where.endswith("seed") and isinstance(value, int) and not 0 <= value < SEEDS:
        raise ConfigError(f"{where} = {value} must be from 0 to {SEEDS - 1}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} = {value!r} must be of type {_type_name(hint)}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value!r} must be a finite number")
    return value


def check_range(group: Any, least: Mapping[str, float], below: Mapping[str, float] | None = None) -> None:
    """Raises ValueError unless each named field of a dataclass is at least `least`, and under `below` where given."""
    for name, bound in least.items():
        value = getattr(group, name)
        limit = (below or {}).get(name, math.inf)
        if not bound <= value < limit:
            upper = "" if limit == math.inf else f" and below {limit:g}"
            raise ValueError(f"{name} = {value} must be at least {bound:g}{upper}")


def check_positive(group: Any, *names: str) -> None:
    """Raises ValueError unless each named field of a dataclass is above 0."""
    for name in names:
        if not getattr(group, name) > 0:
            raise ValueError(f"{name} = {getattr(group, name)} must be above 0")


def check_shares(group: Any, *names: str) -> None:
    """Raises ValueError unless each named field of a dataclass is from 0 to 1, both allowed."""
    for name in names:
        if not 0 <= getattr(group, name) <= 1:
            raise ValueError(f"{name} = {getattr(group, name)} must be from 0 to 1")


def distinct(name: str, values: Sequence[str]) -> None:
    """Raises ValueError if one of `values`, of the config field `name`, is there twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name} has {value!r} twice: give each a name of its own")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
