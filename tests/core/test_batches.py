"""Each order's guarantees, in both layouts, seen through the rows that a posterior hands out."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.core import data_batches, permuted, row_batches
from stochgrad.core._noise import key_words
from stochgrad.core._orders import _permuted
from tests.conftest import Z

LAYOUTS = ["blocks", "rows"]


def visits(size, batch_size, order, layout, count, seed=0):
    """The rows of ``count`` minibatches and their weights, padding left out."""
    batches, _ = row_batches(size, batch_size, order, layout)

    def body(state, _):
        rows, state = batches.next(state)
        weight = jnp.broadcast_to(rows.weight, rows.index.shape)
        return state, (rows.index, weight)

    _, (index, weight) = jax.lax.scan(body, batches.init(jax.random.key(seed)), None, length=count)
    return np.asarray(index), np.asarray(weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (13, 4), (7, 1), (5, 3), (1000, 37)])
def test_reshuffled_visits_each_row_once_an_epoch(size, batch_size, layout):
    k = -(-size // batch_size)
    index, weight = visits(size, batch_size, "reshuffled", layout, 3 * k)
    orders = []
    for epoch in range(3):
        part = slice(epoch * k, (epoch + 1) * k)
        seen = index[part][weight[part] > 0]
        np.testing.assert_array_equal(np.sort(seen), np.arange(size))
        orders.append(tuple(seen))
    assert set(np.unique(weight)) <= {0.0, float(k)}
    if size > 20:
        assert len(set(orders)) == 3  # a new order each epoch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_symmetric_sweeps_turn_at_the_ends(layout):
    k = 5
    index, _ = visits(20, 4, "symmetric", layout, 4 * k)
    for start in (0, 2 * k):
        there, back = index[start : start + k], index[start + k : start + 2 * k]
        np.testing.assert_array_equal(there, back[::-1])
        np.testing.assert_array_equal(np.sort(there.ravel()), np.arange(20))
    assert not np.array_equal(index[:k], index[2 * k : 3 * k])


def test_blocks_are_one_partition_and_rows_are_not():
    blocks = {tuple(sorted(b)) for b in visits(40, 4, "reshuffled", "blocks", 50)[0]}
    rows = {tuple(sorted(b)) for b in visits(40, 4, "reshuffled", "rows", 50)[0]}
    assert len(blocks) == 10
    assert len(rows) > 40


@cache
def row_weights(order, layout, size=11, batch_size=4):
    """The weight of each row after a number of steps, by many keys: one program for all steps."""
    batches, _ = row_batches(size, batch_size, order, layout)

    def weights(step, key):
        after = lambda _, state: batches.next(state)[1]
        rows, _ = batches.next(jax.lax.fori_loop(0, step, after, batches.init(key)))
        weight = jnp.broadcast_to(rows.weight, rows.index.shape)
        return jnp.zeros(size).at[rows.index].add(weight)

    return jax.jit(jax.vmap(weights, (None, 0)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["iid", "reshuffled", "symmetric"])
@pytest.mark.parametrize(
    "step", [pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 6]
)
def test_every_step_weights_every_row_by_one_on_average(order, layout, step):
    runs = 4000
    keys = jax.random.split(jax.random.key(step), runs)
    drawn = np.asarray(row_weights(order, layout)(step, keys))
    error = drawn.std(axis=0) / np.sqrt(runs)
    assert np.all(np.abs(drawn.mean(axis=0) - 1) < Z * error)


@pytest.mark.parametrize("order", ["iid", "reshuffled", "symmetric"])
def test_successive_minibatches_of_iid_are_independent_and_others_are_not(order):
    index, _ = visits(20, 4, order, "blocks", 2000)
    repeats = np.mean([np.array_equal(a, b) for a, b in pairwise(index)])
    expected = {"iid": 1 / 5, "reshuffled": 1 / 25, "symmetric": 1 / 10 + 1 / 50}[order]
    assert abs(repeats - expected) < Z * np.sqrt(expected / 2000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [4, 5, 9, 20])
def test_an_epochs_average_is_the_full_data_score(batch_size, layout):
    x = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    target = stochgrad.posterior(
        lambda t: -jnp.sum(t**2),
        lambda t, b: -jnp.sum((b["x"] - t[None]) ** 2, axis=1) * b["w"],
        {"x": x, "w": np.arange(20, dtype=np.float32)},
        batch_size=batch_size,
        layout=layout,
    )
    score, advance = jax.jit(jax.grad(target.log_density)), jax.jit(target.batches.next)
    theta = jnp.array([0.3, -1.0, 2.0])
    state = target.batches.init(jax.random.key(0))
    total = np.zeros(3)
    k = -(-20 // batch_size)
    for _ in range(k):
        batch, state = advance(state)
        total += np.asarray(score(theta, batch)) / k
    np.testing.assert_allclose(total, score(theta, target.batches.full), rtol=1e-5)


def test_the_full_batch_holds_all_rows_once():
    x = np.arange(10, dtype=np.float32)
    for options in ({"batch_size": 3}, {"order": "full"}, {"batch_size": 4, "layout": "rows"}):
        batch = data_batches(x, **{"batch_size": None, **options}).full
        weight = np.broadcast_to(batch.weight, batch.data.shape)
        np.testing.assert_array_equal(np.sort(np.asarray(batch.data)[weight > 0]), x)
        assert set(np.unique(weight)) <= {0.0, 1.0}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 13, 97, 1000, 2003])
def test_permuted_is_a_permutation(size):
    words = key_words(jax.random.key(0))
    for number in range(5):
        image = permuted(words, jnp.uint32(number), jnp.arange(size), size)
        np.testing.assert_array_equal(np.sort(image), np.arange(size))


def test_all_permutations_of_four_are_equally_likely():
    runs = 48_000

    def code(number):
        image = permuted(key_words(jax.random.key(7)), number, jnp.arange(4), 4)
        return jnp.sum(image * jnp.array([64, 16, 4, 1]))

    codes = np.asarray(jax.jit(jax.vmap(code))(jnp.arange(runs, dtype=jnp.uint32)))
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    chi2 = np.sum((counts - runs / 24) ** 2) / (runs / 24)
    assert chi2 < 23 + Z * np.sqrt(2 * 23) + 10  # a chi-squared of 23 degrees of freedom


@pytest.mark.parametrize("size", [7, 8, 13])
def test_pairs_of_places_are_equally_likely_when_digits_are_unequal(size):
    runs = 40_000

    def code(number):
        image = permuted(key_words(jax.random.key(8)), number, jnp.arange(2), size)
        return image[0] * size + image[1]

    codes = np.asarray(jax.jit(jax.vmap(code))(jnp.arange(runs, dtype=jnp.uint32)))
    _, counts = np.unique(codes, return_counts=True)
    pairs = size * (size - 1)
    assert len(counts) == pairs
    chi2 = np.sum((counts - runs / pairs) ** 2) / (runs / pairs)
    assert abs(chi2 - (pairs - 1)) < Z * np.sqrt(2 * (pairs - 1))


@pytest.mark.parametrize("size", [5, 7, 97, 2000, 2003])
def test_walks_on_an_accelerator_end_where_they_do_elsewhere(size, monkeypatch):
    words, index = key_words(jax.random.key(9)), jnp.arange(size, dtype=jnp.int32)
    expected = _permuted(words, jnp.uint32(3), index, size, jnp.uint32(0), None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = _permuted(words, jnp.uint32(3), index, size, jnp.uint32(0), None)
    np.testing.assert_array_equal(found, expected)


def test_a_stream_is_a_function_of_its_key():
    a, b, c = (visits(20, 4, "reshuffled", "blocks", 10, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_rows_of_a_large_data_set_cost_no_memory():
    size = 2_000_000_000  # a permutation of so many rows would take 8 GB
    words = key_words(jax.random.key(0))
    image = np.asarray(permuted(words, jnp.uint32(0), jnp.arange(1000), size))
    assert len(np.unique(image)) == 1000
    assert image.min() >= 0
    assert image.max() < size
    assert abs(image.mean() / size - 0.5) < Z * np.sqrt(1 / 12 / 1000)
