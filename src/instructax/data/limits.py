"""The values that decide what of the data is kept, and how it is split."""

import dataclasses
import math

from instructax.config import ConfigError, Seed


@dataclasses.dataclass(frozen=True)
class DataLimits:
    """What is kept, and how it is split. Lengths are in tokens.

    Raises ValueError at construction if a value is out of range.
    """

    sequence_tokens: int  # T of packed rows (text, demonstrations; paper, appendix C: 2k)
    prompt_tokens: int  # P, the longest prompt (all but text; 1k)
    response_tokens: (
        int  # R, the longest response, end token included (demonstrations, comparisons; 1k)
    )
    completions: int  # K, the most completions of a comparison (9)
    prefix_characters: (
        int | None
    )  # prompts that agree so far are one (prompts, demonstrations); None: keep all
    prompts_per_user: int | None  # prompts of one user (prompts; 200); None: keep all
    filter_pii: bool  # drop what looks like personal data from the split called "train"
    splits: tuple[
        tuple[str, float], ...
    ]  # names and shares of the splits; the shares sum to 1
    split_seed: Seed  # another seed, other splits

    @property
    def comparison_tokens(self) -> int:
        """The longest prompt with as many responses as there can be, the longest ones."""
        return self.prompt_tokens + self.completions * self.response_tokens

    def __post_init__(self):
        for name, least in (
            ("sequence_tokens", 2),
            ("prompt_tokens", 1),
            ("response_tokens", 2),
            ("completions", 2),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"Limits.{name} is {getattr(self, name)}: it must be at least {least}"
                )
        for name in ("prefix_characters", "prompts_per_user"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(
                    f"Limits.{name} is {getattr(self, name)}: it must be at least 1, or None to keep all"
                )
        names = [name for name, _ in self.splits]
        shares = [share for _, share in self.splits]
        if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise ConfigError(
                f"Limits.splits has the names {names}: they must differ and be of letters, digits and _"
            )
        if not all(share > 0 for share in shares) or not math.isclose(
            sum(shares), 1, abs_tol=1e-9
        ):
            raise ConfigError(
                f"Limits.splits has the shares {shares}: they must be above 0 and sum to 1"
            )
        if self.filter_pii and "train" not in names:
            raise ConfigError(
                f'Limits.filter_pii needs a split called "train", and Limits.splits has {names}'
            )
