"""Packages import only lower packages, have no import cycles, and confine each heavy
library to one package."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from instructax.stages import MODULES as MODULES_OF_STAGES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "instructax"

# Modules directly in src/instructax that import only each other form the package `root`.
ROOT_MODULES = {
    "__init__",
    "types",
    "rng",
    "masking",
    "config",
    "sharding",
    "losses",
    "advantages",
}

# Lowest first. Packages in the same set do not import each other.
ORDER = (
    {"root"},
    {"runtime"},
    {"models"},
    {"data"},
    {"checkpoints"},
    {"generation", "training"},
    {"serving"},
    {"evals"},
    {"simulation"},
    {"stages"},
    {"experiment"},
    {"report"},
    {"cli"},
)
LEVELS = {package: level for level, packages in enumerate(ORDER) for package in packages}

# Library → the only packages that may import it.
HOMES = {
    "flax": {"models"},
    "orbax": {"checkpoints"},
    "tensorflow_datasets": {"data"},
    "ml_collections": set(),
    "tensorflow": set(),
    "torch": set(),
    "transformers": set(),
}
# The modules and packages of `stages.MODULES`, such as `sft` and `ppo`.
STAGES = {module.split(".")[2] for module in MODULES_OF_STAGES.values()}
FILES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source: str) -> set[str]:
    """The dotted names that `source` imports, at any nesting level.

    `from a import b` counts as both a and a.b.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module_name(path: Path) -> str:
    """Path → `instructax.data.batches`; the path of an __init__ → its package."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {module_name(path): imports_of(source) for path, source in FILES.items()}


def package_of(module: str) -> str:
    """`instructax.data.batches` → data, `instructax.losses` → root."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return "root" if name in ROOT_MODULES else name


def upward_imports(package: str, source: str) -> list[str]:
    """Imports in a file of `package` from packages that are not lower."""
    used = {
        package_of(name) for name in imports_of(source) if name.startswith("instructax.")
    } - {package}
    return sorted(
        f"{package} imports {other}" for other in used if LEVELS[other] >= LEVELS[package]
    )


def stray_libraries(package: str, source: str) -> list[str]:
    """Imports of libraries that belong to another package."""
    used = {name.split(".")[0] for name in imports_of(source)}
    return [
        f"{package} imports {library}"
        for library in used & HOMES.keys()
        if package not in HOMES[library]
    ]


def cycle(graph: dict[str, set[str]]) -> set[str]:
    """The modules that remain after repeatedly removing modules without imports."""
    while graph:
        leaves = {name for name, used in graph.items() if not used}
        if not leaves:
            return set(graph)
        graph = {name: used - leaves for name, used in graph.items() if name not in leaves}
    return set()


def import_graph(modules: Iterable[str]) -> dict[str, set[str]]:
    """Module → the modules among `modules` that it imports; an __init__ counts as a
    module."""
    names = set(modules)
    graph: dict[str, set[str]] = {}
    for name in names:
        used = MODULES[name] & names - {name}
        # `from instructax.models import lora` yields both names, but imports the module.
        packages = {module.rpartition(".")[0] for module in used}
        graph[name] = used - packages
    return graph


def test_every_module_has_a_level():
    assert {package_of(name) for name in MODULES} == set(LEVELS)


def test_there_are_at_most_ten_root_modules():
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 10


def stage_of(name: str) -> str | None:
    """The stage with the module or package `name`, None if there is none."""
    parts = name.split(".")
    if parts[:2] != ["instructax", "stages"] or len(parts) < 3:
        return None
    return parts[2] if parts[2] in STAGES else None


def imports_of_other_stages(name: str, imports: Iterable[str]) -> list[str]:
    """The other stages that a stage imports.

    The benchmark runs several stages, but is none itself.
    """
    if stage_of(name) is None:
        return []
    used = {stage_of(imported) for imported in imports} - {None, stage_of(name)}
    return [f"{name} imports {stage}" for stage in sorted(used)]


def test_every_package_states_its_purpose():
    for path, source in FILES.items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(source)), path


def test_packages_import_only_lower_packages():
    found = []
    for path, source in FILES.items():
        found += upward_imports(package_of(module_name(path)), source)
    assert found == []


def test_libraries_stay_in_their_package():
    found = []
    for path, source in FILES.items():
        found += stray_libraries(package_of(module_name(path)), source)
    assert found == []


@pytest.mark.parametrize("package", sorted(LEVELS))
def test_no_package_has_a_cycle(package):
    graph = import_graph(name for name in MODULES if package_of(name) == package)
    # Importing a submodule runs __init__ first, but that is not a dependency of our code.
    if package in graph:
        graph = {name: used - {package} for name, used in graph.items()}
    left = cycle(graph)
    assert not left, f"imports in a cycle: {sorted(left)}"


def test_stages_do_not_import_each_other():
    found = []
    for name, imports in MODULES.items():
        found += imports_of_other_stages(name, imports)
    assert found == []


def test_planted_faults_are_found():
    assert imports_of_other_stages(
        "instructax.stages.sft", {"instructax.stages.ppo.stage.Config"}
    ) == ["instructax.stages.sft imports ppo"]
    # A stage may import the modules of its own package.
    assert not imports_of_other_stages(
        "instructax.stages.ppo.stage", {"instructax.stages.ppo.program"}
    )
    assert upward_imports("models", "def f():\n    from instructax.stages import sft") == [
        "models imports stages"
    ]
    assert upward_imports("root", "import instructax.training.loop") == [
        "root imports training"
    ]
    assert upward_imports("generation", "from instructax.training import loop") == [
        "generation imports training"
    ]
    assert stray_libraries("stages", "import flax.linen as nn") == ["stages imports flax"]
    assert stray_libraries("training", "from orbax import checkpoint") == [
        "training imports orbax"
    ]
    assert stray_libraries("data", "import tensorflow as tf") == ["data imports tensorflow"]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


DRIVER = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("code", end.code)
heavy = {"jax", "numpy", "flax", "orbax", "tensorflow", "torch"}
print("heavy:", *sorted(heavy & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
)
def test_help_does_not_import_jax(script):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, f"scripts/{script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "--help" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["code 0", "heavy:"]
    assert "Traceback" not in done.stderr
