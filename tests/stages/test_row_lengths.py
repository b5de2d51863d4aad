"""Stages list every row length that their networks run, so that the selected kernel
supports all of them."""

import importlib
from typing import Any

import pytest

from instructax.models.sequence_packing import microbatch_shapes
from instructax.stages import build_config, load_stage
from instructax.training import attention

TPU = ("tpu", 5.0)


def config_of(name: str, size: str, **changes: Any) -> Any:
    values = importlib.import_module(f"configs.{name}").get_config(size)
    values.update_from_flattened_dict(changes)
    return build_config(values.to_dict())


def selected(config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The kernel selected for `config` on a TPU, and the reason."""
    monkeypatch.setattr(attention, "device_platform", lambda _: TPU)
    lengths = load_stage(config.stage).row_lengths(config)
    config, reason = attention.select_attention_kernel(config, lengths)
    return config.compute.attention, reason


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_half_rows_of_evaluation_rule_out_splash(name, monkeypatch):
    changes = {"data.limits.sequence_tokens": 384, "compute.tail_splits": 1}
    kernel, reason = selected(config_of(name, "1.3b", **changes), monkeypatch)
    assert kernel == "jax"
    assert "rows of 192 tokens, allowed is a multiple of 128" in reason


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_rows_that_divide_into_whole_blocks_use_splash(name, monkeypatch):
    for changes in (
        {"data.limits.sequence_tokens": 512, "compute.tail_splits": 1},
        {"data.limits.sequence_tokens": 384, "compute.tail_splits": 0},
    ):
        config = config_of(name, "1.3b", **changes)
        assert selected(config, monkeypatch)[0] == "splash"


@pytest.mark.parametrize("name", ["pretrain", "sft", "ppo"])
@pytest.mark.parametrize("tail_splits", [0, 1, 3])
def test_row_lengths_are_the_widths_of_all_microbatches(name, tail_splits):
    changes = {"compute.tail_splits": tail_splits, "compute.microbatch_rows": 1}
    config = config_of(name, "tiny", **changes)
    lengths, shared = load_stage(name).row_lengths(config)
    width = config.data.limits.sequence_tokens
    assert set(lengths) == {w for _, w in microbatch_shapes(1, tail_splits, width)}
    assert not shared
