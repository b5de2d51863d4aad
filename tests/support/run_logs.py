"""Reads what a run writes beside its metrics: its samples and its heartbeat."""

import json
from pathlib import Path
from typing import Any

from instructax.runtime.files import read_json_lines


def read_samples(workdir: Path) -> list[dict[str, Any]]:
    """The samples that a run wrote."""
    return read_json_lines(workdir / "samples.jsonl")


def last_beat(path: Path) -> dict[str, Any]:
    """The last event in a heartbeat file; {} if there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent, or just created
        return {}
