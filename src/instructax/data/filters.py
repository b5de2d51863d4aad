"""What is kept of the collected records, and in which split (paper, section 3.2 and
appendix A.2).

Every filter is a function from a list to the list of what stays, in the same order; what it
dropped is the difference of the lengths. Departures from the paper, which gives no code:
personal data is found by the patterns below, a heuristic that misses names and addresses
and takes some harmless numbers; users stand for the organizations of appendix A.2.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from instructax.data.schema import Comparison, DataRecord, Demonstration, Prompt, Text

RecordT = TypeVar("RecordT", bound=DataRecord)
PromptedRecord = TypeVar("PromptedRecord", Demonstration, Comparison, Prompt)
ItemT = TypeVar("ItemT")

SplitFractions = tuple[
    tuple[str, float], ...
]  # (name of the split, its share of the keys), the shares sum to 1


def drop_shared_prefix(
    records: Sequence[PromptedRecord], length: int
) -> list[PromptedRecord]:
    """Keeps the first of all records whose prompts agree in their first `length`
    characters.

    A prompt of fewer characters is dropped only if an earlier one is equal to it (paper,
    section 3.2: "heuristically deduplicate prompts by checking for prompts that share a
    long common prefix").
    """
    seen: set[str] = set()
    kept = []
    for record in records:
        prefix = record.prompt[:length]
        if prefix not in seen:
            seen.add(prefix)
            kept.append(record)
    return kept


def cap_per_user(records: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Keeps the first `limit` prompts of each user, and all whose user is unknown (paper,
    section 3.2: 200)."""
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for record in records:
        if record.user is not None:
            seen[record.user] += 1
        if record.user is None or seen[record.user] <= limit:
            kept.append(record)
    return kept


def drop_long(
    items: Sequence[ItemT], limit: int, count_tokens: Callable[[ItemT], int]
) -> list[ItemT]:
    """Keeps the items of 1 to `limit` tokens (paper, appendix C: prompts and responses of
    up to 1k tokens)."""
    return [item for item in items if 1 <= count_tokens(item) <= limit]


def drop_containing(records: Sequence[RecordT], texts: Sequence[str]) -> list[RecordT]:
    """Keeps the records that hold none of `texts`."""
    return [
        record
        for record in records
        if not any(text in own for own in record_texts(record) for text in texts)
    ]


def drop_unranked(records: Sequence[Comparison]) -> list[Comparison]:
    """Keeps the comparisons that have ranks; the pairs of the others go in a circle, which
    ranks cannot express."""
    return [record for record in records if record.ranks is not None]


def drop_tied(records: Sequence[Comparison]) -> list[Comparison]:
    """Keeps the comparisons with at least two different ranks: the loss drops ties (paper,
    appendix C.2)."""
    return [record for record in records if len(set(record.ranks or ())) > 1]


def drop_long_completions(
    records: Sequence[Comparison], limit: int, count_tokens: Callable[[str], int]
) -> list[Comparison]:
    """Takes completions of no or more than `limit` tokens out of their comparisons; keeps
    those with two or more.

    The order of the completions that stay is as the labeler gave it. `pairs` of what is
    returned is empty.
    """
    kept = []
    for record in records:
        if record.ranks is None:
            raise ValueError(
                f"comparison {record.id} has no ranks: apply drop_unranked first"
            )
        judged = zip(record.completions, record.ranks, strict=True)
        stays = [
            (completion, rank)
            for completion, rank in judged
            if 1 <= count_tokens(completion) <= limit
        ]
        if len(stays) >= 2:
            completions, ranks = zip(*stays, strict=True)
            kept.append(
                dataclasses.replace(record, completions=completions, ranks=ranks, pairs=())
            )
    return kept


def drop_many_completions(records: Sequence[Comparison], limit: int) -> list[Comparison]:
    """Keeps the comparisons of up to `limit` completions (paper, section 3.5: 9)."""
    return [record for record in records if len(record.completions) <= limit]


def dense_ranks(ranks: Sequence[int]) -> list[int]:
    """Numbers ranks anew from 0 for the best, without gaps, ties together: [4, 2, 2, 9]
    gives [1, 0, 0, 2]."""
    order = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return [order[rank] for rank in ranks]


_PII = (
    re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),  # e-mail address
    re.compile(
        r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])"
    ),  # IPv4 address
    re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"),  # US social security number
    re.compile(
        r"(?<![\w.-])(?:\+?1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
    ),  # US phone number
    re.compile(
        r"(?<!\w)\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,5}(?!\w)"
    ),  # phone number with its country code
)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")


def has_pii(text: str) -> bool:
    """Whether `text` seems to hold an e-mail or IPv4 address, or a phone, social security
    or payment card number.

    A card number is 13 to 19 digits whose Luhn checksum is right, as one in ten of such
    numbers is by chance.
    """
    return any(pattern.search(text) for pattern in _PII) or any(
        _luhn(card) for card in _CARD.findall(text)
    )


def _luhn(card: str) -> bool:
    digits = [int(digit) for digit in card if digit.isdigit()][::-1]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def record_texts(record: DataRecord) -> tuple[str, ...]:
    """Returns all texts of a record that people wrote or judged."""
    match record:
        case Demonstration():
            return (record.prompt, record.completion)
        case Comparison():
            return (record.prompt, *record.completions)
        case Prompt():
            return (record.prompt,)
        case Text():
            return (record.text,)


def drop_pii(records: Sequence[RecordT]) -> list[RecordT]:
    """Keeps the records without sign of personal data; the paper applies it to the training
    split alone."""
    return [
        record
        for record in records
        if not any(has_pii(text) for text in record_texts(record))
    ]


def split_key(record: DataRecord) -> str:
    """Returns what decides the split: the user who sent a prompt if known, else the prompt
    or the text itself.

    So no user is in two splits, and one prompt without a user is in the same split among
    demonstrations, comparisons and prompts.
    """
    if isinstance(record, Prompt) and record.user is not None:
        return f"user {record.user}"
    return f"text {record_texts(record)[0]}"


def split_of(key: str, fractions: SplitFractions, seed: int) -> str:
    """Returns the split of `key`, a function of the arguments alone: new records move no
    old one.

    u = SHA-256(seed, key) as a number in [0, 1); the split is the first whose cumulated
    fraction exceeds u.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    u = int.from_bytes(digest[:6]) / 2**48  # 48 bits: exact in float64
    total = 0.0
    for name, fraction in fractions:
        total += fraction
        if u < total:
            return name
    return fractions[-1][0]  # where rounding left the sum below 1
