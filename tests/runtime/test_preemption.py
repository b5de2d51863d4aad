"""Signals: the first requests a stop, the second ends the process, in Python and in
compiled programs."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from instructax.runtime.preemption import (
    GracefulShutdown,
    StopRequested,
    check_stop_requested,
)


def test_sigterm_asks_as_well():
    with GracefulShutdown() as interruption:
        assert not interruption.stop_requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.stop_requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_real_ctrl_c_in_a_process_of_its_own():
    """The second Ctrl-C must work although the step never ends, as if a compiled program
    hung."""
    program = """
        import os, signal, time
        from instructax.runtime.preemption import GracefulShutdown
        with GracefulShutdown():
            os.kill(os.getpid(), signal.SIGINT)
            print("asked", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stdout == "asked\n" and done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_check_stop_requested_raises_only_within_graceful_shutdown():
    check_stop_requested()
    with GracefulShutdown() as outer:
        check_stop_requested()
        with GracefulShutdown() as inner:
            inner.stop_requested = True
            with pytest.raises(StopRequested):
                check_stop_requested()
        check_stop_requested()
        outer.stop_requested = True
        with pytest.raises(StopRequested):
            check_stop_requested()
    check_stop_requested()


def test_handlers_and_pipe_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with GracefulShutdown():
            assert signal.getsignal(signal.SIGTERM) not in before
    assert [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    ] == before
    assert signal.set_wakeup_fd(-1) == -1
    if descriptors:
        for _ in range(100):  # the thread that reads the pipe closes its end
            if len(os.listdir("/proc/self/fd")) <= descriptors:
                break
            time.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_even_a_compiled_program(number, code):
    """XLA runs an endless loop, so Python's signal handlers are never called."""
    program = f"""
        import threading, time, os
        import jax
        from instructax.runtime.preemption import GracefulShutdown
        loop = lambda x: jax.lax.while_loop(lambda x: x < 1, lambda x: x * 0.5, x)
        endless = jax.jit(loop).lower(0.5).compile()

        def twice():
            for _ in range(2):
                time.sleep(1)
                os.kill(os.getpid(), {int(number)})

        with GracefulShutdown():
            threading.Thread(target=twice, daemon=True).start()
            jax.block_until_ready(endless(0.5))
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, timeout=50
    )
    assert done.returncode == code
