r"""Simulation-based calibration: a sampler against data that a model made.

Parameters drawn from the prior, and data from the likelihood given them, make those parameters one
more draw of the posterior given the data. Among the draws of a right sampler their rank is uniform.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree
from scipy import stats

from stochgrad.core import (
    Batch,
    Batches,
    Kernel,
    Posterior,
    PRNGKey,
    by_name,
    check_callable,
    check_count,
    check_instance,
    check_key,
    row_batches,
)
from stochgrad.gradients import control_variate
from stochgrad.sgmcmc import sghmc

_NEWTON_STEPS = 30
_DAMPING = np.concatenate([[0.0], 10.0 ** np.arange(-4, 3)])
_AT_ONCE = 64
_STEP, _FRICTION, _FIRST = 0.1, 1.0, 0.3


class SBC(NamedTuple):
    """Ranks of parameters among the draws given the data that they made.

    Attributes:
        ranks: How many draws lie below the parameter, from 0 to ``draws``: arrays of shape
            (simulation, ...) by name.
        draws: Draws given each data set.
        finite: Which simulations ended in finite numbers.
        p_values: Of the hypothesis that the ranks are uniform, for each number of each parameter.
        p_value: Of all of them together: the smallest, times their number.
    """

    ranks: dict[str, np.ndarray]
    draws: int
    finite: np.ndarray
    p_values: dict[str, np.ndarray]
    p_value: float

    def to_datatree(self) -> xarray.DataTree:
        """Ranks in the group ``prior_sbc``, divided by the draws: for ``arviz.plot_ecdf_pit``."""
        variables = {
            name: (
                ("chain", "draw", *(f"{name}_dim_{i}" for i in range(ranks.ndim - 1))),
                (ranks[None] + 0.5) / (self.draws + 1),
            )
            for name, ranks in self.ranks.items()
        }
        group = xarray.Dataset(variables)
        coords = {dim: np.arange(size) for dim, size in group.sizes.items()}
        return xarray.DataTree.from_dict({"prior_sbc": group.assign_coords(coords)})


def sbc(
    key: PRNGKey,
    posterior: Posterior,
    sampler: Callable[[Posterior], Kernel] | None = None,
    *,
    simulate: Callable[[PRNGKey], tuple[PyTree, PyTree]] | None = None,
    simulations: int = 500,
    num_draws: int = 100,
    thin: int = 50,
    num_chains: int = 4,
    windows: int = 3,
    window_steps: int = 600,
) -> SBC:
    r"""Simulation-based calibration of a sampler, all data sets in one compiled program.

    For each simulation $\theta^* \sim p(\theta)$, $y \sim p(y \mid \theta^*)$; the sampler draws
    $\theta_1, \dots, \theta_L$ given $y$; and the rank of $\theta^*$ among them,
    $\#\{l : \theta_l < \theta^*\}$, is uniform on $0, \dots, L$ if the draws are independent and of
    the posterior. Uniformity is tested by $\chi^2$ over bins of equal probability.

    The warm-up is part of the program: Newton's method to a mode, then windows of the sampler
    itself, each renewing center and covariance from the second half of the last. The sampler sees a
    posterior in coordinates in which the last window's draws had mean zero and unit covariance. It
    is what ``stochgrad.warm_up`` does, on the device and for one kind of mass: chains never start
    at $\theta^*$.

    Args:
        key: A typed PRNG key.
        posterior: Of a numpyro model whose observed sites are all of its data, or of
            ``stochgrad.posterior`` with ``simulate``. Its data say how many rows there are, and
            what is given for each of them.
        sampler: ``posterior -> kernel``; by default BAOAB with a control variate. Positions are
            vectors, near the origin, of about unit covariance (without ``windows``, those of the
            posterior itself).
        simulate: For a plain posterior ``key -> (position, data)``: from the prior, and the data
            given it.
        simulations: Number of data sets.
        num_draws: L, over all chains.
        thin: Steps for each draw; too few, and draws that hang together make ranks that pile up at
            both ends.
        num_chains: Chains for each data set.
        windows: Windows of the warm-up; 0 leaves it out, and starts where the posterior starts.
        window_steps: Steps of each.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the model cannot be simulated; ``num_draws`` is no multiple of ``num_chains``.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, stochgrad
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(x)):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> target = stochgrad.from_numpyro(model, jnp.zeros(40), batch_size=8)
        >>> result = stochgrad.diagnostics.sbc(jax.random.key(0), target, simulations=50)
        >>> result.ranks["mean"].shape
        (50,)

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman 2018 (arXiv 1804.06788).
    """
    check_key(key)
    check_instance("posterior", posterior, Posterior, "a Posterior")
    simulations = check_count("simulations", simulations, least=20)
    num_chains = check_count("num_chains", num_chains)
    num_draws = check_count("num_draws", num_draws, least=num_chains)
    if num_draws % num_chains:
        raise ValueError(f"num_draws must be a multiple of {num_chains} chains, got {num_draws}.")
    thin = check_count("thin", thin)
    windows = check_count("windows", windows, least=0)
    window_steps = check_count("window_steps", window_steps, least=20)
    factory = _recommended if sampler is None else check_callable("sampler", sampler)
    draw_data, constrain = _simulator(posterior, simulate)

    def one(key):
        data_key, start_key, window_key, run_key = jax.random.split(key, 4)
        truth, target, start = draw_data(data_key, start_key)
        flat, unravel = ravel_pytree(start)

        def in_coordinates(center, factor):
            def log_density(z, batch):
                return target.log_density(unravel(center + factor @ z), batch)

            return Posterior(log_density, target.batches, lambda key: jnp.zeros_like(flat))

        def run(place, key, steps, every):
            kernel = factory(in_coordinates(*place))
            spread_key, *keys = jax.random.split(key, 1 + num_chains)
            spread = jax.random.normal(spread_key, (num_chains, flat.size), flat.dtype)
            spread = spread if windows else jnp.zeros_like(spread)
            z = jax.vmap(lambda key, z: _run(kernel, key, z, steps, every))(jnp.stack(keys), spread)
            return jax.vmap(jax.vmap(lambda z: place[0] + place[1] @ z))(z)

        place = flat, jnp.eye(flat.size, dtype=flat.dtype)
        if windows:
            place = _mode(lambda x: target.log_density(unravel(x), target.batches.full), flat)
        for n in range(windows):  # with short steps as long as the curvature is that of the mode
            narrow = place[0], np.float32(_FIRST ** (1 - n / windows)) * place[1]
            draws = run(narrow, jax.random.fold_in(window_key, n), window_steps, 1)
            place = _renewed(draws[:, window_steps // 2 :], place)
        draws = run(place, run_key, num_draws // num_chains * thin, thin)
        values = jax.vmap(jax.vmap(lambda x: constrain(unravel(x))))(draws)
        below = {
            name: jnp.sum(value < truth[name], (0, 1), dtype=jnp.int32)
            for name, value in values.items()
        }
        return below, jnp.all(jnp.isfinite(draws))

    keys = jax.random.split(key, simulations)
    ranks, finite = jax.jit(lambda keys: lax.map(one, keys, batch_size=_AT_ONCE))(keys)
    ranks = {name: np.asarray(value) for name, value in ranks.items()}
    finite = np.asarray(finite)
    p_values = {name: _p_values(value[finite], num_draws) for name, value in ranks.items()}
    each = np.concatenate([np.ravel(p) for p in p_values.values()])
    lost = 0.0 if not finite.all() else 1.0
    return SBC(ranks, num_draws, finite, p_values, float(min(each.min() * each.size, lost)))


def _recommended(target: Posterior) -> Kernel:
    """BAOAB in coordinates of unit covariance; its noise is that of a control variate."""
    assert target.initial is not None
    center = target.initial(jax.random.key(0))
    return sghmc(control_variate(target, center), _STEP, _FRICTION, integrator="BAOAB")


def _run(kernel: Kernel, key: PRNGKey, z: Float[Array, " d"], steps: int, every: int) -> Any:
    """Each ``every``-th position of a chain."""
    init_key, run_key = jax.random.split(key)

    def draw(state, key):
        for_each = lambda state, key: (kernel.step(key, state)[0], None)
        state, _ = lax.scan(for_each, state, jax.random.split(key, every))
        return state, state.position

    keys = jax.random.split(run_key, steps // every)
    return lax.scan(draw, kernel.init(z, init_key), keys)[1]


def _mode(log_density: Callable, start: Float[Array, " d"]) -> tuple[Array, Array]:
    """A mode, and a square root of minus the inverse Hessian there, by Newton's method.

    Curvatures enter by their absolute values, and of steps with more and more of a common curvature
    added the one is taken that climbs highest.
    """
    value_of, slope_of = log_density, jax.grad(log_density)

    def curvature(x):
        values, vectors = jnp.linalg.eigh(-jax.hessian(log_density)(x))
        size = jnp.abs(values)
        return jnp.maximum(size, 1e-6 * jnp.max(size) + 1e-12), vectors

    def step(_, x):
        size, vectors = curvature(x)
        slope = vectors.T @ slope_of(x)
        damped = jax.vmap(lambda share: x + vectors @ (slope / (size + share * jnp.max(size))))
        places = damped(_DAMPING.astype(x.dtype))
        values = jnp.concatenate([value_of(x)[None], jax.vmap(value_of)(places)])
        best = jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))
        return jnp.concatenate([x[None], places])[best]

    x = lax.fori_loop(0, _NEWTON_STEPS, step, start)
    size, vectors = curvature(x)
    return x, vectors / jnp.sqrt(size)


def _renewed(draws: Float[Array, "chains draws d"], place: tuple) -> tuple[Array, Array]:
    """Mean and a square root of the covariance of a window's draws, or the place that was."""
    whole = jnp.all(jnp.isfinite(draws), (1, 2))[:, None, None]
    count = jnp.sum(whole) * np.float32(draws.shape[1])
    mean = jnp.sum(jnp.where(whole, draws, 0.0), (0, 1)) / count
    apart = jnp.where(whole, draws - mean[None, None], 0.0) / jnp.sqrt(count)
    apart = apart.reshape(-1, len(mean))
    factor = jnp.linalg.cholesky(apart.T @ apart)
    good = jnp.all(jnp.isfinite(factor))
    return jnp.where(good, mean, place[0]), jnp.where(good, factor, place[1])


def _simulator(posterior: Posterior, simulate: Callable | None) -> tuple[Callable, Callable]:
    """``(key, key) -> (truth, posterior, start)``, and ``position -> {name: value}``."""
    if simulate is not None:
        return _plain(posterior, check_callable("simulate", simulate)), by_name
    of = None if posterior.observations is None else posterior.observations()
    if of is None or of.simulate is None or of.given is None:
        raise ValueError(
            "simulate must be given for a posterior that is not of a numpyro model: a function "
            "key -> (position, data)."
        )
    draw, given, constrain = of.simulate, of.given, posterior.constrain
    assert constrain is not None
    assert posterior.initial is not None
    initial, observed = posterior.initial, of.observed
    latent = set(jax.eval_shape(initial, jax.random.key(0)))

    def of_model(key, start_key):
        sites = draw(key)
        log_density = given({name: sites[name] for name in observed})
        target = posterior._replace(log_density=log_density)
        truth = {name: value for name, value in sites.items() if name in latent}
        return truth, target, initial(start_key)

    def latents(position):
        return {name: value for name, value in constrain(position).items() if name in latent}

    return of_model, latents


def _plain(posterior: Posterior, simulate: Callable) -> Callable:
    rows, _ = row_batches(
        posterior.batches.size, posterior.batches.batch_size, _order_of(posterior.batches)
    )

    def of_data(key, start_key):
        position, data = simulate(key)
        size = {leaf.shape[0] for leaf in jax.tree.leaves(data)}
        if size != {posterior.batches.size}:
            raise ValueError(
                f"simulate must return data with {posterior.batches.size} rows, as the posterior "
                f"has, got {sorted(size)}."
            )

        def batch(chosen):
            return Batch(jax.tree.map(lambda x: x[chosen.index], data), chosen.weight)

        def next(state):
            chosen, state = rows.next(state)
            return batch(chosen), state

        numbered = rows.blocks
        blocks = numbered and numbered._replace(at=lambda b: batch(numbered.at(b)))
        batches = rows._replace(next=next, full=batch(rows.full), blocks=blocks)
        start = jax.tree.map(jnp.zeros_like, position)
        return by_name(position), Posterior(posterior.log_density, batches), start

    return of_data


def _order_of(batches: Batches) -> Any:
    return "full" if batches.batch_size >= batches.size else batches.order


def _p_values(ranks: np.ndarray, draws: int) -> np.ndarray:
    """Of uniformity, for each number of a parameter, by bins of nearly equal probability."""
    count = max(min(len(ranks) // 10, draws + 1, 20), 2)
    edges = np.linspace(0, draws + 1, count + 1).round()
    expected = len(ranks) * np.diff(edges) / (draws + 1)
    flat = ranks.reshape(len(ranks), -1)
    p = [
        stats.chisquare(np.histogram(column, edges - 0.5)[0], expected).pvalue for column in flat.T
    ]
    return np.reshape(p, ranks.shape[1:])
