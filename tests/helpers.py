"""Targets with known answers, and Monte Carlo errors."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size

import stochgrad
from stochgrad.core import Gradient


def run_on_devices(count, script):
    """Run a script in a process that sees its cores as several devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", textwrap.dedent(script)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def exact_gradient(log_density):
    """A gradient without noise."""

    def next(key, position, state):
        return jax.value_and_grad(log_density), state

    return Gradient(lambda key, position: (), next)


def noisy_gradient(log_density, sd):
    """A gradient with independent normal noise of a known standard deviation."""

    def next(key, position, state):
        noise = sd * jax.random.normal(key, jnp.shape(position))

        def score(position):
            value, g = jax.value_and_grad(log_density)(position)
            return value, g + noise

        return score, state

    return Gradient(lambda key, position: (), next)


def gaussian_rows(num_rows, dim, seed=0):
    """Rows whose posterior mean and precision are known: x_i ~ N(theta, I), theta ~ N(0, I)."""
    x = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)

    def log_prior(theta):
        return -0.5 * jnp.sum(theta**2)

    def log_likelihood(theta, batch):
        return -0.5 * jnp.sum((batch - theta[None]) ** 2, axis=1)

    return x, log_prior, log_likelihood, x.sum(axis=0) / (num_rows + 1), num_rows + 1.0


def gaussian_posterior(num_rows=20, dim=2, **options):
    x, log_prior, log_likelihood, mean, precision = gaussian_rows(num_rows, dim)
    return stochgrad.posterior(log_prior, log_likelihood, x, **options), mean, precision


def mean_and_error(values):
    """Mean over chains and draws and its standard error, from the draws' own autocorrelation."""
    values = np.asarray(values, np.float64)
    if values.ndim == 2:
        values = values[..., None]
    ess = effective_sample_size(values)
    return values.mean(axis=(0, 1)), np.sqrt(values.var(axis=(0, 1)) / ess)
