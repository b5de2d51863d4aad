"""Lists, verifies and exports the checkpoints of a run, for `scripts/checkpoint.py`.

Nothing here changes a checkpoint.
"""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from instructax.checkpoints.checksums import (
    NewerFormatError,
    find_damage,
    read_record,
    unlisted_files,
)
from instructax.checkpoints.restore import read_arrays
from instructax.checkpoints.steps import best_step, committed_steps
from instructax.config import ConfigError, require
from instructax.runtime.goodput import format_totals, read_totals

# Which arrays `write_arrays` writes; see its docstring.
LEAVES = ("exported", "trained", "all")
# File formats that other programs can read without this package.
SUFFIXES = (".npz", ".safetensors")


def list_checkpoints(workdir: Path) -> list[str]:
    """A table of the folders in `checkpoints/`, and the goodput of the run if it has a log.

    Each line has the step, its size, the number of files and the time of saving, and says
    whether it was hashed and evaluated and whether it is the newest or the best.
    """
    root = Path(workdir) / "checkpoints"
    require(
        root.is_dir(),
        f"{workdir} has no checkpoints: give the workdir of a run that trains",
    )
    steps = committed_steps(workdir)
    # A newer format does not end the listing: the line of that step says so.
    try:
        best = best_step(workdir)
    except NewerFormatError:
        best = None

    # Folders that are not steps, such as `40.damaged`, are listed as well: they take space.
    folders = [path for path in root.iterdir() if path.is_dir()]
    # By step, with the leftovers of a step after it.
    folders.sort(key=lambda path: (_leading_number(path), path.name))
    lines = [f"{'step':>10}  {'MiB':>9}  {'files':>5}  {'saved (UTC)':<19}  state"]
    for path in folders:
        state = ["no step: nothing reads it"]
        if _leading_number(path) in steps and path.name.isdecimal():
            state = _state(path)
            if path.name == str(steps[-1]):
                state.append("newest")
            if path.name == str(best):
                state.append("best")
        lines.append(_folder_line(path, state))

    totals = read_totals(Path(workdir) / "goodput.jsonl")
    if totals:
        lines.append(format_totals(totals))
    return lines


def _leading_number(path: Path) -> int:
    """12 for `12` and `12.damaged`, -1 for other names."""
    head = path.name.partition(".")[0]
    return int(head) if head.isdecimal() else -1


def _folder_line(path: Path, state: list[str]) -> str:
    files = [file for file in path.rglob("*") if file.is_file()]
    mebibytes = sum(file.stat().st_size for file in files) / 2**20
    modified = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    saved = modified.strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"{path.name:>10}  {mebibytes:>9.2f}  {len(files):>5}  {saved}  {', '.join(state)}"
    )


def _state(path: Path) -> list[str]:
    """What the record of a step says about it."""
    try:
        record = read_record(path)
    except NewerFormatError as error:
        return [str(error)]
    if record is None or record["files"] is None:
        return ["not hashed"]
    # "whole" means that the step was saved and evaluated, not that it was verified.
    state = ["hashes unreadable" if "unreadable" in record else "hashed"]
    state.append("evaluation given up" if record["unevaluated"] is not None else "whole")
    if record["metric"] is not None:
        state.append(f"{record['best_metric']} {record['metric']:.6g}")
    return state


def verify_checkpoints(workdir: Path, step: int | None) -> tuple[list[str], list[str]]:
    """Compares the files of one step, or of all, with their sizes and hashes.

    Args:
      workdir: the folder of a run.
      step: None means all steps.

    Returns:
      (lines on what is intact, lines on what is wrong)

    Raises:
      ConfigError: there is nothing to check.
    """
    steps = _require_steps(workdir, step)
    intact = []
    wrong = []
    for number in steps if step is None else [step]:
        path = Path(workdir) / "checkpoints" / str(number)
        record = read_record(path)
        if record is None or record["files"] is None:
            wrong.append(
                f"{path} has no hashes: the run was killed before it wrote them; resuming "
                "the run writes them"
            )
            continue
        # Missing and changed files first, then files that should not be there.
        problems = find_damage(path)
        # Without a readable record every file would be unlisted.
        if "unreadable" not in record:
            problems += unlisted_files(path)
        wrong += problems
        if not problems:
            intact.append(f"{path}: {len(record['files'])} files are as they were saved")
    return intact, wrong


def _require_steps(workdir: Path, step: int | None) -> list[int]:
    """The committed steps; raises ConfigError if there is none, or not the one wanted."""
    steps = committed_steps(workdir)
    require(
        bool(steps), f"{workdir} has no checkpoint: give the workdir of a run that trains"
    )
    require(
        step is None or step in steps,
        f"{workdir} has no step {step}, only {', '.join(map(str, steps))}",
    )
    return steps


def write_arrays(workdir: Path, step: int | None, to: Path, leaves: str) -> str:
    """Writes arrays of a step to a new file. Dtypes stay; no pickle is written.

    Args:
      workdir: the folder of a run.
      step: None means the newest.
      to: the file, `.npz` or `.safetensors`.
      leaves: "exported" for the parameters that later stages read (for PPO the average of
        the policy), named as in the tree of parameters; "trained" for the parameters that
        the optimizer updated last (for PPO the policy before averaging, otherwise the
        same); "all" for every array of the state, including the optimizer's.

    Returns:
      A line that says what was written.

    Raises:
      ConfigError: a value cannot be used, or the step is damaged.
    """
    # Refuse before reading: a step can have hundreds of gigabytes.
    require(leaves in LEAVES, f"--leaves={leaves} must be one of {', '.join(LEAVES)}")
    require(to.suffix in SUFFIXES, f"--to={to} must end in {' or '.join(SUFFIXES)}")
    require(not to.exists(), f"--to={to} is there already: give a new file")
    require(to.parent.is_dir(), f"--to={to}: there is no folder {to.parent}")
    # The newest by default.
    steps = _require_steps(workdir, step)
    number = steps[-1] if step is None else step
    stored = read_arrays(Path(workdir) / "checkpoints" / str(number))
    arrays = {}
    for name, value in select_arrays(stored, leaves).items():
        arrays[name] = np.asarray(value)

    as_npz = to.suffix == ".npz"
    # NumPy stores extension dtypes as raw bytes, which no reader would understand.
    require(
        not as_npz or all(value.dtype.isbuiltin for value in arrays.values()),
        f"--to={to}: .npz has no bfloat16, which step {number} uses: give a .safetensors",
    )
    # Renamed when it is complete, so that `to` never exists with half of its content. The
    # suffix stays last, because NumPy would append its own.
    temporary = to.with_name(f"{to.name}.tmp{to.suffix}")
    # A killed process may have left one.
    temporary.unlink(missing_ok=True)
    if as_npz:
        np.savez(temporary, allow_pickle=False, **arrays)
    else:
        save_file(arrays, temporary)
    temporary.replace(to)
    size = sum(value.size for value in arrays.values())
    return f"{to}: {len(arrays)} arrays, {size:,} numbers of step {number}"


def select_arrays(stored: dict[str, Any], leaves: str) -> dict[str, Any]:
    """The arrays of a step that `write_arrays` writes, under the names it gives them."""
    if leaves == "all":
        return stored
    # The item `params` has the exported parameters. In steps of PPO these are an average,
    # and the policy itself is part of the item `state`.
    prefix = "params/"
    policy_prefix = "state/policy/params/"
    if leaves == "trained" and any(name.startswith(policy_prefix) for name in stored):
        prefix = policy_prefix
    selected = {}
    for name, value in stored.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = value
    if not selected:
        items = sorted({name.partition("/")[0] for name in stored})
        raise ConfigError(
            f"--leaves={leaves}: the step has no arrays under {prefix}, only under "
            f"{', '.join(items)}: give --leaves=all"
        )
    return selected
