"""Federations with known answers."""

import jax.numpy as jnp
import numpy as np

from stochgrad import federated

SIZES = (5, 40, 15)
TRUTH_PRECISION = 1.0 + sum(SIZES)


def rows(sizes=SIZES, dim=2, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n, dim)) + 2 * rng.normal(size=dim)).astype(np.float32) for n in sizes
    ]


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, x):
    return -0.5 * jnp.sum((x - theta[None]) ** 2, axis=1)


def gaussian_mean(sizes=SIZES, dim=2, **options):
    """x_si ~ N(theta, I), theta ~ N(0, I), and clients that disagree."""
    data = rows(sizes, dim)
    target = federated.posterior(log_prior, log_likelihood, data, **{"batch_size": 1, **options})
    return target, data, np.concatenate(data).sum(axis=0) / (1 + sum(sizes))


def logistic(seed=0, dim=3, clients=4, num_rows=400, skew=0.5):
    """Labels split unevenly over the clients: what one sees is not what another sees."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, dim))
    w = rng.normal(size=dim)
    y = rng.random(num_rows) < 1 / (1 + np.exp(-x @ w))
    share = rng.dirichlet(np.full(clients, skew), size=2)
    owner = np.array([rng.choice(clients, p=share[int(label)]) for label in y])
    x, y = x.astype(np.float32), y.astype(np.float32)
    return [(x[owner == s], y[owner == s]) for s in range(clients) if (owner == s).any()]


def logistic_likelihood(w, batch):
    x, y = batch
    z = x @ w
    return y * z - jnp.logaddexp(jnp.zeros_like(z), z)


def logistic_posterior(data, **options):
    return federated.posterior(
        lambda w: -0.125 * jnp.sum(w**2), logistic_likelihood, data, **options
    )
