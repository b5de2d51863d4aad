"""Random keys: every random number is a function of (seed, purpose, step, sample).

A resumed run therefore needs no saved key.
"""

import jax

from instructax.types import Array

# The position of a purpose is part of every run's randomness: append, never reorder.
PURPOSES = ("init", "dropout", "rollout", "minibatches", "evaluate", "collect", "adapters")


def step_key(seed: Array | int, purpose: str, step: Array | int) -> Array:
    """The key of one step for one of `PURPOSES`: key[]. Works on arrays inside jit."""
    purpose_key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    return jax.random.fold_in(purpose_key, step)


def sample_keys(key: Array, samples: Array) -> Array:
    """One key per sample number: key[], i32[B] → key[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, samples)
