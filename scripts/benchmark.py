#!/usr/bin/env python3
"""Measures the speed of one stage.

python scripts/benchmark.py --config configs/benchmark.py:ppo,S --config.inner_epochs=4

The config may also be that of any training stage. Its data and parents are not read:
parameters and tokens are random. Prints a table and, as the last line, the result as JSON.
The exit codes are those of train.py.
"""

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from instructax import cli

# Config files import each other from the root of the project.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file and its argument, FILE:ARGUMENT; override with --config.name=value.",
)
STEPS = flags.DEFINE_integer(
    "steps",
    5,
    "Number of timed repetitions after the first; their median is reported.",
    lower_bound=1,
)
ENDING = flags.DEFINE_float(
    "ending",
    0.0,
    "PPO: the probability that a response ends at a token; 0 fills all responses.",
    lower_bound=0.0,
    upper_bound=0.99,
)
SAMPLING_ALONE = flags.DEFINE_bool(
    "sampling_alone", False, "PPO: measure the rollout only."
)
SIDE_BY_SIDE = flags.DEFINE_integer(
    "side_by_side",
    0,
    "PPO: the number of runs in one program; 0 measures one run in its three programs.",
    lower_bound=0,
)
PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "Folder for a trace of one more repetition, for TensorBoard or xprof.",
)


def main(argv: list[str]) -> int:
    """Parses the flags, measures, and returns the exit code."""
    if len(argv) > 1 or CONFIG.value is None:
        stray = f"unknown argument {argv[1]!r}; " if len(argv) > 1 else ""
        print(
            f"error: {stray}give --config=FILE:ARGUMENT --config.name=value …",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)  # JAX logs every platform that it looks for
    cli.enable_compilation_cache()

    def run() -> None:
        # Imported here, so that --help answers without JAX.
        from instructax.stages import build_config
        from instructax.stages.benchmark import measure as benchmark

        config = build_config(CONFIG.value.to_dict())
        record = benchmark.measure(
            config,
            steps=STEPS.value,
            ending=ENDING.value,
            sampling_alone=SAMPLING_ALONE.value,
            side_by_side=SIDE_BY_SIDE.value,
            profile=PROFILE.value,
        )
        print("\n".join(benchmark.table(record)))
        print(json.dumps(record))

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: cli.parse_config(argv, CONFIG))
