"""Rows of token ids on disk, through tensorflow-datasets without TensorFlow.

The format is `array_record`: random access, a checksum on every chunk, and no TensorFlow to
read it (`parquet`, the other such format, loses rows). A folder is written under a private
name and renamed when it is complete. So whatever has the final name is whole, and processes
that start at once on one shared disk do not harm each other: the first to finish wins, the
others read its rows. A killed process leaves a folder whose name starts with a dot, safe to
delete.
"""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from instructax.config import ConfigError
from instructax.data.batches import Source

MAX_CACHED_BYTES = (
    64 * 2**20
)  # bytes on disk: of less, rows stay in memory once they were read
REPORT = "report.json"
SIZES = "sizes.json"

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # by split: the features of each row

# As bytes: int64 lists, which plain tensors become, are slow to write and to read.
_ints = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
_bools = tfds.features.Tensor(shape=(None,), dtype=np.bool_, encoding="bytes")


@dataclasses.dataclass(frozen=True)
class PreparationReport:
    """What became of the records; saved beside the rows."""

    hash: str  # sha256 of all that decides the rows
    records: int  # read from the files
    dropped: dict[str, int]  # rule: records that it dropped
    kept: dict[str, int]  # split: records
    rows: dict[str, int]  # split: rows on disk
    tokens: dict[str, int]  # split: real tokens, end tokens included
    longest: dict[str, int]  # split: real tokens of the longest row
    padding: dict[str, float]  # split: share of a batch's cells that hold no token
    labelers: list[str]  # names, by the index that rows carry


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Rows that are ready to be read, and how they came about."""

    folder: Path
    sources: dict[str, Source]  # by split
    report: PreparationReport


class CachedSource:
    """A source whose rows are all decoded when the first are asked for, and kept: one by
    one that costs a small network a tenth of its training step."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, record_keys: Sequence[int], /) -> list[Mapping[str, Any]]:
        return [self._rows[key] for key in record_keys]

    @functools.cached_property
    def _rows(self) -> Sequence[Mapping[str, Any]]:
        return self._source.__getitems__(range(len(self)))


class _Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the rows it is given, by split; row i of a source is row i of the split."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar[dict[str, Any]]
    # Where checksums of downloads lie: nowhere, and the search for it imports a package
    # that is not installed.
    code_path: ClassVar[Any] = None

    def __init__(self, rows: Rows, data_dir: Path):
        self._rows = rows
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[tuple[int, Any]]]:
        return {name: self._generate_examples(rows) for name, rows in self._rows.items()}

    def _generate_examples(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterable[tuple[int, Any]]:
        yield from enumerate(rows)


class PackedRows(_Rows):
    """Packed documents: tokens i32[n], lengths i32[s] of the documents, loss_mask b[n]."""

    FEATURES: ClassVar = {"tokens": _ints, "lengths": _ints, "loss_mask": _bools}


class PromptRows(_Rows):
    """Prompts: tokens i32[n]."""

    FEATURES: ClassVar = {"tokens": _ints}


class ComparisonRows(_Rows):
    """Comparisons: prompt i32[n]; the responses, each with its end token, joined to i32[m];
    lengths i32[K] of the responses; ranks i32[K], 0 is best; labeler i32[], an index into
    the report's names, -1 = unknown.
    """

    FEATURES: ClassVar = {
        "prompt": _ints,
        "responses": _ints,
        "lengths": _ints,
        "ranks": _ints,
        "labeler": np.int32,
    }


def write_rows(
    builder: type[_Rows], folder: Path, rows: Rows, report: PreparationReport
) -> None:
    """Writes `rows`, by split, and `report` to `folder`; does nothing if another process
    made it meanwhile.

    Raises OSError if the disk does not take them; nothing is left behind then.
    """
    private = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    private.mkdir(parents=True)
    try:
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(
                io.StringIO()
            ):  # it announces downloads that there are none of
                builder(rows, private).download_and_prepare()
        except RuntimeError as error:  # of array_record's writer, when the disk refuses
            raise OSError(
                f"{folder} cannot be written: {str(error).splitlines()[0]}"
            ) from error
        shutil.rmtree(private / "downloads", ignore_errors=True)
        (private / REPORT).write_text(
            json.dumps(dataclasses.asdict(report), indent=1) + "\n"
        )
        (private / SIZES).write_text(json.dumps(_sizes(private)) + "\n")
        try:
            private.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def read_rows(builder: type[_Rows], folder: Path) -> PreparedData:
    """Opens what `write_rows` wrote. Raises ValueError if files of `folder` are missing or
    not of the size written."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        report = PreparationReport(**json.loads((folder / REPORT).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot use the prepared data in {folder} ({error}): delete it to prepare it again"
        ) from error
    found = _sizes(folder)
    for name, size in sizes.items():
        if found.get(name) != size:
            raise ConfigError(
                f"{folder / name} has {found.get(name, 'no')} bytes where {size} were written: "
                f"delete {folder} to prepare it again"
            )
    stored: Any = tfds.builder_from_directory(
        str(folder / builder.name / str(builder.VERSION))
    )
    sources = {name: stored.as_data_source(split=name) for name in report.rows}
    if sum(sizes.values()) < MAX_CACHED_BYTES:
        sources = {name: CachedSource(source) for name, source in sources.items()}
    return PreparedData(folder=folder, sources=sources, report=report)


def _sizes(folder: Path) -> dict[str, int]:
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SIZES
    )
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
