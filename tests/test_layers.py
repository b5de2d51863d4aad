"""Imports go downwards only, and heavy libraries stay in the one file that is theirs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "instructax"

# A folder is one floor: its files may import each other, but not in a circle.
FLOORS = {
    **dict.fromkeys(("types", "configuration", "operations", "sharding", "safe_text", "own_files", "integrity"), 0),
    **dict.fromkeys(("masked", "clock", "model", "vocabulary"), 1),
    **dict.fromkeys(("processes", "tokenizer", "runlog", "statistics", "divergence"), 1),
    **dict.fromkeys(("watchdog", "heartbeat", "goodput"), 1),
    **dict.fromkeys(("losses", "advantages", "data", "inference", "rows", "checkpoint", "manifest", "optimizer"), 2),
    **dict.fromkeys(("interruption", "locking", "streaming", "batch_view", "pretrained"), 2),
    **dict.fromkeys(("sampling", "chat_template"), 3),
    "engine": 4,
    **dict.fromkeys(("training", "lineage", "inspection", "experience", "evals", "held_out", "answering"), 5),
    **dict.fromkeys(("stage", "microworld"), 6),
    **dict.fromkeys(("supervised", "reward", "ppo", "evaluate", "tasks", "report", "estimate", "chat"), 7),
    # PPO as a run; chat's policies before labelers and on HTTP; models of others as runs
    **dict.fromkeys(("ppo_train", "collect", "serving", "interchange"), 8),
    **dict.fromkeys(("experiment", "workloads"), 9),
    **dict.fromkeys(("benchmark", "killtest", "overhead"), 10),
    "command": 11,
}
# Library → the only places that may import it; nobody may import the last four.
HOMES = {
    "flax": {"model"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "ml_collections": set(),
    "tensorflow": set(),
    "torch": set(),
    "transformers": set(),
}


def imports_of(source: str) -> set[str]:
    """The dotted names that `source` imports, wherever the import stands; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def place_of(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_breaches(place: str, source: str) -> list[str]:
    """Imports of `place` that do not go to a lower floor."""
    used = {name.split(".")[1] for name in imports_of(source) if name.startswith("instructax.")}
    return [f"{place} imports {other}" for other in used & FLOORS.keys() - {place} if FLOORS[other] >= FLOORS[place]]


def home_breaches(place: str, source: str) -> list[str]:
    """Imports of libraries that `place` is not the home of."""
    used = {name.split(".")[0] for name in imports_of(source)}
    return [f"{place} imports {library}" for library in used & HOMES.keys() if place not in HOMES[library]]


FILES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_a_floor():
    assert {place_of(path) for path in FILES} - {"__init__"} == set(FLOORS)


def test_imports_go_to_lower_floors():
    assert [breach for path, source in FILES.items() for breach in floor_breaches(place_of(path), source)] == []


def test_libraries_stay_at_home():
    assert [breach for path, source in FILES.items() for breach in home_breaches(place_of(path), source)] == []


@pytest.mark.parametrize("folder", ["data", "evals", "microworld", "model", "pretrained", "report"])
def test_files_of_a_folder_form_no_circle(folder):
    files = {path.stem: imports_of(path.read_text()) for path in (PACKAGE / folder).glob("*.py")}
    graph = {name: {o for o in files if f"instructax.{folder}.{o}" in used} for name, used in files.items()}
    while graph:
        leaves = {name for name, used in graph.items() if not used}
        assert leaves, f"a circle within {graph}"
        graph = {name: used - leaves for name, used in graph.items() if name not in leaves}


def test_planted_breaches_are_seen():
    assert floor_breaches("ppo", "def f():\n    from instructax import reward") == ["ppo imports reward"]
    assert floor_breaches("losses", "import instructax.training") == ["losses imports training"]
    assert floor_breaches("data", "from instructax.stage import run") == ["data imports stage"]
    assert home_breaches("ppo", "import flax.linen as nn") == ["ppo imports flax"]
    assert home_breaches("stage", "from orbax import checkpoint") == ["stage imports orbax"]
    assert home_breaches("data", "import tensorflow as tf") == ["data imports tensorflow"]


DRIVER = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("code", end.code)
print("heavy:", *sorted({"jax", "numpy", "flax", "orbax", "tensorflow", "torch"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_help_comes_without_jax(script):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, f"scripts/{script}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "--help" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["code 0", "heavy:"]
    assert "Traceback" not in done.stderr
