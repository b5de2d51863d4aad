"""Reading records: every kind of line, valid and invalid."""

import gzip
import json

import pytest

from instructax.data.schema import (
    Comparison,
    DataError,
    Demonstration,
    Prompt,
    Text,
    read_jsonl,
)

DEMONSTRATION = {"id": "d", "prompt": "p", "format": "plain", "completion": "c"}
COMPARISON = {"id": "c", "prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 1]}
PROMPT = {"id": "p", "prompt": "p", "format": "dialog"}
TEXT = {"id": "t", "text": "x"}


def write(path, *lines):
    path.write_bytes(
        b"\n".join(
            line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
        )
    )
    return path


def test_reads_each_kind_with_its_optional_fields(tmp_path):
    file = write(
        tmp_path / "d.jsonl",
        DEMONSTRATION | {"source": "s", "labeler": None, "meta": {"any": [1]}},
    )
    assert list(read_jsonl([file], Demonstration)) == [
        Demonstration("d", "p", "plain", "c", "s", None)
    ]
    judged = COMPARISON | {"pairs": [[0, 1, -1], [1, 2, 0]], "labeler": "w"}
    file = write(
        tmp_path / "c.jsonl",
        judged,
        COMPARISON | {"id": "x", "ranks": None, "pairs": [[0, 1, 1]]},
    )
    assert list(read_jsonl([file], Comparison)) == [
        Comparison(
            "c", "p", ("a", "b", "c"), (2, 1, 1), ((0, 1, -1), (1, 2, 0)), "w", None
        ),
        Comparison("x", "p", ("a", "b", "c"), None, ((0, 1, 1),), None, None),
    ]
    file = write(tmp_path / "p.jsonl", PROMPT | {"user": "u", "kind": "chat"})
    assert list(read_jsonl([file], Prompt)) == [
        Prompt("p", "p", "dialog", "chat", "u", None)
    ]
    assert list(read_jsonl([write(tmp_path / "t.jsonl", TEXT)], Text)) == [
        Text("t", "x", None)
    ]


def test_byte_order_mark_crlf_blank_lines_and_gzip(tmp_path):
    lines = (
        b'\xef\xbb\xbf{"id": "1", "text": "caf\xc3\xa9"}\r\n\r\n  \n'
        b'{"id": "2", "text": "a\\u0000\\r\\nb"}\r\n'
    )
    plain = tmp_path / "t.jsonl"
    packed = tmp_path / "t.jsonl.gz"
    plain.write_bytes(lines)
    packed.write_bytes(gzip.compress(lines))
    expected = [Text("1", "café", None), Text("2", "a\0\r\nb", None)]
    assert list(read_jsonl([plain], Text)) == expected
    assert list(read_jsonl([packed], Text)) == expected


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


BAD_LINES = [
    (Text, b'{"id": "t", "text": "\xff"}', "line: not UTF-8 at byte 21 (b'\\xff\"}')"),
    (Text, b'\xff\xfe{\x00"\x00', "line: not UTF-8 at byte 0"),
    (Text, b'{"id": "t", "text"', "line: not JSON: "),
    (
        Text,
        b'{"id": "t", "text": "x", "meta": {"a": NaN}}',
        "line: not JSON: NaN is not a JSON number: a number must be finite",
    ),
    (
        Text,
        b'{"id": "t", "text": "x", "meta": {"a": -Infinity}}',
        "line: not JSON: -Infinity is not a JSON number: a number must be finite",
    ),
    (Text, b'{"meta": ' + b"[" * 200_000, "line: JSON is nested too deeply"),
    (Text, b'{"meta": ' + b"1" * 5000 + b"}", "line: not JSON: Exceeds the limit"),
    (Text, [1], "line: not a JSON object ([1])"),
    (
        Text,
        b'{"id": "t", "text": "x", "text": "y"}',
        "text: given twice (['id', 'text', 'text'])",
    ),
    (
        Text,
        b'{"id": "t", "text": "x", "meta": {"a": 1, "a": 2}}',
        "a: given twice (['a', 'a'])",
    ),
    (Text, TEXT | {"meta": 3}, "meta: not an object (3)"),
    (Text, without(TEXT, "text"), "text: missing among the fields of this line (['id'])"),
    (Text, TEXT | {"id": 7}, "id: must be a string (7)"),
    (Text, TEXT | {"text": " \n"}, "text: empty (' \\n')"),
    (
        Text,
        b'{"id": "t", "text": "ab\\ud800"}',
        "text: lone surrogate at character 2 ('\\ud800')",
    ),
    (Text, TEXT | {"source": ""}, "source: empty ('')"),
    (
        Demonstration,
        DEMONSTRATION | {"labler": "w"},
        "labler: not a field of Demonstration, which has id, prompt, ",
    ),
    (Demonstration, DEMONSTRATION | {"prompt": ""}, "prompt: empty ('')"),
    (
        Demonstration,
        DEMONSTRATION | {"completion": None},
        "completion: must be a string (None)",
    ),
    (
        Demonstration,
        without(DEMONSTRATION, "format"),
        "format: missing among the fields of this line (",
    ),
    (
        Demonstration,
        DEMONSTRATION | {"format": "chat"},
        'format: must be "plain" or "dialog" (\'chat\')',
    ),
    (
        Demonstration,
        DEMONSTRATION | {"format": []},
        'format: must be "plain" or "dialog" ([])',
    ),
    (Prompt, PROMPT | {"user": 5}, "user: must be a string (5)"),
    (
        Comparison,
        COMPARISON | {"completions": "ab"},
        "completions: must be a list of strings ('ab')",
    ),
    (
        Comparison,
        COMPARISON | {"completions": ["a"]},
        "completions: a comparison needs at least 2 completions, not 1",
    ),
    (
        Comparison,
        COMPARISON | {"completions": ["a", "", "c"]},
        "completions[1]: empty ('')",
    ),
    (
        Comparison,
        COMPARISON | {"ranks": [1, 2]},
        "ranks: 2 ranks for 3 completions ([1, 2])",
    ),
    (
        Comparison,
        COMPARISON | {"ranks": [0, 1, 2]},
        "ranks: must be null or a list of integers, 1 for the best ([0",
    ),
    (
        Comparison,
        COMPARISON | {"ranks": [1.0, 2, 3]},
        "ranks: must be null or a list of integers",
    ),
    (
        Comparison,
        COMPARISON | {"ranks": [True, 2, 3]},
        "ranks: must be null or a list of integers",
    ),
    (
        Comparison,
        COMPARISON | {"ranks": None},
        "ranks: null, and there are no pairs either (None)",
    ),
    (Comparison, COMPARISON | {"pairs": {}}, "pairs: must be a list of [i, j, w] ({})"),
    (
        Comparison,
        COMPARISON | {"pairs": [[0, 1]]},
        "pairs: must be a list of [i, j, w], three integers ([0, 1])",
    ),
    (
        Comparison,
        COMPARISON | {"pairs": [[0, 3, -1]]},
        "pairs: needs i and j in 0 .. 2, i != j, and w in -1, 0, 1 ([0",
    ),
    (
        Comparison,
        COMPARISON | {"pairs": [[1, 1, 0]]},
        "pairs: needs i and j in 0 .. 2, i != j",
    ),
    (
        Comparison,
        COMPARISON | {"pairs": [[0, 1, 1]]},
        "pairs: contradicts ranks [2, 1, 1] ([0, 1, 1])",
    ),
    (
        Comparison,
        COMPARISON | {"pairs": [[1, 2, -1]]},
        "pairs: contradicts ranks [2, 1, 1] ([1, 2, -1])",
    ),
    (Comparison, COMPARISON | {"pairs": [[0, 1, 2]]}, "pairs: needs i and j in 0 .. 2"),
]


@pytest.mark.parametrize(
    ("cls", "line", "message"), BAD_LINES, ids=[message[:40] for _, _, message in BAD_LINES]
)
def test_a_bad_line_names_its_place_field_reason_and_value(tmp_path, cls, line, message):
    good = {
        Text: TEXT,
        Demonstration: DEMONSTRATION,
        Prompt: PROMPT,
        Comparison: COMPARISON,
    }[cls] | {"id": "good"}
    file = write(tmp_path / "f.jsonl", good, b"", line)
    with pytest.raises(DataError) as caught:
        list(read_jsonl([file], cls))
    text = str(caught.value)
    assert text.startswith(f"{file}:3: {message}")
    assert "\n" not in text
    assert len(text) < len(str(file)) + 220


def test_an_id_may_occur_once_in_all_files(tmp_path):
    one = write(tmp_path / "1.jsonl", TEXT)
    two = write(tmp_path / "2.jsonl", TEXT | {"id": "u"}, TEXT)
    with pytest.raises(DataError) as caught:
        list(read_jsonl([one, two], Text))
    assert str(caught.value) == f"{two}:2: id: already used at {one}:1 ('t')"
    assert len(list(read_jsonl([one], Text))) == 1


def test_files_that_cannot_be_read(tmp_path):
    whole = gzip.compress(
        b"".join(b'{"id": "%d", "text": "x"}\n' % i for i in range(3)), mtime=0
    )
    cut, not_gzip, corrupt = (
        tmp_path / f"{name}.jsonl.gz" for name in ("cut", "not", "corrupt")
    )
    cut.write_bytes(whole[:-9])
    not_gzip.write_bytes(b"{}")
    corrupt.write_bytes(whole[:12] + b"\xff\xff\xff" + whole[15:])
    cases = [
        (tmp_path / "none.jsonl", "none.jsonl: cannot be read ("),
        (tmp_path, f"{tmp_path}: cannot be read ("),
        (cut, "file: gzip data ends too early"),
        (not_gzip, "not.jsonl.gz: cannot be read (Not a gzipped file"),
        (corrupt, "corrupt.jsonl.gz: cannot be read ("),
    ]
    for file, message in cases:
        with pytest.raises(DataError) as caught:
            list(read_jsonl([file], Text))
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{file}:")
