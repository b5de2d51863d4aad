"""Few-shot prefixes: random sets of examples as text, and prompts that start with them."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from instructax.data.prompt_format import add_separator
from instructax.data.schema import Demonstration
from instructax.data.tokenizer import Tokenizer
from instructax.types import Prompts

# Random sets of examples to try per wanted prefix, because long ones do not fit.
ATTEMPTS_PER_PREFIX = 100


def random_prefixes(
    examples: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    shots: int,
    count: int,
    max_tokens: int,
    seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (text, tokens i32[n]) of random few-shot prefixes.

    Args:
        examples: Demonstrations to choose from.
        tokenizer: The tokenizer.
        shots: Examples in a prefix.
        count: Prefixes to yield; fewer if too few of the tried ones fit.
        max_tokens: Most tokens of a prefix.
        seed: Random seed.
    """
    # All prefixes come from one generator, also those that do not fit.
    generator = np.random.default_rng(seed)
    num_found = 0
    for _ in range(ATTEMPTS_PER_PREFIX * count):
        # Different examples in random order.
        # The format of the paper's few-shot prompts: prompt, completion, blank line.
        text = ""
        for index in generator.permutation(len(examples))[:shots]:
            example = examples[index]
            text += f"{add_separator(example.prompt)}{example.completion}\n\n"
        tokens = tokenizer.encode(text)
        # Too long ones are skipped rather than cut: half an example is a bad example.
        if len(tokens) <= max_tokens:
            num_found += 1
            yield text, tokens
        if num_found == count:
            return


def prepend_prefix(prefix: np.ndarray, prompts: Prompts, room: int) -> Prompts:
    """Puts `prefix` right before each prompt; empty prompts stay empty.

    Args:
        prefix: Token ids, i32[n] with n <= `room`.
        prompts: Left-padded prompts, [B, P].
        room: Columns to add.

    Returns:
        Left-padded prompts, [B, room + P].
    """
    # New columns go before the left padding.
    added = ((0, 0), (room, 0))
    tokens = np.pad(np.asarray(prompts.tokens), added)
    mask = np.pad(np.asarray(prompts.mask), added)
    for row in np.flatnonzero(mask.any(axis=1)):
        # The prompt's first real column.
        stop = room + int(np.argmax(mask[row, room:]))
        start = stop - len(prefix)
        tokens[row, start:stop] = prefix
        mask[row, start:stop] = True
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))
