"""What ``numpyro.infer.MCMC`` says after a run of our kernels."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from numpyro.infer import MCMC

from stochgrad.core import (
    ConvergenceWarning,
    Draws,
    check_instance,
    warn_of_divergence,
    warn_of_draws,
)
from stochgrad.diagnostics import bias_reasons

_LEVEL = 4  # the caller of MCMC.run


def report_after_runs(ours: Callable[[Any], Any]) -> None:
    """Let ``MCMC.run`` end with a report where its kernel is one of ours.

    numpyro hands a kernel nothing at the end of a run, so that the method is wrapped. For kernels
    of others it does what it did.

    Args:
        ours: ``sampler -> kernel``, or None for a kernel that is not ours.
    """
    run = MCMC.run

    @wraps(run)
    def run_and_report(self, *args, **kwargs):
        run(self, *args, **kwargs)
        kernel = ours(self.sampler)
        if kernel is not None:
            _report(self, kernel)

    MCMC.run = run_and_report  # pyright: ignore[reportAttributeAccessIssue]


def _report(mcmc: MCMC, kernel: Any) -> None:
    fields = mcmc.get_extra_fields(group_by_chain=True)
    latent = mcmc.last_state.z  # pyright: ignore[reportOptionalMemberAccess]
    draws = mcmc.get_samples(group_by_chain=True)
    if isinstance(draws, dict):  # without deterministic sites
        draws = {name: draws[name] for name in latent if name in draws}
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((fields, draws))):
        return  # inside of a transformation there is nothing to look at yet
    diverging = np.asarray(fields["diverging"])
    if not diverging.size:
        return
    chains = len(diverging)
    first = {n: int(np.argmax(row)) for n, row in enumerate(diverging) if row.any()}
    where = {n: f"at draw {i}" if i else "before draw 1" for n, i in first.items()}
    settings = kernel.settings
    finite = int(np.sum(~diverging))
    warn_of_divergence(where, chains, settings.get("step_size"), finite, diverging.size, _LEVEL)
    healthy = [n for n in range(chains) if n not in first]
    full = settings.get("order") == "full"
    warn_of_draws(
        {name: np.asarray(x)[healthy] for name, x in draws.items()} if healthy else {},
        noise_ratio=None if full else np.asarray(fields["noise_ratio"])[healthy],
        log_density=-np.asarray(fields["potential_energy"])[healthy],
        steps=mcmc.thinning * settings["num_steps"],
        samples=bool(healthy),
        level=_LEVEL,
    )
    tuned = kernel.tuning and kernel.tuning.warm_up
    if tuned is not None and healthy:  # nobody chose these settings: they answer for themselves
        for reason in (*tuned.reasons, *bias_reasons(to_draws(mcmc))):
            warnings.warn(reason, ConvergenceWarning, stacklevel=_LEVEL - 1)


def to_draws(mcmc: MCMC) -> Draws:
    """The samples of ``MCMC`` with one of our kernels, as ``stochgrad.sample`` returns draws.

    With ``.verdict``, ``.to_arviz()`` and the rest.

    Raises:
        TypeError: it is no ``MCMC``.
        ValueError: its kernel is not one of ours, or it has not run.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from stochgrad.numpyro import SGHMC, to_draws
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("rows", len(x), subsample_size=10):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=numpyro.subsample(x, 0))
        >>> mcmc = MCMC(SGHMC(model, 0.02, 20.0), num_warmup=100, num_samples=1000,
        ...     thinning=5, num_chains=2, chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(100))
        >>> to_draws(mcmc).num_draws
        200
    """
    check_instance("mcmc", mcmc, MCMC, "a numpyro.infer.MCMC")
    tuning = getattr(mcmc.sampler, "tuning", None)
    if tuning is None or tuning.kernel is None or mcmc.last_state is None:
        raise ValueError("mcmc must have run with a kernel of stochgrad.numpyro, in this process.")
    posterior = tuning.kernel.posterior
    fields = mcmc.get_extra_fields(group_by_chain=True)
    samples = mcmc.get_samples(group_by_chain=True)
    positions = jax.jit(jax.vmap(jax.vmap(posterior.unconstrain)))(samples)
    diverging = np.asarray(fields["diverging"])
    first = np.where(diverging.any(axis=1), np.argmax(diverging, axis=1), -1)
    return Draws(
        positions=jax.tree.map(np.asarray, positions),
        stats={
            "log_density": -np.asarray(fields["potential_energy"]),
            "noise_ratio": np.asarray(fields["noise_ratio"]),
        },
        finite=~diverging,
        first_bad=first,
        attrs={
            "method": tuning.kernel.method,
            "thin": mcmc.thinning * mcmc.sampler.settings["num_steps"],  # pyright: ignore
        },
        posterior=posterior,
        settings=dict(tuning.kernel.settings),
        notes=tuning.warm_up.reasons if tuning.warm_up is not None else (),
    )
