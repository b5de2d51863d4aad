"""Length limits, filters and splits of the prepared data."""

import dataclasses
import math

from instructax.config import ConfigError, Seed, check_range

# The least value of each length that leaves something to train on.
_MINIMUMS = {
    "sequence_tokens": 2,
    "prompt_tokens": 1,
    "response_tokens": 2,
    "completions": 2,
}


@dataclasses.dataclass(frozen=True)
class DataLimits:
    """What is kept of the data, and how it is split. Lengths are in tokens.

    Raises ConfigError at construction if a value is out of range.
    """

    # T, the width of packed rows of text and demonstrations (paper, appendix C: 2k).
    sequence_tokens: int
    # P, the longest prompt (1k).
    prompt_tokens: int
    # R, the longest response including its end token (1k).
    response_tokens: int
    # K, the most completions of a comparison (9).
    completions: int
    # Prompts that agree in this many leading characters count as duplicates, among prompts
    # and demonstrations; None keeps all.
    prefix_characters: int | None
    # The most prompts of one user (200); None keeps all.
    prompts_per_user: int | None
    # Whether to drop records with personal data from the split "train".
    filter_pii: bool
    # (name, fraction) of each split; the fractions sum to 1.
    splits: tuple[tuple[str, float], ...]
    # Seeds the assignment of records to splits.
    split_seed: Seed

    @property
    def comparison_tokens(self) -> int:
        """Tokens of the longest possible comparison: its prompt and all its responses."""
        return self.prompt_tokens + self.completions * self.response_tokens

    def __post_init__(self):
        check_range(self, _MINIMUMS)
        for name in ("prefix_characters", "prompts_per_user"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} = {value} must be at least 1, or None to keep all"
                )
        self._check_splits()

    def _check_splits(self) -> None:
        names = [name for name, _ in self.splits]
        fractions = [fraction for _, fraction in self.splits]
        # Names become file names of the prepared rows.
        if len(set(names)) < len(names) or not all(map(str.isidentifier, names)):
            raise ConfigError(
                f"splits = {self.splits}: the names must differ and consist of letters, "
                "digits and _"
            )
        sums_to_one = math.isclose(sum(fractions), 1, abs_tol=1e-9)
        if min(fractions, default=0) <= 0 or not sums_to_one:
            raise ConfigError(
                f"splits = {self.splits}: the fractions must be above 0 and sum to 1"
            )
        if self.filter_pii and "train" not in names:
            raise ConfigError(
                'filter_pii = True needs a split called "train", but splits = '
                f"{self.splits}: add one, or set filter_pii = False"
            )
