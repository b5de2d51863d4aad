"""The preview of a batch: prompts, trained tokens, end tokens and padding; colors only on a
terminal."""

import io

import numpy as np
from rich.console import Console

from instructax.data.document_packing import (
    demonstration_document,
    pack_documents,
    segments_and_positions,
)
from instructax.data.preview import preview_text, print_preview
from instructax.data.tokenizer import load_tokenizer
from instructax.types import LmBatch

BYTES = load_tokenizer("bytes")


def batch_of(*pairs, length=40):
    documents = [
        demonstration_document(BYTES.encode(prompt), BYTES.encode(answer), BYTES.eos_id)
        for prompt, answer in pairs
    ]
    (row,) = pack_documents(documents, length)
    segments, positions = segments_and_positions(row.lengths)
    room = length - len(row.tokens)
    # Padded with the end token: padding is recognized by its position, not its id.
    tokens = np.pad(row.tokens, (0, room), constant_values=BYTES.eos_id)
    masks = (np.pad(x, (0, room)) for x in (segments, positions, row.loss_mask))
    segments, positions, loss_mask = masks
    return LmBatch(
        tokens=tokens[None],
        segments=segments[None],
        positions=positions[None],
        loss_mask=loss_mask[None],
    )


EXPECTED = """first batch, row 1 of 1: 2 documents, 19 tokens, 11 trained, 21 of padding
  prompt   Hi.\\n\\n
  trained  Hel\\x1b[2Jo⟨end⟩
  prompt   a\\n\\n
  trained  b⟨end⟩
  padding  21 tokens"""


def test_every_span_is_named_and_control_characters_are_escaped(capsys):
    batch = batch_of(("Hi.\n\n", "Hel\x1b[2Jo"), ("a\n\n", "b"))
    # Trained tokens: eight bytes and an end token, one byte and an end token.
    assert preview_text(batch, 0, BYTES.decode).plain == EXPECTED
    print_preview(batch, BYTES.decode)
    assert capsys.readouterr().out == f"{EXPECTED}\n"  # not a terminal: no colors


def test_colors_follow_the_loss_mask():
    batch = batch_of(("Hi", "Yes"))
    text = preview_text(batch, 0, BYTES.decode)
    styled = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert styled["bold green"].endswith("Yes") and styled["cyan"].endswith("Hi")
    assert styled["reverse bold green"] == "⟨end⟩"
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard").print(text)
    assert "\x1b[" in out.getvalue()


def test_long_spans_and_many_documents_are_cut():
    batch = batch_of(*[("a", "b")] * 5, ("x" * 500, "y"), length=600)
    plain = preview_text(batch, 0, BYTES.decode).plain
    assert plain.count("prompt") == 3 and "… 3 more documents" in plain
    long = preview_text(batch_of(("x" * 500, "y"), length=600), 0, BYTES.decode).plain
    assert "x" * 400 + "… (500 characters)" in long and "x" * 401 not in long


def test_full_and_empty_rows():
    full = batch_of(("Hi", "Yes"), length=6)
    assert "padding  " not in preview_text(full, 0, BYTES.decode).plain
    empty = LmBatch(**{name: np.zeros_like(value) for name, value in vars(full).items()})
    assert preview_text(empty, 0, BYTES.decode).plain == (
        "first batch, row 1 of 1: 0 documents, 0 tokens, 0 trained, 6 of padding\n"
        "  padding  6 tokens"
    )
