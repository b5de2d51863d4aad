"""The report of finished experiments in the embedded world: one page with the paper's
figures, claims and samples.

It is made from run logs and the world alone; what the labelers say is simulated, and the
same for the same logs.
"""

from pathlib import Path

from instructax.config import ConfigError


def write(roots: list[Path], out: Path) -> Path:
    """Writes `index.html` and its figures, as PNG and SVG, into `out`, and prints the table
    of policies; returns the page's path. Several `roots` are seeds of one experiment.
    Raises ValueError for a folder without finished runs."""
    from instructax.experiment import require_matplotlib
    from instructax.report import page
    from instructax.report.judging import read
    from instructax.report.results import load
    from instructax.report.tables import console_table

    require_matplotlib()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give the folder that the page is written into")
    experiments = [load(root) for root in roots]
    page.check_seeds(experiments)
    readings = [read(experiment) for experiment in experiments]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "index.html"
    path.write_text(page.build(readings, out), encoding="utf-8")
    for reading in readings:
        print(console_table(reading))
    return path
