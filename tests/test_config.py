"""Dataclasses built from dicts: conversions, and the one-line error for each mistake."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import pytest

from instructax.config import ConfigError, Seed, construct, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    low: int
    high: int

    def __post_init__(self):
        if self.low > self.high:
            raise ConfigError(f"low = {self.low} must not exceed high = {self.high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    rate: float
    steps: int
    flag: bool
    kind: Literal["a", "b"]
    limit: int | None
    files: tuple[str, ...]
    splits: tuple[tuple[str, float], ...]
    inner: Inner


GOOD: dict[str, Any] = {
    "name": "n",
    "rate": 0.5,
    "steps": 3,
    "flag": True,
    "kind": "b",
    "limit": None,
    "files": ("x", "y"),
    "splits": (("train", 0.9), ("held", 0.1)),
    "inner": {"low": 1, "high": 2},
}


def test_every_kind_of_field_is_built():
    assert construct(Outer, GOOD) == Outer(**{**GOOD, "inner": Inner(low=1, high=2)})


def test_integers_and_lists_are_converted():
    built = construct(
        Outer, {**GOOD, "rate": 2, "limit": 7, "files": ["x"], "splits": [["all", 1]]}
    )
    assert (built.rate, built.limit, built.files, built.splits) == (
        2.0,
        7,
        ("x",),
        (("all", 1.0),),
    )
    assert type(built.rate) is float and type(built.splits[0][1]) is float
    assert construct(Outer, {**GOOD, "files": ()}).files == ()


MISTAKES = [
    ({"rate": "fast"}, "config.rate = 'fast' must be of type float, not str"),
    ({"rate": math.nan}, "config.rate = nan must be a finite number"),
    ({"rate": -math.inf}, "config.rate = -inf must be a finite number"),
    ({"rate": True}, "config.rate = True must be of type float, not bool"),
    ({"rate": None}, "config.rate = None must be of type float, not NoneType"),
    ({"steps": 3.0}, "config.steps = 3.0 must be of type int, not float"),
    ({"steps": True}, "config.steps = True must be of type int, not bool"),
    ({"steps": np.int64(3)}, "config.steps = np.int64(3) must be of type int, not int64"),
    ({"flag": 1}, "config.flag = 1 must be of type bool, not int"),
    ({"name": 4}, "config.name = 4 must be of type str, not int"),
    ({"kind": "c"}, "config.kind = 'c' must be one of 'a', 'b'"),
    ({"kind": ["a"]}, "config.kind = ['a'] must be one of 'a', 'b'"),
    ({"limit": "many"}, "config.limit = 'many' must be of type int, not str"),
    ({"files": "x"}, "config.files = 'x' must be a sequence such as ('a', 'b')"),
    ({"files": {"x": 1}}, "config.files = {'x': 1} must be a sequence such as ('a', 'b')"),
    ({"files": ("x", 2)}, "config.files[1] = 2 must be of type str, not int"),
    (
        {"splits": (("train", 0.9), ("held",))},
        "config.splits[1] = ('held',) must have 2 items",
    ),
    (
        {"splits": (("train", math.nan),)},
        "config.splits[0][1] = nan must be a finite number",
    ),
    ({"inner": 5}, "config.inner = 5 must be a group of values"),
    ({"inner": {"low": 1}}, "config.inner.high is missing; it must be of type int"),
    (
        {"inner": {"low": 1, "high": 2, "hihg": 2}},
        "config.inner.hihg is unknown; config.inner has: low, high",
    ),
    ({"inner": {"low": 3, "high": 2}}, "config.inner: low = 3 must not exceed high = 2"),
    ({"raet": 1.0}, f"config.raet is unknown; config has: {', '.join(GOOD)}"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    MISTAKES,
    ids=[m.split(" = ")[0] + f"-{i}" for i, (_, m) in enumerate(MISTAKES)],
)
def test_each_mistake_is_one_line(change, message):
    with pytest.raises(ConfigError) as caught:
        construct(Outer, {**GOOD, **change})
    assert str(caught.value) == message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded:
    seed: Seed
    split_seed: Seed


def test_seeds_must_be_valid_for_every_generator():
    assert construct(Seeded, {"seed": 0, "split_seed": 2**31 - 1}).split_seed == 2**31 - 1
    for value in (-1, 2**31):
        for name in ("seed", "split_seed"):
            with pytest.raises(ConfigError) as caught:
                construct(Seeded, {"seed": 0, "split_seed": 0, name: value})
            assert (
                str(caught.value) == f"config.{name} = {value} must be from 0 to 2147483647"
            )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rate", "float"),
        ("kind", "Literal['a', 'b']"),
        ("limit", "int | None"),
        ("files", "tuple[str, ...]"),
        ("inner", "Inner"),
    ],
)
def test_a_missing_field_is_named_with_its_type(name, kind):
    with pytest.raises(ConfigError) as caught:
        construct(Outer, {key: value for key, value in GOOD.items() if key != name})
    assert str(caught.value) == f"config.{name} is missing; it must be of type {kind}"


def test_errors_use_the_callers_prefix():
    with pytest.raises(ConfigError, match=r"^model\.low is missing"):
        construct(Inner, {"high": 1}, "model")


def test_the_original_error_is_not_chained():
    with pytest.raises(ConfigError) as caught:
        construct(Inner, {"low": 3, "high": 2})
    assert caught.value.__suppress_context__


def test_require():
    require(True, "never said")
    with pytest.raises(ConfigError, match=r"^said$"):
        require(False, "said")
