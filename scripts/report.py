#!/usr/bin/env python3
"""Writes the report of finished experiments: python scripts/report.py runs/micro
--out=runs/micro/report

One page, `index.html`, with the paper's figures, its claims and samples, and the figures as
PNG and SVG beside it. Several folders are seeds of one experiment. It reads logs alone, no
checkpoint. Exit codes as those of train.py.
"""

import pathlib
import sys

from absl import app, flags

from instructax import cli

OUT = flags.DEFINE_string(
    "out", None, "folder that the page and its figures are written into"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) < 2 or not OUT.value:
        print(
            "error: give the folders of finished experiments and --out=FOLDER",
            file=sys.stderr,
        )
        return 2
    roots, out = [pathlib.Path(path) for path in argv[1:]], pathlib.Path(OUT.value)

    def write() -> None:
        from instructax import report

        print(report.write(roots, out))

    return cli.guarded(write)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
