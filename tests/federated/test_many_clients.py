"""Many clients of very different sizes: laid out once, gone over in parts, looked at by samples."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import federated
from stochgrad.federated import _client_sums, _matrices, _reference, _spread
from tests.federated.toys import gaussian_mean, log_likelihood, log_prior, rows


class Read(Sequence):
    """Clients that are read when they are asked for; at most one is held."""

    def __init__(self, data):
        self.data, self.asked = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, s):
        self.asked.append(s)
        return self.data[s].copy()


def test_clients_that_are_read_are_those_of_a_list():
    data = rows((3, 37, 8))
    lazy = Read(data)
    made = [
        federated.posterior(log_prior, log_likelihood, clients, batch_size=4)
        for clients in (data, lazy)
    ]
    whole = [x.batches.full for x in made]
    for a, b in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(lazy.asked) <= 2 * 3 + 3
    # padded to whole minibatches, and not to the largest client
    assert len(whole[0].weight) == 4 + 40 + 8
    assert float(whole[0].weight.sum()) == 48
    at = jnp.ones(2)
    found = made[1].log_density(at, whole[1])
    every = np.concatenate(data)
    expected = -1.0 - 0.5 * np.sum((every - 1.0) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    taken = made[1].batches.take(np.array([0, 3, 47]))
    np.testing.assert_array_equal(taken.data, every[[0, 3, 47]])


def test_clients_that_change_between_two_looks_are_refused():
    class Growing(Read):
        def __getitem__(self, s):
            return np.resize(super().__getitem__(s), (len(self.asked), 2))

    with pytest.raises(ValueError, match="has other rows when it is asked for them again"):
        federated.posterior(log_prior, log_likelihood, Growing(rows()), batch_size=4)


def test_all_rows_at_once_are_refused_where_most_would_be_padding():
    sizes = np.full(2000, 5)
    sizes[7] = 5000
    data = [np.zeros((n, 1), np.float32) for n in sizes]
    with pytest.raises(ValueError, match="order='full' pads the rows of 2,000 clients"):
        federated.posterior(log_prior, log_likelihood, data, order="full")


def test_sums_over_clients_in_parts_are_those_at_once(monkeypatch):
    target, _, _ = gaussian_mean(sizes=(50, 301, 8), batch_size=7)
    score = jax.value_and_grad(target.log_density)
    at = jnp.array([0.3, -2.0])
    whole = _client_sums.all_likelihoods(target, score)(at)
    reference = federated.find_reference(target, jnp.zeros(2))
    monkeypatch.setattr(_client_sums, "MANY_ROWS", 10)
    monkeypatch.setattr(_reference, "MANY_ROWS", 10)
    monkeypatch.setattr(_client_sums, "_TOGETHER", 64)
    parts = _client_sums.all_likelihoods(target, score)(at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)
    again = federated.find_reference(target, jnp.zeros(2))
    np.testing.assert_allclose(again.position, reference.position, rtol=1e-3)


def regression(count=60, dim=3):
    """Clients of one to nine rows, each of which informs a few directions."""
    rng = np.random.default_rng(0)
    data = []
    for n in rng.integers(1, 10, count):
        x = (rng.normal(size=(n, dim)) + rng.normal(size=dim)).astype(np.float32)
        data.append((x, rng.normal(size=n).astype(np.float32)))

    def likelihood(w, batch):
        x, y = batch
        return -0.5 * (y - x @ w) ** 2

    return federated.posterior(log_prior, likelihood, data, batch_size=5)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", [federated.global_first_order, "shrunk"])
def test_the_law_of_a_sample_of_clients_is_that_of_all(monkeypatch, surrogate):
    """What is sampled is 200 visits among 60 clients; the law of all is by their matrices."""
    target = federated.visiting(regression(), local_steps=5)
    if surrogate == "shrunk":
        made = federated.global_quadratic(target, jnp.zeros(3)).scaled(np.full(60, 0.3))
    else:
        made = surrogate(target, jnp.zeros(3))
    expected = _spread.spread_of_draws(target, made, 1e-3).ratio
    assert 1.03 < expected < 2
    for module in (_matrices, _spread):
        monkeypatch.setattr(module, "MOST_CLIENTS", 50)
    draw = np.random.default_rng
    found = []
    for seed in range(8):
        monkeypatch.setattr(np.random, "default_rng", lambda _, s=seed: draw(s))
        monkeypatch.setattr(_spread, "_SAMPLED_NUMBERS", 10**9)
        monkeypatch.setattr(_spread, "_FEWEST", 200)
        found.append(_spread.spread_of_draws(target, made, 1e-3).ratio)
    error = np.std(found, ddof=1)
    assert abs(np.mean(found) - expected) < 5.5 * error / np.sqrt(8) + 0.1 * (
        expected - 1
    )  # of a maximum, upwards
    assert error < 0.3 * (expected - 1)


def test_curvature_of_too_many_clients_to_look_at_is_told_of(monkeypatch):
    from stochgrad.federated import _precautions

    for module in (_matrices, _spread, _precautions):
        monkeypatch.setattr(module, "MOST_CLIENTS", 2)
    target, _, _ = gaussian_mean(batch_size=5)
    settings = {"local_steps": 4, "step_size": 1e-4, "init": jnp.zeros(2), "num_samples": 2}
    run = lambda **more: federated.sample(
        jax.random.key(0), target, progress=False, **settings, **more
    )
    with pytest.warns(federated.StabilityWarning, match="looked at for up to 2 clients"):
        run(surrogate="exact")
    for on_unsafe in ("cap", "raise"):
        with pytest.raises(ValueError, match="looked at for up to 2 clients"):
            run(surrogate="exact", on_unsafe=on_unsafe)
    assert run().attrs["surrogate"] == "global_first_order"
