"""The metric log: buffering, rewinding, non-finite values, phases and console output."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from instructax.runtime import files, metric_log
from instructax.runtime.metric_log import MetricLog


def open_log(workdir, **changes):
    settings = {
        "total_steps": 10,
        "log_every": 4,
        "start_step": 0,
        "tensorboard": False,
        "console": False,
    }
    return MetricLog(workdir, **{**settings, **changes})


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    ]


def steps(path):
    return [line["step"] for line in read(path)]


class Lazy:
    """A device scalar: reading it synchronizes."""

    shape = ()

    def __init__(self, value):
        self.value, self.reads = value, 0

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return np.asarray(self.value, dtype)

    __float__ = __int__ = __bool__ = lambda self: self.__array__().item()


def test_values_are_exact_and_sorted_by_name(tmp_path):
    with open_log(tmp_path, log_every=1) as log:
        log.record(
            1,
            {
                "loss": jnp.float32(0.1),
                "accuracy": 0.75,
                "clipped": jnp.bfloat16(0.5),
                "tokens": jnp.int32(3),
            },
        )
    (line,) = read(tmp_path / "metrics.jsonl")
    assert list(line)[:5] == ["step", "accuracy", "clipped", "loss", "tokens"]
    assert (
        line["loss"] == float(np.float32(0.1))
        and line["accuracy"] == 0.75
        and line["clipped"] == 0.5
    )
    assert line["tokens"] == 3 and isinstance(line["tokens"], int)
    assert "nonfinite" not in line


def test_nothing_is_fetched_before_the_flush(tmp_path):
    values = [Lazy(float(step)) for step in range(1, 7)]
    with open_log(tmp_path, log_every=4, total_steps=100) as log:
        for step, value in enumerate(values, start=1):
            log.record(step, {"loss": value})
            assert [v.reads for v in values] == ([0] * 6 if step < 4 else [1] * 4 + [0] * 2)
            assert len(read(tmp_path / "metrics.jsonl")) == (0 if step < 4 else 4)
    assert [line["loss"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_one_fetch_for_all_steps_and_a_flush_at_the_last_step(tmp_path, monkeypatch):
    calls = []
    fetch = metric_log.jax.device_get
    monkeypatch.setattr(
        metric_log.jax, "device_get", lambda tree: calls.append(len(tree)) or fetch(tree)
    )
    log = open_log(tmp_path, log_every=4, total_steps=6)
    for step in range(1, 7):
        log.record(step, {"a": jnp.float32(step), "b": jnp.float32(2 * step)})
    assert calls == [4, 2]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    log.close()
    log.close()
    assert calls == [4, 2]


def test_flushed_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), open_log(tmp_path) as log:
        log.record(1, {"loss": 1.0})
        raise RuntimeError("boom")
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_nonfinite_is_null_and_named(tmp_path, capsys):
    with open_log(tmp_path, console=True) as log:
        log.record(
            1, {"loss": jnp.nan, "gradient_norm": jnp.float32(np.inf), "accuracy": 0.5}
        )
        log.write_sample(1, {"score": math.nan, "ids": np.arange(3), "text": ("a", "b")})
        log.write_summary({"loss": math.inf, "accuracy": jnp.float32(0.5)})
    (line,) = read(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["gradient_norm"], line["accuracy"]) == (None, None, 0.5)
    assert line["nonfinite"] == ["gradient_norm", "loss"]
    assert read(tmp_path / "samples.jsonl") == [
        {"step": 1, "score": None, "ids": [0, 1, 2], "text": ["a", "b"]}
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "loss": None,
        "accuracy": 0.5,
    }
    assert "loss non-finite" in capsys.readouterr().out


def test_rewinding_keeps_each_step_once(tmp_path):
    with open_log(tmp_path, log_every=1) as log:
        for step in range(8):
            log.record(step, {"loss": float(step)})
            log.write_sample(step, {"text": "first"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9')  # killed while writing a line
    with open_log(tmp_path, start_step=5, log_every=1) as log:
        assert steps(tmp_path / "metrics.jsonl") == [0, 1, 2, 3, 4, 5]
        for step in (6, 7, 8):
            log.record(step, {"loss": 10.0 * step})
            log.write_sample(step, {"text": "second"})
    assert [line["loss"] for line in read(tmp_path / "metrics.jsonl")] == [
        0,
        1,
        2,
        3,
        4,
        5,
        60,
        70,
        80,
    ]
    assert [line["text"] for line in read(tmp_path / "samples.jsonl")] == ["first"] * 6 + [
        "second"
    ] * 3
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_starts_an_empty_log(tmp_path):
    for _ in range(2):
        with open_log(tmp_path) as log:
            log.record(0, {"kl": 0.0})
            log.record(1, {"kl": 0.1})
        assert steps(tmp_path / "metrics.jsonl") == [0, 1]


@pytest.mark.parametrize(
    "junk", ["null\n", "[1]\n", "{}\n", '{"step": "x"}\n', "\x00\x00\n", '{"step": 1}']
)
def test_rewinding_drops_what_is_no_log_line(tmp_path, junk):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + junk)
    files.rewind(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_phase_times_add_up_and_go_to_the_next_record(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 12.5, 20.0, 20.25, 30.0, 31.0, 40.0, 100.0])
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metric_log.jax, "device_count", lambda: 8)
    with open_log(tmp_path, log_every=2) as log:  # 0
        with log.phase("rollout"):  # 10 … 12.5
            pass
        with pytest.raises(KeyError), log.phase("rollout"):  # 20 … 20.25
            raise KeyError
        log.record(1, {"loss": 1.0, "tokens": 100})
        with log.phase("update"):  # 30 … 31
            pass
        log.record(2, {"loss": 1.0, "tokens": jnp.int32(60)})  # 40
    first, second = read(tmp_path / "metrics.jsonl")
    assert first["time/rollout_s"] == 2.75 and "time/update_s" not in first
    assert second["time/update_s"] == 1.0 and "time/rollout_s" not in second
    for line in (first, second):
        assert line["time/step_s"] == 20.0
        assert line["time/tokens_per_second_per_device"] == 160 / 40 / 8


def test_the_first_step_is_waited_for_and_timed(tmp_path, monkeypatch, capsys):
    clock = iter([5.0, 12.25, 20.0, 30.0, 42.0])
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: next(clock))
    waited = []
    monkeypatch.setattr(metric_log.jax, "block_until_ready", waited.append)
    with open_log(tmp_path, log_every=1, console=True) as log:  # 5
        log.first_step_done({"loss": 0.5})  # 12.25
        log.record(1, {"loss": 0.5, "tokens": 58})  # 20
        log.record(2, {"loss": 0.25, "tokens": 80})  # 30
    assert waited == [{"loss": 0.5}]
    first, second = read(tmp_path / "metrics.jsonl")
    assert first["time/first_step_s"] == 7.25 and "time/first_step_s" not in second
    assert (first["time/step_s"], second["time/step_s"]) == (7.25, 10.0)
    rate = "time/tokens_per_second_per_device"
    assert (first[rate], second[rate]) == (1.0, 1.0)
    assert capsys.readouterr().out.startswith("first step after 7.2 s\nstep 1/")


def test_the_first_step_does_not_affect_the_step_time_of_later_ones(tmp_path, monkeypatch):
    clock = iter([5.0, 105.0, 125.0])
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: next(clock))
    with open_log(tmp_path, log_every=3) as log:  # 5
        log.first_step_done({"loss": 0.5})  # 105
        for step in (1, 2, 3):
            log.record(step, {"loss": 0.5, "tokens": 1000 if step == 1 else 80})
    for line in read(tmp_path / "metrics.jsonl"):  # flushed at 125
        assert (
            line["time/step_s"] == 10.0 and line["time/tokens_per_second_per_device"] == 1.0
        )


def test_a_resumed_run_differs_only_in_times(tmp_path):
    for name, cuts in (("whole", [(0, 6)]), ("resumed", [(0, 4), (3, 6)])):
        for start, stop in cuts:
            with open_log(tmp_path / name, start_step=start, log_every=2) as log:
                for step in range(start + 1, stop + 1):
                    log.record(step, {"loss": jnp.sin(jnp.float32(step)), "tokens": 7})

    def lines_without_times(name):
        lines = []
        for line in read(tmp_path / name / "metrics.jsonl"):
            lines.append({k: v for k, v in line.items() if not k.startswith("time/")})
        return lines

    whole = lines_without_times("whole")
    resumed = lines_without_times("resumed")
    assert (
        whole == resumed and len(whole) == 6 and set(whole[0]) == {"step", "loss", "tokens"}
    )


def test_console_line(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 20.0, 99.0])
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metric_log.jax, "device_count", lambda: 8)
    with open_log(tmp_path, log_every=4, console=True, total_steps=1000) as log:
        for step in range(1, 5):
            log.record(
                step,
                {
                    "kl": 2.0,
                    "loss": 1 / step,
                    "tokens": 80_000,
                    **{f"a{i}": i for i in range(9)},
                },
            )
    expected = (
        "step 4/1000  loss 0.25  kl 2  a0 0  a1 1  a2 2  a3 3  2,000 "
        "tokens/s/device  eta 1:23:00\n"
    )
    assert capsys.readouterr().out == expected


def test_sampled_text_cannot_drive_the_terminal(tmp_path, capsys):
    text = "ab\x1b[2Jc\n\r\x9b\u202edé\ud800" + "x" * 500
    with open_log(tmp_path, console=True, log_every=3) as log:
        log.write_sample(2, {"response": "of a step without a console line"})
        log.write_sample(3, {"response": text})
        log.write_sample(3, {"response": "a second one of this step"})
    out = capsys.readouterr().out
    assert out.startswith("sample 3  response: ab\\x1b[2Jc\\n\\r\\x9b\\u202edé\\ud800xxx")
    assert out.count("\n") == 1 and len(out) < 250 and out.rstrip("\n").isprintable()
    assert [line["response"] for line in read(tmp_path / "samples.jsonl")][1:] == [
        text,
        "a second one of this step",
    ]
    assert (tmp_path / "samples.jsonl").read_bytes().isascii()


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metric_log.jax, "process_index", lambda: 1)
    with open_log(tmp_path / "run", console=True, tensorboard=True, log_every=1) as log:
        log.record(1, {"loss": 1.0})
        log.write_sample(1, {"text": "x"})
        log.write_summary({"loss": 1.0})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_tensorboard_scalars(tmp_path):
    loader = pytest.importorskip("tensorboardX.record_writer")
    from tensorboardX.proto.event_pb2 import Event

    with open_log(tmp_path, tensorboard=True, start_step=3) as log:
        log.record(4, {"loss": 0.25, "broken": jnp.nan})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data = path.read_bytes()
    events = []
    while data:  # A record: length u64, its checksum u32, the event, its checksum u32.
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert loader is not None and 4 in [e.step for e in events if e.HasField("session_log")]
    scalars = {
        value.tag: (e.step, value.simple_value) for e in events for value in e.summary.value
    }
    assert (
        scalars["loss"] == (4, 0.25)
        and "broken" not in scalars
        and "time/step_s" in scalars
    )


def test_a_missing_tensorboard_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'instructax\[tensorboard\]'"):
        open_log(tmp_path, tensorboard=True)


def test_errors_name_the_cause(tmp_path):
    with open_log(tmp_path, start_step=5) as log:
        with pytest.raises(ValueError, match="step 5 follows step 5"):
            log.record(5, {})
        with pytest.raises(ValueError, match=r"metric 'values' has shape \(2,\)"):
            log.record(6, {"values": jnp.zeros(2)})
        for name in metric_log.RESERVED:
            with pytest.raises(ValueError, match=f"the name '{name}'"):
                log.record(6, {name: 1})
            with pytest.raises(ValueError, match=f"the name '{name}'"):
                log.write_sample(6, {name: 1})
        log.record(6, {"loss": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [6]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
