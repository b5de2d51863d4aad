"""One clock: every random number is a function of (seed, purpose, step, sample), so
resuming needs no saved key."""

import jax

from instructax.types import Array

# The order is part of every run's randomness: append, never reorder.
PURPOSES = ("init", "dropout", "rollout", "minibatches", "evaluate", "collect", "adapters")


def step_key(seed: Array | int, purpose: str, step: Array | int) -> Array:
    """The key of one step for one purpose: key[]. Works inside jit, on arrays."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose)), step
    )


def sample_keys(key: Array, samples: Array) -> Array:
    """One key for each sample number: key[], i32[B] → key[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, samples)
