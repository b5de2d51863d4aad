#!/usr/bin/env python3
"""Runs lm-evaluation-harness on a finished policy.

python scripts/lm_eval_harness.py --workdir runs/micro/ppo-ptx --tasks=arc_easy

Tasks are those of the harness, which downloads their data, or those in the folder
--include_path.
The exit codes are those of train.py.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

from instructax import cli
from instructax.config import ConfigError

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "A finished run of pretraining, SFT or PPO: WORKDIR, WORKDIR@STEP or WORKDIR@best.",
)
TASKS = flags.DEFINE_list("tasks", [], "Names of tasks, separated by commas.")
INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "A folder with your own task files (YAML)."
)
FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Few-shot examples before each question.", lower_bound=0
)
LIMIT = flags.DEFINE_integer("limit", None, "The most questions per task.", lower_bound=1)
CHAT = flags.DEFINE_bool("apply_chat_template", False, "Format questions as conversations.")
SYSTEM = flags.DEFINE_string(
    "system", None, "With --apply_chat_template: the system message."
)
GEN_KWARGS = flags.DEFINE_string(
    "gen_kwargs", None, "Replaces the tasks' own, for example max_gen_toks=64."
)
OUTPUT = flags.DEFINE_string("output", None, "The JSON file for all results.")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Texts scored or completed at a time.", lower_bound=1
)
SEED = flags.DEFINE_integer(
    "seed", 0, "The seed of tasks that sample.", lower_bound=0, upper_bound=2**31 - 1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "The dtype of the computation."
)

# Task → why its results would be wrong.
REFUSED_TASKS = {
    "realtoxicityprompts": (
        "it asks the Perspective API, which shuts down on 2026-12-31, and counts every "
        "failed request as not toxic; measure toxicity with public_tasks"
    ),
}


def main(argv: list[str]) -> int:
    """Parses the flags, evaluates, and returns the exit code."""
    if len(argv) > 1 or not WORKDIR.value or not TASKS.value:
        print(
            "error: give --workdir=FOLDER of a finished run and --tasks=NAME,NAME",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    workdir = WORKDIR.value
    return cli.guarded(lambda: evaluate(workdir))


def evaluate(workdir: str) -> None:
    """Runs the tasks, prints the harness's table and writes its results."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'instructax[lm_eval]'"
        ) from None
    from instructax.evals.lm_eval_model import InstructaxLM
    from instructax.serving.policy import open_served

    manager = TaskManager(include_path=INCLUDE_PATH.value)
    unknown = [task for task in TASKS.value if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}"
        )

    for task in TASKS.value:
        if task in REFUSED_TASKS:
            raise ConfigError(f"--tasks: {task} is refused: {REFUSED_TASKS[task]}")

    policy = open_served(workdir, dtype=DTYPE.value, batch_size=BATCH_SIZE.value)
    run: Any = simple_evaluate  # its annotations are narrower than what it accepts
    results = run(
        InstructaxLM(policy, seed=SEED.value),
        tasks=TASKS.value,
        num_fewshot=FEWSHOT.value,
        limit=LIMIT.value,
        apply_chat_template=CHAT.value,
        system_instruction=SYSTEM.value,
        gen_kwargs=GEN_KWARGS.value,
        task_manager=manager,
    )
    print(make_table(results))
    if OUTPUT.value:
        text = json.dumps(results, default=str, indent=2) + "\n"
        pathlib.Path(OUTPUT.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
