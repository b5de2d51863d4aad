"""Rows of token ids on disk: tensorflow-datasets without TensorFlow.

The file format is `array_record`: random access, a checksum on every chunk, and no
TensorFlow to read it. (`parquet`, the other such format, loses rows.) A folder is written
under a temporary name and renamed once it is complete. So a folder with its final name is
whole, and processes that start at the same time on a shared disk cannot harm one another:
the first to finish wins, and the others read its rows. A killed process leaves a folder
whose name starts with a dot; it is safe to delete.
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

# Data sets of fewer bytes on disk stay in memory once they have been read.
MAX_CACHED_BYTES = 64 * 2**20
REPORT_FILE = "report.json"
# Size of every other file, which detects truncated and missing files.
SIZES_FILE = "sizes.json"

# By split: the features of each row.
RowsBySplit = Mapping[str, Sequence[Mapping[str, Any]]]

# As bytes, because plain tensors become int64 lists, which are slow to write and read.
_ints = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
_bools = tfds.features.Tensor(shape=(None,), dtype=np.bool_, encoding="bytes")


@dataclasses.dataclass(frozen=True)
class PreparationReport:
    """What became of the records; saved beside the rows."""

    # SHA-256 of everything that decides the rows.
    hash: str
    # Records in the files.
    records: int
    # Filter → records it dropped.
    dropped: dict[str, int]
    # Split → records kept.
    kept: dict[str, int]
    # Split → rows on disk.
    rows: dict[str, int]
    # Split → real tokens, including end tokens.
    tokens: dict[str, int]
    # Split → real tokens of the longest row.
    longest: dict[str, int]
    # Split → fraction of padding in a batch.
    padding: dict[str, float]
    # Names, by the index that rows store.
    labelers: list[str]


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Rows ready to be read, and the report on their preparation."""

    folder: Path
    # By split.
    sources: dict[str, Source]
    report: PreparationReport


class CachedSource:
    """Decodes all rows of a source at the first access and keeps them in memory.

    Decoding rows one by one costs a small network a tenth of its training step.
    """

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, record_keys: Sequence[int], /) -> list[Mapping[str, Any]]:
        # Rows may be shared by callers, which only read them.
        return [self._rows[key] for key in record_keys]

    @functools.cached_property
    def _rows(self) -> Sequence[Mapping[str, Any]]:
        return self._source.__getitems__(range(len(self)))


class _Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the given rows, by split; row i of a source is row i of its split.

    The names and versions of its subclasses are part of the path on disk.
    """

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar[dict[str, Any]]
    # Where tfds looks for checksums of downloads. There are none, and the search imports a
    # package that is not installed.
    code_path: ClassVar[Any] = None

    def __init__(self, rows: RowsBySplit, data_dir: Path):
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
    """Comparisons.

    prompt i32[n]; responses i32[m], all responses with their end tokens, concatenated;
    lengths i32[K] of the responses; ranks i32[K], 0 is best; labeler i32[], an index into
    the report's names, or -1 if unknown.
    """

    FEATURES: ClassVar = {
        "prompt": _ints,
        "responses": _ints,
        "lengths": _ints,
        "ranks": _ints,
        "labeler": np.int32,
    }


def write_rows(
    builder: type[_Rows], folder: Path, rows: RowsBySplit, report: PreparationReport
) -> None:
    """Writes `rows` and `report` to `folder`; does nothing if another process creates the
    folder first.

    Raises OSError if the disk refuses the files; nothing is left behind then.
    """
    # Beside the final folder, so that the rename stays within one file system.
    private = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    private.mkdir(parents=True)
    try:
        tfds.disable_progress_bar()
        try:
            # Silences the download messages of tfds.
            with contextlib.redirect_stdout(io.StringIO()):
                builder(rows, private).download_and_prepare()
        except RuntimeError as error:
            # From the writer of array_record, when the disk refuses.
            raise OSError(
                f"{folder} cannot be written: {str(error).splitlines()[0]}"
            ) from error
        # tfds creates this folder although nothing is downloaded.
        shutil.rmtree(private / "downloads", ignore_errors=True)

        report_json = json.dumps(dataclasses.asdict(report), indent=1)
        (private / REPORT_FILE).write_text(report_json + "\n")
        # Last, so that it lists the report too.
        (private / SIZES_FILE).write_text(json.dumps(_sizes(private)) + "\n")
        try:
            private.rename(folder)
        except OSError:
            # Renaming onto a folder with files fails: another process was faster.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def read_rows(builder: type[_Rows], folder: Path) -> PreparedData:
    """Opens what `write_rows` wrote.

    Raises ConfigError if files of `folder` are missing or do not have the size that was
    written.
    """
    try:
        sizes = json.loads((folder / SIZES_FILE).read_text())
        report = PreparationReport(**json.loads((folder / REPORT_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot use the prepared data in {folder} ({error}): "
            "delete it to prepare it again"
        ) from error
    # Sizes detect truncated files; the format has checksums against flipped bits.
    actual_sizes = _sizes(folder)
    for name, size in sizes.items():
        if actual_sizes.get(name) != size:
            raise ConfigError(
                f"{folder / name} has {actual_sizes.get(name, 'no')} bytes "
                f"where {size} were written: delete {folder} to prepare it again"
            )

    # Opened from its metadata on disk; the builder class is not needed.
    stored: Any = tfds.builder_from_directory(
        str(folder / builder.name / str(builder.VERSION))
    )
    sources = {name: stored.as_data_source(split=name) for name in report.rows}
    if sum(sizes.values()) < MAX_CACHED_BYTES:
        sources = {name: CachedSource(source) for name, source in sources.items()}
    return PreparedData(folder=folder, sources=sources, report=report)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, except the list of sizes itself."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SIZES_FILE:
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes
