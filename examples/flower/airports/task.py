"""The model, and the dynamics: what server and clients agree on."""

import jax.numpy as jnp

import stochgrad

COLUMNS = ["evening", "summer", "distance", "temp", "humid", "wind_speed", "precip", "visib"]
INIT = jnp.zeros(len(COLUMNS) + 1)
BATCH = 500
ROWS = 320_000


def log_prior(w):
    """Normal with a standard deviation of two."""
    return -0.125 * jnp.sum(w**2)


def log_likelihood(w, batch):
    """Logistic regression, one value a row."""
    x, late = batch
    z = w[0] + x @ w[1:]
    return late * z - jnp.logaddexp(jnp.zeros_like(z), z)


def kernel(gradient):
    """Underdamped Langevin dynamics; a unit of time crosses the posterior a few times."""
    stiff = (0.25 * ROWS) ** 0.5
    return stochgrad.sghmc(gradient, 0.3 / stiff, friction=0.3 * stiff, integrator="BAOAB")
