"""Places of a posterior that the search saw and no chain has visited."""

import numpy as np

from stochgrad.core import Draws, PRNGKey, evenly, ravel_draws
from stochgrad.sgmcmc import EQUALS, Normal, WarmUp, evidence_bound, precision_of

_MOST_DRAWS = 2000
_FURTHER = 1.5


def unvisited(tuned: WarmUp, draws: Draws, key: PRNGKey) -> tuple[str, ...]:
    """A sentence where a path of Pathfinder ended far from all draws, at as good a place.

    As good is a normal there whose evidence bound is that of a normal at the draws, or less by at
    most 5. Chains of a warm-up may all have ended in one mode of several by chance.
    """
    healthy = draws.first_bad < 0
    posterior = draws.posterior
    if posterior is None or not healthy.any() or not draws.num_draws:
        return ()
    number = max(_MOST_DRAWS // int(np.sum(healthy)), 2)
    some = draws[evenly(draws.num_draws, number)].finite_chains()
    x = np.concatenate(ravel_draws(some.positions))
    mean, precision = precision_of(x, len(x) / 4, tuned.precision)
    furthest = np.max(np.linalg.norm(precision.whiten(x - mean), axis=1))
    paths = tuned.approximation.paths
    far = [(float(np.linalg.norm(precision.whiten(path.mean - mean))), path.elbo) for path in paths]
    far = [(distance, elbo) for distance, elbo in far if distance > _FURTHER * furthest]
    if not far:
        return ()
    bound = evidence_bound(posterior, tuned.center, Normal(mean, precision), key)
    far = [(distance, elbo) for distance, elbo in far if elbo > bound - EQUALS]
    if not far:
        return ()
    distance, elbo = max(far, key=lambda pair: pair[1])
    return (
        f"no chain has visited a place {distance:.0f} standard deviations away where the posterior "
        f"is as large (evidence bound {elbo:.1f} there, {bound:.1f} here): it has several modes, "
        "and these draws are of one. Order or fix what makes them alike, or start chains in each.",
    )
