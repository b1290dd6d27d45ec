"""Counted privacy: what one row can change, and what is counted for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from tests.conftest import Z
from tests.federated.toys import logistic, logistic_likelihood, logistic_posterior

accounting = pytest.importorskip("dp_accounting")

AT = jnp.array([0.3, -0.2, 0.5])


def row_by_row(position, x, y, norm):
    """Each row's gradient, clipped, by hand."""
    rows = []
    for one in zip(x, y, strict=True):
        batch = jax.tree.map(lambda a: jnp.asarray(a)[None], one)
        g = np.asarray(jax.grad(lambda w: logistic_likelihood(w, batch)[0])(position), np.float64)
        rows.append(g * min(1.0, norm / np.linalg.norm(g)))
    return np.stack(rows)


@pytest.mark.parametrize("batch_size", [3, 7])
def test_rows_are_clipped_one_by_one_on_the_minibatches_of_a_posterior(batch_size):
    """Clipping sums, or the prior, or weighting rows before, would show; so would padding."""
    data = [(x[:10], y[:10]) for x, y in logistic(num_rows=80)[:2]]
    target = logistic_posterior(data, batch_size=batch_size)
    gradient = federated.clipped_minibatch(target, 0.6)
    state = target.batches.init(jax.random.key(0))
    prior = np.asarray(jax.grad(lambda w: -0.125 * jnp.sum(w**2))(AT))
    clipped = 0
    for _ in range(6):
        batch, _ = target.batches.next(state)
        score, state = gradient.next(jax.random.key(1), AT, state)
        found = score(AT)[1]
        rows = row_by_row(AT, *batch.data, 0.6)
        clipped += int(np.sum(np.isclose(np.linalg.norm(rows, axis=1), 0.6)))
        wanted = prior + np.asarray(batch.weight, np.float64) @ rows
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-3)
    assert clipped > 0


def test_a_wide_norm_clips_nothing():
    target = logistic_posterior(logistic(num_rows=80), batch_size=5)
    state = target.batches.init(jax.random.key(0))
    ours, _ = federated.clipped_minibatch(target, 1e3).next(jax.random.key(1), AT, state)
    plain, _ = stochgrad.gradients.minibatch(target).next(jax.random.key(1), AT, state)
    np.testing.assert_allclose(ours(AT)[1], plain(AT)[1], rtol=1e-4, atol=1e-3)
    assert np.all(federated.clipped_share(target, AT, 1e3) == 0)
    assert np.all(federated.clipped_share(target, AT, 1e-3) == 1)


@pytest.mark.slow
def test_rows_of_a_numpyro_model_are_clipped_too():
    import numpyro
    import numpyro.distributions as dist

    data = [(x[:9], y[:9]) for x, y in logistic(num_rows=80)[:2]]

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with numpyro.plate("rows", len(y), subsample_size=4):
            xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Bernoulli(logits=xb @ w), obs=yb)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        target = stochgrad.from_numpyro(model, clients=data)
        found = federated.private_surrogates(
            jax.random.key(0), target, {"w": AT}, norm=0.6, noise_multiplier=1e-6, form="full"
        )
        score, _ = federated.clipped_minibatch(target, 0.6).next(
            jax.random.key(1), {"w": AT}, target.batches.init(jax.random.key(2))
        )
        assert np.isfinite(score({"w": AT})[1]["w"]).all()
    for s, (x, y) in enumerate(data):
        rows = row_by_row(AT, x, y, 0.6)
        np.testing.assert_allclose(found.slope["w"][s], rows.sum(axis=0), atol=1e-3)
        np.testing.assert_allclose(found.precision.matrices[s], rows.T @ rows, atol=1e-3)


def test_a_row_whose_gradient_is_not_finite_counts_as_nothing():
    """A position sent by a server can make one row overflow: what comes back must not tell."""
    target = federated.posterior(
        lambda w: -0.5 * w**2,
        lambda w, x: jnp.sqrt(jnp.abs(w - x)),
        [np.array([0.0, 1.0], np.float32)],
        batch_size=2,
    )
    score, _ = federated.clipped_minibatch(target, 0.1).next(
        jax.random.key(0), jnp.float32(1), target.batches.init(jax.random.key(0))
    )
    np.testing.assert_allclose(score(jnp.float32(1))[1], -1 + 0.1, rtol=1e-6)


@pytest.mark.parametrize("order", ["iid", "reshuffled", "symmetric"])
def test_visits_of_minibatches_are_those_that_chains_make(order):
    data = [np.arange(11, dtype=np.float32)]
    target = federated.posterior(lambda w: -w, lambda w, x: -w * x, data, batch_size=2, order=order)
    key, before, steps = jax.random.key(3), 4, 23
    state, counts, met = target.batches.init(key), np.zeros(6), {}
    for t in range(before + steps):
        batch, state = target.batches.next(state)
        rows = tuple(np.asarray(batch.data)[np.asarray(batch.weight) > 0])
        if t >= before:
            met[rows] = met.get(rows, 0) + 1
    counts = federated.block_visits(target, key, before, steps)
    assert sorted(counts[counts > 0]) == sorted(met.values())
    assert counts.sum() == steps
    whole = federated.block_visits(target, key, 0, 20)
    if order != "iid":
        assert whole.max() == 4  # of 20 steps in sweeps of six


def test_the_noise_multiplier_of_langevin_dynamics():
    """sqrt(2/h) B / (N C), where a row's gradient may be zero instead."""
    h, rows, size, norm = 1e-5, 3000, 50, 2.0
    cost = federated.langevin_cost(h, rows / size, norm, "zero_out")
    np.testing.assert_allclose(1 / np.sqrt(cost), np.sqrt(2 / h) * size / (rows * norm), rtol=1e-12)
    replaced = federated.langevin_cost(h, rows / size, norm, "replace")
    np.testing.assert_allclose(replaced, 4 * cost, rtol=1e-12)
    hot = federated.langevin_cost(h, rows / size, norm, "replace", 2.0)
    np.testing.assert_allclose(hot, 2 * cost, rtol=1e-12)


@pytest.mark.parametrize(("sigma", "times"), [(1.0, 1), (20.0, 300), (0.5, 4)])
def test_costs_add_up_as_two_other_accountants_say(sigma, times):
    """By Rényi divergences, alpha / 2 sigma^2, from above; by privacy losses, to their grid."""
    event = accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(sigma), times)
    delta = 1e-6
    ours = federated.epsilon_of(times / sigma**2, delta)
    renyi = accounting.rdp.RdpAccountant().compose(event).get_epsilon(delta)
    exact = accounting.pld.PLDAccountant().compose(event).get_epsilon(delta)
    assert ours <= renyi * (1 + 1e-9)
    np.testing.assert_allclose(ours, exact, rtol=2e-3)
    orders = np.array([1.5, 2.0, 8.0, 32.0])
    closed = orders * times / (2 * sigma**2)
    counted = accounting.rdp.RdpAccountant(orders).compose(event)
    bound = [
        r + np.log1p(-1 / a) - np.log(delta * a) / (a - 1)
        for a, r in zip(orders, closed, strict=True)
    ]
    np.testing.assert_allclose(counted.get_epsilon(delta), max(min(bound), 0), rtol=1e-6)
    back = federated.most_cost(ours, delta)
    np.testing.assert_allclose(back, times / sigma**2, rtol=1e-5)


def test_steps_of_chains_are_counted_by_sweeps():
    data = [np.zeros(40, np.float32), np.zeros(10, np.float32)]
    target = federated.posterior(lambda w: -w, lambda w, x: -w * x, data, batch_size=5)
    steps = [[17, 3], [8, 0]]
    found = federated.privacy_of_steps(
        target, 1e-4, 0.5, steps, delta=1e-4, noise_multipliers=[4.0, 5.0]
    )
    costs = [
        met * federated.langevin_cost(1e-4, 10.0, 0.5, "replace") + 1 / 16 + 1 / 25
        for met in (3 + 1, 2)
    ]
    wanted = [federated.epsilon_of(cost, 1e-4) for cost in costs]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    anyhow = federated.posterior(lambda w: -w, lambda w, x: -w * x, data, batch_size=5, order="iid")
    more = federated.privacy_of_steps(anyhow, 1e-4, 0.5, steps, delta=1e-4)
    cost = 25 * federated.langevin_cost(1e-4, 10.0, 0.5, "replace")
    np.testing.assert_allclose(more[0], federated.epsilon_of(cost, 1e-4), rtol=1e-6)


@pytest.mark.parametrize("order", ["full", "reshuffled"])
def test_the_best_test_of_a_row_has_the_power_that_is_counted(order):
    """Likelihood ratios of whole trajectories tell two data sets apart by mu, and no more.

    Log likelihoods are linear, so that the ratio is known: a row's steps, along its gradient.
    """
    h, norm, steps, trajectories = 0.01, 0.7, 11, 4000
    rows = np.full(6, 0.1, np.float32)
    size = {"batch_size": 2} if order == "reshuffled" else {}
    make = lambda first: federated.posterior(
        lambda w: -0.5 * w**2, lambda w, x: w * x, [np.r_[first, rows[1:]]], order=order, **size
    )
    words = jax.random.key(5)

    def ends(target, seed):
        kernel = stochgrad.sgld(federated.clipped_minibatch(target, norm), h)
        state = kernel.init(jnp.float32(0), jax.random.key(0))

        def run(key):
            stream = target.batches.init(words)
            start = state._replace(gradient_state=stream)
            move = lambda s, k: (lambda after: (after, after.position))(kernel.step(k, s)[0])
            return jax.lax.scan(move, start, jax.random.split(key, steps))[1]

        keys = jax.random.split(jax.random.key(seed), trajectories)
        return np.asarray(jax.jit(jax.vmap(run))(keys), np.float64)

    one, other = make(np.float32(5.0)), make(np.float32(-5.0))
    here, there = ends(one, 1), ends(other, 2)
    block_rows, state = [], one.batches.init(words)
    for _ in range(steps):
        batch, state = one.batches.next(state)
        block_rows.append(bool(np.any(np.asarray(batch.data) * np.asarray(batch.weight) > 1)))
    with_row = np.array(block_rows)
    moves = lambda x: (
        np.diff(np.c_[np.zeros(len(x)), x], axis=1) + h * np.c_[np.zeros(len(x)), x[:, :-1]]
    )
    statistic = lambda x: moves(x)[:, with_row].sum(axis=1)
    a, b = statistic(here), statistic(there)
    power = (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)
    weight = 1.0 if order == "full" else 3.0
    cost = with_row.sum() * federated.langevin_cost(h, weight, norm, "replace")
    error = np.sqrt(2 / trajectories * (1 + cost / 8))
    assert abs(power - np.sqrt(cost)) < Z * error
    if order == "reshuffled":
        assert with_row.sum() == federated.block_visits(one, words, 0, steps).max()


def test_the_noise_of_slopes_and_curvatures_is_what_is_said():
    """And it does not depend on data; twice one key would be one noise."""
    data = logistic(num_rows=60, clients=1)
    target = logistic_posterior(data, batch_size=7)
    draw = functools.partial(
        federated.private_surrogates,
        posterior=target,
        reference=AT,
        norm=0.5,
        noise_multiplier=3.0,
        form="full",
    )
    rows = row_by_row(AT, *data[0], 0.5)
    made = [draw(jax.random.key(n)) for n in range(150)]
    slopes = np.stack([np.asarray(s.slope[0], np.float64) for s in made]) - rows.sum(axis=0)
    sd = 3.0 * 2 * 0.5
    n = slopes.size
    assert abs((slopes**2).mean() / sd**2 - 1) < Z * np.sqrt(2 / n)
    assert np.all(np.abs(slopes.mean(axis=0)) < Z * sd / np.sqrt(len(slopes)))
    for s in made[:3]:
        assert np.linalg.eigvalsh(s.precision.matrices[0])[0] > -1e-3
    zero = federated.private_surrogates(
        jax.random.key(0), target, AT, norm=0.5, noise_multiplier=3.0, adjacency="zero_out"
    )
    np.testing.assert_allclose(
        np.asarray(made[0].slope[0], np.float64) - rows.sum(axis=0),
        2 * (np.asarray(zero.slope[0], np.float64) - rows.sum(axis=0)),
        rtol=1e-2,
        atol=1e-3,
    )


def test_no_two_rows_change_a_fisher_matrix_by_more_than_is_counted():
    from stochgrad.federated._accounting import fisher_sensitivity

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4000, 3))
    scale = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True) / 0.7, 1)
    outer = lambda x: np.einsum("ni,nj->nij", scale(x), scale(x))
    change = np.linalg.norm(outer(a) - outer(b), axis=(1, 2))
    assert change.max() <= fisher_sensitivity(0.7, "replace") * (1 + 1e-12)
    assert change.max() > 0.97 * fisher_sensitivity(0.7, "replace")
    assert (
        np.linalg.norm(outer(a), axis=(1, 2)).max() <= fisher_sensitivity(0.7, "zero_out") * 1.001
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": 0.0}, "norm must be a positive number"),
        ({"step_size": -1.0}, "step_size must be"),
        ({"delta": 1.0}, "delta must be below 1"),
        ({"steps": [1, 2]}, "steps must be numbers of steps with each of the 1 clients"),
        ({"steps": [-1]}, "steps must be numbers"),
        ({"adjacency": "swap"}, "adjacency must be one of"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"noise_multipliers": [0.0]}, "noise_multipliers must be"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(change, message):
    target = logistic_posterior(logistic(clients=1), batch_size=5)
    good = {"step_size": 1e-4, "norm": 1.0, "steps": [3], "delta": 1e-5}
    with pytest.raises(ValueError, match=message):
        federated.privacy_of_steps(target, **{**good, **change})
    plain = stochgrad.posterior(lambda w: -w, lambda w, x: -w * x, jnp.ones(3), batch_size=1)
    with pytest.raises(TypeError, match="federated"):
        federated.clipped_minibatch(plain, 1.0)
