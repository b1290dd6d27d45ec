"""Slopes that are taken anew along the chain, or at the mean of a first run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.core import Shared
from stochgrad.federated import current_visit
from stochgrad.federated._renewal_law import renewed_covariance
from tests.conftest import Z
from tests.federated.test_surrogates import precision_of
from tests.federated.toys import gaussian_mean, logistic, logistic_posterior

pytestmark = [
    pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning"),
    pytest.mark.filterwarnings("ignore::stochgrad.federated.StabilityWarning"),
]

AT = jnp.array([0.7, -1.2, 0.4])


def over_clients_and_minibatches(target, surrogates, state, position, **options):
    """Each estimate from one state, with the probability of its client and minibatch."""
    clients = target.batches.owners
    found, weights = [], []
    for s in range(clients.count):
        for block in range(clients.blocks[s]):

            def next(stream, s=s, block=block):
                visit = stream.value._replace(client=jnp.int32(s))
                weight = jnp.float32(clients.blocks[s] / clients.shares[s])
                return clients.at(s, block, weight), Shared(visit, optional=True)

            only = target._replace(batches=target.batches._replace(next=next))
            step = federated.conducive_svrg(only, surrogates, **options).next
            score, _ = step(jax.random.key(0), position, state)
            found.append(jax.tree.map(np.asarray, score(position)))
            weights.append(clients.shares[s] / clients.blocks[s])
    return found, np.array(weights)


@pytest.mark.parametrize("form", ["none", "full"])
@pytest.mark.parametrize("control_variate", [False, True])
def test_estimates_average_to_the_full_score_by_enumeration(form, control_variate):
    """Over clients that are not Gaussian and their minibatches, from the anchor of a past visit."""
    target = logistic_posterior(logistic(num_rows=60), batch_size=8)
    target = federated.visiting(target, probabilities=[0.1, 0.2, 0.3, 0.4])
    made = federated.global_first_order(target, jnp.zeros(3))
    if form == "full":
        made = made._replace(precision=precision_of("full", count=4, d=3))
    options = {"period": 2, "control_variate": control_variate}
    gradient = federated.conducive_svrg(target, made, **options)
    state = gradient.init(jax.random.key(0), jnp.zeros(3))
    step = jax.jit(lambda at, state: gradient.next(jax.random.key(0), at, state)[1])
    for i in range(3):
        state = step(AT + 0.1 * i, state)
    np.testing.assert_allclose(state.anchor, AT + 0.2, rtol=1e-6)
    here = -0.5 * AT
    found, weights = over_clients_and_minibatches(target, made, state, here, **options)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    value, slope = jax.value_and_grad(target.log_density)(here, target.batches.full)
    size = max(float(np.abs(g).max()) for _, g in found)
    mean = sum(w * g for w, (_, g) in zip(weights, found, strict=True))
    np.testing.assert_allclose(mean, slope, atol=2e-6 * size)
    assert np.ptp([g for _, g in found], axis=0).min() > 0.1  # there is noise to average out
    mean = sum(w * v for w, (v, _) in zip(weights, found, strict=True))
    np.testing.assert_allclose(mean, value, rtol=1e-5)


def test_of_gaussian_clients_with_their_curvature_every_estimate_is_the_full_score():
    """At every position and anchor: what one client does not know, the surrogates do."""
    target, _, mean = gaussian_mean()
    exact = federated.global_quadratic(target, jnp.zeros(2))
    gradient = federated.conducive_svrg(target, exact, period=1)
    state = gradient.init(jax.random.key(0), jnp.zeros(2))
    rng = np.random.default_rng(0)
    step = jax.jit(lambda at, state: gradient.next(jax.random.key(0), at, state)[1])
    for at in rng.normal(size=(3, 2)).astype(np.float32):
        here = jnp.asarray(rng.normal(size=2), jnp.float32)
        found, _ = over_clients_and_minibatches(target, exact, state, here, period=1)
        for _, g in found:
            np.testing.assert_allclose(g, -61 * (here - mean), atol=1e-3)
        state = step(jnp.asarray(at), state)


def test_a_value_is_what_its_gradient_is_the_gradient_of():
    target, _, _ = gaussian_mean(dim=6)
    made = federated.global_first_order(target, jnp.ones(6))
    made = made._replace(precision=precision_of("diagonal"))
    gradient = federated.conducive_svrg(target, made, period=1, control_variate=False)
    at = jnp.linspace(-1.0, 1.0, 6)
    score, _ = gradient.next(jax.random.key(0), at, gradient.init(jax.random.key(0), at))
    automatic = jax.grad(lambda x: score(x)[0])(at)
    np.testing.assert_allclose(score(at)[1], automatic, rtol=1e-4, atol=1e-3)


def test_an_anchor_stays_for_a_period_of_visits():
    target = federated.visiting(gaussian_mean()[0], local_steps=3)
    made = federated.global_first_order(target, jnp.zeros(2))
    gradient = federated.conducive_svrg(target, made, period=2)
    state = gradient.init(jax.random.key(0), jnp.zeros(2))
    step = jax.jit(lambda at, state: gradient.next(jax.random.key(0), at, state)[1])
    anchors, visits = [], []
    for i in range(15):
        state = step(jnp.full(2, 1.0 + i), state)
        anchors.append(float(state.anchor[0]))
        visits.append(int(current_visit(state).number))
    assert anchors == [0.0] * 6 + [7.0] * 6 + [13.0] * 3
    assert visits == sorted([1, 2, 3, 4, 5] * 3)


def call(**options):
    target, _, _ = gaussian_mean(batch_size=5)
    settings = {"surrogate": "global_first_order", "local_steps": 4, "step_size": 1e-3}
    settings |= {"init": jnp.zeros(2), "num_chains": 2, "progress": False, "num_samples": 20}
    return federated.sample(
        jax.random.key(0), target, **{**settings, "probabilities": [0.3, 0.4, 0.3], **options}
    )


def test_a_run_in_two_parts_is_a_run_in_one(tmp_path):
    """Also from the middle of a period, with a first run that is made anew."""
    more = {"surrogate_period": 3, "thin": 3, "reference": "trajectory", "num_warmup": 4}
    whole = call(**more)
    call(**more, num_samples=7, checkpoint=tmp_path / "run")
    again = call(**more, checkpoint=tmp_path / "run", resume=True)
    np.testing.assert_array_equal(whole.positions[:, 7:], again.positions[:, -13:])
    with pytest.raises(ValueError, match="surrogate_period was 3 and is now 2"):
        call(**{**more, "surrogate_period": 2}, checkpoint=tmp_path / "run", resume=True)


def test_what_renewals_and_a_first_run_send_is_counted():
    d = 2 * 4  # bytes of a position
    plain, renewed = call(thin=4), call(thin=4, surrogate_period=5)
    assert renewed.stats["renewals"][0].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    more = 3 * d * renewed.stats["renewals"]
    np.testing.assert_array_equal(renewed.stats["bytes_up"], plain.stats["bytes_up"] + more)
    more = more + 2 * d * plain.stats["visits"]
    np.testing.assert_array_equal(renewed.stats["bytes_down"], plain.stats["bytes_down"] + more)
    again = call(thin=4, num_warmup=6, reference="trajectory")
    first = 2 * 6 * d  # visits of two chains
    up, down = (again.attrs[n] - plain.attrs[n] for n in ("setup_bytes_up", "setup_bytes_down"))
    assert (up, down) == (first + 3 * d, first + 2 * 3 * d)


def test_the_look_by_which_surrogates_are_chosen_is_counted():
    """A matrix of each client, also where first order is enough, and once where it is not."""
    first, looked = call(), call(surrogate="auto")
    assert looked.attrs["surrogate"] == "global_first_order"
    more = looked.attrs["setup_bytes_up"] - first.attrs["setup_bytes_up"]
    assert more == 3 * 2 * 2 * 4
    full = call(surrogate="global_quadratic", local_steps=200)
    looked = call(surrogate="auto", local_steps=200)
    assert looked.attrs["surrogate"] == "global_quadratic"
    assert looked.attrs["setup_bytes_up"] == full.attrs["setup_bytes_up"]


def test_slopes_are_taken_at_the_mean_of_the_first_run():
    """Of a posterior whose mean is far from its mode: exp(theta) rates, few counts."""
    counts = [np.zeros((2, 1), np.float32), np.ones((1, 1), np.float32)]
    target = federated.posterior(
        lambda t: -0.125 * jnp.sum(t**2),
        lambda t, y: y[:, 0] * t[0] - jnp.exp(t[0]),
        counts,
        batch_size=2,
    )
    seen = []

    def surrogate(posterior, reference):
        seen.append(float(reference[0]))
        return federated.global_first_order(posterior, reference)

    draws = federated.sample(
        jax.random.key(1),
        target,
        surrogate=surrogate,
        reference="trajectory",
        step_size=0.03,
        init=jnp.zeros(1),
        num_warmup=1000,
        num_samples=2,
        thin=10,
        num_chains=32,
        progress=False,
    )
    grid = np.linspace(-15, 5, 20001)
    log_p = -0.125 * grid**2 + grid - 3 * np.exp(grid)
    p = np.exp(log_p - log_p.max())
    mean = (grid * p).sum() / p.sum()
    sd = np.sqrt(((grid - mean) ** 2 * p).sum() / p.sum())
    assert abs(grid[p.argmax()] - mean) > 0.2 * sd  # the mode is elsewhere
    # 32 chains of 500 draws, at least one in four of them independent; half of it for the step
    assert abs(seen[0] - mean) < Z * sd / np.sqrt(32 * 500 / 4) + 0.05 * sd
    assert draws.positions.shape == (32, 2, 1)


def by_recursion(visits, exact, p, h, steps, period):
    """The variance over all steps of Euler's method in one dimension, to convergence."""
    z, heat = np.full((2, 2), 1 / exact), np.diag([2 * h, 0.0])
    turns = [np.array([[1 - h * v, h * (v - exact)], [0.0, 1.0]]) for v in visits]
    for _ in range(400):
        z, seen = np.full((2, 2), z[0, 0]), []
        for _ in range(period):
            each = [z] * len(p)
            for _ in range(steps):
                each = [a @ x @ a.T + heat for a, x in zip(turns, each, strict=True)]
                seen.append(sum(w * x[0, 0] for w, x in zip(p, each, strict=True)))
            z = sum(w * x for w, x in zip(p, each, strict=True))
    return np.mean(seen)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(("period", "steps"), [(1, 60), (3, 20)])
def test_draws_spread_as_the_law_says(period, steps):
    """With shares far from the clients' rows, so that their own curvature shows."""
    p, h = np.array([0.6, 0.1, 0.3]), 0.02 / 61
    target, data, mean = gaussian_mean(order="full", batch_size=None)
    draws = federated.sample(
        jax.random.key(3),
        target,
        surrogate="global_first_order",
        surrogate_period=period,
        probabilities=p,
        local_steps=steps,
        step_size=h,
        init=jnp.zeros(2),
        num_samples=2000,
        num_warmup=300,
        thin=11,  # no divisor of a visit: all of its steps are seen
        num_chains=128,
        progress=False,
    )
    visits = 1 + np.array([len(x) for x in data]) / p
    law = renewed_covariance(visits[:, None, None], np.array([[61.0]]), p, h * steps, period)[0, 0]
    expected = by_recursion(visits, 61.0, p, h, steps, period)
    assert expected * 61 > 1.1
    assert abs(law / expected - 1) < h * visits.max() / 2  # Euler's steps, at the longest
    of_chain = ((np.asarray(draws.positions, np.float64) - mean) ** 2).mean(axis=(1, 2)) / expected
    error = of_chain.std(ddof=1) / np.sqrt(len(of_chain))
    assert abs(of_chain.mean() - 1) < Z * error
    assert Z * error < 0.05


def test_the_law_of_curvature_that_is_known_is_the_posteriors():
    exact = np.diag([2.0, 5.0])
    visits = np.stack([exact] * 3)
    p = np.array([0.5, 0.3, 0.2])
    for period in (1, 4):
        found = renewed_covariance(visits, exact, p, 0.7, period)
        np.testing.assert_allclose(found, np.linalg.inv(exact), rtol=1e-5, atol=1e-9)
    apart = visits - 60 * np.eye(2)
    assert np.isinf(renewed_covariance(apart, exact, p, 0.7, 2)).all()
    assert renewed_covariance(visits, exact, p, 0.7, 10**9) is None


def test_chains_of_a_first_run_that_do_not_agree_are_told_of():
    """Two modes, a chain in each: the mean is in neither."""
    target = federated.posterior(
        lambda t: -0.5 * jnp.sum((t**2 - 9.0) ** 2),
        lambda t, x: 0.0 * (x @ t),
        [np.ones((4, 1), np.float32)] * 2,
        batch_size=2,
    )
    settings = {"step_size": 1e-3, "num_samples": 2, "num_warmup": 100, "num_chains": 2}
    with pytest.warns(federated.StabilityWarning, match="chains of the first run"):
        federated.sample(
            jax.random.key(0),
            target,
            init=jnp.array([[-3.0], [3.0]]),
            reference="trajectory",
            surrogate="global_first_order",
            progress=False,
            **settings,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate_period": 0}, "surrogate_period must be"),
        ({"surrogate_period": 2, "method": "DSGLD"}, "surrogate_period is for method='FSGLD'"),
        ({"surrogate_period": 2, "surrogate": "sampled"}, "takes them elsewhere"),
        ({"surrogate_period": 2, "local_steps": [1, 2, 3]}, "local_steps must be one number"),
        ({"reference": "trajectory"}, "num_warmup=0: give two or more"),
        ({"reference": "trajectory", "num_warmup": 9, "method": "DSGLD"}, "reference='trajectory'"),
        ({"reference": "mode"}, "reference must be one of"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_a_first_run_that_diverges_is_named():
    with (
        pytest.warns(stochgrad.DivergenceWarning, match="diverged"),
        pytest.raises(ValueError, match="chains of the first run"),
    ):
        call(reference="trajectory", num_warmup=60, thin=10, step_size=10.0)
