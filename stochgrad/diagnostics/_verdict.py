"""Whether draws can be used, in words and numbers."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from stochgrad.core import (
    Draws,
    Posterior,
    check_instance,
    direction_name,
    draw_reasons,
    effective_draws,
    evenly,
    hoisted_jit,
    last_draws,
    resident_block,
    rhat,
    some_series,
)
from stochgrad.diagnostics._excursions import excursion_reasons
from stochgrad.gradients import control_variate, minibatch
from stochgrad.sgmcmc import Precision

if TYPE_CHECKING:
    import pandas

_MOST_SERIES = 256
_MOST_POINTS = 2000
_MOST_BYTES = 2**27
_ERRORS = 4.0
_MATERIAL = 0.3
_SHIFT = 0.2
_LEAST_BFMI = 0.2


@dataclass(frozen=True)
class Verdict:
    r"""Whether draws can be used.

    Attributes:
        ok: Whether nothing speaks against them.
        reasons: What does, in sentences.
        table: Numbers by parameter, a data frame: ``mean`` and ``sd`` in unconstrained space,
            ``rhat``, ``ess_bulk``, and ``virial``, $E[(\theta_i - \bar\theta_i) g_i]$ with the
            gradient g of the log density, which is -1 for draws of the posterior (integration by
            parts), with its standard error ``virial_se``; ``sd_predicted``, of the chain's law, and
            ``mass_sd``, the spread that the kernel's mass takes for one. NaN where there is none.
    """

    ok: bool
    reasons: tuple[str, ...]
    table: "pandas.DataFrame"

    def __str__(self) -> str:
        if self.ok:
            return "ok: nothing speaks against these draws.\n" + self._worst()
        return "do not use: " + " Also: ".join(self.reasons) + "\n" + self._worst()

    def _worst(self) -> str:
        if not len(self.table):
            return ""
        return self.table.sort_values("rhat", ascending=False).head(8).round(3).to_string()


def diagnose(draws: Draws) -> Verdict:
    r"""Everything that is known against the draws of a run.

    Divergences, draws of no density, gradient noise, R-hat and effective draws, rounding; for NUTS
    its divergent transitions and the energy's BFMI; and where the posterior is known the virial
    check: for every direction of the draws' own principal axes, in units of its spread,
    $E[z_i g_i] = -1$ and $E[g_i] = 0$ under the posterior, with gradients of minibatches centered
    at the draws' mean, which do not know the sampler. Draws 30% too wide or narrow in variance, or
    0.2 standard deviations off, are named where the check is certain of it (4 standard errors).
    Draws far from the others are held against the log density on all rows. What nothing at the
    draws can know is a mode that no chain has seen. Draws that ``stochgrad.infer`` made with
    ``target="sandwich"`` are held against that covariance instead, along its own axes.

    Args:
        draws: What ``stochgrad.sample`` or ``stochgrad.infer`` returned.

    Returns:
        ``ok``, ``reasons`` and ``table``; ``draws.verdict`` is the same.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(9), order="full"
        ... )
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0), stochgrad.sghmc(target, 0.3, 5.0, integrator="BAOAB"),
        ...     init=jnp.float32(0.9), num_samples=1000, thin=5, num_chains=2,
        ... )
        >>> stochgrad.diagnose(draws).ok
        True
    """
    import pandas

    check_instance("draws", draws, Draws, "a stochgrad.Draws")
    reasons = list(draws.notes)
    healthy = draws.first_bad < 0
    if not healthy.all():
        lost = int(np.sum(~healthy))
        reasons.append(f"{lost} of {len(healthy)} chains diverged (non-finite positions).")
    if not healthy.any() or not draws.num_draws:
        return Verdict(False, (*reasons, "no chain is finite to the end."), pandas.DataFrame())
    positions = last_draws(draws, healthy)
    stats = {name: np.asarray(x)[healthy] for name, x in draws.stats.items()}
    reasons += _of_run(draws, positions, stats)
    names, series, _ = some_series(positions, _MOST_SERIES)
    table = pandas.DataFrame(
        {
            "mean": series.mean((0, 1)),
            "sd": series.std((0, 1)),
            "rhat": rhat(series),
            "ess_bulk": effective_draws(series),
            "virial": np.nan,
            "virial_se": np.nan,
            "sd_predicted": _chosen(draws.law and draws.law.sd, len(names)),
            "mass_sd": _chosen(_spread_of_mass(draws), len(names)),
        },
        index=pandas.Index(names, name="parameter"),
    )
    reasons += excursion_reasons(draws)
    robust = draws.attrs.get("target") == "sandwich"
    if robust and draws.law is not None:
        reasons += _off_law(series, draws.law.covariance, names)
    checked = None if robust else _gradients(draws, healthy)
    if checked is not None and checked[0].shape[2] == len(names):
        table["virial"], table["virial_se"] = _virial(*checked)
        reasons += _of_directions(*checked, names)
    return Verdict(not reasons, tuple(reasons), table)


def _spread_of_mass(draws: Draws) -> Any:
    """The standard deviations, over the raveled position, at which a mass makes paces equal."""
    mass = draws.settings.get("mass")
    if isinstance(mass, Precision):
        return np.sqrt(mass.variances)
    inverse = draws.settings.get("inverse_mass")
    if inverse is not None:
        return np.sqrt(np.diag(inverse) if np.ndim(inverse) == 2 else inverse)
    return None


def _chosen(values: Any, count: int) -> np.ndarray:
    """Those of the numbers of a tree, one for each of a position, that a table shows."""
    if values is None:
        return np.full(count, np.nan)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(values)])
    flat = flat[evenly(len(flat), _MOST_SERIES)]
    return flat if len(flat) == count else np.full(count, np.nan)


def bias_reasons(draws: Draws) -> list[str]:
    """The virial check of ``diagnose`` alone: where gradients say that draws are biased."""
    check_instance("draws", draws, Draws, "a stochgrad.Draws")
    healthy = draws.first_bad < 0
    checked = _gradients(draws, healthy) if healthy.any() and draws.num_draws else None
    names = some_series(last_draws(draws, healthy), _MOST_SERIES)[0]
    if checked is None or checked[0].shape[2] != len(names):
        return []
    return _of_directions(*checked, names)


def _of_run(draws: Draws, positions: dict, stats: dict) -> list[str]:
    """What the run's own numbers say."""
    full = draws.settings.get("order") == "full"
    found = draw_reasons(
        positions,
        noise_ratio=None if full else stats.get("noise_ratio"),
        log_density=stats.get("log_density"),
        steps=None if draws.collected else int(draws.attrs.get("thin", 1)),
    )
    reasons = [reason for _, reason in found]
    divergent = stats.get("diverging")
    if divergent is not None and np.mean(divergent) > 0:
        reasons.append(
            f"{int(np.sum(divergent))} of {divergent.size} transitions of NUTS diverged: it could "
            "not follow the posterior where it is narrow, and what lies there is missing. "
            "Reparameterize (a hierarchy non-centered), or take a smaller step."
        )
    energy = stats.get("energy")
    if energy is not None and energy.shape[1] > 10:
        bfmi = np.mean(np.diff(energy, axis=1) ** 2, axis=1) / np.var(energy, axis=1)
        if np.min(bfmi) < _LEAST_BFMI:
            reasons.append(
                f"the energy's BFMI is {np.min(bfmi):.2f} (below {_LEAST_BFMI:g}): tails are "
                "heavier than momenta reach; reparameterize."
            )
    return reasons


def _gradients(draws: Draws, healthy: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Some draws and estimates of the gradient there, (chain, draw, d) both, if there are any.

    Of more than 256 coordinates those that ``some_series`` takes.
    """
    posterior = draws.posterior
    if not isinstance(posterior, Posterior) or draws.collected:
        return None
    chains = int(np.sum(healthy))
    size = sum(math.prod(x.shape[2:]) for x in jax.tree.leaves(draws.positions))
    most = min(max(_MOST_POINTS // chains, 50), max(_MOST_BYTES // (4 * size * chains), 10))
    numbers = evenly(draws.num_draws, most)
    some = draws[numbers].finite_chains().positions
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(some)):
        return None
    mean = jax.tree.map(lambda x: x.mean((0, 1), dtype=np.float64).astype(x.dtype), some)
    full = posterior.batches.batch_size >= posterior.batches.size
    try:
        gradient = minibatch(posterior) if full else control_variate(posterior, mean)
    except ValueError:  # the mean is no place where the density is finite
        gradient = minibatch(posterior)
    coordinates = evenly(size, _MOST_SERIES)

    def along(key, positions):
        state = gradient.init(key, jax.tree.map(lambda x: x[0], positions))

        def one(state, position):
            score, state = gradient.next(key, position, state)
            both = [ravel_pytree(x)[0][coordinates] for x in (position, score(position)[1])]
            return state, both

        return lax.scan(one, state, positions)[1]

    flat = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:])), some)
    with resident_block(posterior):
        both = hoisted_jit(along)(jax.random.key(0), flat)
    shape = (chains, len(numbers), len(coordinates))
    points, values = (np.asarray(x, np.float64).reshape(shape) for x in both)
    return (points, values) if np.isfinite(values).all() else None


def _virial(points: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of $(x_i - c_i) g_i$ and its standard error."""
    products = (points - points.mean((0, 1))) * gradients
    return products.mean((0, 1)), _standard_error(products)


def _standard_error(series: Float[np.ndarray, "chains draws k"]) -> Float[np.ndarray, " k"]:
    effective = effective_draws(series, "mean")
    return series.std((0, 1)) / np.sqrt(np.where(np.isfinite(effective), effective, 1.0))


def _of_directions(points: np.ndarray, gradients: np.ndarray, names: list[str]) -> list[str]:
    """Where draws are too wide, too narrow or off, along their principal axes.

    The axes are those of one half of the chains and the check is made on the other, for the axis
    along which some draws happen to be narrow is no test of these draws.
    """
    if len(points) == 1:
        middle = points.shape[1] // 2
        halves = [(points[:, :middle], gradients[:, :middle])]
        halves.append((points[:, middle:], gradients[:, middle:]))
    else:
        halves = [(points[i::2], gradients[i::2]) for i in range(2)]
    reasons: list[str] = []
    for (own, _), (other, slopes) in (halves, halves[::-1]):
        reasons = reasons or _off_axes(*_axes(own), other, slopes, names)
    return reasons


def _axes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns along the principal axes, one standard deviation long, and their duals."""
    d = points.shape[2]
    flat = points.reshape(-1, d)
    scale = np.maximum(flat.std(0), 1e-300)
    if d == 1:
        return np.diag(scale), np.diag(1 / scale)
    return _principal(scale, np.cov(flat / scale, rowvar=False))


def _principal(scale: np.ndarray, correlation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What ``_axes`` returns, of standard deviations and correlations."""
    values, axes = np.linalg.eigh(correlation)
    root = np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    return scale[:, None] * axes * root, axes / scale[:, None] / root


def _off_axes(
    axes: np.ndarray,
    duals: np.ndarray,
    points: np.ndarray,
    gradients: np.ndarray,
    names: list[str],
) -> list[str]:
    white = (points - points.mean((0, 1))) @ duals
    slopes = gradients @ axes
    width, error = _virial(white, slopes)
    shift, shift_error = slopes.mean((0, 1)), _standard_error(slopes)
    reasons = []
    i = int(np.argmax(np.abs(width + 1) / np.maximum(error, 1e-300)))
    if abs(width[i] + 1) > max(_ERRORS * error[i], _MATERIAL):
        ratio = math.sqrt(max(-width[i], 0.0))
        word = "wide" if ratio > 1 else "narrow"
        reasons.append(
            f"draws are too {word} along {direction_name(axes[:, i], names)}: their standard "
            f"deviation is about {ratio:.2g} times the posterior's there (virial {width[i]:.2f} +- "
            f"{error[i]:.2f}, where -1 is right). Take a smaller step, larger minibatches or a "
            "control variate at a better center; or run longer where R-hat is high."
        )
    i = int(np.argmax(np.abs(shift) / np.maximum(shift_error, 1e-300)))
    if abs(shift[i]) > max(_ERRORS * shift_error[i], _SHIFT):
        reasons.append(
            f"draws are off by about {abs(shift[i]):.2g} standard deviations along "
            f"{direction_name(axes[:, i], names)} (mean gradient {shift[i]:.2f} +- "
            f"{shift_error[i]:.2f}, where 0 is right): they have not reached the posterior, or "
            "the step biases them. Run longer, or take a smaller step."
        )
    return reasons


def _off_law(series: np.ndarray, covariance: np.ndarray, names: list[str]) -> list[str]:
    """Where draws do not spread as their law says, along the axes of its covariance."""
    if covariance.shape != (len(names), len(names)):
        return []
    scale = np.sqrt(np.diag(covariance))
    axes, duals = _principal(scale, covariance / np.outer(scale, scale))
    white = (series - series.mean((0, 1))) @ duals
    width, error = np.mean(white**2, axis=(0, 1)), _standard_error(white**2)
    i = int(np.argmax(np.abs(width - 1) / np.maximum(error, 1e-300)))
    if abs(width[i] - 1) <= max(_ERRORS * error[i], _MATERIAL):
        return []
    where = direction_name(axes[:, i] / scale, names)
    return [
        f"draws do not have the sandwich's spread along {where}: "
        f"their standard deviation is {math.sqrt(width[i]):.2g} times as large. The posterior is "
        "too far from a normal for it, or the chains are too short: take more rows, or bootstrap."
    ]
