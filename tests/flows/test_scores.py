"""Scores carried along the forward pass, and path gradients, are exact."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import transforms

import stochgrad
from stochgrad.flows import draw_with_score, parameters, reverse_kl
from stochgrad.gradients import dense, push_score, triangular
from tests.conftest import Z
from tests.flows import toys
from tests.flows.toys import log_density

pytestmark = pytest.mark.slow

NAMES = [
    "affine coupling", "inverted coupling", "spline coupling", "implicit coupling",
    "autoregressive", "inverted autoregressive", "block autoregressive", "triangular spline",
    "containers", "conditional",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_brute_force(name, key):
    """Would catch a wrong rule of any layer."""
    flow = toys.make(name)
    condition = jnp.linspace(0.0, 1.0, 3) if name == "conditional" else None

    @jax.jit
    def both():
        return (
            draw_with_score(key, flow, 3, condition),
            toys.scores_by_force(flow, key, 3, condition),
        )

    for got, want in zip(*both(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["implicit coupling", "continuous"])
def test_path_gradient_is_that_of_brute_force(name, key):
    """Where nothing can be inverted: would catch a surrogate that leaks another gradient."""
    flow = toys.make(name)
    params, static = eqx.partition(flow, eqx.is_inexact_array)

    @jax.jit
    def both(params):
        flow = eqx.combine(params, static)
        x, log_q, score = toys.scores_by_force(flow, key, 3)
        up = jax.vmap(jax.grad(log_density))(x) - score
        _, pull = jax.vjp(lambda p: toys.draws(eqx.combine(p, static), key, 3), params)
        objective = reverse_kl(flow, log_density, num_samples=3)
        value, gradient = objective.next(key, None, ())[0](params)
        bound = jnp.mean(jax.vmap(log_density)(x) - log_q)
        return gradient, pull(up / 3)[0], value, bound

    gradient, wanted, value, bound = both(params)
    got, want = (jax.flatten_util.ravel_pytree(g)[0] for g in (gradient, wanted))
    assert jnp.max(jnp.abs(got - want)) < 1e-10 * jnp.max(jnp.abs(want))
    np.testing.assert_allclose(value, bound, rtol=1e-12)


@pytest.mark.parametrize("name", ["spline coupling", "autoregressive"])
def test_path_gradient_is_sticking_the_landing(name, key):
    """The same as flowjax's own estimator, which inverts the flow."""
    from flowjax.train.losses import ElboLoss

    flow = toys.make(name)
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    theirs = jax.grad(lambda p: ElboLoss(log_density, 6, stick_the_landing=True)(p, static, key))(
        params
    )
    score, _ = reverse_kl(flow, log_density, num_samples=6).next(key, None, ())
    ours = jax.jit(score)(params)[1]
    a, b = (jax.flatten_util.ravel_pytree(g)[0] for g in (ours, theirs))
    assert jnp.max(jnp.abs(a + b)) < 1e-10 * jnp.max(jnp.abs(a))


def test_every_estimator_has_the_total_gradients_mean(key):
    """Paired differences with the total gradient, in random directions."""
    flow = toys.make("affine coupling")
    params, count = parameters(flow), 2000
    names = "path", "auto", "score", "total"
    objectives = [reverse_kl(flow, log_density, name, num_samples=12) for name in names]
    size = jax.flatten_util.ravel_pytree(params)[0].size
    directions = jax.random.normal(jax.random.key(3), (size, 5))

    def one(key):
        scores = [objective.next(key, params, ())[0] for objective in objectives]
        return [jax.flatten_util.ravel_pytree(s(params)[1])[0] @ directions for s in scores]

    *ours, total = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(key, count)))
    for name, gradient in zip(names, ours, strict=False):
        # "auto" has draws of its own
        d = gradient - total if name != "auto" else gradient - total.mean(0)
        noise = d.std(0) if name != "auto" else np.hypot(d.std(0), total.std(0))
        assert np.all(np.abs(d.mean(0)) < Z * noise / np.sqrt(count)), name
        assert np.all(d.std(0) > 0)


def test_no_variance_is_left_where_the_flow_fits(key):
    flow = toys.make("affine coupling")
    params = parameters(flow)

    def size(estimator):
        score = reverse_kl(flow, flow.log_prob, estimator, num_samples=6).next(key, None, ())[0]
        return jnp.max(jnp.abs(jax.flatten_util.ravel_pytree(score(params)[1])[0]))

    path, auto, total = jax.jit(lambda: [size(e) for e in ("path", "auto", "total")])()
    assert path < 1e-12
    assert auto < 1e-12
    assert total > 1e-2


def test_layers_of_numpyro(key):
    """Rules of numpyro's transforms against the dense solve."""
    from numpyro.distributions.flows import (
        BlockNeuralAutoregressiveTransform,
        InverseAutoregressiveTransform,
    )
    from numpyro.nn import AutoregressiveNN, BlockNeuralAutoregressiveNN

    init, arn = AutoregressiveNN(4, [6], permutation=jnp.arange(4))
    weights = init(key, (4,))[1]
    init, block = BlockNeuralAutoregressiveNN(4, [3, 3])
    block_weights = init(key, (4,))[1]
    scale = jnp.tril(jax.random.normal(key, (4, 4)), -1) + 2 * jnp.eye(4)
    layers = [
        InverseAutoregressiveTransform(lambda x: arn(weights, x)),
        BlockNeuralAutoregressiveTransform(lambda x: block(block_weights, x)),
        transforms.LowerCholeskyAffine(jnp.ones(4), scale),
        transforms.IndependentTransform(transforms.SigmoidTransform(), 1),
        transforms.PermuteTransform(jnp.array([2, 0, 1, 3])),
        transforms.LowerCholeskyAffine(jnp.ones(4), scale).inv,
    ]
    layers.append(transforms.ComposeTransform([layers[0], layers[4], layers[2]]))
    x, score = jax.random.normal(key, (2, 2, 4))

    @jax.jit
    def all_of(x, score):
        found = []
        for layer in layers:

            def forward(x, layer=layer):
                y, between = layer.call_with_intermediates(x)
                return y, jnp.sum(layer.log_abs_det_jacobian(x, y, between))

            wanted = jax.vmap(lambda x, s, f=forward: dense(f, x, s, "it"))(x, score)
            found.append((push_score(layer, x, score), wanted))
        return found

    for pushed, wanted in all_of(x, score):
        np.testing.assert_allclose(pushed.score, wanted, rtol=1e-9, atol=1e-9)
        assert pushed.log_det.shape == (2,)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 20])
def test_triangular_layers_whole_and_by_sweeps(size, key):
    """Up to eight dimensions the Jacobian is whole; its order is any, as of a permuted network."""
    order = jax.random.permutation(key, size)
    below = jnp.tril(jax.random.normal(key, (size, size)), -1)[order][:, order]

    def forward(x):
        slope = 1.5 + jnp.tanh(below @ x)
        return slope * x + jnp.sin(below @ x), jnp.sum(jnp.log(slope))

    x, score = jax.random.normal(jax.random.key(2), (2, size))
    found = triangular(forward, x, score, 1.5 + jnp.tanh(below @ x))
    np.testing.assert_allclose(found, dense(forward, x, score, "it"), rtol=1e-9, atol=1e-9)


def test_a_rule_of_ones_own():
    class Double:
        pass

    with pytest.raises(TypeError, match="no rule for the score behind a layer of type Double"):
        push_score(Double(), jnp.ones(2), jnp.ones(2))
    push_score.register(Double, lambda layer, x, s, c=None: (2 * x, jnp.log(2.0) * x.size, s / 2))
    assert push_score(Double(), jnp.ones(2), jnp.ones(2))[2][0] == 0.5


def test_too_large_to_solve_densely():
    with pytest.raises(ValueError, match="no inverse and no rule of its own, and with 65 dim"):
        dense(lambda x: (x, jnp.sum(x)), jnp.ones(65), jnp.ones(65), "a layer")


def test_single_precision_stays_single():
    with jax.enable_x64(False):
        flow = toys.make("autoregressive")
        draws = draw_with_score(jax.random.key(0), flow, 3)
        assert {leaf.dtype for leaf in draws} == {jnp.dtype("float32")}
        assert stochgrad.flows.parameters(flow) is not None
