"""Every flow with every estimator, against gradients by brute force."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from stochgrad.flows import parameters, reverse_kl, split_flow
from stochgrad.gradients import leave_one_out_coefficients
from tests.flows import toys
from tests.flows.toys import log_density

pytestmark = pytest.mark.slow

FLOWS = [
    "affine coupling", "inverted coupling", "spline coupling", "implicit coupling",
    "autoregressive", "inverted autoregressive", "block autoregressive", "triangular spline",
    "containers", "conditional", "continuous",
]  # fmt: skip
ESTIMATORS = {"path": "path", "total": "total", "part": 0.4, "auto": "auto", "score": "score"}
COUNT = 5


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def by_force(flow, key, condition):
    """Gradients of each draw, path and total, and those in the draw, from the whole Jacobian."""
    params, static = split_flow(flow)

    def one(key):
        def draw(p):
            x, log_q, score = toys.score_by_force(eqx.combine(p, static), key, condition)
            return x, log_q, jax.lax.stop_gradient(score)

        (x, log_q, score), pull = jax.vjp(draw, params)
        up = jax.grad(log_density)(x)
        zero = jnp.zeros_like(x)
        path = pull((up - score, 0.0 * log_q, zero))[0]
        total = pull((up, -jnp.ones_like(log_q), zero))[0]
        return ravel_pytree(path)[0], ravel_pytree(total)[0], up, score, log_density(x) - log_q

    return jax.vmap(one)(jax.random.split(key, COUNT))


def references(path, total, up, score, reward):
    """The mean over draws that each estimator says it is."""
    c = leave_one_out_coefficients(up, score)[:, None]
    others = (jnp.sum(reward) - reward) / (COUNT - 1)
    at_fixed = path - total
    each = {
        "path": path,
        "total": total,
        "part": 0.4 * total + 0.6 * path,
        "auto": c * total + (1 - c) * path,
        "score": (reward - others)[:, None] * at_fixed,
    }
    return {name: jnp.mean(rows, axis=0) for name, rows in each.items()}


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_are_those_of_brute_force(name, key):
    """Would catch a wrong rule of a layer, an estimator that leaks another, one that fails."""
    flow = toys.make(name)
    condition = jnp.linspace(0.0, 1.0, 3) if name == "conditional" else None
    params = parameters(flow)

    @jax.jit
    def both(params):
        found = {}
        for which, estimator in ESTIMATORS.items():
            objective = reverse_kl(
                flow, log_density, estimator, num_samples=COUNT, condition=condition
            )
            found[which] = ravel_pytree(objective.next(key, None, ())[0](params)[1])[0]
        return found, references(*by_force(flow, key, condition))

    found, wanted = both(params)
    for estimator in ESTIMATORS:
        size = jnp.max(jnp.abs(wanted[estimator]))
        error = jnp.max(jnp.abs(found[estimator] - wanted[estimator]))
        assert size > 1e-3, estimator
        assert error < 1e-9 * size, estimator
    assert not np.allclose(found["auto"], found["total"])
