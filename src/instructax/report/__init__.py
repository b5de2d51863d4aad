"""The report of finished experiments in the simulated world.

It is one HTML page with the paper's figures, claims and samples. It depends only on run
logs and on the world, whose labelers are simulated: the same logs give the same page.
"""

from pathlib import Path

from instructax.config import ConfigError


def write_report(roots: list[Path], out: Path) -> Path:
    """Writes the report of one experiment, and prints its table of policies.

    Args:
      roots: the folders of the experiment, one for each seed.
      out: the folder for `index.html` and its figures, as PNG and SVG files.

    Returns:
      The path of the page.

    Raises:
      ConfigError: a folder has no finished runs, or the folders are not seeds of the
        same experiment.
    """
    # Imported here: `--help` of the commands must not load numpy, matplotlib and jax.
    from instructax.experiment import require_matplotlib
    from instructax.report import page
    from instructax.report.judging import judge_experiment
    from instructax.report.results import load_experiment
    from instructax.report.tables import console_text, policy_table

    # All that can be wrong is checked before a figure is drawn or a folder created.
    require_matplotlib()
    _require_jinja2()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give the folder that the page is written into")

    results = [load_experiment(root) for root in roots]
    page.check_seeds(results)
    experiments = [judge_experiment(experiment) for experiment in results]

    out.mkdir(parents=True, exist_ok=True)
    path = out / "index.html"
    path.write_text(page.page_html(experiments, out), encoding="utf-8")
    for judged in experiments:
        print(console_text(policy_table(judged)))
    return path


def _require_jinja2() -> None:
    """Raises ConfigError if jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the page is rendered by jinja2, which is not installed: "
            "pip install 'instructax[plots]'"
        ) from None
