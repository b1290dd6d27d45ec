"""Surrogates are what they say, and a conducive gradient made of them averages to zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.federated import Diagonal, Full, LowRank, Surrogates, conducive
from tests.federated.toys import gaussian_mean, logistic, logistic_likelihood, logistic_posterior


@pytest.fixture(scope="module")
def federation():
    data = logistic()
    target = logistic_posterior(data, batch_size=20)
    return data, target, federated.find_reference(target, jnp.zeros(3))


def likelihood_of(data):
    return lambda w: jnp.sum(logistic_likelihood(w, jax.tree.map(jnp.asarray, data)))


def outputs(w, batch):
    return batch[0] @ w


def of_outputs(z, batch):
    return batch[1] * z - jnp.logaddexp(jnp.zeros_like(z), z)


def test_the_reference_is_the_mode_of_all_data(federation):
    data, target, reference = federation
    pooled = stochgrad.posterior(
        lambda w: -0.125 * jnp.sum(w**2),
        logistic_likelihood,
        tuple(np.concatenate(column) for column in zip(*data, strict=True)),
        order="full",
    )
    hessian = -jax.hessian(pooled.log_density)(reference.position, pooled.batches.full)
    score = jax.grad(pooled.log_density)(reference.position, pooled.batches.full)
    assert float(score @ jnp.linalg.solve(hessian, score)) < 0.01**2
    assert reference.bytes_up == reference.rounds * len(data) * 3 * 4
    assert 3 < reference.rounds <= 100


@pytest.mark.parametrize(
    "form", ["diagonal", *(pytest.param(f, marks=pytest.mark.slow) for f in ("full", "low_rank"))]
)
def test_global_surrogates_are_the_expansion_of_each_clients_likelihood(federation, form):
    """The prior inside, a padded row that counts, or a minibatch's scale would show."""
    data, target, reference = federation
    made = federated.global_quadratic(target, reference, form=form, rank=2)
    first = federated.global_first_order(target, reference)
    at = reference.position
    for s, of_client in enumerate(data):
        slope = jax.grad(likelihood_of(of_client))(at)
        matrix = -jax.hessian(likelihood_of(of_client))(at)
        np.testing.assert_allclose(first.slope[s], slope, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(made.score(s, at), slope, rtol=1e-3, atol=1e-3)
        v = jnp.array([1.0, -2.0, 0.5])
        if form == "full":
            expected = matrix @ v
        elif form == "diagonal":
            expected = jnp.diag(matrix) * v
        else:
            values, vectors = np.linalg.eigh(matrix)
            rest = np.diag(matrix) - np.diag(
                low := (vectors[:, 1:] * values[1:]) @ vectors[:, 1:].T
            )
            expected = (low + np.diag(rest)) @ v
        found = made.precision.times(s, v)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert made.bytes_each == {"full": 48, "diagonal": 24, "low_rank": 56}[form]


@pytest.mark.slow
def test_fisher_and_gauss_newton_are_their_formulas(federation):
    data, target, reference = federation
    at = reference.position
    kinds = {
        "fisher": "fisher",
        "gauss_newton": federated.gauss_newton(outputs, of_outputs),
    }
    for name, kind in kinds.items():
        made = federated.global_quadratic(target, reference, curvature=kind)
        for s, (x, y) in enumerate(data):
            p = 1 / (1 + np.exp(-x @ np.asarray(at)))
            weight = (y - p) ** 2 if name == "fisher" else p * (1 - p)
            expected = (x * weight[:, None]).T @ x
            np.testing.assert_allclose(made.precision.matrices[s], expected, rtol=2e-3, atol=1e-3)
    diagonal = federated.global_quadratic(target, at, curvature="fisher", form="diagonal")
    full = federated.global_quadratic(target, at, curvature="fisher")
    np.testing.assert_allclose(
        diagonal.precision.values, jax.vmap(jnp.diag)(full.precision.matrices), rtol=1e-4
    )


def precision_of(form, count=3, d=6, seed=0):
    rng = np.random.default_rng(seed)
    if form == "none":
        return None
    if form == "diagonal":
        return Diagonal(jnp.asarray(rng.random((count, d)), jnp.float32))
    if form == "full":
        a = rng.normal(size=(count, d, d))
        return Full(jnp.asarray(a @ a.transpose(0, 2, 1), jnp.float32))
    rank = 1 if form == "low_rank" else 3
    return LowRank(
        jnp.asarray(rng.normal(size=(count, rank, d)), jnp.float32),
        jnp.asarray(rng.random((count, rank)), jnp.float32),
        jnp.asarray(rng.random((count, d)), jnp.float32),
    )


@pytest.mark.parametrize("form", ["none", "diagonal", "full", "low_rank", "many_ranks"])
def test_a_conducive_gradient_is_its_formula_and_averages_to_zero(form):
    """Weighed by the shares of steps; by the clients' number, say, it would not vanish."""
    target, _, _ = gaussian_mean(dim=6)
    shares = target.batches.owners.shares
    rng = np.random.default_rng(1)
    origin = jnp.asarray(rng.normal(size=6), jnp.float32)
    slope = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    made = Surrogates(origin, slope, precision_of(form))
    gradient = conducive(target, made, strength=0.5)
    at = jnp.asarray(rng.normal(size=6), jnp.float32)
    key = jax.random.key(0)
    found: dict[int, tuple] = {}
    mine, plain = gradient.init(key, at), target.batches.init(key)

    @jax.jit
    def both(mine, plain):
        batch, plain = target.batches.next(plain)
        score, mine = gradient.next(key, at, mine)
        bare = jax.value_and_grad(target.log_density)(at, batch)
        return jax.tree.map(jnp.subtract, score(at), bare), mine, plain

    while len(found) < 3:
        gap, mine, plain = both(mine, plain)
        found[int(mine.value.client)] = gap
    total = sum(made.score(t, at) for t in range(3))
    for s, (_, g) in found.items():
        expected = 0.5 * (total - made.score(s, at) / np.float32(shares[s]))
        np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-3)
    average = sum(np.float32(shares[s]) * g for s, (_, g) in found.items())
    np.testing.assert_allclose(average, 0.0, atol=2e-4)
    value = sum(np.float32(shares[s]) * v for s, (v, _) in found.items())
    np.testing.assert_allclose(value, 0.0, atol=2e-3)


def test_its_value_is_what_its_gradient_is_the_gradient_of():
    target, _, _ = gaussian_mean(dim=6)
    slope = jnp.ones((3, 6))
    gradient = conducive(target, Surrogates(jnp.zeros(6), slope, precision_of("full")))
    at = jnp.linspace(-1.0, 1.0, 6)
    score, _ = gradient.next(jax.random.key(0), at, gradient.init(jax.random.key(0), at))
    automatic = jax.grad(lambda x: score(x)[0])(at)
    np.testing.assert_allclose(score(at)[1], automatic, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_with_a_control_variate_and_first_order_surrogates_there_is_no_noise_at_the_reference(
    federation,
):
    """The clients' own centers and the conducive gradient have to fit together."""
    _, target, reference = federation
    centered = stochgrad.control_variate(target, reference)
    surrogates = federated.global_first_order(target, reference)
    gradient = conducive(centered, surrogates)
    at = reference.position
    state = gradient.init(jax.random.key(0), at)
    found, alone = [], []
    for _ in range(20):
        score, state = gradient.next(jax.random.key(0), at, state)
        found.append(np.asarray(score(at)[1]))
    state = centered.init(jax.random.key(0), at)
    for _ in range(20):
        score, state = centered.next(jax.random.key(0), at, state)
        alone.append(np.asarray(score(at)[1]))
    exact = jax.grad(target.log_density)(at, target.batches.full)
    np.testing.assert_allclose(found, np.broadcast_to(exact, (20, 3)), atol=0.05)
    assert np.std(alone, axis=0).min() > 1.0  # what a client does not know of the others


def test_exact_is_for_gaussian_likelihoods_alone(federation):
    _, target, reference = federation
    with pytest.raises(ValueError, match="not a Gaussian function"):
        federated.exact(target, reference)
    plain, data, _ = gaussian_mean(batch_size=7)
    made = federated.exact(plain, jnp.zeros(2))
    for s, x in enumerate(data):
        np.testing.assert_allclose(made.slope[s], x.sum(axis=0), rtol=1e-4)
        np.testing.assert_allclose(made.precision.matrices[s], len(x) * np.eye(2), atol=1e-3)


def test_local_surrogates_of_a_gaussian_likelihood_are_exact():
    target, data, mean = gaussian_mean(batch_size=4)
    laplace = federated.laplace_local(target, jnp.zeros(2))
    drawn = federated.sampled(jax.random.key(0), target, jnp.zeros(2), num_samples=2000)
    for s, x in enumerate(data):
        np.testing.assert_allclose(laplace.slope[s], x.sum(axis=0), rtol=1e-3, atol=1e-2)
        matrix = drawn.precision.matrices[s]
        np.testing.assert_allclose(matrix / len(x), np.eye(2), atol=0.25)
    merged, covariance = federated.fisher_merge(target, laplace)
    np.testing.assert_allclose(merged, mean, rtol=1e-3)
    np.testing.assert_allclose(covariance, np.eye(2) / 61, atol=1e-5)
    diagonal = federated.laplace_local(target, jnp.zeros(2), form="diagonal")
    np.testing.assert_allclose(diagonal.score(1, merged), laplace.score(1, merged), atol=1e-2)


def test_means_and_precisions_make_surrogates():
    mean = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    made = federated.gaussian(mean, np.stack([np.eye(2), 2 * np.eye(2)]))
    diagonal = federated.gaussian(mean, jnp.array([[1.0, 1.0], [2.0, 2.0]]), origin=jnp.ones(2))
    for q in (made, diagonal):
        np.testing.assert_allclose(q.score(1, jnp.zeros(2)), 2 * mean[1], rtol=1e-5)
    with pytest.raises(ValueError, match="client 1 must be positive definite"):
        federated.gaussian(mean, np.stack([np.eye(2), -np.eye(2)]))
    with pytest.raises(ValueError, match="must be positive"):
        federated.gaussian(mean, -mean)


@pytest.mark.slow
def test_an_unsafe_surrogate_is_named_with_its_margin_and_capped():
    target, _, _ = gaussian_mean()
    target = federated.visiting(target, probabilities=[0.8, 0.1, 0.1])
    exact = federated.exact(target, jnp.zeros(2))
    found = federated.stability(target, exact)
    np.testing.assert_allclose(found.margin, 61, rtol=1e-3)
    np.testing.assert_allclose(found.far_margin, 61, rtol=1e-3)
    assert not found.unsafe().any()
    wrong = exact.scaled([1.0, 3.0, 1.0])
    assert federated.stability(target, wrong).unsafe().tolist() == [False, True, False]
    safe = federated.capped(target, wrong)
    assert not federated.stability(target, safe).unsafe().any()
    np.testing.assert_array_equal(safe.slope, exact.slope)
    run = {
        "step_size": 1e-3,
        "local_steps": 9,
        "init": jnp.zeros(2),
        "num_samples": 2,
        "progress": False,
    }
    call = lambda **more: federated.sample(
        jax.random.key(0), target, surrogate=wrong, reference=jnp.zeros(2), **run, **more
    )
    with pytest.raises(ValueError, match=r"client 1 \(margin -"):
        call(on_unsafe="raise", probabilities=[0.8, 0.1, 0.1])
    with pytest.warns(federated.StabilityWarning, match="client 1"):
        call(probabilities=[0.8, 0.1, 0.1])
    with pytest.warns(
        federated.StabilityWarning, match=r"the curvature of clients 1 to 0\.\d+ of itself"
    ):
        call(on_unsafe="cap", probabilities=[0.8, 0.1, 0.1])


def test_eigenvalues_of_many_dimensions_are_found():
    from stochgrad.federated._curvature import extreme_eigenvalues

    a = np.random.default_rng(0).normal(size=(100, 100))
    a = (a + a.T) / 2
    values = np.linalg.eigvalsh(a)
    found = extreme_eigenvalues(lambda v: (a @ v).astype(np.float32), 100)
    np.testing.assert_allclose(found, (values[0], values[-1]), rtol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: federated.global_quadratic(t, jnp.zeros(2), form="half"), "form must be"),
        (lambda t: federated.global_quadratic(t, jnp.zeros(2), curvature="k"), "curvature must be"),
        (
            lambda t: federated.global_first_order(t, jnp.full(2, np.nan)),
            "reference must be finite",
        ),
        (lambda t: conducive(t, Surrogates(jnp.zeros(2), jnp.zeros((2, 2)))), "2 clients"),
        (lambda t: federated.find_reference(t, jnp.full(2, np.inf)), "init must be finite"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian_mean()[0])


def test_a_conducive_gradient_keeps_what_its_target_has():
    """Where to start and what a position stands for were lost on the way."""
    target, _, _ = gaussian_mean()
    made = Surrogates(jnp.zeros(2), jnp.zeros((3, 2)))
    inner = stochgrad.gradients.minibatch(target)._replace(
        initial=lambda key: jnp.full(2, 7.0), model=lambda position: {"mean": position}
    )
    gradient = conducive(inner, made)
    assert gradient.posterior is target
    np.testing.assert_array_equal(gradient.initial(jax.random.key(0)), [7.0, 7.0])
    assert gradient.model(3.0) == {"mean": 3.0}


def test_surrogates_of_other_positions_are_refused():
    target, _, _ = gaussian_mean()
    gradient = conducive(target, Surrogates(jnp.zeros(3), jnp.zeros((3, 3))))
    with pytest.raises(ValueError, match=r"surrogates are of positions of shape \(3,\)"):
        gradient.init(jax.random.key(0), jnp.zeros(2))


def test_data_without_clients_are_refused():
    plain = stochgrad.posterior(lambda p: 0.0 * p, lambda p, x: x * p, jnp.ones(3), order="full")
    with pytest.raises(TypeError, match="is not federated"):
        conducive(plain, Surrogates(jnp.zeros(()), jnp.zeros((2,))))


@pytest.mark.slow
def test_what_shrinking_makes_worse_is_left_alone():
    """A likelihood that is convex somewhere needs its surrogate's curvature."""
    x = np.linspace(1.0, 2.0, 12, dtype=np.float32)

    def bent(theta, row):
        return 0.5 * (row[:, 1] * theta[0] ** 2 - 2.0 * row[:, 0] * theta[1] ** 2)

    rows = [np.stack([x, x], axis=1), np.stack([x, -2 * x], axis=1)]
    target = federated.posterior(lambda t: -0.5 * jnp.sum(t**2), bent, rows, batch_size=3)
    exact = federated.global_quadratic(target, jnp.zeros(2))
    assert not federated.stability(target, exact).unsafe(far=False).any()
    first = federated.global_first_order(target, jnp.zeros(2))
    assert federated.stability(target, first).unsafe().tolist() == [True, False]
    safe = federated.capped(target, exact)
    before, after = (federated.stability(target, s).margin.min() for s in (first, safe))
    assert after > before
