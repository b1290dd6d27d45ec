"""Accuracy by enumeration, intervals, metrics on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from tests.conftest import Z
from tests.em.toys import small


def test_rates_are_those_of_the_enumeration():
    toy, theta, copies = small(), jnp.array([0.4, -0.3]), 700
    number = jnp.tile(jnp.arange(3, dtype=jnp.int32), copies)
    found = em.evaluate(
        jax.random.key(0),
        toy.model(),
        theta,
        em.Questions(number, number),
        samples=4,
        batch_size=1024,
        vote=lambda tokens, mask: tokens[:, 0],
    )
    p, n = np.asarray(toy.solved(theta), np.float64), 3 * copies
    for k, rate in found.pass_at.items():
        each = 1 - (1 - p) ** k
        assert abs(rate.mean - each.mean()) < Z * np.sqrt(np.mean(each * (1 - each)) / n)
        assert rate.low < rate.mean < rate.high
    assert list(found.pass_at) == [1, 2, 4]
    best = np.argmax(np.asarray(toy.log_probs(theta)), axis=1)
    assert found.greedy.mean == pytest.approx(toy.right[np.arange(3), best].mean())
    np.testing.assert_array_equal(found.tokens[:3, 0], best)
    # by majority: all 4^4 outcomes of four draws of each question
    table, expected = np.exp(np.asarray(toy.log_probs(theta), np.float64)), 0.0
    for draws in np.ndindex(4, 4, 4, 4):
        counts = [draws.count(z) for z in draws]
        winner = draws[int(np.argmax(counts))]
        expected += np.sum(np.prod(table[:, draws], axis=1) * toy.right[:, winner]) / 3
    assert abs(found.majority.mean - expected) < Z * np.sqrt(expected * (1 - expected) / n)


def test_rationales_without_an_answer_have_no_vote():
    toy, theta = small(), jnp.array([0.4, -0.3])
    found = em.evaluate(
        jax.random.key(0),
        toy.model(),
        theta,
        toy.questions(),
        vote=lambda tokens, mask: jnp.full(tokens.shape[0], -1),
    )
    assert found.majority.mean == 0


def test_intervals_cover():
    """Wilson's 95%: at worst a little under, also near zero."""
    rng = np.random.default_rng(0)
    for p in (0.02, 0.3, 0.9):
        rates = [em.Rate.of(rng.random(100) < p) for _ in range(2000)]
        assert np.mean([rate.low <= p <= rate.high for rate in rates]) > 0.92
    assert em.Rate.of(np.zeros(20)).high > 0.1


def test_metrics_are_lines_of_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    em.json_lines(path, {"greedy": np.float32(0.5)}, step=3)
    zeros = jnp.zeros(2)
    em.json_lines(path, em.Stats(*[zeros + n for n in range(7)]), step=4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4, 5]
    assert rows[0] == {"step": 3, "greedy": 0.5}
    assert rows[2]["tokens"] == 6.0
    with pytest.raises(ValueError, match="of one length"):
        em.json_lines(path, {"a": [1, 2], "b": 3})


def test_bad_input_gets_one_sentence():
    toy = small()
    with pytest.raises(ValueError, match="samples"):
        em.evaluate(jax.random.key(0), toy.model(), jnp.zeros(2), toy.questions(), samples=0)
    empty = em.Questions(jnp.zeros((0,), jnp.int32), jnp.zeros((0,), jnp.int32))
    with pytest.raises(ValueError, match="at least one row"):
        em.evaluate(jax.random.key(0), toy.model(), jnp.zeros(2), empty)
