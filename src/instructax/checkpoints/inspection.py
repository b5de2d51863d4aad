"""The checkpoints of a run at hand: what is there, whether it is whole, and its numbers for
other programs."""

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

LEAVES = ("exported", "trained", "all")
SUFFIXES = (".npz", ".safetensors")


def list_checkpoints(workdir: Path) -> list[str]:
    """A line for each folder of `checkpoints/`: step, size, files, time of saving,
    evaluated or not, hashed or not, and whether it is the newest or the best; last the
    goodput, if there is a ledger."""
    root = Path(workdir) / "checkpoints"
    require(
        root.is_dir(),
        f"{workdir} has no checkpoints: give the workdir of a run that trains",
    )
    steps = committed_steps(workdir)
    try:
        best = best_step(workdir)
    except NewerFormatError:  # said in the line of that step
        best = None
    lines = [f"{'step':>10}  {'MiB':>9}  {'files':>5}  {'saved (UTC)':<19}  state"]
    folders = sorted(
        (path for path in root.iterdir() if path.is_dir()),
        key=lambda path: (_number(path), path.name),
    )
    for path in folders:
        files = [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) / 2**20
        saved = datetime.datetime.fromtimestamp(
            path.stat().st_mtime, datetime.UTC
        ).strftime("%Y-%m-%d %H:%M:%S")
        state = (
            _state(path)
            if _number(path) in steps and path.name.isdecimal()
            else ["no step: nothing reads it"]
        )
        state += ["newest"] * (path.name == str(steps[-1:] and steps[-1])) + ["best"] * (
            path.name == str(best)
        )
        lines.append(
            f"{path.name:>10}  {size:>9.2f}  {len(files):>5}  {saved}  {', '.join(state)}"
        )
    found = read_totals(Path(workdir) / "goodput.jsonl")
    return lines + ([format_totals(found)] if found else [])


def _number(path: Path) -> int:
    head = path.name.partition(".")[0]
    return int(head) if head.isdecimal() else -1


def _state(path: Path) -> list[str]:
    try:
        record = read_record(path)
    except NewerFormatError as error:
        return [str(error)]
    if record is None or record["files"] is None:
        return ["not hashed"]
    metric = (
        []
        if record["metric"] is None
        else [f"{record['best_metric']} {record['metric']:.6g}"]
    )
    evaluated = "evaluation given up" if record["unevaluated"] is not None else "whole"
    return ["hashes unreadable" if "unreadable" in record else "hashed", evaluated, *metric]


def verify_checkpoints(workdir: Path, step: int | None) -> tuple[list[str], list[str]]:
    """(what was checked, what is wrong): the files of every step, or of one, against their
    sizes and hashes, by name.

    Raises ConfigError if there is nothing to check.
    """
    root = Path(workdir) / "checkpoints"
    steps = committed_steps(workdir)
    require(
        bool(steps), f"{workdir} has no checkpoint: give the workdir of a run that trains"
    )
    require(
        step is None or step in steps,
        f"{workdir} has no step {step}, only {', '.join(map(str, steps))}",
    )
    good, bad = [], []
    for number in steps if step is None else [step]:
        path = root / str(number)
        record = read_record(path)
        if record is None or record["files"] is None:
            bad.append(
                f"{path} has no hashes: the run was killed before it wrote them; it writes them when it goes on"
            )
            continue
        wrong = find_damage(path) + ([] if "unreadable" in record else unlisted_files(path))
        bad += wrong
        good += (
            []
            if wrong
            else [f"{path}: {len(record['files'])} files are as they were saved"]
        )
    return good, bad


def write_arrays(workdir: Path, step: int | None, to: Path, leaves: str) -> str:
    """Writes arrays of a step, the newest if None, to the new file `to`, .npz or
    .safetensors; a line that says what.

    `exported` is what later stages read, named as in the tree of parameters: of PPO the
    average of the policy. `trained` is what the optimizer had last: of PPO the policy
    before averaging, else the same. `all` is every array of the state, the optimizer's too.
    Dtypes stay as they are; no pickle is written.

    Raises ConfigError, and ValueError for a step that is damaged.
    """
    require(leaves in LEAVES, f"--leaves={leaves} must be one of {', '.join(LEAVES)}")
    require(to.suffix in SUFFIXES, f"--to={to} must end in {' or '.join(SUFFIXES)}")
    require(not to.exists(), f"--to={to} is there already: give a new file")
    require(to.parent.is_dir(), f"--to={to}: there is no folder {to.parent}")
    steps = committed_steps(workdir)
    require(
        bool(steps), f"{workdir} has no checkpoint: give the workdir of a run that trains"
    )
    require(
        step is None or step in steps,
        f"{workdir} has no step {step}, only {', '.join(map(str, steps))}",
    )
    number = steps[-1] if step is None else step
    stored = read_arrays(Path(workdir) / "checkpoints" / str(number))
    arrays = {
        name: np.asarray(value) for name, value in select_arrays(stored, leaves).items()
    }
    npz = to.suffix == ".npz"
    require(
        not npz or all(value.dtype.isbuiltin for value in arrays.values()),
        f"--to={to}: .npz has no bfloat16, which arrays of step {number} are of: give a .safetensors",
    )
    temporary = to.with_name(f"{to.name}.tmp{to.suffix}")
    temporary.unlink(missing_ok=True)
    if npz:
        np.savez(temporary, allow_pickle=False, **arrays)
    else:
        save_file(arrays, temporary)
    temporary.replace(to)
    return f"{to}: {len(arrays)} arrays, {sum(x.size for x in arrays.values()):,} numbers of step {number}"


def select_arrays(stored: dict[str, Any], leaves: str) -> dict[str, Any]:
    """The arrays of a step that `write_arrays` writes, by the names that they get."""
    if leaves == "all":
        return stored
    trained = "state/policy/params/"
    averaged = any(name.startswith(trained) for name in stored)
    prefix = trained if leaves == "trained" and averaged else "params/"
    found = {
        name.removeprefix(prefix): value
        for name, value in stored.items()
        if name.startswith(prefix)
    }
    if not found:
        raise ConfigError(f"the step has no arrays under {prefix}")
    return found
