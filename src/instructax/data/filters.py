"""Filters and splits of the collected records (paper, section 3.2 and appendix A.2).

Every filter maps a list of records to the list of those that stay, in the same order; the
number of dropped records is the difference of the lengths. The paper publishes no code, so
this module departs from it twice: personal data is detected by the patterns below, a
heuristic that misses names and addresses and matches some harmless numbers; and users stand
in for the organizations of appendix A.2.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from instructax.data.schema import Comparison, DataRecord, Demonstration, Prompt, Text

_RecordT = TypeVar("_RecordT", bound=DataRecord)
PromptedRecord = TypeVar("PromptedRecord", Demonstration, Comparison, Prompt)
ItemT = TypeVar("ItemT")

# (name, fraction) of each split; the fractions sum to 1.
SplitFractions = tuple[tuple[str, float], ...]


def drop_shared_prefix(
    records: Sequence[PromptedRecord], length: int
) -> list[PromptedRecord]:
    """Keeps the first of all records whose prompts share their first `length` characters.

    A shorter prompt is dropped only if an earlier one equals it (paper, section 3.2:
    "heuristically deduplicate prompts by checking for prompts that share a long common
    prefix").
    """
    # Prefixes of the records kept so far.
    seen: set[str] = set()
    kept = []
    for record in records:
        prefix = record.prompt[:length]
        if prefix not in seen:
            seen.add(prefix)
            kept.append(record)
    return kept


def cap_per_user(records: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Keeps the first `limit` prompts of each user, and all prompts of unknown users
    (paper, section 3.2: 200)."""
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for record in records:
        # Unknown users may be many people, so they have no limit.
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


def drop_containing(records: Sequence[_RecordT], texts: Sequence[str]) -> list[_RecordT]:
    """Keeps the records that contain none of `texts`."""

    def contains(record: _RecordT, text: str) -> bool:
        return any(text in own for own in record_texts(record))

    kept = []
    for record in records:
        if not any(contains(record, text) for text in texts):
            kept.append(record)
    return kept


def drop_unranked(records: Sequence[Comparison]) -> list[Comparison]:
    """Keeps the comparisons that have ranks. The pairs of the others are cyclic, which
    ranks cannot express."""
    return [record for record in records if record.ranks is not None]


def drop_tied(records: Sequence[Comparison]) -> list[Comparison]:
    """Keeps the comparisons with at least two different ranks, because the loss drops ties
    (paper, appendix C.2)."""
    return [record for record in records if len(set(record.ranks or ())) > 1]


def drop_long_completions(
    records: Sequence[Comparison], limit: int, count_tokens: Callable[[str], int]
) -> list[Comparison]:
    """Removes empty completions and those of more than `limit` tokens from comparisons.

    Comparisons with fewer than two completions left are dropped. The others keep the order
    of their completions; their `pairs` become empty.
    """
    kept = []
    for record in records:
        if record.ranks is None:
            raise ValueError(
                f"comparison {record.id} has no ranks: apply drop_unranked first"
            )
        completions = []
        ranks = []
        for completion, rank in zip(record.completions, record.ranks, strict=True):
            if 1 <= count_tokens(completion) <= limit:
                completions.append(completion)
                ranks.append(rank)
        if len(completions) >= 2:
            shortened = dataclasses.replace(
                record, completions=tuple(completions), ranks=tuple(ranks), pairs=()
            )
            kept.append(shortened)
    return kept


def drop_many_completions(records: Sequence[Comparison], limit: int) -> list[Comparison]:
    """Keeps the comparisons of up to `limit` completions (paper, section 3.5: 9)."""
    return [record for record in records if len(record.completions) <= limit]


def dense_ranks(ranks: Sequence[int]) -> list[int]:
    """Renumbers ranks from 0 for the best, without gaps; ties share a rank: [4, 2, 2, 9]
    gives [1, 0, 0, 2]."""
    # Rank → its place among the different ranks.
    dense_rank = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return [dense_rank[rank] for rank in ranks]


_PII = (
    # E-mail address.
    re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    # IPv4 address.
    re.compile(
        r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}"
        r"(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])"
    ),
    # US social security number.
    re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"),
    # US phone number.
    re.compile(
        r"(?<![\w.-])(?:\+?1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
    ),
    # Phone number with a country code.
    re.compile(r"(?<!\w)\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,5}(?!\w)"),
)
# 13 to 19 digits, perhaps with blanks or hyphens between them.
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")


def has_pii(text: str) -> bool:
    """Whether `text` seems to contain an e-mail or IPv4 address, or a phone, social
    security or payment card number.

    A card number has 13 to 19 digits and a valid Luhn checksum; one in ten random numbers
    passes it too.
    """
    if any(pattern.search(text) for pattern in _PII):
        return True
    return any(map(_has_luhn_checksum, _CARD.findall(text)))


def _has_luhn_checksum(card: str) -> bool:
    """Every second digit, from the right, is doubled and its digits added."""
    # The checksum counts from the right.
    digits = [int(digit) for digit in card if digit.isdigit()]
    digits.reverse()
    total = sum(digits[::2])
    for digit in digits[1::2]:
        total += sum(divmod(2 * digit, 10))
    return total % 10 == 0


def record_texts(record: DataRecord) -> tuple[str, ...]:
    """All texts of a record that people wrote or judged."""
    match record:
        case Demonstration():
            return (record.prompt, record.completion)
        case Comparison():
            return (record.prompt, *record.completions)
        case Prompt():
            return (record.prompt,)
        case Text():
            return (record.text,)


def drop_pii(records: Sequence[_RecordT]) -> list[_RecordT]:
    """Keeps the records without signs of personal data. The paper filters only the training
    split."""
    return [record for record in records if not any(map(has_pii, record_texts(record)))]


def split_key(record: DataRecord) -> str:
    """The key that decides a record's split: the user of a prompt if known, else the prompt
    or the text itself.

    No user is therefore in two splits, and a prompt without a user is in the same split
    among demonstrations, comparisons and prompts.
    """
    # The prefixes keep a user's name apart from an equal text.
    if isinstance(record, Prompt) and record.user is not None:
        return f"user {record.user}"
    return f"text {record_texts(record)[0]}"


def split_of(key: str, fractions: SplitFractions, seed: int) -> str:
    """The split of `key`. It depends on the arguments alone, so adding records moves no
    other record.

    SHA-256 of seed and key, read as a number u in [0, 1), picks the first split whose
    cumulative fraction exceeds u.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    # 48 bits are exact in float64.
    u = int.from_bytes(digest[:6]) / 2**48
    # Cumulative fractions, in the order of the splits.
    total = 0.0
    for name, fraction in fractions:
        total += fraction
        if u < total:
            return name
    # Rounding can leave the sum of the fractions slightly below 1.
    return fractions[-1][0]
