"""Rows on disk are complete or absent, whatever happens while they are written."""

import dataclasses
import json
import multiprocessing

import numpy as np
import pytest
from tests.support.data_limits import SHORT_LIMITS

from instructax.data import prepare, storage
from instructax.data.prompt_format import PLAIN_FORMAT
from instructax.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("bytes")


def prompts(file, count):
    lines = [
        json.dumps({"id": str(i), "prompt": f"p{i}", "format": "plain"})
        for i in range(count)
    ]
    file.write_text("\n".join(lines))
    return file


def test_an_interrupted_preparation_is_never_used(tmp_path, monkeypatch):
    file = prompts(tmp_path / "p.jsonl", 2)

    def fails(path):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_sizes", fails)
        with pytest.raises(OSError, match="no space left"):
            prepare.prepare_prompts(
                [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
            )
    assert list((tmp_path / "data").iterdir()) == []
    killed = tmp_path / "data" / ".prompts-0123-half" / "prompt_rows"
    killed.mkdir(parents=True)
    prepared = prepare.prepare_prompts(
        [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
    )
    assert len(prepared.sources["train"]) == 2


class RecordingSource:
    """A source that records its reads."""

    def __init__(self, rows):
        self.rows = rows
        self.read = []

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, keys):
        self.read += keys
        return [self.rows[key] for key in keys]


def test_cached_rows_are_read_once_and_returned_in_the_requested_order():
    source = RecordingSource([{"tokens": np.arange(i)} for i in range(6)])
    cached = storage.CachedSource(source)
    for keys in ([4, 1, 4], [1, 0], [0, 4]):
        assert [len(row["tokens"]) for row in cached.__getitems__(keys)] == keys
    assert source.read == list(range(6))
    assert len(cached) == 6


def test_only_small_data_is_cached_in_memory(tmp_path, monkeypatch):
    prompts(tmp_path / "a.jsonl", 4)
    kinds = []
    for limit in (storage.MAX_CACHED_BYTES, 0):
        monkeypatch.setattr(storage, "MAX_CACHED_BYTES", limit)
        source = prepare.prepare_prompts(
            [tmp_path / "a.jsonl"], TOKENIZER, SHORT_LIMITS, tmp_path / "rows", PLAIN_FORMAT
        ).sources["train"]
        kinds.append(isinstance(source, storage.CachedSource))
        assert [bytes(row["tokens"].tolist()) for row in source.__getitems__([2, 0])] == [
            b"p2\n\n",
            b"p0\n\n",
        ]
    assert kinds == [True, False]


def test_a_failing_rename_is_reported(tmp_path, monkeypatch):
    file = prompts(tmp_path / "p.jsonl", 1)

    def fails(self, target):
        raise OSError("read-only file system")

    monkeypatch.setattr("pathlib.Path.rename", fails)
    with pytest.raises(OSError, match="read-only file system"):
        prepare.prepare_prompts(
            [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
        )


@pytest.mark.parametrize("damage", ["cut rows", "no rows", "no report", "bad report"])
def test_damaged_data_is_refused(tmp_path, damage):
    file = prompts(tmp_path / "p.jsonl", 2)
    prepared = prepare.prepare_prompts(
        [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
    )
    (rows,) = prepared.folder.rglob("*.array_record*")
    if damage == "cut rows":
        rows.write_bytes(rows.read_bytes()[:-1])
    elif damage == "no rows":
        rows.unlink()
    elif damage == "no report":
        (prepared.folder / "report.json").unlink()
    else:
        (prepared.folder / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"delete .* to prepare it again") as caught:
        prepare.prepare_prompts(
            [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
        )
    assert str(prepared.folder) in str(caught.value)


def prepare_in_process(barrier, file, data_dir, results):
    barrier.wait()
    prepared = prepare.prepare_prompts(
        [file], TOKENIZER, SHORT_LIMITS, data_dir, PLAIN_FORMAT
    )
    results.put(
        (prepared.report.hash, len(prepared.sources["train"]), str(prepared.folder))
    )


def test_processes_that_start_at_once_share_one_folder(tmp_path):
    file = prompts(tmp_path / "p.jsonl", 50)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    results = context.Queue()
    arguments = (barrier, file, tmp_path / "data", results)
    processes = [
        context.Process(target=prepare_in_process, args=arguments) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == [
        found.pop()[2].rsplit("/", 1)[1]
    ]


def test_the_loser_of_a_race_keeps_the_rows_of_the_winner(tmp_path):
    file = prompts(tmp_path / "p.jsonl", 2)
    prepared = prepare.prepare_prompts(
        [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
    )
    before = {
        path: path.read_bytes() for path in prepared.folder.rglob("*") if path.is_file()
    }
    late = dataclasses.replace(prepared.report, records=0)
    storage.write_rows(
        storage.PromptRows,
        prepared.folder,
        {"train": [{"tokens": np.array([1], np.int32)}]},
        late,
    )
    assert {
        path: path.read_bytes() for path in prepared.folder.rglob("*") if path.is_file()
    } == before
    assert len(list((tmp_path / "data").iterdir())) == 1
