"""Filters and splits: which records are kept, in which order, and that splits do not
overlap."""

import collections
import hashlib

import pytest

from instructax.data import filters
from instructax.data.schema import Comparison, Demonstration, Prompt, Text


def prompt(id_, text, user=None):
    return Prompt(id=id_, prompt=text, format="plain", kind=None, user=user, source=None)


def comparison(id_, completions, ranks):
    return Comparison(
        id=id_,
        prompt="p",
        completions=tuple(completions),
        ranks=ranks,
        pairs=((0, 1, 0),),
        labeler=None,
        source=None,
    )


def ids(records):
    return [record.id for record in records]


def test_the_first_prompt_with_a_shared_prefix_is_kept():
    records = [
        prompt("a", "abcdX"),
        prompt("b", "abcdY"),
        prompt("c", "abc"),
        prompt("d", "abce"),
        prompt("e", "abc"),
    ]
    assert ids(filters.drop_shared_prefix(records, 4)) == ["a", "c", "d"]
    assert ids(filters.drop_shared_prefix(records, 5)) == ["a", "b", "c", "d"]
    assert ids(filters.drop_shared_prefix(records, 3)) == ["a"]


def test_cap_per_user_does_not_limit_unknown_users():
    records = [
        prompt(str(i), f"prompt {i}", user)
        for i, user in enumerate(["u", None, "u", "v", "u", None, None, "v"])
    ]
    assert ids(filters.cap_per_user(records, 2)) == ["0", "1", "2", "3", "5", "6", "7"]
    assert ids(filters.cap_per_user(records, 1)) == ["0", "1", "3", "5", "6"]


def test_drop_long_keeps_one_to_limit_tokens():
    assert filters.drop_long(["", "a", "ab", "abc"], 2, len) == ["a", "ab"]


def test_comparisons_that_are_unranked_tied_or_too_large_are_dropped():
    records = [
        comparison("none", "ab", None),
        comparison("tied", "abc", (2, 2, 2)),
        comparison("some", "abc", (1, 1, 3)),
    ]
    assert ids(filters.drop_unranked(records)) == ["tied", "some"]
    assert ids(filters.drop_tied(records)) == ["some"]
    assert ids(filters.drop_many_completions(records, 2)) == ["none"]


def test_long_completions_are_removed_from_their_comparison():
    records = [
        comparison("a", ["1", "22", "333", "4"], (3, 1, 2, 5)),
        comparison("b", ["1", "333", ""], (1, 2, 3)),
    ]
    (kept,) = filters.drop_long_completions(records, 2, len)
    assert (kept.id, kept.completions, kept.ranks, kept.pairs) == (
        "a",
        ("1", "22", "4"),
        (3, 1, 5),
        (),
    )
    with pytest.raises(
        ValueError, match="comparison x has no ranks: apply drop_unranked first"
    ):
        filters.drop_long_completions([comparison("x", "ab", None)], 2, len)


def test_dense_ranks_start_at_zero_and_ties_share():
    assert filters.dense_ranks([4, 2, 2, 9]) == [1, 0, 0, 2]
    assert filters.dense_ranks([1, 2, 3]) == [0, 1, 2]
    assert filters.dense_ranks([7, 7]) == [0, 0]


PERSONAL = [
    "write to jane.doe+x@mail.example.org!",
    "the server is 192.168.10.254, port 80",
    "SSN 078-05-1120.",
    "call (415) 555-2671 now",
    "call 415-555-2671",
    "call +1 415.555.2671",
    "ring +44 20 7946 0958",
    "card 4111 1111 1111 1111, thanks",
    "card 4111111111111111",
    "amex 378282246310005",
]
HARMLESS = [
    "3 + 4 = 7, and 1,234,567.89 dollars",
    "@home at 10:30 on 2022-03-04",
    "version 1.2.3.4.5 of 300.1.1.1",
    "ISO 4111 1111 1111 1112 has a wrong checksum",
    "call 555-2671",
    "between 1914-1918 and 1939-1945",
    "pi is 3.14159265358979323846",
    "order 12345-67-89012",
]


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data_is_found(text):
    assert filters.has_pii(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_numbers_are_not_personal_data(text):
    assert not filters.has_pii(text)


def test_every_text_of_a_record_is_searched_for_personal_data():
    mail = "a@b.org"
    demonstration = Demonstration(
        id="d", prompt="p", format="plain", completion=mail, source=None, labeler=None
    )
    text = Text(id="t", text="t", source=None)
    records = [
        demonstration,
        prompt("p", mail),
        text,
        comparison("c", ["a", mail], (1, 2)),
        comparison("k", "ab", (1, 2)),
    ]
    assert ids(filters.drop_pii(records)) == ["t", "k"]


FRACTIONS = (("train", 0.7), ("valid", 0.2), ("test", 0.1))


def test_the_split_is_decided_by_the_hash_as_a_number():
    for i in range(200):
        key = f"user {i}"
        u = int(hashlib.sha256(f"5 {key}".encode()).hexdigest(), 16) / 2**256
        expected = "train" if u < 0.7 else "valid" if u < 0.9 else "test"
        assert filters.split_of(key, FRACTIONS, 5) == expected


def test_splits_have_their_fractions_and_depend_on_the_seed():
    counts = collections.Counter(
        filters.split_of(str(i), FRACTIONS, 0) for i in range(10_000)
    )
    for name, fraction in FRACTIONS:
        assert abs(counts[name] / 10_000 - fraction) < 0.02  # 4 standard deviations
    moved = sum(
        filters.split_of(str(i), FRACTIONS, 0) != filters.split_of(str(i), FRACTIONS, 1)
        for i in range(1000)
    )
    assert 350 < moved < 570  # 1 - (0.49 + 0.04 + 0.01) = 0.46 are expected by chance
    assert filters.split_of("x", (("train", 0.0), ("rest", 0.0)), 0) == "rest"


def test_no_user_and_no_prompt_straddles_the_splits():
    by_user = [prompt(str(i), f"prompt {i}", f"user {i % 40}") for i in range(400)]
    places = collections.defaultdict(set)
    for record in by_user:
        places[record.user].add(filters.split_of(filters.split_key(record), FRACTIONS, 0))
    assert all(len(found) == 1 for found in places.values())
    assert set().union(*places.values()) == {"train", "valid", "test"}
    same = [
        prompt("p", "same"),
        Demonstration(
            id="d", prompt="same", format="plain", completion="c", source=None, labeler="w"
        ),
        Comparison(
            id="c",
            prompt="same",
            completions=("a", "b"),
            ranks=(1, 2),
            pairs=(),
            labeler="v",
            source=None,
        ),
        Text(id="t", text="same", source=None),
    ]
    assert {filters.split_key(record) for record in same} == {"text same"}
    assert filters.split_key(prompt("p", "user 3")) != filters.split_key(
        prompt("p", "x", "user 3")
    )
