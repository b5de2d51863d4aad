"""Readers of the JSON files that runs write."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructax.evals.intervals import Estimate
from instructax.runtime.files import read_json_lines

# What JSON holds is checked where it is used.
JsonObject = Mapping[str, Any]


def read_run_file(path: Path) -> dict[str, Any]:
    """Returns the object in `path`, or {} if the file does not exist."""
    if not path.exists():
        return {}
    return json.loads(path.read_text())


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the object on each line of `path`, or [] if the file does not exist."""
    if not path.exists():
        return []
    return read_json_lines(path)


def logged_estimate(record: JsonObject, scale: float = 1.0) -> Estimate:
    """Returns the estimate in a log record, multiplied by `scale`.

    JSON has no NaN and no infinity: a null value is the mean of nothing, and a null bound
    is infinite.
    """

    def number(key: str, if_null: float) -> float:
        logged = record[key]
        return scale * (if_null if logged is None else logged)

    return Estimate(
        value=number("value", math.nan),
        low=number("low", -math.inf),
        high=number("high", math.inf),
        count=record["count"],
    )
