"""Text in pieces: joined they are the whole, whatever the pieces; stop strings end it where
they begin."""

import numpy as np
import pytest

from instructax.data.tokenizer import load_tokenizer, train_bpe
from instructax.serving.text_stream import TextStream

BYTES = load_tokenizer("bytes")
TEXT = "naïve café – 日本語 🙂 end"


def streamed(text, sizes, stops=(), ended=False, tokenizer=BYTES):
    """(the pieces, the stream) of a text whose tokens come `sizes` at a time, again and
    again."""
    ids = tokenizer.encode(text)
    ids = np.append(ids, tokenizer.eos_id) if ended else ids
    stream, pieces, start, turn = TextStream(tokenizer, stops), [], 0, 0
    while start < len(ids):
        stop = start + sizes[turn % len(sizes)]
        over = stop >= len(ids)
        pieces.append(stream.add(ids[start:stop], over=over, ended=over and ended))
        start, turn = stop, turn + 1
    return pieces, stream


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (1000,)])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    "tokenizer", [BYTES, train_bpe([TEXT] * 3, 300)], ids=["bytes", "bpe"]
)
def test_pieces_join_to_the_text(sizes, ended, tokenizer):
    pieces, stream = streamed(TEXT, sizes, ended=ended, tokenizer=tokenizer)
    assert "".join(pieces) == stream.text == TEXT
    assert all("\ufffd" not in piece for piece in pieces)  # no half characters on the way
    assert stream.finish == ("stop" if ended else "length")
    assert stream.tokens == len(tokenizer.encode(TEXT)) + ended


@pytest.mark.parametrize("sizes", [(1,), (2,), (5, 1), (1000,)])
@pytest.mark.parametrize(
    ("stops", "wanted", "tokens"),
    [
        (("STOP",), "a S ST b", 12),
        (("ST b", "STOP"), "a S ", 8),
        (("OP", "STOP"), "a S ST b", 12),
        (("zz",), "a S ST bSTOP after", 18),
    ],
)
def test_the_first_stop_string_ends_the_text(sizes, stops, wanted, tokens):
    pieces, stream = streamed("a S ST bSTOP after", sizes, stops)
    assert "".join(pieces) == stream.text == wanted
    assert stream.tokens == tokens  # as many as it took, not as many as had come
    assert stream.finish == ("length" if "zz" in stops else "stop")


def test_nothing_that_could_begin_a_stop_string_is_shown():
    pieces, stream = streamed("xSTOq", (1,), ("STOP",))
    assert pieces == ["x", "", "", "", "STOq"]
    assert stream.text == "xSTOq"


def test_a_text_that_is_over_takes_no_more():
    _, stream = streamed("a.b", (1000,), (".",))
    assert stream.add(BYTES.encode("more"), over=True, ended=False) == ""
    assert (stream.text, stream.finish, stream.tokens) == ("a", "stop", 2)


def test_broken_bytes_come_through_at_the_end():
    stream = TextStream(BYTES)
    assert stream.add(np.array([65, 0xE6]), over=False, ended=False) == "A"
    assert stream.add(np.array([0x97]), over=True, ended=False) == "\ufffd"
