"""A public name means one thing: no two packages define the same top-level name."""

import ast
from collections import defaultdict
from pathlib import Path

from instructax.stages import MODULES

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "instructax"
# The five names that every stage defines, with the same meaning.
STAGE_NAMES = {"Config", "validate", "train", "row_lengths", "memory"}


def top_level_names(source: str) -> set[str]:
    """Public classes, functions and constants that a module defines itself."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    # Each module has a logger of its own, as usual in Python.
    return {name for name in names if not name.startswith("_")} - {"logger"}


def homes_of_names(sources: dict[str, str]) -> dict[str, list[str]]:
    """Name -> the modules that define it, of names that several modules define."""
    homes = defaultdict(list)
    for module, source in sources.items():
        for name in top_level_names(source):
            homes[name].append(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_a_public_name_is_defined_once():
    sources = {str(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    homes = homes_of_names(sources)
    assert {name: homes[name] for name in homes.keys() - STAGE_NAMES} == {}


def test_every_stage_defines_the_five_names():
    for module in MODULES.values():
        path = PACKAGE.parent / (module.replace(".", "/") + ".py")
        assert top_level_names(path.read_text()) >= STAGE_NAMES, module


def test_a_planted_second_meaning_is_found():
    sources = {
        "data": "def pack(x): ...",
        "models": "class Pack: ...\npack = 3",
        "evals": "",
    }
    assert homes_of_names(sources) == {"pack": ["data", "models"]}
