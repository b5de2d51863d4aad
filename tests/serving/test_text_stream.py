"""Streamed pieces join to the whole text, and stop strings end it where they begin."""

import numpy as np
import pytest

from instructax.data.tokenizer import load_tokenizer, train_bpe
from instructax.serving.text_stream import TextStream

BYTES = load_tokenizer("bytes")
TEXT = "naïve café – 日本語 🙂 end"


def stream_text(text, chunk_sizes, stop_strings=(), hit_eos=False, tokenizer=BYTES):
    """(pieces, stream) of a text in chunks of the given sizes, which are repeated."""
    ids = tokenizer.encode(text)
    if hit_eos:
        ids = np.append(ids, tokenizer.eos_id)
    stream = TextStream(tokenizer, stop_strings)
    pieces = []
    start = 0
    while start < len(ids):
        stop = start + chunk_sizes[len(pieces) % len(chunk_sizes)]
        done = stop >= len(ids)
        pieces.append(stream.add(ids[start:stop], done=done, hit_eos=done and hit_eos))
        start = stop
    return pieces, stream


@pytest.mark.parametrize("chunk_sizes", [(1,), (2,), (3, 1), (1000,)])
@pytest.mark.parametrize("hit_eos", [True, False])
@pytest.mark.parametrize(
    "tokenizer", [BYTES, train_bpe([TEXT] * 3, 300)], ids=["bytes", "bpe"]
)
def test_pieces_join_to_the_text(chunk_sizes, hit_eos, tokenizer):
    pieces, stream = stream_text(TEXT, chunk_sizes, hit_eos=hit_eos, tokenizer=tokenizer)
    assert "".join(pieces) == stream.text == TEXT
    # No incomplete characters on the way.
    assert all("\ufffd" not in piece for piece in pieces)
    assert stream.finish_reason == ("stop" if hit_eos else "length")
    assert stream.num_tokens == len(tokenizer.encode(TEXT)) + hit_eos


@pytest.mark.parametrize("chunk_sizes", [(1,), (2,), (5, 1), (1000,)])
@pytest.mark.parametrize(
    ("stop_strings", "text", "num_tokens"),
    [
        (("STOP",), "a S ST b", 12),
        (("ST b", "STOP"), "a S ", 8),
        (("OP", "STOP"), "a S ST b", 12),
        (("zz",), "a S ST bSTOP after", 18),
    ],
)
def test_the_first_stop_string_ends_the_text(chunk_sizes, stop_strings, text, num_tokens):
    pieces, stream = stream_text("a S ST bSTOP after", chunk_sizes, stop_strings)
    assert "".join(pieces) == stream.text == text
    # The tokens up to the stop string, however many came in its chunk.
    assert stream.num_tokens == num_tokens
    assert stream.finish_reason == ("length" if "zz" in stop_strings else "stop")


def test_a_possible_beginning_of_a_stop_string_is_held_back():
    pieces, stream = stream_text("xSTOq", (1,), ("STOP",))
    assert pieces == ["x", "", "", "", "STOq"]
    assert stream.text == "xSTOq"


def test_a_finished_stream_ignores_further_tokens():
    _, stream = stream_text("a.b", (1000,), (".",))
    assert stream.add(BYTES.encode("more"), done=True, hit_eos=False) == ""
    assert (stream.text, stream.finish_reason, stream.num_tokens) == ("a", "stop", 2)


def test_incomplete_characters_are_shown_at_the_end():
    stream = TextStream(BYTES)
    assert stream.add(np.array([65, 0xE6]), done=False, hit_eos=False) == "A"
    assert stream.add(np.array([0x97]), done=True, hit_eos=False) == "\ufffd"
