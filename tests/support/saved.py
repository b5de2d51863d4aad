"""Train states, checkpoints and ways to damage them, for tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.restore import load_params
from instructax.checkpoints.steps import committed_steps
from instructax.types import PpoState, TrainState


def load_newest_params(workdir, abstract):
    """The parameters of the newest step of a run."""
    return load_params(workdir, abstract, step=committed_steps(workdir)[-1])


def make_train_state(seed=0.0, width=8):
    params = {
        "layers": {"kernel": jnp.arange(2.0 * 8 * width).reshape(2, 8, width) / 7 + seed},
        "bias": jnp.full(width, float(seed)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(
        jax.tree.map(lambda x: jnp.cos(x + seed), params), opt_state, params
    )
    return TrainState(step=jnp.int32(seed), params=params, opt_state=opt_state)


def make_ppo_state(seed=0.0):
    policy = make_train_state(seed)
    value = make_train_state(seed + 100)
    return PpoState(
        policy=policy, value=value, ema=jax.tree.map(lambda x: x / 3, policy.params)
    )


def on_devices(tree, count):
    """`tree` as abstract arrays whose last axis, if of size 8, is sharded over `count`
    devices."""
    mesh = jax.make_mesh(
        (count,), ("rows",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,)
    )

    def layout(leaf):
        axes = [None] * leaf.ndim
        if leaf.shape[-1:] == (8,):
            axes[-1] = "rows"
        spec = PartitionSpec(*axes)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(layout, tree)


def put(tree, abstract):
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, abstract)


def open_checkpoints(workdir, **changes):
    settings = {
        "save_every": 1,
        "keep": 100,
        "best_metric": "",
        "best_mode": "max",
        "exported": "params",
    }
    return Checkpoints(workdir, **{**settings, **changes})


def save_steps(workdir, steps, **changes):
    checkpoints = open_checkpoints(workdir, **changes)
    for step in steps:
        checkpoints.save(step, make_train_state(step), {})
    checkpoints.close()


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def flip_bit(step_folder):
    """Flips one bit in the middle of the largest data file."""
    path = max(
        (p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    return path
