"""Every test that the table of faults in docs/reliability.md names is there; every row
names one or says why not."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "reliability.md")
    .read_text()
    .partition("## Faults")[2]
    .splitlines()
    if line.startswith("|") and not line.startswith(("| ---", "| fault", "| **"))
]
NO_TEST = ("by construction", "not tested: ")


def names_in(name: str) -> set[str]:
    """The tests in a file of tests/."""
    tree = ast.parse((ROOT / "tests" / name).read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_has_a_test_or_a_reason():
    assert len(ROWS) > 80
    for fault, happens, shown in ROWS:
        assert fault and happens
        assert re.search(r"`test_\w+\.py::test_\w+`", shown) or shown.startswith(NO_TEST), (
            fault
        )


def test_every_test_that_is_named_is_there():
    named = {
        (file, test)
        for *_, shown in ROWS
        for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", shown)
    }
    assert [
        f"{file}::{test}" for file, test in sorted(named) if test not in names_in(file)
    ] == []


def test_no_fault_stands_twice():
    faults = [fault for fault, *_ in ROWS]
    assert len(set(faults)) == len(faults)
