"""Readability figures of Python files, measured with `ast`: python scripts/density.py
[FOLDER …]

Prints, for the files below each folder (src/ if none is given): lines per file, line width,
comment-only lines, tuple assignments and comprehensions per 1,000 lines, and how many
functions have at most 50 lines. Short `__init__.py` files (under 20 lines) are left out of
the file lengths.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SHORT_INIT = 20  # lines; shorter __init__ files only hold a docstring and names
LONG_FUNCTION = 50  # lines, decorators, signature and docstring included


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value with at least `share` of all values at or below it."""
    ordered = sorted(values)
    index = max(0, -(-int(share * 100) * len(ordered) // 100) - 1)
    return ordered[index]


def is_tuple_assignment(node: ast.AST) -> bool:
    """Whether `node` assigns several values that are written out: `a, b = x, y`, not `a, b
    = f()`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def measure(files: Sequence[Path]) -> dict[str, str]:
    """Name of a figure → its value, as text."""
    file_lengths: list[int] = []
    widths: list[int] = []
    function_lengths: list[int] = []
    comments = 0
    tuples = 0
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
            tuples += is_tuple_assignment(node)
            comprehensions += isinstance(node, COMPREHENSIONS)
            if isinstance(node, FUNCTIONS):
                function_lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
    total = sum(file_lengths)
    short = sum(length <= LONG_FUNCTION for length in function_lengths)
    return {
        "files": str(len(file_lengths)),
        "lines": f"{total:,}",
        "lines per file, median / p90 / max": _spread(file_lengths),
        "function lines, median / p90 / max": _spread(function_lengths),
        "functions of at most 50 lines": f"{100 * short / max(len(function_lengths), 1):.1f}%",
        "line width, p90": str(percentile(widths, 0.9)),
        "comment-only lines": f"{100 * comments / max(total, 1):.1f}%",
        "tuple assignments per 1,000 lines": f"{1000 * tuples / max(total, 1):.1f}",
        "comprehensions per 1,000 lines": f"{1000 * comprehensions / max(total, 1):.1f}",
    }


def _spread(values: Sequence[int]) -> str:
    return f"{percentile(values, 0.5)} / {percentile(values, 0.9)} / {max(values)}"


def main() -> int:
    """Prints the table; 2 if there is no Python file."""
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
