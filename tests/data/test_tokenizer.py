"""Tokenizers: known ids, round trips, and text that tries to produce special tokens."""

import gzip
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from instructax.data import tokenizer as tokenizer_lib

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_tokenizer.py"
EOT = "<|endoftext|>"
TEXTS = [
    "low lower lowest",
    "new newer newest\n\nwide  wider",
    "naïve café – 日本語 🙂",
    f"an {EOT} in text",
] * 3


def byte_symbols() -> list[str]:
    """GPT-2's table, as in its source: visible bytes represent themselves, the others count
    up from 256."""
    symbols = []
    extra = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(256 + extra))
            extra += 1
    return symbols


def write_gpt2(folder: Path, merges: list[str]) -> Path:
    """Ids 0 to 255 are the bytes, followed by one id per merge and the end of text."""
    pieces = [*byte_symbols(), *(merge.replace(" ", "") for merge in merges), EOT]
    (folder / "encoder.json").write_text(
        json.dumps({piece: index for index, piece in enumerate(pieces)})
    )
    (folder / "vocab.bpe").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )
    return folder


def added(index: int, content: str, special: bool) -> dict:
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }
    return {"id": index, "content": content, **flags}


def write_json(path: Path, model: dict, **parts) -> str:
    empty = dict.fromkeys(
        (
            "truncation",
            "padding",
            "normalizer",
            "pre_tokenizer",
            "post_processor",
            "decoder",
        )
    )
    path.write_text(
        json.dumps({"version": "1.0", **empty, "added_tokens": [], **parts, "model": model})
    )
    return str(path)


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def write_byte_level(
    path: Path, extra_vocab: dict, merges: list, added_tokens: list, **model
) -> str:
    vocab = {symbol: index for index, symbol in enumerate(byte_symbols())} | extra_vocab
    model = {"type": "BPE", "vocab": vocab, "merges": merges, **model}
    return write_json(
        path, model, added_tokens=added_tokens, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL
    )


@pytest.fixture(scope="module")
def trained() -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.train_bpe(TEXTS, 300)


def test_golden_bytes():
    tokenizer = tokenizer_lib.load_tokenizer("bytes")
    ids = tokenizer.encode("Aé\n €")
    assert ids.dtype == np.int32 and ids.tolist() == [
        65,
        0xC3,
        0xA9,
        10,
        32,
        0xE2,
        0x82,
        0xAC,
    ]
    assert (tokenizer.size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"a\xe2\x82",
        b"\xe2\x82b",
        b"\xc0\x80",
        b"\xf0\x9f\x99",
        b"\xed\xa0\x80",
        b"\x80\x80",
    ],
)
def test_invalid_utf8_decodes_as_in_python(data: bytes):
    assert tokenizer_lib.load_tokenizer("bytes").decode(list(data)) == data.decode(
        errors="replace"
    )


def test_special_ids_are_written_out_and_end_an_incomplete_character():
    ids = np.array([0xE2, 0x82, 256, 0xAC, 65, 256], np.int32)
    assert tokenizer_lib.load_tokenizer("bytes").decode(ids) == f"\ufffd{EOT}\ufffdA{EOT}"


def test_golden_gpt2(tmp_path: Path):
    # "Ġ" is a space. The rank of a merge decides, not its position: "l o" comes before "o
    # w", so "low" is lo + w.
    folder = write_gpt2(tmp_path, ["l o", "o w", "lo w", "Ġ low", "e r", "n e", "Ã ©"])
    tokenizer = tokenizer_lib.load_tokenizer(str(folder))
    assert (tokenizer.size, tokenizer.eos_id) == (264, 263)
    assert tokenizer.encode("low lower").tolist() == [258, 259, 260]
    # "e r" outranks "n e".
    assert tokenizer.encode("owl ner").tolist() == [257, 108, 32, 110, 260]
    assert tokenizer.encode("é!").tolist() == [262, 33]
    assert tokenizer.decode([258, 259, 263, 262]) == f"low low{EOT}é"


def test_words_are_split_before_merging(tmp_path: Path):
    # GPT-2 splits contractions such as 's, letters, digits and spaces; no merge crosses
    # these borders.
    tokenizer = tokenizer_lib.load_tokenizer(
        str(write_gpt2(tmp_path, ["a 1", "a !", "Ġ Ġ", "' s", "t '"]))
    )
    assert tokenizer.encode("a1a!").tolist() == [97, 49, 97, 33]
    assert tokenizer.encode("t's").tolist() == [116, 259]
    assert tokenizer.encode("a   a").tolist() == [97, 258, 32, 97]


@hypothesis.given(
    text=st.text(max_size=60)
    | st.text(alphabet="<|endoftx> \n\té🙂\u0301\u2028\x00", max_size=60)
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_round_trip(trained: tokenizer_lib.Tokenizer, text: str):
    for tokenizer in (trained, tokenizer_lib.load_tokenizer("bytes")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids


def test_bytes_are_the_utf8_of_any_text():
    tokenizer = tokenizer_lib.load_tokenizer("bytes")
    text = "".join(
        chr(code) for code in range(0, 0x11000, 7) if not 0xD800 <= code < 0xE000
    )
    assert tokenizer.encode(text).tolist() == list(text.encode())


def test_encode_batch_is_encode(trained: tokenizer_lib.Tokenizer):
    batch = trained.encode_batch(iter([*TEXTS, ""]))
    assert [ids.tolist() for ids in batch] == [
        trained.encode(text).tolist() for text in [*TEXTS, ""]
    ]
    assert all(ids.dtype == np.int32 for ids in batch) and trained.encode_batch([]) == []


def test_every_id_decodes(trained: tokenizer_lib.Tokenizer):
    for tokenizer in (trained, tokenizer_lib.load_tokenizer("bytes")):
        assert all(tokenizer.decode([index]) for index in range(tokenizer.size))
        for index in (-1, tokenizer.size):
            with pytest.raises(ValueError, match=f"id {index} .* size {tokenizer.size}"):
                tokenizer.decode([0, index])


@pytest.mark.parametrize("text", ["ok \ud800", "\udfff"])
def test_lone_surrogates_are_refused(trained: tokenizer_lib.Tokenizer, text: str):
    for call in (
        trained.encode,
        lambda text: trained.encode_batch(["fine", text]),
        lambda text: tokenizer_lib.train_bpe([text], 300),
    ):
        with pytest.raises(
            ValueError,
            match=f"surrogate, U\\+{ord(text[-1]):04X} at character {len(text) - 1}",
        ):
            call(text)


def test_training_merges_the_most_frequent_pair_first():
    # "ab" occurs 3 times and "abc" twice: the first merge is a + b, the second ab + c. The
    # end of text has id 0.
    tokenizer = tokenizer_lib.train_bpe(["abc", "abc", "ab"], 259)
    assert (tokenizer.size, tokenizer.eos_id) == (259, 0)
    assert tokenizer.encode("abcab").tolist() == [258, 257]


def test_training_is_deterministic_and_bounded(trained: tokenizer_lib.Tokenizer):
    assert tokenizer_lib.train_bpe(iter(TEXTS), 300).hash == trained.hash
    assert tokenizer_lib.train_bpe(TEXTS, 299).hash != trained.hash
    assert trained.size == 300
    assert tokenizer_lib.train_bpe(["ab"], 5000).size == 258
    assert tokenizer_lib.train_bpe([], 257).size == 257
    with pytest.raises(ValueError, match=r"at least 257 .* not 256"):
        tokenizer_lib.train_bpe(TEXTS, 256)


def test_save_and_load_keep_hash_ids_and_end_of_text(
    tmp_path: Path, trained: tokenizer_lib.Tokenizer
):
    (tmp_path / "gpt2").mkdir()
    gpt2 = tokenizer_lib.load_tokenizer(str(write_gpt2(tmp_path / "gpt2", ["l o"])))
    two_ends = [added(256, EOT, True), added(257, "<|im_end|>", True)]
    write_byte_level(tmp_path / "tokenizer.json", {}, [], two_ends)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<|im_end|>"}}'
    )
    chat = tokenizer_lib.load_tokenizer(str(tmp_path))
    assert chat.eos_id == 257
    for index, tokenizer in enumerate(
        [trained, gpt2, chat, tokenizer_lib.load_tokenizer("bytes")]
    ):
        path = str(tmp_path / f"new{index}" / "any.json")
        tokenizer_lib.save_tokenizer(tokenizer, path)
        loaded = tokenizer_lib.load_tokenizer(path)
        assert loaded == tokenizer and (loaded.hash, loaded.eos_id) == (
            tokenizer.hash,
            tokenizer.eos_id,
        )
        assert loaded.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
    copy = pickle.loads(pickle.dumps(trained))
    assert copy == trained and copy.decode(copy.encode(TEXTS[2])) == TEXTS[2]


def test_the_hash_depends_only_on_the_content(tmp_path: Path):
    def load(name: str, **options) -> tokenizer_lib.Tokenizer:
        vocab = {"lo": 256, "ow": 257, EOT: 258}
        tokens = [added(258, EOT, True), added(259, "<tool>", False)]
        path = write_byte_level(
            tmp_path / f"{name}.json",
            vocab,
            **{"merges": ["l o", "o w"], "added_tokens": tokens} | options,
        )
        return tokenizer_lib.load_tokenizer(path)

    first = load("first")
    content = json.loads((tmp_path / "first.json").read_text())
    content["added_tokens"].reverse()
    content["post_processor"] = (
        BYTE_LEVEL  # has no effect here, so it is not part of the hash
    )
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    (tmp_path / "same.json").write_text(
        json.dumps(dict(reversed(content.items())), indent=3)
    )
    assert tokenizer_lib.load_tokenizer(str(tmp_path / "same.json")).hash == first.hash
    assert load("pairs", merges=[["l", "o"], ["o", "w"]]).hash == first.hash
    assert load("order", merges=["o w", "l o"]).hash != first.hash
    assert (
        load(
            "token", added_tokens=[added(258, EOT, True), added(259, "<tools>", False)]
        ).hash
        != first.hash
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<tool>"}')
    other_end = load("first")
    assert other_end.eos_id == 259 and other_end.hash != first.hash and other_end != first
    assert (
        len(first.hash) == 64
        and len({first.hash, tokenizer_lib.load_tokenizer("bytes").hash}) == 2
    )


def test_text_never_makes_a_special_token(tmp_path: Path):
    # Merges, whole words (ignore_merges) and added tokens can all produce special tokens;
    # each of these ways must be closed. `<think>` is an added token, but not a special one.
    vocab = {"<e": 256, "os>": 257, "os": 258, "<eos>": 259, "<pad>": 260, "s>": 264}
    merges = ["o s", "s >", "os >", "< e", "<e os>"]
    tokens = [
        added(259, "<eos>", True),
        added(260, "<pad>", True),
        added(261, "<think>", False),
        added(262, "«é»", True),
    ]
    processor = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<eos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    }
    processor |= {
        "pair": [],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [259], "tokens": ["<eos>"]}},
    }
    path = write_byte_level(tmp_path / "t.json", vocab, merges, tokens, ignore_merges=True)
    content = json.loads(Path(path).read_text()) | {"post_processor": processor}
    # The whole text is one word, which ignore_merges needs.
    content["pre_tokenizer"] = BYTE_LEVEL | {"use_regex": False}
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    Path(path).write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    tokenizer = tokenizer_lib.load_tokenizer(path)
    assert (tokenizer.size, tokenizer.eos_id) == (265, 259)
    assert tokenizer.encode("<eos>").tolist() == [256, 257]
    for text in ("<eos>", "<pad>", "<think>", "«é»", "a<eos>b <pad><think> c", EOT):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {259, 260, 262} & set(ids.tolist())
        assert ids.tolist().count(261) == text.count("<think>")
    assert (
        tokenizer.decode([97, 259, 260, 261, 262, 263])
        == "a<eos><pad><think>«é»<|unused 263|>"
    )


def test_an_added_single_character_is_ordinary_text(tmp_path: Path):
    path = write_byte_level(
        tmp_path / "t.json", {}, [], [added(256, EOT, True), added(97, "a", False)]
    )
    tokenizer = tokenizer_lib.load_tokenizer(path)
    assert (
        tokenizer.encode("ba").tolist() == [98, 97]
        and tokenizer.decode([98, 97, 256]) == f"ba{EOT}"
    )


SPACED_TEXTS = (
    "x):\n    return",
    "a\n\nb",
    "  a   b\n\n\nc    ",
    "\tx\n \n  y",
    "",
    "    ",
)


@pytest.mark.parametrize("text", SPACED_TEXTS)
@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_added_tokens_that_are_not_special_are_pieces_of_text(
    tmp_path: Path, text: str, in_vocabulary: bool
):
    """Ids equal those of the tokenizers library: Pythia lists runs of spaces behind the
    vocabulary, Gemma has them and line breaks in it."""
    runs = {"  ": 258, "    ": 257, "\n\n": 259, "\n\n\n": 260}
    vocab = {EOT: 256}
    if in_vocabulary:
        vocab |= runs
    tokens = [added(256, EOT, True)]
    # In the order of their ids, by which the library numbers tokens behind the vocabulary.
    for token, index in sorted(runs.items(), key=lambda run: run[1]):
        tokens.append(added(index, token, False))
    tokens.append(added(261, "<pad>", True))
    path = write_byte_level(tmp_path / "t.json", vocab, [], tokens)
    expected = tokenizers.Tokenizer.from_file(path).encode(text, add_special_tokens=False)
    tokenizer = tokenizer_lib.load_tokenizer(path)
    assert tokenizer.encode(text).tolist() == expected.ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert set(tokenizer.added_text_tokens()) == set(runs)
    # The file that an export writes encodes like training.
    tokenizer_lib.save_tokenizer(tokenizer, str(tmp_path / "saved" / "tokenizer.json"))
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert saved.encode(text, add_special_tokens=False).ids == expected.ids


def test_added_tokens_behind_a_unigram_vocabulary(tmp_path: Path):
    pieces = [["<unk>", 0.0], ["</s>", 0.0], ["▁", -1.0], ["a", -2.0], ["b", -2.0]]
    content = {
        "version": "1.0",
        "added_tokens": [
            added(0, "<unk>", True),
            added(1, "</s>", True),
            added(5, "<think>", False),
            added(6, "aa", False),
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    library = tokenizers.Tokenizer.from_file(str(path))
    tokenizer = tokenizer_lib.load_tokenizer(str(path))
    for text in ("ab<think>ba", "aaab", "a</s>b"):
        ids = tokenizer.encode(text).tolist()
        if "</s>" not in text:
            assert ids == library.encode(text, add_special_tokens=False).ids
        assert 1 not in ids


def test_unigram(tmp_path: Path):
    # The pieces "</s>" and "<unk>" have the best scores. Unknown characters still get the
    # id of "<unk>".
    vocab = [
        ["<unk>", 0.0],
        ["</s>", 0.0],
        ["▁", -2.0],
        ["a", -2.0],
        ["▁a", -3.0],
        *([c, -5.0] for c in "</s>unk"),
    ]
    metaspace = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": True,
    }
    tokens = [added(0, "<unk>", True), added(1, "</s>", True)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab}
    path = write_json(
        tmp_path / "t.json",
        model,
        added_tokens=tokens,
        pre_tokenizer=metaspace,
        decoder=metaspace,
    )
    tokenizer = tokenizer_lib.load_tokenizer(path)
    assert (tokenizer.size, tokenizer.eos_id) == (12, 1)
    assert tokenizer.encode("a a").tolist() == [4, 4]
    assert tokenizer.encode("</s>").tolist() == [2, 5, 6, 7, 8]
    assert tokenizer.decode(tokenizer.encode("a</s> <unk>")) == "a</s> <unk>"
    assert tokenizer.encode("aé").tolist() == [4, 0]
    assert tokenizer.decode([4, 1]) == "a</s>"


def test_unknown_word_of_a_word_level_model(tmp_path: Path):
    model = {
        "type": "WordLevel",
        "vocab": {"[UNK]": 0, "</s>": 1, "hi": 2},
        "unk_token": "[UNK]",
    }
    path = write_json(
        tmp_path / "t.json",
        model,
        added_tokens=[added(0, "[UNK]", True)],
        pre_tokenizer={"type": "WhitespaceSplit"},
    )
    tokenizer = tokenizer_lib.load_tokenizer(path)
    assert (
        tokenizer.encode("hi </s> you").tolist() == [2, 0, 0]
        and tokenizer.decode([2, 0, 1]) == "hi [UNK] </s>"
    )


@pytest.mark.parametrize(("tokens", "ids"), [([], [2]), ([added(2, "ab", True)], [0, 1])])
def test_merges_with_a_prefix_inside_words(
    tmp_path: Path, tokens: list[dict], ids: list[int]
):
    vocab = {"a": 0, "##b": 1, "ab": 2, EOT: 3}
    model = {
        "type": "BPE",
        "continuing_subword_prefix": "##",
        "vocab": vocab,
        "merges": ["a ##b"],
    }
    tokenizer = tokenizer_lib.load_tokenizer(
        write_json(tmp_path / "t.json", model, added_tokens=tokens)
    )
    assert tokenizer.encode("ab").tolist() == ids


def test_bpe_dropout_is_disabled(tmp_path: Path):
    path = write_byte_level(
        tmp_path / "t.json", {"ab": 256, EOT: 257}, ["a b"], [], dropout=0.9
    )
    tokenizer = tokenizer_lib.load_tokenizer(path)
    assert tokenizer.encode(" ab" * 50).tolist() == [32, 256] * 50


@pytest.mark.parametrize(
    ("names", "config", "eos"),
    [
        ([EOT, "</s>", "<|im_end|>"], None, EOT),
        (["<|im_end|>", "</s>"], None, "</s>"),
        (["<|im_end|>"], {"eos_token": None}, "<|im_end|>"),
        ([EOT, "<end>"], {"eos_token": "<end>"}, "<end>"),
    ],
)
def test_the_end_token_is_found(
    tmp_path: Path, names: list[str], config: dict | None, eos: str
):
    write_byte_level(
        tmp_path / "tokenizer.json",
        {},
        [],
        [added(256 + i, name, True) for i, name in enumerate(names)],
    )
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = tokenizer_lib.load_tokenizer(str(path))
        assert (
            tokenizer.eos_id == 256 + names.index(eos)
            and tokenizer.decode([tokenizer.eos_id]) == eos
        )


def test_a_missing_end_token_is_an_error(tmp_path: Path):
    path = write_byte_level(tmp_path / "t.json", {}, [], [added(256, "<end>", True)])
    with pytest.raises(
        ValueError,
        match=r"<\|endoftext\|>, </s>, <\|im_end\|>; name it in .*tokenizer_config.json",
    ):
        tokenizer_lib.load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(ValueError, match="looked for <stop>;"):
        tokenizer_lib.load_tokenizer(path)


VOCAB = {"a": 0, "b": 1, EOT: 2}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'model'"),
        (
            json.dumps(
                {
                    "model": {"type": "BPE", "vocab": VOCAB},
                    "pre_tokenizer": {"type": "Nonsense"},
                }
            ),
            "Exception: ",
        ),
        (
            json.dumps({"model": {"vocab": VOCAB, "merges": ["a b"]}}),
            "the merge 'a' 'b' needs 'ab'",
        ),
        (json.dumps({"model": {"vocab": VOCAB, "merges": ["a b c"]}}), "too many values"),
        (
            json.dumps({"model": {"vocab": VOCAB | {"b": 0}, "merges": []}}),
            "'a' and 'b' share the id 0: give each",
        ),
        (
            json.dumps({"model": {"vocab": VOCAB | {"b": -1}, "merges": []}}),
            "token 'b' has the id -1: ids must be integers from 0; correct",
        ),
        (
            json.dumps(
                {
                    "model": {"vocab": VOCAB, "merges": []},
                    "added_tokens": [added(5, EOT, True)],
                }
            ),
            "two ids, 2 and 5: give it one id",
        ),
        ("\x80", "cannot use"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=reason) as error:
        tokenizer_lib.load_tokenizer(str(file))
    assert str(error.value).startswith(
        f"cannot use the tokenizer at {file}: "
    ) and "\n" not in str(error.value)


def test_missing_and_incomplete_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere"):
        tokenizer_lib.load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"FileNotFoundError: .*tokenizer\.json"):
        tokenizer_lib.load_tokenizer(str(tmp_path))
    folder = write_gpt2(tmp_path, [])
    vocab = json.loads((folder / "encoder.json").read_text())
    for name in ("Ġ", EOT):
        (folder / "encoder.json").write_text(
            json.dumps({key: vocab[key] for key in vocab if key != name})
        )
        with pytest.raises(ValueError, match="vocabulary lacks"):
            tokenizer_lib.load_tokenizer(str(folder))


# Runs the script once for each list of arguments, in forks of one process, so that imports
# happen once.
SCRIPT_RUNNER = """
import json, os, runpy, sys
from pathlib import Path

import absl.app
import instructax.cli
import instructax.data.tokenizer

script, folder = sys.argv[1], Path(sys.argv[2])
codes = []
for number, arguments in enumerate(json.loads(sys.argv[3])):
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(folder / f"{number}.{name}", os.O_CREAT | os.O_WRONLY)
            os.dup2(file, descriptor)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def run_script(folder: Path, argument_lists: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the script for each list of arguments."""
    folder.mkdir()
    arguments = [str(SCRIPT), str(folder), json.dumps(argument_lists)]
    runner = subprocess.run(
        [sys.executable, "-c", SCRIPT_RUNNER, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    results = []
    for number, code in enumerate(json.loads(runner.stdout)):
        stdout = (folder / f"{number}.stdout").read_text()
        stderr = (folder / f"{number}.stderr").read_text()
        results.append((code, stdout, stderr))
    return results


def test_the_script_trains_the_same_tokenizer_as_the_library(
    tmp_path: Path, trained: tokenizer_lib.Tokenizer
):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in TEXTS[:-1])
    (tmp_path / "b.txt").write_text(TEXTS[-1], encoding="utf-8")
    files = ["--files", str(tmp_path / "a.jsonl.gz"), "--files", str(tmp_path / "b.txt")]
    out = str(tmp_path / "made" / "tokenizer.json")
    options = ["--field", "body", "--vocab_size", "300", "--out", out]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *files, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "300 tokens" in done.stdout
    assert tokenizer_lib.load_tokenizer(out) == trained


def test_the_script_reports_errors_in_one_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text" * 100)[:-9])
    (tmp_path / "a.txt").write_text("some text")
    out = ["--out", str(tmp_path / "t.json")]
    size = "--vocab_size=300"
    text = f"--files={tmp_path}/a.txt"
    cases = [
        ([*out, size, f"--files={tmp_path}/a.jsonl"], "a.jsonl, line 2: .* under 'text'"),
        ([*out, size, f"--files={tmp_path}/a.txt.gz"], "a.txt.gz: cannot be read"),
        ([*out, size, f"--files={tmp_path}/none.txt"], "none.txt: cannot be read"),
        ([*out, size, f"--files={tmp_path}/a.csv"], r"a.csv: must end in \.txt"),
        ([*out, "--vocab_size=30", text], "at least 257"),
        ([*out, "--vocab_size=many", text], "many"),
        ([*out, size, text, "more.txt"], "unexpected argument more.txt"),
        ([f"--out={tmp_path}", size, text], "is a folder"),
        (out, "--files"),
    ]
    results = run_script(tmp_path / "output", [arguments for arguments, _ in cases])
    for (arguments, reason), (code, _, stderr) in zip(cases, results, strict=True):
        assert code == 2 and stderr.count("\n") == 1, (arguments, stderr)
        assert re.search(reason, stderr), (reason, stderr)
    assert not (tmp_path / "t.json").exists()


def test_help_imports_neither_jax_nor_tokenizers():
    code = (
        "import runpy, sys; sys.modules.update(jax=None, tokenizers=None, numpy=None); "
        "path = sys.argv[1]; sys.argv = [path, '--help']; "
        "runpy.run_path(path, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "--vocab_size" in done.stdout and "Traceback" not in done.stderr


def test_tokens_containing_a_text_are_marked():
    marked = tokenizer_lib.load_tokenizer("bytes").tokens_containing("\n")
    assert marked.shape == (257,) and np.flatnonzero(marked).tolist() == [10]
