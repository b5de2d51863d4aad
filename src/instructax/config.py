"""From the nested dict of a config file to frozen dataclasses, with one clear line for
every mistake."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")
INTEGERS = (
    2**31
)  # integers are of 32 bits where they are computed with: their magnitudes are below it
SEEDS = INTEGERS  # what every generator of random numbers takes: seeds are below it
LARGEST, SMALLEST = (
    2.0**128,
    2.0**-126,
)  # float32's: magnitudes of fractions are below the one, 0 or from the other on
SHOWN = 200  # characters of a value in an error


class ConfigError(ValueError):
    """A config value that cannot be used; the message names it, what is allowed, and where
    to change it."""


def construct(
    cls: type[Config], values: Mapping[str, Any], where: str = "config"
) -> Config:
    """Builds the dataclass `cls` from `values`; every field must be given, and nothing
    else.

    Nested dataclasses are built from nested mappings, tuples from sequences, integers are
    taken for floats. Raises ConfigError on a missing or unknown name, a wrong type, a
    number that is not finite or has no place in 32 bits, or a value that is not among those
    allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"{where}.{_cut(repr(str(name))[1:-1])} is unknown; {where} has: {', '.join(fields)}"
            )
    for name in fields:
        if name not in values:
            raise ConfigError(
                f"{where}.{name} is missing; it must be of type {_type_name(hints[name])}"
            )
    try:
        return cls(
            **{
                name: _convert(values[name], hints[name], f"{where}.{name}")
                for name in fields
            }
        )
    except ConfigError:
        raise
    except ValueError as error:  # a dataclass's own check of how its fields fit together
        raise ConfigError(f"{where}: {error}") from None


def format_value(value: Any) -> str:
    """The repr of a value in an error, cut where it is long."""
    if (
        type(value) is int and abs(value) >= 10**SHOWN
    ):  # Python writes out no integer of thousands of digits
        return f"{'-' * (value < 0)}2**{value.bit_length()} or so"
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):  # such an integer, or endless nesting, within
        return f"a {type(value).__name__} too long to show"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


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
            raise ConfigError(
                f"{where} = {format_value(value)} must be one of {', '.join(map(repr, typing.get_args(hint)))}"
            )
        return value
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if value is None else _convert(value, inner, where)
    if origin is tuple:
        return _convert_tuple(value, typing.get_args(hint), where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {format_value(value)} must be a group of values")
        return construct(typing.cast(type, hint), value, where)
    return _convert_scalar(value, hint, where)


def _convert_tuple(value: Any, item_hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(
            f"{where} = {format_value(value)} must be a sequence such as ('a', 'b')"
        )
    if item_hints[-1] is Ellipsis:
        item_hints = (item_hints[0],) * len(value)
    if len(item_hints) != len(value):
        raise ConfigError(
            f"{where} = {format_value(value)} must have {len(item_hints)} items"
        )
    return tuple(
        _convert(item, hint, f"{where}[{i}]")
        for i, (item, hint) in enumerate(zip(value, item_hints, strict=True))
    )


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    if where.endswith("seed") and isinstance(value, int) and not 0 <= value < SEEDS:
        raise ConfigError(f"{where} = {format_value(value)} must be from 0 to {SEEDS - 1}")
    if not isinstance(value, (int, float) if hint is float else hint) or (
        isinstance(value, bool) and hint is not bool
    ):
        raise ConfigError(
            f"{where} = {format_value(value)} must be of type {_type_name(hint)}, not {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value!r} must be a finite number")
    if hint is int and abs(value) >= INTEGERS:
        raise ConfigError(
            f"{where} = {format_value(value)} must be from {1 - INTEGERS} to {INTEGERS - 1}"
        )
    if hint is float and value and not SMALLEST <= abs(value) < LARGEST:
        raise ConfigError(
            f"{where} = {format_value(value)} must be 0 or of a magnitude from 1.2e-38 to 3.4e38, as 32 bits hold"
        )
    return float(value) if hint is float else value


def check_range(
    group: Any, least: Mapping[str, float], below: Mapping[str, float] | None = None
) -> None:
    """Raises ValueError unless each named field of a dataclass is at least `least`, and
    under `below` where given."""
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


def check_fractions(group: Any, *names: str) -> None:
    """Raises ValueError unless each named field of a dataclass is from 0 to 1, both
    allowed."""
    for name in names:
        if not 0 <= getattr(group, name) <= 1:
            raise ValueError(f"{name} = {getattr(group, name)} must be from 0 to 1")


def require_distinct(name: str, values: Sequence[str]) -> None:
    """Raises ValueError if one of `values`, of the config field `name`, is there twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name} has {value!r} twice: give each a name of its own")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
