"""Validation metrics against references that run every document alone."""

from functools import partial

import jax
import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.evals import validation
from instructax.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_device")

REWARD_MODEL = Transformer(tiny_models.gpt_config(), tiny_models.compute(), "scalar")
POLICY = Transformer(tiny_models.gpt_config(), tiny_models.compute(), "tokens")
ANSWERS = (3, 1, 4, 2, 4, 2, 3, 4)  # per prompt; the first ties all, the second has no pair


def read_from(monkeypatch, batches):
    """Makes the metrics read `batches`, whatever the source."""
    monkeypatch.setattr(validation, "validation_batches", lambda *_: iter(batches))
    monkeypatch.setattr(validation, "validation_rows", lambda *_: iter(range(len(batches))))
    monkeypatch.setattr(
        validation, "read_comparisons", lambda source, rows, limits: batches[rows]
    )


def halves_of(batch):
    return [jax.tree.map(lambda x: x[:4], batch), jax.tree.map(lambda x: x[4:], batch)]


class Limits:
    completions = 4


def test_ranking_metrics_add_up_over_batches(monkeypatch):
    batch = stages.comparisons(ANSWERS, 5)
    read_from(monkeypatch, halves_of(batch))
    params = tiny_models.random_params(REWARD_MODEL)
    loss, correct, pairs = stages.plain_ranking(REWARD_MODEL, params, batch)
    ranking = validation.Ranking(
        REWARD_MODEL, stages.mesh_of(), Limits, batch_size=4, max_batches=2, width=0
    )
    source = []
    means = ranking.means(params, source)
    assert means["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert means["validation_accuracy"] == correct / pairs
    assert means["validation_pairs"] == pairs

    estimates = ranking.estimates(params, source)
    assert estimates["accuracy"]["value"] == pytest.approx(correct / pairs)
    assert estimates["accuracy"]["low"] < correct / pairs < estimates["accuracy"]["high"]
    assert estimates["pairs"] == pairs
    assert sum(entry["pairs"] for entry in estimates["calibration"]) == pairs
    right = sum(entry["pairs"] * entry["share"] for entry in estimates["calibration"])
    assert right == pytest.approx(correct)


def test_the_mean_loss_is_per_token_over_all_batches(monkeypatch):
    """Rows with more trained tokens count for more, and the empty row for nothing."""
    rows = stages.packed_rows(8, 14)
    read_from(monkeypatch, halves_of(rows))
    params = tiny_models.random_params(POLICY)
    loss = validation.ValidationLoss(
        POLICY, stages.mesh_of(), batch_size=4, max_batches=2, sequence_tokens=14
    )
    wanted = stages.plain_loss(POLICY, params, rows)
    assert loss.mean(params, []) == pytest.approx(wanted, rel=1e-5)
    estimate = loss.estimate(params, [])
    assert estimate["value"] == pytest.approx(wanted, rel=1e-5)
    assert estimate["count"] == 7


def test_no_validation_rows_give_zeros(monkeypatch):
    read_from(monkeypatch, [])
    mesh = stages.mesh_of()
    loss = validation.ValidationLoss(
        POLICY, mesh, batch_size=4, max_batches=2, sequence_tokens=14
    )
    ranking = validation.Ranking(
        REWARD_MODEL, mesh, Limits, batch_size=4, max_batches=2, width=0
    )
    assert loss.mean({}, []) == 0
    assert set(ranking.means({}, []).values()) == {0}


def test_demonstration_scores_are_those_at_each_documents_end():
    rows = stages.packed_rows(5, 14)
    params = tiny_models.random_params(REWARD_MODEL)
    scores = jax.jit(partial(validation.demonstration_scores, REWARD_MODEL))
    total, count = scores(params, rows)
    documents = [tokens for tokens, _ in stages.documents_of(rows)]
    assert count == len(documents) == 8
    wanted = stages.plain_scores(REWARD_MODEL, params, documents).sum()
    assert float(total) == pytest.approx(wanted, rel=1e-5)


def test_calibration_bins_pairs_by_predicted_probability():
    """σ(2.2) = 0.90 is in the ninth bin, σ(0.1) = 0.52 in the first."""
    gaps = np.array([2.2, 2.2, -2.2, 0.1])
    first, ninth = validation.calibration(gaps)
    assert (first["pairs"], first["share"]) == (1, 1.0)
    assert (ninth["pairs"], ninth["share"]) == (3, pytest.approx(2 / 3))
    assert ninth["predicted"] == pytest.approx(0.900, abs=1e-3)
