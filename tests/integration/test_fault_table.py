"""The fault table in docs/reliability.md: every row names existing tests, or says why there
is none."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_A_FAULT = ("| ---", "| fault", "| **")
NO_TEST = ("by construction", "not tested: ")


def table_rows() -> list[list[str]]:
    """The cells of each row: fault, what happens, tests."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = []
    for line in page.partition("## Faults")[2].splitlines():
        if line.startswith("|") and not line.startswith(NOT_A_FAULT):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


ROWS = table_rows()


def functions_in(name: str) -> set[str]:
    """The tests in the files called `name`, anywhere in tests/."""
    tests = set()
    for path in (ROOT / "tests").rglob(name):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                tests.add(node.name)
    return tests


def test_every_row_names_a_test_or_a_reason():
    assert len(ROWS) > 80
    for fault, happens, tests in ROWS:
        assert fault
        assert happens
        named = re.search(r"`test_\w+\.py::test_\w+`", tests)
        assert named or tests.startswith(NO_TEST), fault


def test_every_named_test_exists():
    missing = set()
    for *_, tests in ROWS:
        for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", tests):
            if test not in functions_in(file):
                missing.add(f"{file}::{test}")
    assert missing == set()


def test_no_fault_is_listed_twice():
    faults = [fault for fault, *_ in ROWS]
    assert len(set(faults)) == len(faults)
