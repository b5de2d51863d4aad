"""The training loop, with a toy whose state is a number; and the parts of a step, with
small networks."""

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import tiny_models

from instructax import sharding
from instructax.masking import masked_mean
from instructax.models.transformer import Transformer
from instructax.runtime.nonfinite import Diverged, NonFiniteGuard
from instructax.runtime.preemption import check_stop_requested
from instructax.sharding import MeshConfig, make_mesh
from instructax.training import loop
from instructax.training.accumulation import (
    accumulate,
    microbatch_weights,
    split_microbatches,
)
from instructax.training.optimizer import apply_gradients, make_optimizer
from instructax.training.state import (
    abstract_state,
    init_state,
    layouts,
    no_adapters,
    start_from,
)


@dataclasses.dataclass
class Toy:
    """A run whose state lists its batches. Every call that `fit` makes is recorded in
    `calls`."""

    save_every: int = 100
    # The call during which SIGINT arrives: (call, step).
    signal_in: tuple[str, int] = ("", 0)
    calls: list[Any] = dataclasses.field(default_factory=list)
    first_metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unevaluated: dict[str, Any] | None = None
    pauses_in: str = ""  # the call that checks for a requested stop

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[:2] == self.signal_in:
            os.kill(os.getpid(), signal.SIGINT)
        if call[0] == self.pauses_in:
            check_stop_requested()

    def batches(self, step: int) -> str:
        self.note("read", step)
        return f"batch {step}"

    def update(self, state: Any, batch: str) -> tuple[Any, dict[str, Any]]:
        self.note("update", int(state.step), batch)
        return State(state.step + 1, (*state.seen, batch)), {"loss": 10 - int(state.step)}

    def evaluate(self, state: Any) -> dict[str, Any]:
        self.note("evaluate", int(state.step), state.seen[-1])
        return {"held_out": int(state.step)}

    def finish(self, state: Any) -> Any:
        self.note("finish", int(state.step))
        return State(state.step, (*state.seen, "finished"))

    @contextlib.contextmanager
    def phase(self, name: str):
        self.note("phase", name)
        yield

    def first_step_done(self, metrics: dict[str, Any]) -> None:
        self.first_metrics.append(dict(metrics))

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        self.flushed = False
        self.note("record", step, dict(metrics))

    def flush(self) -> None:
        self.flushed = True

    def save(
        self, step: int, state: Any, metrics: dict[str, Any], *, evaluated: bool = True
    ) -> None:
        assert self.flushed or self.due(step), (
            "the log must be on disk first; at a due step it flushes itself"
        )
        self.note(
            "save", step, state.seen, dict(metrics), *([] if evaluated else ["unevaluated"])
        )

    def mark_evaluated(self, metrics: dict[str, Any]) -> None:
        self.note("complete", dict(metrics))

    def due(self, step: int) -> bool:
        return step % self.save_every == 0

    def maybe_save(self, step: int, state: Any, metrics: dict[str, Any]) -> None:
        self.note("maybe_save", step)
        if self.due(step):
            self.save(step, state, metrics)

    def fit(
        self,
        state: Any,
        *,
        total_steps: int,
        evaluate_every: int = 0,
        prepare_save: Any = lambda state: state,
        nonfinite_guard: NonFiniteGuard | None = None,
    ) -> tuple[Any, dict]:
        callbacks = loop.LoopCallbacks(
            read_batch=self.batches,
            update=self.update,
            evaluate=self.evaluate,
            prepare_save=prepare_save,
        )
        guard = nonfinite_guard or NonFiniteGuard(0, Path("never"))
        outputs = loop.LoopOutputs(checkpoints=self, log=self, nonfinite_guard=guard)
        return loop.fit(
            state,
            callbacks,
            outputs,
            total_steps=total_steps,
            evaluate_every=evaluate_every,
        )

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]


@dataclasses.dataclass(frozen=True)
class State:
    step: int
    seen: tuple[str, ...] = ()


def test_the_order_of_one_run():
    toy = Toy()
    state, metrics = toy.fit(State(0), total_steps=2, prepare_save=toy.finish)
    assert toy.calls == [
        ("phase", "data"),
        ("read", 0),
        ("phase", "update"),
        ("update", 0, "batch 0"),
        ("record", 1, {"loss": 10}),
        ("phase", "save"),
        ("maybe_save", 1),
        ("phase", "data"),
        ("read", 1),
        ("phase", "update"),
        ("update", 1, "batch 1"),
        ("phase", "evaluate"),
        ("evaluate", 2, "batch 1"),
        ("record", 2, {"loss": 9, "held_out": 2}),
        ("finish", 2),
        ("phase", "save"),
        ("save", 2, ("batch 0", "batch 1", "finished"), {"loss": 9, "held_out": 2}),
    ]
    assert state == State(2, ("batch 0", "batch 1", "finished"))
    assert metrics == {"loss": 9, "held_out": 2}


def test_every_saved_state_went_through_prepare_save():
    toy = Toy(save_every=2, signal_in=("update", 2))
    with pytest.raises(loop.Interrupted):
        toy.fit(State(0), total_steps=7, prepare_save=toy.finish)
    saved = [call[2] for call in toy.named("save")]
    assert [call[1] for call in toy.named("finish")] == [2, 3]
    assert saved == [
        ("batch 0", "batch 1", "finished"),
        ("batch 0", "batch 1", "finished", "batch 2", "finished"),
    ]


@pytest.mark.parametrize(
    ("every", "steps"), [(0, [7]), (2, [2, 4, 6, 7]), (7, [7]), (3, [3, 6, 7]), (100, [7])]
)
def test_evaluates_periodically_and_at_the_end(every, steps):
    toy = Toy()
    toy.fit(State(0), total_steps=7, evaluate_every=every)
    assert [call[1] for call in toy.named("evaluate")] == steps
    assert [call[1] for call in toy.named("record") if "held_out" in call[2]] == steps


def test_resuming_continues_where_the_run_stopped():
    whole = Toy()
    rest = Toy()
    last, _ = whole.fit(State(0), total_steps=5, evaluate_every=2)
    resumed, _ = rest.fit(
        State(3, ("batch 0", "batch 1", "batch 2")), total_steps=5, evaluate_every=2
    )
    assert resumed == last
    assert rest.calls == whole.calls[whole.calls.index(("read", 3)) - 1 :]


def test_a_run_that_lacks_only_its_summary_is_evaluated():
    toy = Toy()
    state, metrics = toy.fit(
        State(4, ("finished",)), total_steps=4, prepare_save=toy.finish
    )
    assert (state, metrics) == (State(4, ("finished",)), {"held_out": 4})
    assert toy.calls == [("phase", "evaluate"), ("evaluate", 4, "finished")]


def test_the_final_evaluation_can_be_interrupted_too():
    toy = Toy(signal_in=("evaluate", 4), pauses_in="evaluate")
    with pytest.raises(loop.Interrupted, match="step 4 is saved"):
        toy.fit(State(4, ("finished",)), total_steps=4)
    assert toy.named("record") == []


HANDLERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = [signal.getsignal(number) for number in HANDLERS]
    yield
    assert [signal.getsignal(number) for number in HANDLERS] == before


@pytest.mark.parametrize("call", ["read", "update"])
def test_an_interruption_saves_the_finished_step(call):
    toy = Toy(signal_in=(call, 2))
    with pytest.raises(loop.Interrupted) as caught:
        toy.fit(State(0), total_steps=9)
    assert (
        str(caught.value)
        == "interrupted; step 3 is saved, the same command goes on from there"
    )
    assert toy.named("save") == [
        ("save", 3, ("batch 0", "batch 1", "batch 2"), {"loss": 8})
    ]
    assert toy.calls[-1] == toy.named("save")[0]


def test_an_interruption_after_a_skipped_save_takes_one_more_step():
    """`maybe_save` saved nothing at step 3, so the message must not claim that it did."""
    toy = Toy(signal_in=("maybe_save", 3))
    with pytest.raises(loop.Interrupted, match="step 4 is saved"):
        toy.fit(State(0), total_steps=9)
    assert [call[1] for call in toy.named("save")] == [4]


def test_an_update_that_checks_for_stops_is_abandoned():
    toy = Toy(signal_in=("update", 2), pauses_in="update")
    with pytest.raises(loop.Interrupted, match="step 2 is saved"):
        toy.fit(State(0), total_steps=9, evaluate_every=1, prepare_save=toy.finish)
    assert toy.named("save") == [
        ("save", 2, ("batch 0", "batch 1", "finished"), {"loss": 9, "held_out": 2})
    ]
    assert [call[1] for call in toy.named("record")] == [1, 2]


def test_an_abandoned_first_update_saves_step_0():
    toy = Toy(signal_in=("read", 0), pauses_in="update")
    with pytest.raises(loop.Interrupted, match="step 0 is saved"):
        toy.fit(State(0), total_steps=9)
    assert toy.named("save", "record") == [("save", 0, (), {})]


@pytest.mark.parametrize("total_steps", [5, 3])
def test_an_interrupted_evaluation_is_repeated_on_resume(total_steps):
    """In the end, steps, metrics and log lines equal those of an uninterrupted run."""
    whole = Toy(save_every=2)
    stopped = Toy(save_every=2, signal_in=("evaluate", 3), pauses_in="evaluate")
    wanted = whole.fit(State(0), total_steps=total_steps, evaluate_every=3)
    with pytest.raises(loop.Interrupted, match="step 3 is saved"):
        stopped.fit(State(0), total_steps=total_steps, evaluate_every=3)
    seen = ("batch 0", "batch 1", "batch 2")
    assert stopped.calls[-1] == ("save", 3, seen, {"loss": 8}, "unevaluated")
    resumed = Toy(save_every=2, unevaluated={"loss": 8})
    assert resumed.fit(State(3, seen), total_steps=total_steps, evaluate_every=3) == wanted
    assert resumed.named("complete") == [("complete", {"loss": 8, "held_out": 3})]
    assert stopped.named("record") + resumed.named("record") == whole.named("record")


def test_an_evaluation_can_be_interrupted_again():
    toy = Toy(unevaluated={"loss": 8}, signal_in=("evaluate", 3), pauses_in="evaluate")
    with pytest.raises(loop.Interrupted, match="step 3 is saved"):
        toy.fit(State(3, ("batch 2",)), total_steps=3)
    assert toy.named("save", "record") == [
        ("save", 3, ("batch 2",), {"loss": 8}, "unevaluated")
    ]


def test_an_interruption_during_the_last_step_has_no_effect():
    toy = Toy(signal_in=("update", 8))
    assert toy.fit(State(0), total_steps=9)[0].step == 9
    assert [call[1] for call in toy.named("save")] == [9]


def test_a_second_signal_ends_the_run_at_once():
    toy = Toy(signal_in=("update", 2))
    toy.record = lambda *_: (
        os.kill(os.getpid(), signal.SIGINT) if toy.calls[-1][:2] == ("update", 2) else None
    )
    with pytest.raises(KeyboardInterrupt):
        toy.fit(State(0), total_steps=9)
    assert toy.named("save") == []


def test_the_first_step_of_a_new_or_resumed_run_is_reported():
    for first in (0, 2):
        toy = Toy()
        toy.fit(State(first), total_steps=4)
        assert toy.first_metrics == [{"loss": 10 - first}]


def test_a_failing_update_restores_the_handlers():
    toy = Toy()
    toy.update = lambda state, batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        toy.fit(State(0), total_steps=1)


# Parts of a step.


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def test_shares():
    np.testing.assert_allclose(
        microbatch_weights(jnp.array([1.0, 0.0, 3.0])), [0.25, 0.0, 0.75]
    )
    np.testing.assert_array_equal(microbatch_weights(jnp.zeros(2)), [0.0, 0.0])


def test_split_rows_keeps_the_order_and_shards_every_microbatch(mesh):
    rows = {"x": np.arange(24).reshape(8, 3), "y": np.arange(8)}
    parts = jax.jit(lambda tree: split_microbatches(tree, 2, mesh))(
        sharding.shard_rows(rows, mesh)
    )
    np.testing.assert_array_equal(parts["x"], np.arange(24).reshape(2, 4, 3))
    np.testing.assert_array_equal(parts["y"], np.arange(8).reshape(2, 4))
    assert {shard.data.shape for shard in parts["x"].addressable_shards} == {(2, 1, 3)}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(mesh, parts):
    """A masked mean over rows of 0 to 5 real tokens. The microbatches have unequal counts,
    and one of four has none."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 5, 3)).astype(np.float32)
    y = rng.normal(size=(8, 5)).astype(np.float32)
    mask = np.arange(5)[None, :] < np.array([5, 1, 0, 0, 2, 1, 4, 3])[:, None]
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}

    def loss_of(params, rows):
        x, y, mask = rows
        return masked_mean((jnp.einsum("btd,d->bt", x, params["w"]) - y) ** 2, mask)

    def gradients_of(rows):
        loss, gradients = jax.value_and_grad(loss_of)(params, rows)
        return gradients, loss

    @jax.jit
    def step(rows):
        split = split_microbatches(rows, parts, mesh)
        weights = microbatch_weights(jnp.sum(split[2], axis=(1, 2), dtype=jnp.float32))
        gradients, losses = accumulate(gradients_of, split, weights)
        return gradients, losses, weights

    gradients, losses, weights = step((x, y, mask))
    loss, whole = jax.value_and_grad(loss_of)(params, (x, y, mask))
    assert losses.shape == (parts,)
    np.testing.assert_allclose(gradients["w"], whole["w"], rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(weights * losses), loss, rtol=1e-5)


def test_a_single_microbatch_is_weighted_too():
    gradients, metrics = accumulate(
        lambda part: ({"w": part}, part), jnp.array([6.0]), jnp.array([0.5])
    )
    assert (float(gradients["w"]), metrics.tolist()) == (3.0, [6.0])


@pytest.fixture(scope="module")
def network():
    return Transformer(
        tiny_models.gpt_config(), tiny_models.compute(), "tokens"
    ), make_optimizer(tiny_models.optimizer_config())


@pytest.fixture(scope="module")
def fresh(network, mesh):
    return init_state(*network, jax.random.key(3), mesh)


def test_a_fresh_state_is_sharded_at_initialization(network, fresh, mesh):
    abstract = abstract_state(*network, mesh, no_adapters)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda x, s: x.sharding == s, fresh, layouts(abstract))
        )
    )
    kernel = fresh.params["blocks"]["mlp"]["up"]["kernel"]  # [2, 16, 28] over fsdp × tensor
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 14)}
    assert fresh.step == 0 and all(
        not jnp.any(leaf) for leaf in jax.tree.leaves(fresh.opt_state)
    )
    assert 0.15 < jnp.std(kernel) < 0.25  # init_std is 0.2: random, not zero


def test_a_fresh_state_does_not_depend_on_the_mesh(network, fresh):
    one = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    alone = init_state(*network, jax.random.key(3), one)
    jax.tree.map(np.testing.assert_array_equal, alone.params, fresh.params)


def test_starting_from_loaded_parameters_leaves_them_alone(network, fresh, mesh):
    """PPO keeps the loaded parameters as its reference, while the state that starts from
    the same values is donated."""
    optimizer = network[1]
    loaded = fresh.params
    kept = jax.tree.map(np.asarray, loaded)
    state = start_from(loaded, optimizer, mesh, no_adapters)
    jax.tree.map(np.testing.assert_array_equal, state.params, kept)
    assert state.step == 0 and all(
        not jnp.any(leaf) for leaf in jax.tree.leaves(state.opt_state)
    )
    assert layouts(state) == layouts(abstract_state(*network, mesh, no_adapters))

    def step(state):
        return apply_gradients(
            optimizer, state, jax.tree.map(jnp.ones_like, state.params), jnp.float32(0.1)
        )

    moved = jax.jit(step, donate_argnums=0)(state)
    assert not np.array_equal(moved.params["embedding"], kept["embedding"])
    jax.tree.map(np.testing.assert_array_equal, loaded, kept)


class Failing(Toy):
    """Skips the updates after the steps in `bad`."""

    bad: tuple[int, ...] = ()

    def update(self, state, batch):
        moved, metrics = super().update(state, batch)
        return moved, {**metrics, "skipped": jnp.float32(state.step in self.bad)}


@pytest.mark.parametrize(
    ("bad", "ends_after"),
    [((1, 2, 4, 5), None), ((2, 3, 4), 5), ((0, 1, 2), 3), ((3, 4, 5), 6)],
)
def test_a_run_ends_after_more_skipped_updates_in_a_row_than_allowed(
    tmp_path, bad, ends_after
):
    """Two are allowed. The guard notices one update later, but at once where a step is
    saved."""
    toy = Failing(save_every=3)
    toy.bad = bad
    skips = NonFiniteGuard(2, tmp_path / "skipped")
    if ends_after is None:
        toy.fit(State(0), total_steps=6, nonfinite_guard=skips)
    else:
        message = (
            f"not finite in 3 updates in a row, up to step {ends_after}; "
            f".*same command repeats it"
        )
        with pytest.raises(Diverged, match=message):
            toy.fit(State(0), total_steps=6, nonfinite_guard=skips)
    # The third skip in a row ends the run; only the batches of the first two are kept.
    kept = [step + 1 for step in bad][: None if ends_after is None else 2]
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == [
        f"{step}-0.npz" for step in kept
    ]
    saved = [call[1] for call in toy.named("save")]
    assert saved == [step for step in (3, 6) if ends_after is None or step < ends_after]


@pytest.mark.parametrize("most", [0, 1])
def test_the_batch_of_a_skipped_update_is_kept(mesh, tmp_path, most):
    batch = sharding.shard_rows(
        {"tokens": np.arange(16).reshape(8, 2), "more": {"mask": np.arange(8) > 3}}, mesh
    )
    skips = NonFiniteGuard(most, tmp_path)
    skips.observe(7, batch, {"skipped": jnp.float32(0.25)})  # one of PPO's four minibatches
    with contextlib.nullcontext() if most else pytest.raises(Diverged):
        skips.check()
    with np.load(tmp_path / "7-0.npz") as kept:
        assert sorted(kept) == ["more.mask", "tokens"]
        np.testing.assert_array_equal(kept["tokens"], batch["tokens"])
        np.testing.assert_array_equal(kept["more.mask"], batch["more"]["mask"])
