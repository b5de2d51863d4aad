"""Few-shot prefixes: random sets of examples as text, prompts that start with them, and
responses that end at a line break."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from instructax.config import require
from instructax.data.prompt_format import add_separator
from instructax.data.schema import Demonstration
from instructax.data.tokenizer import Tokenizer
from instructax.types import Array, Prompts, Rollouts

# Random sets of examples to try per wanted prefix, because long ones do not fit.
ATTEMPTS_PER_PREFIX = 100


def plain_examples(examples: Sequence[Demonstration], shots: int) -> list[Demonstration]:
    """The demonstrations in plain format. Raises ConfigError if there are fewer than
    `shots`."""
    # Chat examples cannot be written as plain text before a prompt.
    plain = [example for example in examples if example.format == "plain"]
    require(
        len(plain) >= shots,
        f"config.shots = {shots} is more than the {len(plain)} plain demonstrations: "
        "lower it, or give more",
    )
    return plain


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
      examples: demonstrations to choose from.
      tokenizer: the tokenizer.
      shots: examples in a prefix.
      count: prefixes to yield; fewer if too few of the tried ones fit.
      max_tokens: most tokens of a prefix.
      seed: random seed.
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
      prefix: token ids, i32[n] with n <= `room`.
      prompts: left-padded prompts, [B, P].
      room: columns to add.

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


def truncate_at_stops(
    rollouts: Rollouts, stop_token_mask: Array, eos_id: int
) -> tuple[Rollouts, Array]:
    """Truncates responses at their first stop token.

    Args:
      rollouts: responses [B, R].
      stop_token_mask: stop tokens, b[V].
      eos_id: the end token, which replaces the stop token.

    Returns:
      The truncated rollouts, and the mask b[B, R] of the tokens before the stop token.
    """
    # b[B, R]; sampled tokens only, since padding has an arbitrary id.
    is_stop = stop_token_mask[rollouts.responses] & rollouts.mask
    # From the first stop token on.
    stopped = jnp.cumsum(is_stop, axis=1) > 0
    # The first stop token becomes the end token; what follows is masked out.
    first = stopped & ~jnp.pad(stopped, ((0, 0), (1, 0)))[:, :-1]
    kept = rollouts.mask & ~stopped
    truncated = Rollouts(
        prompts=rollouts.prompts,
        responses=jnp.where(stopped, eos_id, rollouts.responses),
        mask=kept | first,
        logprobs=jnp.where(kept, rollouts.logprobs, 0.0),
        ended=rollouts.ended | jnp.any(stopped, axis=1),
    )
    return truncated, kept
