"""Packing documents into rows: worked examples, and what packing must not change."""

import numpy as np
import pytest

from instructax.data import document_packing

EOS = 9


def document(*tokens):
    tokens = np.array(tokens, np.int32)
    return document_packing.Document(tokens, np.arange(len(tokens)) > 0)


def test_text_is_split_and_gets_one_end_token():
    pieces = document_packing.text_documents(np.array([1, 2, 3, 4, 5], np.int32), EOS, 4)
    assert [piece.tokens.tolist() for piece in pieces] == [[1, 2, 3, 4], [5, 9]]
    assert [piece.loss_mask.tolist() for piece in pieces] == [
        [False, True, True, True],
        [False, True],
    ]
    (whole,) = document_packing.text_documents(np.array([1, 2, 3], np.int32), EOS, 4)
    assert whole.tokens.tolist() == [1, 2, 3, 9]
    assert whole.tokens.dtype == np.int32


def test_demonstrations_train_on_completion_and_end_token():
    # Ids that equal the end token within prompt and completion are ordinary tokens.
    result = document_packing.demonstration_document(
        np.array([1, 9]), np.array([3, 9, 4]), EOS
    )
    assert result.tokens.tolist() == [1, 9, 3, 9, 4, 9]
    assert result.loss_mask.tolist() == [False, False, True, True, True, True]
    with pytest.raises(ValueError, match="a demonstration's prompt has no tokens"):
        document_packing.demonstration_document(np.array([], np.int32), np.array([3]), EOS)


def test_packing_into_rows_of_six_by_hand():
    documents = [
        document(1, 1, 1, 1),
        document(2, 2, 2),
        document(3, 3),
        document(4),
        document(5, 5),
        document(6),
    ]
    rows = document_packing.pack_documents(documents, 6)
    assert [row.tokens.tolist() for row in rows] == [
        [1, 1, 1, 1, 3, 3],
        [2, 2, 2, 4, 5, 5],
        [6],
    ]
    assert [row.lengths.tolist() for row in rows] == [[4, 2], [3, 1, 2], [1]]
    assert rows[0].loss_mask.tolist() == [False, True, True, True, False, True]
    segments, positions = document_packing.segments_and_positions(rows[1].lengths)
    assert segments.tolist() == [1, 1, 1, 2, 3, 3]
    assert positions.tolist() == [0, 1, 2, 0, 0, 1]


def test_the_number_of_open_rows_is_limited(monkeypatch):
    monkeypatch.setattr(document_packing, "OPEN_ROWS", 2)
    documents = [
        document(1, 1, 1),
        document(2, 2, 2),
        document(3, 3, 3),
        document(4),
        document(5),
        document(6),
    ]
    # Opening the third row closes the first one, which still has room.
    rows = document_packing.pack_documents(documents, 4)
    assert [row.tokens.tolist() for row in rows] == [
        [1, 1, 1],
        [2, 2, 2, 4],
        [3, 3, 3, 5],
        [6],
    ]


def test_every_document_is_packed_once_and_whole():
    rng = np.random.default_rng(0)
    documents = [document(*([i] * int(rng.integers(1, 17)))) for i in range(500)]
    rows = document_packing.pack_documents(documents, 16)
    seen = {}
    for row in rows:
        assert len(row.tokens) == row.lengths.sum() <= 16
        segments, positions = document_packing.segments_and_positions(row.lengths)
        for segment in range(1, len(row.lengths) + 1):
            own = segments == segment
            (name,) = set(row.tokens[own].tolist())
            assert name not in seen
            seen[name] = int(own.sum())
            assert positions[own].tolist() == list(range(seen[name]))
            assert row.loss_mask[own].tolist() == [False] + [True] * (seen[name] - 1)
    assert seen == {i: len(document.tokens) for i, document in enumerate(documents)}
    tokens = sum(seen.values())
    assert tokens / (16 * len(rows)) > 0.92  # one document per row would use 53%
    assert [
        row.tokens.tolist() for row in document_packing.pack_documents(documents, 16)
    ] == [row.tokens.tolist() for row in rows]


def test_documents_that_do_not_fit_are_refused():
    for bad in (document(1, 2, 3), document()):
        with pytest.raises(
            ValueError,
            match=f"a document of {len(bad.tokens)} tokens does not fit rows of 2",
        ):
            document_packing.pack_documents([bad], 2)
