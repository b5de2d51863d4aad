"""Every config and every run of every experiment builds and has the paper's values, and the
library reads every config field."""

import ast
import dataclasses
import functools
import importlib
import json
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from configs import ppo, sizes
from tests.support import tiny_models

import instructax
from instructax.config import ConfigError
from instructax.data.limits import DataLimits
from instructax.experiment import RunSpec, load_config, load_file
from instructax.models.config import ModelConfig
from instructax.models.init import init_params
from instructax.models.transformer import Transformer, parameter_count
from instructax.sharding import MeshConfig
from instructax.stages import MODULES, build_config, load_stage
from instructax.stages import memory as estimate
from instructax.training.run import RunConfig

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path(instructax.__file__).parent
MODELS = ("pretrain", "sft", "reward_model", "ppo", "evaluate")
# Configs whose sizes are those of the simulated world.
IN_WORLDS = ("world", "collect", "public_tasks")
ARGUMENTS = [(name, size) for name in MODELS for size in sizes.SIZES]
ARGUMENTS += [("sft", f"{size},baseline") for size in sizes.SIZES] + [
    (name, size) for name in IN_WORLDS for size in sizes.SIMULATED
]


@functools.cache
def values_of(name: str, arg: str) -> dict[str, Any]:
    return importlib.import_module(f"configs.{name}").get_config(arg).to_dict()


@functools.cache
def built(name: str, arg: str) -> Any:
    return build_config(values_of(name, arg))


def test_every_file_is_tested():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    # The tests in tests/stages/benchmark build the configs of benchmarks.
    assert files == {*MODELS, *IN_WORLDS, "benchmark", "sizes", "__init__"}


@pytest.mark.parametrize(("name", "arg"), ARGUMENTS)
def test_every_config_builds(name, arg):
    config = built(name, arg)
    assert config.seed == 0
    if name not in IN_WORLDS:
        length = config.data.limits.prompt_tokens + config.data.limits.response_tokens
        assert max(length, config.data.limits.sequence_tokens) <= config.model.max_length
    if name == "sft" and config.data.text:
        assert 0 < config.data.text_fraction < 1


@pytest.mark.parametrize("name", [*MODELS, *IN_WORLDS])
def test_an_unknown_size_is_one_line(name):
    with pytest.raises(ValueError, match=r"^size 'huge' must be one of [^\n]*$"):
        importlib.import_module(f"configs.{name}").get_config("huge")


def test_an_unknown_variant_is_one_line():
    with pytest.raises(
        ValueError, match=r"^variant 'base' must be absent or 'baseline'[^\n]*$"
    ):
        importlib.import_module("configs.sft").get_config("1.3b,base")


# Parameters in 10⁶ (Brown et al., 2020, table 2.1).
COUNTS = {
    "125m": 125,
    "350m": 356,
    "760m": 760,
    "1.3b": 1316,
    "2.7b": 2650,
    "6b": 6660,
    "175b": 174600,
}


@pytest.mark.parametrize("size", COUNTS)
def test_the_papers_sizes_have_their_parameters(size):
    config = built("sft", size)
    model = Transformer(config.model, config.compute, "tokens")
    count = parameter_count(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    c = config.model
    layer = 4 * c.embed_dim * c.num_heads * c.head_dim + 2 * c.embed_dim * c.mlp_dim
    vectors = 3 * c.num_heads * c.head_dim + c.mlp_dim + 6 * c.embed_dim
    assert count == (c.vocab_size + c.max_length + 2) * c.embed_dim + c.num_layers * (
        layer + vectors
    )
    assert count / 1e6 == pytest.approx(COUNTS[size], rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n, s in ARGUMENTS if n not in (*IN_WORLDS, "evaluate")]
)
def test_every_model_divides_by_its_mesh(name, size):
    config = built(name, size)
    mesh = estimate.abstract_mesh(config.mesh)
    assert all(held >= 0 for held in load_stage(name).memory(config, mesh).values())


# Device counts stated in the configs' docstrings.
HARDWARE = {
    ("pretrain", "1.3b"): 64,
    ("sft", "1.3b"): 8,
    ("sft", "1.3b,baseline"): 8,
    ("sft", "175b"): 64,
    ("sft", "175b,baseline"): 64,
    ("reward_model", "6b"): 8,
    ("ppo", "1.3b"): 16,
    ("ppo", "175b"): 256,
}


def devices_of(name: str, arg: str) -> int:
    """The device count stated above, or the smallest that the mesh allows."""
    mesh = built(name, arg).mesh
    return HARDWARE.get((name, arg), mesh.fsdp * mesh.tensor)


@pytest.mark.parametrize(
    ("name", "arg"), [case for case in ARGUMENTS if case[0] not in ("world", "collect")]
)
def test_every_batch_divides_by_its_mesh(name, arg):
    config = built(name, arg)
    data, rest = divmod(devices_of(name, arg), config.mesh.fsdp * config.mesh.tensor)
    assert rest == 0
    mesh: Any = estimate.abstract_mesh(dataclasses.replace(config.mesh, data=data))
    load_stage(name).validate(config, mesh)


PAPER = ("1.3b", "6b", "175b")
EVERY_STAGE = [
    (name, size) for name in ("pretrain", "sft", "reward_model", "ppo") for size in PAPER
]
PPO = [("ppo", size) for size in PAPER]
SFT = [("sft", size) for size in PAPER]
BASELINE = [("sft", f"{size},baseline") for size in PAPER]

# (configs, dotted name, value or one value per size, section of the paper)
PAPER_VALUES: list[tuple[list[tuple[str, str]], str, Any, str]] = [
    (EVERY_STAGE, "optimizer.beta1", 0.9, "C"),
    (EVERY_STAGE, "optimizer.beta2", 0.95, "C"),
    (EVERY_STAGE, "data.limits.sequence_tokens", 2048, "C: context of 2k"),
    (EVERY_STAGE, "data.limits.prompt_tokens", 1024, "C: longer prompts are dropped"),
    (EVERY_STAGE, "data.limits.response_tokens", 1024, "C"),
    (EVERY_STAGE, "data.limits.prompts_per_user", 200, "3.2"),
    (EVERY_STAGE, "data.limits.filter_pii", True, "3.2"),
    (EVERY_STAGE, "data.limits.completions", 9, "3.5: K = 4 … 9"),
    (EVERY_STAGE, "compute.dtype", "bf16", "C: 16 bits with 32-bit parameters"),
    (BASELINE, "epochs", 16.0, "C.1"),
    (BASELINE, "batch_size", (32, 32, 8), "C.1"),
    (BASELINE, "optimizer.learning_rate", (9.65e-6, 9.65e-6, 5.03e-6), "C.1"),
    (BASELINE, "dropout", 0.2, "C.1"),
    (BASELINE, "data.text_fraction", 0.0, "C.1"),
    (BASELINE + SFT, "optimizer.schedule", "cosine", "C.1, C.3"),
    (BASELINE + SFT, "optimizer.final_fraction", 0.1, "C.1, C.3"),
    (BASELINE + SFT, "optimizer.warmup_steps", 0, "C.1"),
    (SFT, "epochs", 2.0, "C.3"),
    (SFT, "batch_size", (32, 32, 8), "C.3"),
    (SFT, "optimizer.learning_rate", (5e-6, 1.04e-5, 2.45e-6), "C.3"),
    (SFT, "data.text_fraction", 0.1, "C.3"),
    (SFT, "dropout", 0.0, "C.1 alone has it"),
    ([("reward_model", "6b")], "epochs", 1.0, "C.2"),
    ([("reward_model", "6b")], "batch_size", 64, "C.2"),
    ([("reward_model", "6b")], "optimizer.learning_rate", 9e-6, "C.2"),
    ([("reward_model", "6b")], "optimizer.schedule", "cosine", "C.2"),
    ([("reward_model", "6b")], "optimizer.final_fraction", 0.1, "C.2"),
    (PPO, "steps", 500, "C.4: 256k episodes of 512"),
    (PPO, "batch_size", 512, "C.4"),
    (PPO, "minibatches", 8, "C.4: of 64"),
    (PPO, "inner_epochs", 1, "C.4"),
    (PPO, "ptx_rows", 512, "C.4: 8 examples for each of the minibatch's 64 episodes"),
    (PPO, "optimizer.learning_rate", (1.18e-5, 1.18e-5, 2.55e-6), "figure 38"),
    (PPO, "value_optimizer.learning_rate", (9e-6, 9e-6, 5e-6), "C.4"),
    (PPO, "optimizer.schedule", "constant", "C.4"),
    (PPO, "optimizer.warmup_steps", 10, "C.4"),
    (PPO, "optimizer.warmup_from", 0.1, "C.4"),
    (PPO, "temperature", 1.0, "C.4"),
    (PPO, "kl_coef", 0.02, "C.4"),
    (PPO, "ptx_coef", 27.8, "C.4"),
    (PPO, "clip", 0.2, "C.4"),
    (PPO, "discount", 1.0, "C.4"),
    (PPO, "ema_decay", 0.992, "C.4"),
    (
        PPO,
        "reward_model",
        values_of("reward_model", "6b")["model"],
        "C.2: 6B for all policies",
    ),
    (PPO, "reward_parent", "runs/6b/reward", "C.2"),
    (SFT, "model.num_layers", (24, 32, 96), "GPT-3"),
    (SFT, "model.embed_dim", (2048, 4096, 12288), "GPT-3"),
    (SFT, "model.num_heads", (16, 32, 96), "GPT-3"),
    (SFT, "model.head_dim", 128, "GPT-3"),
    (SFT, "model.vocab_size", 50257, "GPT-3"),
    (SFT, "model.max_length", 2048, "C"),
    (
        [("pretrain", size) for size in PAPER],
        "optimizer.learning_rate",
        (2e-4, 1.2e-4, 6e-5),
        "GPT-3",
    ),
    (
        [("pretrain", size) for size in PAPER],
        "optimizer.warmup_steps",
        (358, 179, 114),
        "GPT-3: 375e6 tokens",
    ),
]


@pytest.mark.parametrize(("cases", "name", "value", "source"), PAPER_VALUES)
def test_the_papers_values(cases, name, value, source):
    wanted = value if isinstance(value, tuple) else (value,) * len(cases)
    assert len(wanted) == len(cases)
    for case, expected in zip(cases, wanted, strict=True):
        found = functools.reduce(
            lambda group, key: group[key], name.split("."), values_of(*case)
        )
        assert found == expected, f"{case} {name}: {source}"


def test_the_error_about_16_bits_names_the_tolerance_of_the_configs():
    source = (SOURCES / "stages/ppo/invariants.py").read_text()
    assert ppo.TOLERANCES["bf16"] == ppo.TOLERANCES["bf16_matmul"]
    assert f"config.tolerance = {ppo.TOLERANCES['bf16']} " in source


def test_the_paper_ran_256k_episodes():
    assert all(built(*case).steps * built(*case).batch_size == 256_000 for case in PPO)


# Experiments.


def arguments_of(experiment: str, folder: Path) -> list[str]:
    """The experiment's arguments after the colon. Data that it needs is written to
    `folder`."""
    if experiment == "real_text":
        for patterns in load_file(ROOT / "experiments/real_text.py").FILES.values():
            for pattern in patterns:
                path = folder / f"{pattern.replace('*', '')}.jsonl.gz"
                path.parent.mkdir(exist_ok=True)
                path.touch()
        return [str(folder)]
    if experiment == "smollm2":
        experiments = load_file(ROOT / "experiments/smollm2.py")
        for pattern in [
            pattern for patterns in experiments.FILES.values() for pattern in patterns
        ]:
            path = folder / f"{pattern.replace('*', '')}.jsonl.gz"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return [str(folder), f"{folder},hour", f"{folder},hour,bf16_matmul"]
    return ["tiny", "micro", "family"]


def parents_of(config: Any) -> dict[str, ModelConfig]:
    """The parent runs of `config`, and the architecture that each must have."""
    named = {getattr(config, "parent", ""): getattr(config, "model", None)}
    named |= {getattr(config, "policy_parent", ""): getattr(config, "model", None)}
    named |= {getattr(config, "reward_parent", ""): getattr(config, "reward_model", None)}
    prompted = [
        word
        for policy in getattr(config, "policies", ())
        for word in policy
        if str(word).startswith("runs/")
    ]
    named |= dict.fromkeys(prompted, getattr(config, "model", None))
    return {path.partition("@")[0]: model for path, model in named.items() if path}


def stand_in_for_smollm2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes `folder` the working directory, with an imported model in it; returns the
    model's folder."""
    base = "runs/smollm2/pretrain"
    monkeypatch.chdir(folder)
    Path(base).mkdir(parents=True)
    model = dataclasses.asdict(tiny_models.llama_config(max_length=1024))
    (Path(base) / "manifest.json").write_text(
        json.dumps({"stage": "pretrained", "model": model})
    )
    (Path(base) / "summary.json").write_text("{}")
    Path("configs").symlink_to(ROOT / "configs")
    return base


@pytest.mark.parametrize(
    "experiment", sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
)
def test_every_run_of_every_experiment_builds(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    bases: dict[str, Any] = {}
    if experiment == "smollm2":
        bases[stand_in_for_smollm2(tmp_path, monkeypatch)] = SimpleNamespace(
            model=tiny_models.llama_config(max_length=1024)
        )
    for argument in arguments_of(experiment, tmp_path):
        runs = load_file(ROOT / f"experiments/{experiment}.py").get_runs(
            argument, "runs/here"
        )
        assert len({run.name for run in runs}) == len(runs) > 1
        done: dict[str, Any] = dict(bases)
        for run in runs:
            values = load_config(run)
            config = build_config(values)
            for path, model in parents_of(config).items():
                assert path in done, (
                    f"{run.name} starts from {path}, which no run before it makes"
                )
                assert model in (None, done[path].model), (
                    f"{run.name} wants another architecture of {path}"
                )
            if "world" in [earlier.name for earlier in runs] and hasattr(
                config, "tokenizer"
            ):
                assert config.tokenizer == "runs/here/world/tokenizer.json"
            done[f"runs/here/{run.name}"] = config


@pytest.mark.parametrize("experiment", ["real_text", "smollm2"])
def test_missing_data_is_a_one_line_error(experiment, tmp_path, monkeypatch):
    stand_in_for_smollm2(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"has no pretrain/.* with the ending .jsonl.gz"):
        load_file(ROOT / f"experiments/{experiment}.py").get_runs(str(tmp_path), "runs/a")


def test_a_seed_that_is_not_a_number_is_a_one_line_error():
    with pytest.raises(ConfigError, match="seed 'one' must be a whole number"):
        load_file(ROOT / "experiments/alignment.py").get_runs("micro,one", "runs/here")


@pytest.mark.parametrize(
    ("config", "overrides", "named"),
    [
        ("configs/ppo.py:tiny", {"kl_ceof": 0.1}, r"with \{'kl_ceof': 0\.1\}: .*kl_ceof"),
        ("configs/ppo.py:tiny", {"data.limits.anwsers": 4}, "anwsers"),
        ("configs/ppo.py:tiny", {"kl_coef": "much"}, "kl_coef"),
        ("configs/ppo.py:huge", {}, "huge"),
        ("configs/qqo.py:tiny", {}, "configs/qqo.py"),
    ],
)
def test_an_impossible_run_is_a_config_error(config, overrides, named, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=named):
        load_config(RunSpec("x", config, overrides))


def test_an_unknown_stage_is_a_config_error():
    with pytest.raises(
        ConfigError,
        match=(
            r"^config\.stage = 'rlhf' must be one of world, collect, pretrain, "
            r"sft, reward_model"
        ),
    ):
        build_config({"stage": "rlhf"})


# Every field is read.


def groups_of(cls: type) -> set[type]:
    """The config dataclass and all nested ones."""
    hints = typing.get_type_hints(cls).values()
    inner = {
        hint for hint in hints if dataclasses.is_dataclass(hint) and isinstance(hint, type)
    }
    return {cls}.union(*map(groups_of, inner))


def names_read(sources: dict[str, str], own_classes: set[str]) -> set[str]:
    """Attributes that `sources` read, except where a config class validates itself."""
    names: set[str] = set()

    def visit(node: ast.AST, within: str = "") -> None:
        if isinstance(node, ast.ClassDef):
            within = node.name
        checks_itself = isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
        if checks_itself and within in own_classes:
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child, within)

    for source in sources.values():
        visit(ast.parse(source))
    return names


def dead_fields(groups: set[type]) -> set[str]:
    """Config fields that the library never reads."""
    sources = {str(path): path.read_text() for path in SOURCES.rglob("*.py")}
    read = names_read(sources, {group.__name__ for group in groups})
    dead: set[str] = set()
    for group in groups:
        for field in dataclasses.fields(group):
            if field.name not in read:
                dead.add(f"{group.__qualname__.split('.')[-1]}.{field.name}")
    return dead


def test_every_field_is_read():
    stages = {load_stage(name).Config for name in MODULES}
    groups = set[type]().union(*map(groups_of, stages))
    assert {DataLimits, RunConfig, ModelConfig, MeshConfig} <= groups and len(groups) == 21
    assert dead_fields(groups) == set()


def test_a_planted_dead_field_is_found():
    @dataclasses.dataclass(frozen=True)
    class Planted:
        learning_rate: float  # read
        momentum_of_nobody: float

    assert dead_fields({Planted}) == {"Planted.momentum_of_nobody"}
    check = (
        "class Planted:\n    def __post_init__(self):\n        assert "
        "self.momentum_of_nobody > 0"
    )
    assert names_read({"x": check}, {"Planted"}) == set()
    assert names_read({"x": "config.momentum_of_nobody = 1"}, set()) == set()
