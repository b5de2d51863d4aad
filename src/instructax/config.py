"""Builds frozen dataclasses from the nested dict of a config file.

Every value is checked against the type of its field, and every mistake is reported as one
line that names the value, what is allowed, and where to change it.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

ConfigT = TypeVar("ConfigT")

# Integers end up in int32 arrays: magnitudes must stay below this.
INT_LIMIT = 2**31

# Range of float32: a number is 0, or its magnitude lies in [FLOAT_SMALLEST, FLOAT_LIMIT).
FLOAT_LIMIT = 2.0**128
FLOAT_SMALLEST = 2.0**-126

# Longest value, in characters, that an error message shows in full.
MAX_SHOWN = 200


class ConfigError(ValueError):
    """A mistake that the user can correct: a config value, a flag, a file or a folder.

    The message names the value, what is allowed, and where to change it. Commands print it
    as one line and exit with code 2; every other ValueError is a bug and keeps its
    traceback.
    """


@dataclasses.dataclass(frozen=True)
class IntRange:
    """Bounds of an integer field, for `Annotated[int, IntRange(least, limit)]`."""

    least: int
    limit: int  # exclusive


# Random number generators take seeds in this range.
Seed = Annotated[int, IntRange(0, INT_LIMIT)]


def construct(
    cls: type[ConfigT], values: Mapping[str, Any], where: str = "config"
) -> ConfigT:
    """Builds a dataclass from a nested mapping.

    Nested dataclasses are built from nested mappings and tuples from sequences. Integers
    are accepted for floats.

    Args:
      cls: the dataclass to build.
      values: one value for every field, and no others.
      where: prefix of names in error messages.

    Raises:
      ConfigError: a name is missing or unknown, a value has the wrong type, is not one of
        the allowed choices, is not finite or does not fit into 32 bits, or the dataclass
        rejects a combination of values.
    """
    # Names first, so that a misspelled one is reported before values that look wrong.
    fields = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
    # With `Annotated`, which carries the range of integers.
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in values:
        if name not in fields:
            # Without the quotes of `repr`, but with its escapes: names may hold newlines.
            shown = _shorten(repr(str(name))[1:-1])
            raise ConfigError(
                f"{where}.{shown} is unknown; {where} has: {', '.join(fields)}"
            )
    for name in fields:
        if name not in values:
            expected = _type_name(hints[name])
            raise ConfigError(f"{where}.{name} is missing; it must be of type {expected}")
    converted = {
        name: _convert(values[name], hints[name], f"{where}.{name}") for name in fields
    }
    try:
        return cls(**converted)
    except ConfigError as error:  # from `__post_init__`, which does not know the prefix
        raise ConfigError(f"{where}: {error}") from None


def format_value(value: Any) -> str:
    """The repr of a value for an error message, shortened if it is long."""
    if type(value) is int and abs(value) >= 10**MAX_SHOWN:
        # Python refuses to print integers with thousands of digits.
        sign = "-" if value < 0 else ""
        return f"{sign}2**{value.bit_length()} or so"
    try:
        return _shorten(repr(value))
    except (ValueError, RecursionError):  # such an integer, or endless nesting, inside it
        return f"a {type(value).__name__} too long to show"


def _shorten(text: str) -> str:
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[:MAX_SHOWN]}…"


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _type_name(typing.get_args(hint)[0])
    if isinstance(hint, type) and origin is None:
        return hint.__name__
    return str(hint).removeprefix("typing.")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Converts `value` to the type `hint`, or raises a ConfigError that names `where`."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Annotated:
        return _convert_int_in_range(value, arguments[1], where)
    if origin is Literal:
        if value not in arguments:
            allowed = ", ".join(map(repr, arguments))
            raise ConfigError(f"{where} = {format_value(value)} must be one of {allowed}")
        return value
    if origin in (types.UnionType, Union):
        # The only unions in configs are `X | None`.
        if value is None:
            return None
        inner = next(argument for argument in arguments if argument is not type(None))
        return _convert(value, inner, where)
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {format_value(value)} must be a group of values")
        return construct(typing.cast(type, hint), value, where)
    return _convert_scalar(value, hint, where)


def _convert_tuple(value: Any, item_hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"{where} = {format_value(value)} must be a sequence such as ('a', 'b')"
        )
    if item_hints[-1] is Ellipsis:  # tuple[X, ...]: any number of items
        item_hints = (item_hints[0],) * len(value)
    if len(item_hints) != len(value):
        raise ConfigError(
            f"{where} = {format_value(value)} must have {len(item_hints)} items"
        )
    items = []
    for i, (item, hint) in enumerate(zip(value, item_hints, strict=True)):
        items.append(_convert(item, hint, f"{where}[{i}]"))
    return tuple(items)


def _convert_int_in_range(value: Any, bounds: IntRange, where: str) -> int:
    if isinstance(value, int) and not bounds.least <= value < bounds.limit:
        raise ConfigError(
            f"{where} = {format_value(value)} must be from {bounds.least} to "
            f"{bounds.limit - 1}"
        )
    return _convert_scalar(value, int, where)


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    accepted = (int, float) if hint is float else hint
    # bool is a subclass of int, but True is not a number of steps.
    unwanted_bool = isinstance(value, bool) and hint is not bool
    if not isinstance(value, accepted) or unwanted_bool:
        raise ConfigError(
            f"{where} = {format_value(value)} must be of type {_type_name(hint)}, "
            f"not {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value!r} must be a finite number")
    if hint is int and abs(value) >= INT_LIMIT:
        raise ConfigError(
            f"{where} = {format_value(value)} must be from {1 - INT_LIMIT} to "
            f"{INT_LIMIT - 1}"
        )
    if hint is float and value and not FLOAT_SMALLEST <= abs(value) < FLOAT_LIMIT:
        raise ConfigError(
            f"{where} = {format_value(value)} must be 0 or have a magnitude from 1.2e-38 "
            "to 3.4e38, the range of float32"
        )
    # An integer given for a float field.
    return float(value) if hint is float else value


def check_range(
    group: Any, least: Mapping[str, float], below: Mapping[str, float] | None = None
) -> None:
    """Checks fields of a dataclass against bounds.

    Args:
      group: the dataclass.
      least: field name → smallest allowed value.
      below: field name → exclusive upper bound, for those that have one.

    Raises:
      ConfigError: a field is out of bounds.
    """
    for name, bound in least.items():
        value = getattr(group, name)
        limit = (below or {}).get(name, math.inf)
        if not bound <= value < limit:
            upper = "" if limit == math.inf else f" and below {limit:g}"
            raise ConfigError(f"{name} = {value} must be at least {bound:g}{upper}")


def check_positive(group: Any, *names: str) -> None:
    """Raises ConfigError unless each named field of the dataclass `group` is above 0."""
    for name in names:
        value = getattr(group, name)
        if not value > 0:
            raise ConfigError(f"{name} = {value} must be above 0")


def check_fractions(group: Any, *names: str) -> None:
    """Raises ConfigError unless each named field of the dataclass `group` is in [0, 1]."""
    for name in names:
        value = getattr(group, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} = {value} must be from 0 to 1")


def require_distinct(name: str, values: Sequence[str]) -> None:
    """Raises ConfigError if a value of the config field `name` occurs twice."""
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{name} has {value!r} twice: give each its own name")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
