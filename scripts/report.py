#!/usr/bin/env python3
"""Writes the report of finished experiments.

python scripts/report.py runs/micro --out=runs/micro/report

Writes the page `index.html`, with the paper's figures, its claims and sampled responses,
and the figures as PNG and SVG next to the page. Several folders are treated as seeds of one
experiment. Only logs are read, no checkpoints. The exit codes are those of train.py.
"""

import pathlib
import sys

from absl import app, flags

from instructax import cli

OUT = flags.DEFINE_string("out", None, "Folder to write the page and its figures into.")


def main(argv: list[str]) -> int:
    """Parses the command line, writes the report, and returns the exit code."""
    if len(argv) < 2 or not OUT.value:
        print(
            "error: give the folders of finished experiments and --out=FOLDER",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    roots = [pathlib.Path(path) for path in argv[1:]]
    out = pathlib.Path(OUT.value)

    def run() -> None:
        # Imported here, so that --help answers without JAX.
        from instructax import report

        print(report.write_report(roots, out))

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
