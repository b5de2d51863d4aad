"""Measures how readable Python files are.

python scripts/density.py [FOLDER …]

Prints, for the files in the folders (default: src/): lines per file, lines per function,
functions of at most 50 lines, line width, comment-only lines, and tuple assignments and
comprehensions per 1,000 lines. The lines per file exclude `__init__.py` files of fewer than
20 lines.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Shorter `__init__.py` files, in lines, contain a docstring and names only.
SHORT_INIT = 20

# Longest function that fits on one screen, in lines, including signature and docstring.
MAX_FUNCTION = 50


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    rank = -(-int(share * 100) * len(ordered) // 100)  # rounded up, from 1
    return ordered[max(rank, 1) - 1]


def is_tuple_assignment(node: ast.AST) -> bool:
    """Whether `node` unpacks values that are written out.

    True for `a, b = x, y`, False for `a, b = f()`.
    """
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def measure(files: Sequence[Path]) -> dict[str, str]:
    """Measures Python files and returns name of a statistic → its value as text."""
    file_lengths: list[int] = []
    widths: list[int] = []
    function_lengths: list[int] = []
    comments = 0
    tuple_assignments = 0
    comprehensions = 0
    for path in files:
        source = path.read_text()
        lines = source.splitlines()
        if path.name != "__init__.py" or len(lines) >= SHORT_INIT:
            file_lengths.append(len(lines))
        for line in lines:
            if line.strip():
                widths.append(len(line))
            comments += line.lstrip().startswith("#")
        for node in ast.walk(ast.parse(source)):
            tuple_assignments += is_tuple_assignment(node)
            comprehensions += isinstance(node, COMPREHENSIONS)
            if isinstance(node, FUNCTIONS):
                last_line = node.end_lineno or node.lineno
                function_lengths.append(last_line - node.lineno + 1)

    total = sum(file_lengths)
    short_functions = sum(length <= MAX_FUNCTION for length in function_lengths)
    return {
        "files": str(len(file_lengths)),
        "lines": f"{total:,}",
        "lines per file, median / p90 / max": _spread(file_lengths),
        "function lines, median / p90 / max": _spread(function_lengths),
        "functions of at most 50 lines": _per(100, short_functions, len(function_lengths))
        + "%",
        "line width, p90": str(percentile(widths, 0.9)),
        "comment-only lines": _per(100, comments, total) + "%",
        "tuple assignments per 1,000 lines": _per(1000, tuple_assignments, total),
        "comprehensions per 1,000 lines": _per(1000, comprehensions, total),
    }


def _per(unit: int, count: int, total: int) -> str:
    return f"{unit * count / max(total, 1):.1f}"


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return f"{percentile(values, 0.5)} / {percentile(values, 0.9)} / {max(values)}"


def main() -> int:
    """Prints the table; returns 2 if there is no Python file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("src")])
    paths: list[Path] = parser.parse_args().paths
    files: list[Path] = []
    for path in paths:
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    if not files:
        print(f"error: no Python files below {', '.join(map(str, paths))}", file=sys.stderr)
        return 2
    for name, value in measure(files).items():
        print(f"{name:<38}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
