#!/usr/bin/env python3
"""Evaluates a policy on tasks of lm-evaluation-harness.

python scripts/lm_eval_harness.py --workdir runs/micro/ppo-ptx --tasks=arc_easy,lambada

Tasks are the harness's own, which it downloads, or those in the folder --include_path. The
exit codes are those of train.py.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

from instructax import cli
from instructax.config import ConfigError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "A finished run of pretraining, SFT or PPO: WORKDIR or WORKDIR@STEP."
)
TASKS = flags.DEFINE_list("tasks", [], "Names of tasks, separated by commas.")
INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "A folder with task files (YAML) of your own."
)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Number of few-shot examples before each question.", lower_bound=0
)
LIMIT = flags.DEFINE_integer(
    "limit", None, "The largest number of questions per task.", lower_bound=1
)
APPLY_CHAT_TEMPLATE = flags.DEFINE_bool(
    "apply_chat_template", False, "Ask each question as a message of a conversation."
)
SYSTEM = flags.DEFINE_string(
    "system", None, "The system message, with --apply_chat_template."
)
GEN_KWARGS = flags.DEFINE_string(
    "gen_kwargs", None, "Replaces the tasks' own settings, such as max_gen_toks=64."
)
OUTPUT = flags.DEFINE_string("output", None, "A JSON file for all results.")
ROWS = flags.DEFINE_integer(
    "rows", 8, "Number of texts that are scored or answered at a time.", lower_bound=1
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "The seed of tasks that sample.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "The dtype of the computation."
)


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
    """Runs the tasks, prints the harness's table, and writes its results."""
    # lm_eval is an optional dependency.
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'instructax[lm_eval]'"
        ) from None
    # Imported here, so that --help answers without JAX.
    from instructax.evals.lm_eval_model import InstructaxLM
    from instructax.serving.chat import open_served

    manager = TaskManager(include_path=INCLUDE_PATH.value)
    unknown = [task for task in TASKS.value if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks: there is no {', '.join(unknown)} among the tasks of "
            "lm-evaluation-harness"
        )
    # Unknown tasks are reported before the policy is loaded.
    policy = open_served(workdir, dtype=DTYPE.value, rows=ROWS.value)
    model = InstructaxLM(policy.engine, policy.tokenizer, policy.template, seed=SEED.value)
    run_tasks: Any = simple_evaluate  # its annotations are narrower than what it accepts
    results = run_tasks(
        model,
        tasks=TASKS.value,
        num_fewshot=NUM_FEWSHOT.value,
        limit=LIMIT.value,
        apply_chat_template=APPLY_CHAT_TEMPLATE.value,
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
