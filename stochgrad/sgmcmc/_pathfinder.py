"""Pathfinder: the normal distribution that is nearest to a posterior on the way to its mode."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Position,
    Posterior,
    PRNGKey,
    check_count,
    check_instance,
    check_key,
    check_position,
    is_function,
    log_densities,
)
from stochgrad.sgmcmc._mode import EXACT_DIMENSION, Climb, climb
from stochgrad.sgmcmc._normal import Normal, NormalApproximation, generator
from stochgrad.sgmcmc._precision import Precision

_MEMORY = 8
_BLOCK = 32
_SCREENING = 4
_MANY_ROWS = 50_000
_REACHES = (0.2, 0.05, 1.0, 0.5)
"""How far the paths start from the origin, in units of the model's own starting points."""
_UNLIMITED = 10**9


@key_first
def pathfinder(
    key: PRNGKey,
    posterior: Posterior,
    *,
    init: Position | Callable[[PRNGKey], Position] | None = None,
    num_paths: int | None = None,
    num_draws: int = 16,
    max_iterations: int = 200,
    passes: int = 300,
) -> NormalApproximation:
    r"""The best normal approximation on several ways to the mode, and at the mode.

    L-BFGS climbs the log density on all rows. At each iterate its memory makes a normal
    distribution, and the one of the greatest evidence lower bound is kept (Zhang, Carpenter, Gelman
    & Vehtari, JMLR 2022): where a density is unbounded, as that of a hierarchy is where the group
    scale goes to zero, it lies in the bulk on the way there. In up to 128 dimensions the normal of
    the curvature at the mode competes, where there is one, which is better on data of unlike
    scales. All is computed on the host in double precision but the density itself.

    Args:
        key: A typed PRNG key.
        posterior: A posterior.
        init: Where the paths start: a position, or a function of a key; where the posterior knows
            (a numpyro model), at random at several distances from the origin.
        num_paths: Paths; eight by default, four beyond 50,000 rows.
        num_draws: Draws to estimate a bound by.
        max_iterations: Iterations of L-BFGS on a path, at most.
        passes: Passes over all rows for the search of the mode after that; zero for none.

    Raises:
        ValueError: no path has a point with a finite bound; ``init`` is needed.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), order="full"
        ... )
        >>> found = stochgrad.pathfinder(jax.random.key(0), target, init=jnp.float32(0.0))
        >>> round(float(found.position), 2), found.precision.variances.round(3).tolist()
        (0.99, [0.01])
    """
    check_instance("posterior", posterior, Posterior, "a Posterior")
    check_key(key)
    if num_paths is None:
        num_paths = 8 if posterior.batches.size <= _MANY_ROWS else 4
    num_paths, num_draws = check_count("num_paths", num_paths), check_count("num_draws", num_draws)
    passes = check_count("passes", passes, least=0)
    starts = list(starts_of(posterior, key, init, num_paths))
    problem = Climb(posterior, starts[0], _UNLIMITED)
    values = _values(posterior, problem)
    rng = generator(key)

    def bounds(normals: list[Normal], count: int) -> list[Normal]:
        return _with_bounds(values, rng, normals, count)

    best, ends = [], []
    for start in starts:
        x = np.asarray(ravel_pytree(start)[0], np.float64)
        iterates = _ascent(problem, x, check_count("max_iterations", max_iterations))
        normals = list(_normals(iterates))
        if normals:  # a few draws for all of them, more for the best
            by_bound = sorted(bounds(normals, _SCREENING), key=lambda normal: -normal.elbo)
            best.append(max(bounds(by_bound[:4], num_draws), key=lambda normal: normal.elbo))
            ends.append(max(iterates, key=lambda point: point[1])[0])
    if best and passes and problem.size <= EXACT_DIMENSION:
        end = ends[int(np.argmax([normal.elbo for normal in best]))]
        for normal in _at_mode(posterior, problem, end, passes):
            best += bounds([normal], num_draws)
    best = sorted(best, key=lambda normal: -normal.elbo)
    if not best or best[0].elbo == -np.inf:
        raise ValueError(
            "posterior: no starting point leads to where the log density is finite around it: "
            "give init, a position of positive density."
        )
    position = jax.tree.map(np.asarray, problem.at(best[0].mean))
    spent = _UNLIMITED - problem.left
    return NormalApproximation(
        position=position,
        precision=best[0].precision,
        elbo=best[0].elbo,
        paths=tuple(best),
        passes=spent,
        unravel=problem.at,
    )


def _with_bounds(values, rng, normals: list[Normal], count: int) -> list[Normal]:
    """The same normals with their evidence bounds, from so many draws of each."""
    white = rng.standard_normal((len(normals), count, normals[0].mean.size))
    points = [normal.draws(z) for normal, z in zip(normals, white, strict=True)]
    densities = values(np.concatenate(points)).reshape(len(normals), count)
    own = [normal.log_density(z) for normal, z in zip(normals, white, strict=True)]
    elbos = np.mean(densities - own, axis=1)
    elbos = np.where(np.isfinite(elbos), elbos, -np.inf)
    return [normal._replace(elbo=float(e)) for normal, e in zip(normals, elbos, strict=True)]


def evidence_bound(
    posterior: Posterior, position: Position, normal: Normal, key: PRNGKey, count: int = 64
) -> float:
    """The evidence lower bound of a normal, from so many draws on all rows."""
    problem = Climb(posterior, position, _UNLIMITED)
    values = _values(posterior, problem)
    return _with_bounds(values, generator(key), [normal], count)[0].elbo


def starts_of(posterior: Posterior, key: PRNGKey, init: Any, count: int) -> Iterator[Position]:
    keys = jax.random.split(jax.random.fold_in(key, 1), count)
    if init is None and posterior.initial is None:
        raise ValueError("init is needed: the posterior defines no starting point.")
    if init is None:
        for i, k in enumerate(keys):
            reach = _REACHES[i % len(_REACHES)]
            yield jax.tree.map(lambda x: reach * x, posterior.initial(k))  # pyright: ignore
        return
    init = getattr(init, "position", init)
    if is_function(init):
        for k in keys:
            start = init(k)
            check_position(start, "init(key)")
            yield start
        return
    check_position(init)
    start = jax.tree.map(jnp.asarray, init)
    yield start
    for k in keys[1:]:
        flat, unravel = ravel_pytree(start)
        yield unravel(flat + 0.1 * jax.random.normal(k, flat.shape, flat.dtype))


def _values(posterior: Posterior, problem: Climb) -> Callable[[np.ndarray], np.ndarray]:
    """Log densities on all rows at many points, in blocks of one shape."""
    on_all_rows, unravel = log_densities(posterior), jax.vmap(problem.unravel)

    def values(points: np.ndarray) -> np.ndarray:
        problem.left -= len(points)
        parts = []
        for i in range(0, len(points), _BLOCK):
            part = points[i : i + _BLOCK]
            block = np.resize(part, (min(_BLOCK, 16 * -(-len(part) // 16)), problem.size))
            parts.append(
                np.asarray(on_all_rows(unravel(jnp.asarray(block, problem.dtype))))[: len(part)]
            )
        return np.concatenate(parts).astype(np.float64)

    return values


def _ascent(problem: Climb, start: np.ndarray, iterations: int) -> list[tuple]:
    """Position, log density and gradient at the iterates of L-BFGS."""
    from scipy.optimize import minimize

    seen: dict[bytes, tuple] = {}
    path: list[tuple] = []

    def objective(x):
        value, g = problem.value_and_grad(x)
        if not np.isfinite(value) or not np.all(np.isfinite(g)):
            return 1e300, np.zeros_like(g)
        seen[x.tobytes()] = (x.copy(), value, g)
        return -value, -g

    def keep(x):
        if x.tobytes() in seen:
            path.append(seen[x.tobytes()])
        seen.clear()

    value, g = problem.value_and_grad(start)
    if not np.isfinite(value) or not np.all(np.isfinite(g)):
        return []
    path.append((start, value, g))
    options = {"maxiter": iterations, "maxfun": 3 * iterations, "maxcor": _MEMORY}
    minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=keep,
        options=options | {"ftol": 0.0, "gtol": 1e-8},
    )
    return path


def _normals(path: list[tuple]) -> Iterator[Normal]:
    """The normal at each iterate, of the inverse Hessian that L-BFGS has there.

    Its diagonal is updated from iterate to iterate, and the last eight steps are put in.
    """
    alpha = np.ones_like(path[0][0]) if path else np.ones(0)
    steps: list[np.ndarray] = []
    bends: list[np.ndarray] = []
    for before, (x, _, g) in pairwise(path):
        s, y = x - before[0], before[2] - g
        if s @ y > 1e-12 * (y @ y):
            following = _next_diagonal(alpha, s, y)
            if np.all(np.isfinite(following)) and np.all(following > 0):
                alpha = following
                steps, bends = [*steps, s][-_MEMORY:], [*bends, y][-_MEMORY:]
        try:
            precision, mean = _inverse_hessian(alpha, steps, bends, x, g)
        except (np.linalg.LinAlgError, ValueError):
            continue
        yield Normal(mean, precision)


def _next_diagonal(alpha, s, y):
    """The diagonal after a step s along which the gradient fell by y (Gilbert & Lemarechal)."""
    a, b, c = np.sum(alpha * y**2), y @ s, np.sum(s**2 / alpha)
    with np.errstate(all="ignore"):
        return 1 / (a / (b * alpha) + y**2 / b - a * s**2 / (b * c * alpha**2))


def _inverse_hessian(alpha, steps, bends, x, g) -> tuple[Precision, np.ndarray]:
    r"""The covariance $\operatorname{diag}(\alpha) + \beta\gamma\beta^\top$, and where it leads."""
    scale = np.sqrt(alpha)
    if not steps:
        return Precision(scale, np.zeros((x.size, 0)), np.zeros(0)), x + alpha * g
    s, y = np.array(steps).T, np.array(bends).T
    inner = s.T @ y
    inverse = np.linalg.inv(np.triu(inner))
    scaled = scale[:, None] * y
    corner = inverse.T @ (scaled.T @ scaled + np.diag(np.diag(inner))) @ inverse
    gamma = np.block([[np.zeros_like(inner), -inverse], [-inverse.T, corner]])
    beta = np.hstack([alpha[:, None] * y, s])
    q, r = np.linalg.qr(beta / scale[:, None])
    values, vectors = np.linalg.eigh(np.eye(len(r)) + r @ gamma @ r.T)
    mean = x + alpha * g + beta @ (gamma @ (beta.T @ g))
    return Precision(scale, q @ vectors, values), mean


def _at_mode(posterior, problem: Climb, start, passes: int) -> Iterator[Normal]:
    """The normal of the curvature at the mode, where there is one."""
    mode = climb(posterior, problem.at(start), passes)
    if not np.isfinite(mode.distance):
        return
    x = np.asarray(ravel_pytree(mode.position)[0], np.float64)
    curvature = problem.curvature(x, problem.value_and_grad(x)[1])
    if curvature.positive:
        yield Normal(x, Precision(curvature.scale, curvature.basis, 1 / curvature.values))
