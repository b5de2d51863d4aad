"""The production form of an iteration: the three functions of `algorithm`, each compiled
with its shardings, timed, and followed by the invariants that must hold between them."""

from functools import partial
from typing import Any

import jax

from instructax import sharding
from instructax.runtime.preemption import check_stop_requested
from instructax.stages.ppo import algorithm
from instructax.stages.ppo.invariants import check_rollouts, check_update
from instructax.stages.ppo.program import PpoProgram, PpoSettings
from instructax.training.state import (
    AddAdapters,
    abstract_state,
    layouts,
    no_adapters,
)
from instructax.types import Array, Params, PpoState, Rollouts


def abstract_ppo_state(
    program: PpoProgram,
    add_policy_adapters: AddAdapters = no_adapters,
    add_value_adapters: AddAdapters = no_adapters,
) -> PpoState:
    """Shapes, dtypes and shardings of the whole state; allocates nothing."""
    # The average starts as a copy of the policy, adapters included, so it has the same
    # layout.
    policy = abstract_state(
        program.policy, program.policy_optimizer, program.mesh, add_policy_adapters
    )
    value = abstract_state(
        program.value_model, program.value_optimizer, program.mesh, add_value_adapters
    )
    return PpoState(policy=policy, value=value, ema=policy.params)


class CompiledIteration:
    """`algorithm.iteration` in three compiled programs.

    Args:
      program: networks, optimizers and compile-time choices.
      abstract: shapes and shardings of the state.
      settings: hyperparameters.
      ref_params: the policy that the KL penalty is measured against.
      reward_params: the reward model.
      tolerance: nats, of the invariants.
    """

    def __init__(
        self,
        program: PpoProgram,
        abstract: PpoState,
        settings: PpoSettings,
        ref_params: Params,
        reward_params: Params,
        tolerance: float,
    ):
        # Rows of prompts, rollouts and experience are split over devices alike in all three
        # programs, so nothing is moved between them. Settings and metrics are on every
        # device.
        mesh = program.mesh
        state = layouts(abstract)
        policy = layouts(abstract.policy.params)
        # Parents have no adapters, so their trees differ from those of the state.
        reference = sharding.shardings(ref_params, mesh)
        reward = sharding.shardings(reward_params, mesh)
        rows = sharding.row_sharding(mesh)
        replicated = sharding.replicated(mesh)
        # Three programs rather than one: each is timed alone, the invariants between them
        # can stop the run, and a stop request need not wait for the whole iteration.
        # The PPO program is a static argument: equal ones are compiled once per process.
        rollout = jax.jit(
            algorithm.rollout,
            static_argnums=0,
            in_shardings=(policy, rows, replicated, replicated),
            out_shardings=rows,
        )
        # Rollouts are an input of this program and, inside the experience, an output.
        score = jax.jit(
            algorithm.score,
            static_argnums=0,
            in_shardings=(state, reference, reward, rows, replicated),
            out_shardings=(rows, rows, replicated),
        )
        update = jax.jit(
            algorithm.update,
            static_argnums=0,
            in_shardings=(state, rows, rows, replicated),
            out_shardings=(state, replicated),
            donate_argnums=1,  # the old state's memory is reused
        )
        self._rollout = partial(rollout, program)
        self._score = partial(score, program)
        self._update = partial(update, program)
        self._settings = settings
        self._ref_params = ref_params
        self._reward_params = reward_params
        self._tolerance = tolerance

    def __call__(
        self, state: PpoState, batch: Any, phase: Any
    ) -> tuple[PpoState, dict[str, Any], Rollouts, Array]:
        """Runs one iteration.

        Args:
          state: the state, which is donated.
          batch: (prompts, text or None).
          phase: `phase(name)` is a context manager that times its block.

        Returns:
          (new state, metrics, rollouts, scores f32[B])

        Raises:
          InvariantError: an identity of a correct run is broken.
          StopRequested: the run was asked to stop before the update began.
        """
        prompts, text = batch
        settings = self._settings
        # The policy equals the reference before the first update only.
        first = int(state.step) == 0

        with phase("rollout"):
            rollouts = self._rollout(state.policy.params, prompts, state.step, settings)
            # Dispatch is asynchronous; without waiting the time would be the next phase's.
            jax.block_until_ready(rollouts)
        # The state is unchanged so far, so the iteration can be dropped and repeated later.
        check_stop_requested()

        with phase("score"):
            experience, scored, metrics = self._score(
                state, self._ref_params, self._reward_params, rollouts, settings
            )
            # Reads metrics, so it waits for the program as well.
            check_rollouts(metrics, first=first, tolerance=self._tolerance)
        check_stop_requested()

        # From here on the old state is gone, so an interruption waits for the new one.
        with phase("ppo_update"):
            state, update_metrics = self._update(state, experience, text, settings)
            # Raises after the donation: a broken run must not go on, so its state is not
            # needed.
            check_update(update_metrics, tolerance=self._tolerance)
        return state, {**metrics, **update_metrics}, rollouts, scored.scores
