"""Initial parameters of a network, and their shapes and shardings."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructax import sharding
from instructax.models.transformer import Transformer
from instructax.types import Array, Params


def init_params(model: Transformer, key: Array) -> Params:
    """Randomly initialized float32 parameters."""
    # Parameter shapes do not depend on the input, so one token is enough: [1, 1].
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, tokens, tokens)["params"]


def abstract_params(model: Transformer, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the parameters; allocates nothing."""
    # Any key gives the same shapes.
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return sharding.abstract_arrays(shapes, mesh)
