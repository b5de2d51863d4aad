#!/usr/bin/env python3
"""Runs tasks of lm-evaluation-harness: python scripts/lm_eval_harness.py --workdir
runs/micro/ppo-ptx --tasks=arc_easy,lambada

Tasks are the harness's own, which it downloads, or those of the folder --include_path. Exit
codes are train.py's.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

from instructax import cli
from instructax.config import ConfigError

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

WORKDIR = flags.DEFINE_string(
    "workdir", None, "a finished run of pretraining, SFT or PPO, or WORKDIR@STEP of one"
)
TASKS = flags.DEFINE_list("tasks", [], "names of tasks, between commas")
INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "a folder of task files (YAML) of your own"
)
FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "worked examples before each question", lower_bound=0
)
LIMIT = flags.DEFINE_integer("limit", None, "the most questions of a task", lower_bound=1)
CHAT = flags.DEFINE_bool("apply_chat_template", False, "asks as in a conversation")
SYSTEM = flags.DEFINE_string(
    "system", None, "with --apply_chat_template: what the conversation opens with"
)
GEN_KWARGS = flags.DEFINE_string(
    "gen_kwargs", None, "such as max_gen_toks=64, instead of the tasks' own"
)
OUTPUT = flags.DEFINE_string("output", None, "a file for all results, as JSON")
ROWS = flags.DEFINE_integer(
    "rows", 8, "texts that are scored or answered at a time", lower_bound=1
)
SEED = flags.DEFINE_integer(
    "seed", 0, "of tasks that sample", lower_bound=0, upper_bound=2**31 - 1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "of the computation"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or not WORKDIR.value or not TASKS.value:
        print(
            "error: give --workdir=FOLDER of a finished run and --tasks=NAME,NAME",
            file=sys.stderr,
        )
        return 2
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    workdir = WORKDIR.value
    return cli.guarded(lambda: evaluate(workdir))


def evaluate(workdir: str) -> None:
    """Prints the harness's table, and writes its results."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'instructax[lm_eval]'"
        ) from None
    from instructax.evals.lm_eval_model import InstructaxLM
    from instructax.serving.chat import open_served

    manager = TaskManager(include_path=INCLUDE_PATH.value)
    unknown = [task for task in TASKS.value if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks: there is no {', '.join(unknown)} among the tasks of lm-evaluation-harness"
        )
    policy = open_served(workdir, dtype=DTYPE.value, rows=ROWS.value)
    run: Any = simple_evaluate  # whose types are narrower than what it takes
    results = run(
        InstructaxLM(policy.engine, policy.tokenizer, policy.template, seed=SEED.value),
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
        pathlib.Path(OUTPUT.value).write_text(
            json.dumps(results, default=str, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
