"""Train states: how they are created, sharded and updated under jit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instructax import rng, sharding
from instructax.models.init import init_params
from instructax.models.lora import add_lora, trainable
from instructax.models.transformer import Transformer
from instructax.types import Array, Params, TrainState

# Adds LoRA adapters to parameters, or returns the parameters unchanged.
AddAdapters = Callable[[Params], Params]


def no_adapters(params: Params) -> Params:
    """The identity: all parameters are trained."""
    return params


def adapter_initializer(config: Any, network: int = 0) -> AddAdapters:
    """Returns the function that adds the adapters which a stage's config asks for.

    Args:
      config: a stage's config; `config.lora` and `config.seed` are read.
      network: index of the network within the stage; each gets its own random adapters.
    """

    def add_adapters(params: Params) -> Params:
        # Policy and value model of PPO share a seed, but not their adapters.
        key = rng.step_key(config.seed, "adapters", network)
        return add_lora(params, config.lora, key)

    return add_adapters


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0; the optimizer state covers only the trainable parameters."""
    # Frozen parameters have no moments, which saves most of the optimizer's memory with
    # LoRA.
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(trainable(params)),
    )


def abstract_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    add_adapters: AddAdapters,
) -> TrainState:
    """Shapes, dtypes and shardings of a train state; allocates nothing."""

    # Traced for shapes only, so any key will do.
    create = jax.jit(_random_state, static_argnums=(0, 1, 2))
    shapes = create.eval_shape(model, optimizer, add_adapters, jax.random.key(0))
    # The optimizer's moments are sharded like the parameters that they belong to.
    return sharding.abstract_arrays(shapes, mesh)


def layouts(tree: Any) -> Any:
    """The shardings of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    key: Array,
    mesh: Mesh,
    add_adapters: AddAdapters = no_adapters,
) -> TrainState:
    """A randomly initialized state; each device allocates only its own shards."""
    # Under jit with these shardings no device ever holds a whole large parameter.
    shardings = layouts(abstract_state(model, optimizer, mesh, add_adapters))
    create = jax.jit(_random_state, static_argnums=(0, 1, 2), out_shardings=shardings)
    return create(model, optimizer, add_adapters, key)


def _random_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    add_adapters: AddAdapters,
    key: Array,
) -> TrainState:
    return new_state(add_adapters(init_params(model, key)), optimizer)


def start_from(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    add_adapters: AddAdapters,
) -> TrainState:
    """A state at step 0 with loaded parameters and a fresh optimizer state.

    Copies `params`, so that they outlive a donation of the state.
    """

    def create(params: Params) -> TrainState:
        return new_state(add_adapters(params), optimizer)

    # No donation: PPO's reference policy keeps using `params`.
    shapes = jax.eval_shape(create, params)
    return jax.jit(create, out_shardings=sharding.shardings(shapes, mesh))(params)


def compile_update(
    update: Callable[..., Any], program: Any, abstract: Any, mesh: Mesh
) -> Callable[[Any, Any, Any], Any]:
    """`update(program, state, batch, settings) -> (state, metrics)` under jit.

    The state keeps its shardings and is donated, the batch is sharded by rows, and settings
    and metrics are replicated.

    Args:
      update: the function to compile.
      program: what is compiled in, hashable. Equal programs are compiled once per process.
      abstract: shapes and shardings of the state.
      mesh: the mesh that holds the state.

    Returns:
      `step(state, batch, settings) -> (state, metrics)`
    """
    state = layouts(abstract)
    replicated = sharding.replicated(mesh)
    compiled = jax.jit(
        update,
        static_argnums=0,
        in_shardings=(state, sharding.row_sharding(mesh), replicated),
        out_shardings=(state, replicated),
        # XLA writes the new state over the old one: one state in memory, not two.
        donate_argnums=1,
    )
    return partial(compiled, program)
