"""What ``numpyro.infer.MCMC`` says after a run of our kernels."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from numpyro.infer import MCMC

from stochgrad.core import warn_of_divergence, warn_of_draws

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
