"""The density script: one planted example of everything that it counts."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "density.py"


@pytest.fixture(scope="module")
def density():
    spec = importlib.util.spec_from_file_location("density", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Ten lines.
PLAIN = '''"""A module."""

x = 1


def f(y):
    """Twice y."""
    z = 2 * y

    return z
'''


def figures(density, folder: Path, **sources: str) -> dict[str, str]:
    """Measures files that are named by keyword."""
    paths = []
    for name, source in sources.items():
        path = folder / f"{name}.py"
        path.write_text(source)
        paths.append(path)
    return density.measure(paths)


def test_plain_code_has_nothing_to_count(density, tmp_path):
    assert figures(density, tmp_path, plain=PLAIN) == {
        "files": "1",
        "lines": "10",
        "lines per file, median / p90 / max": "10 / 10 / 10",
        "function lines, median / p90 / max": "5 / 5 / 5",
        "functions of at most 50 lines": "100.0%",
        "line width, p90": "18",
        "comment-only lines": "0.0%",
        "tuple assignments per 1,000 lines": "0.0",
        "comprehensions per 1,000 lines": "0.0",
    }


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("a, b = 1, 2", "tuple assignments per 1,000 lines", "90.9"),
        ("a, b = f(1)", "tuple assignments per 1,000 lines", "0.0"),
        ("c = (1, 2)", "tuple assignments per 1,000 lines", "0.0"),
        ("d = [i for i in range(3)]", "comprehensions per 1,000 lines", "90.9"),
        ("d = {i for i in range(3)}", "comprehensions per 1,000 lines", "90.9"),
        ("d = {i: i for i in range(3)}", "comprehensions per 1,000 lines", "90.9"),
        ("d = sum(i for i in range(3))", "comprehensions per 1,000 lines", "90.9"),
        ("# a reason", "comment-only lines", "9.1%"),
        ("e = 1  # a unit", "comment-only lines", "0.0%"),
        ("f = '" + "x" * 80 + "'", "line width, p90", "86"),
    ],
)
def test_a_planted_line_is_counted(density, tmp_path, line, name, value):
    assert figures(density, tmp_path, planted=f"{PLAIN}{line}\n")[name] == value


def test_a_planted_long_function_is_counted(density, tmp_path):
    body = "    y += 1\n"
    source = "def fits(y):\n" + body * 49 + "\n\ndef long(y):\n" + body * 50
    found = figures(density, tmp_path, functions=source)
    assert found["functions of at most 50 lines"] == "50.0%"
    assert found["function lines, median / p90 / max"] == "50 / 51 / 51"


def test_short_init_files_are_left_out_of_the_lengths(density, tmp_path):
    short = {"__init__": '"""A package."""\n', "plain": PLAIN}
    assert figures(density, tmp_path, **short)["files"] == "1"
    long = {"__init__": PLAIN * 2, "plain": PLAIN}
    assert figures(density, tmp_path, **long)["files"] == "2"


def test_percentile(density):
    assert density.percentile([3], 0.9) == 3
    assert density.percentile([4, 1, 3, 2], 0.5) == 2
    assert density.percentile(range(1, 11), 0.9) == 9
    assert density.percentile(range(1, 12), 0.9) == 10


def test_the_command(tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN)
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "lines per file, median / p90 / max" in done.stdout

    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run([*command, str(empty)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no Python files below {empty}\n"
