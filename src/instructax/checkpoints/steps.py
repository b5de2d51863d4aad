"""The saved steps of a run: which are complete, which is best, and which are kept."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from instructax.checkpoints.checksums import has_checksums, read_record, record_path

# The two parts that every step consists of; `checkpoint` explains them.
ITEMS = ("params", "state")


def committed_steps(workdir: Path) -> list[int]:
    """The steps that were saved completely, in rising order.

    Other folders and unfinished saves are ignored.
    """
    root = Path(workdir) / "checkpoints"
    if not root.is_dir():
        return []
    steps = []
    for path in root.iterdir():
        # `int` would also accept names that no step is saved under, such as `0099` or
        # digits of other scripts.
        is_number = re.fullmatch("0|[1-9][0-9]*", path.name)
        if is_number and all((path / item).is_dir() for item in ITEMS):
            steps.append(int(path.name))
    return sorted(steps)


def files_hash(workdir: Path, step: int) -> str:
    """One sha256 over the hashes of all files of a step; "" if they were never written."""
    record = read_record(Path(workdir) / "checkpoints" / str(step))
    files = record["files"] if record else None
    if not files:
        return ""
    # Hashes the hashes: the files may have hundreds of gigabytes.
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def best_step(workdir: Path) -> int | None:
    """The step with the best value of the metric that the newest step names.

    The newest step also says whether the lowest or the highest value is the best. Of equal
    steps the newest is returned; None if the newest step names no metric.
    """
    root = Path(workdir) / "checkpoints"
    steps = committed_steps(workdir)
    if not steps:
        return None
    # A resumed run may have another metric; only records of the current one are compared.
    newest = read_record(root / str(steps[-1]))
    name = newest["best_metric"] if newest else ""
    mode = newest["best_mode"] if newest else ""
    if not mode:
        # Records of earlier versions have no mode: their rule depended on the name.
        mode = "min" if name.endswith("loss") else "max"
    # Negated metrics turn the lowest value into the highest.
    sign = -1 if mode == "min" else 1

    # In rising order and with `>=`, so that the newest of equal steps wins.
    best = None
    best_value = 0.0
    for step in steps:
        record = read_record(root / str(step)) or {"best_metric": "", "metric": None}
        # Not rated, or rated by another metric.
        if record["best_metric"] != name or record["metric"] is None:
            continue
        value = sign * record["metric"]
        if best is None or value >= best_value:
            best = step
            best_value = value
    return best


def delete_old_steps(workdir: Path, newest: int, keep: int) -> None:
    """Deletes the steps before `newest` that need not be kept.

    The newest `keep` steps stay, and the best one. Only steps with checksums count, because
    a step whose save was killed before hashing must not displace a verified one. Steps
    after `newest` belong to another run, and neither count nor are deleted.
    """
    root = Path(workdir).absolute() / "checkpoints"
    steps = [step for step in committed_steps(workdir) if step <= newest]
    # In rising order, so the newest are at the end.
    hashed = [step for step in steps if has_checksums(root / str(step))]
    kept = {*hashed[-keep:], best_step(workdir)}
    for step in steps:
        if step in kept:
            continue
        path = root / str(step)
        # Renaming is atomic: a half-deleted folder never looks like a step. If the process
        # is killed here, the next one deletes the renamed folder.
        condemned = path.rename(root / f"{step}.deleted")
        record_path(path).unlink(missing_ok=True)
        delete_folder(condemned)


def delete_folder(path: Path) -> None:
    """Deletes a folder, or a symbolic link to one without touching its target."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)
