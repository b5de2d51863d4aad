#!/usr/bin/env python3
"""Measures one stage: python scripts/benchmark.py --config configs/benchmark.py:ppo,S
--config.inner_epochs=4

Any config of a stage that trains can be given; its data and parents are not read:
parameters and tokens are random. Prints a table and, last, one line of JSON. Exit codes as
those of train.py.
"""

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from instructax import cli

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE:ARGUMENT of a config; values as --config.name=value"
)
STEPS = flags.DEFINE_integer(
    "steps", 5, "repetitions after the first, of which the median counts", lower_bound=1
)
ENDING = flags.DEFINE_float(
    "ending",
    0.0,
    "PPO: how likely a response ends at a token; 0: all are full",
    lower_bound=0.0,
    upper_bound=0.99,
)
SAMPLING = flags.DEFINE_bool("sampling_alone", False, "PPO: the rollout only")
BESIDE = flags.DEFINE_integer(
    "side_by_side",
    0,
    "PPO: so many runs in one program; 0: one run in its three programs",
    lower_bound=0,
)
PROFILE = flags.DEFINE_string(
    "profile", "", "folder for a trace of one more repetition, read by TensorBoard or xprof"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or CONFIG.value is None:
        stray = f"unknown argument {argv[1]!r}; " if len(argv) > 1 else ""
        print(
            f"error: {stray}give --config=FILE:ARGUMENT --config.name=value …",
            file=sys.stderr,
        )
        return 2
    logging.set_verbosity(logging.WARNING)  # jax reports each platform that it looks for

    cli.enable_compilation_cache()

    def run() -> None:
        from instructax.stages import build_config
        from instructax.stages.benchmark import measure as benchmark

        config = build_config(CONFIG.value.to_dict())
        record = benchmark.measure(
            config,
            steps=STEPS.value,
            ending=ENDING.value,
            sampling_alone=SAMPLING.value,
            side_by_side=BESIDE.value,
            profile=PROFILE.value,
        )
        print("\n".join(benchmark.table(record)))
        print(json.dumps(record))

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: cli.parse_config(argv, CONFIG))
