#!/usr/bin/env python3
"""Writes the report of finished experiments: python scripts/report.py runs/micro
--out=runs/micro/report

The report is one page, `index.html`, with the paper's figures, claims and samples; the
figures lie beside it as PNG and SVG files. Several folders are seeds of one experiment.
Only logs are read, no checkpoints. Exit codes are those of train.py.
"""

import pathlib
import sys

from absl import app, flags

from instructax import cli

OUT = flags.DEFINE_string("out", None, "folder for the page and its figures")


def main(argv: list[str]) -> int:
    """Parses the flags, calls the library and returns the exit code."""
    if len(argv) < 2 or not OUT.value:
        print(
            "error: give the folders of finished experiments and --out=FOLDER",
            file=sys.stderr,
        )
        return 2
    roots = [pathlib.Path(path) for path in argv[1:]]
    out = pathlib.Path(OUT.value)

    def write() -> None:
        from instructax import report

        print(report.write(roots, out))

    return cli.guarded(write)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
