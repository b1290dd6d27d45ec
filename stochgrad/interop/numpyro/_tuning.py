"""The hyper-parameters of a numpyro kernel that were left out."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from stochgrad.core import Gradient, Kernel, Posterior
from stochgrad.diagnostics import with_law
from stochgrad.gradients import control_variate, minibatch, saga, svrg
from stochgrad.sgmcmc import (
    Center,
    Precision,
    StepSizeReport,
    WarmUp,
    center_at,
    langevin_at,
    pathfinder,
    warm_up,
)

GradientName: TypeAlias = Literal["minibatch", "control_variate", "svrg", "saga"]

_SEED = 20260501
_BIAS = 0.02
_MOST_WINDOWS = 8
_FOUND = ("step_size", "friction", "mass")


class Tuning(NamedTuple):
    """Hyper-parameters that were left out, and what they follow from.

    Attributes:
        kernel: The kernel.
        start: ``key -> position``, where a chain starts.
        settings: The hyper-parameters that were found, by name.
        center: The center of the control variate, and how far from a mode it is.
        mass: The mass, where it was left out.
        step_size: The step size and its reasons, where it was left out.
        warm_up: The windows that all follows from, where there were any.
    """

    kernel: Any  # a Kernel; None in another process
    start: Any
    settings: dict[str, Any] = {}
    center: Center | None = None
    mass: PyTree | Precision | None = None
    step_size: StepSizeReport | None = None
    warm_up: WarmUp | None = None


def as_named_gradient(name: GradientName, posterior: Posterior, center: Any) -> Gradient:
    """The gradient of a name."""
    if name == "control_variate":
        return control_variate(posterior, center)
    return {"minibatch": minibatch, "svrg": svrg, "saga": saga}[name](posterior)


def tune(
    posterior: Posterior,
    factory: Callable[..., Kernel],
    gradient: GradientName,
    settings: dict[str, Any],
    tunable: bool,
    num_warmup: int,
) -> Tuning:
    """A kernel whose step size, friction and mass, where they are None, fit the posterior.

    Without friction and mass a warm-up in windows finds the bulk and its covariance, unless
    ``num_warmup`` is zero; otherwise the center of a control variate and a step size come from
    Pathfinder's normal alone.
    """
    assert posterior.initial is not None  # which a numpyro model has
    missing = {name for name in _FOUND if name in settings and settings[name] is None}
    missing = missing if tunable else set()
    chosen = {name: value for name, value in settings.items() if name not in missing}
    if "mass" in missing and "friction" not in missing:
        chosen["mass"] = 1.0
        missing.discard("mass")
    if gradient != "control_variate" and not missing:
        kernel = factory(as_named_gradient(gradient, posterior, None), **chosen)
        return Tuning(kernel, posterior.initial, {n: chosen[n] for n in ("mass",) if n in chosen})
    key = jax.random.key(_SEED)
    if not missing:
        first = pathfinder(key, posterior)
        kernel = factory(control_variate(posterior, first.position), **chosen)
        around = _around(first.unravel, first.starts(key, 64))
        return Tuning(kernel, around, center=center_at(posterior, first.position))
    own = None if gradient == "control_variate" else as_named_gradient(gradient, posterior, None)
    windows = _MOST_WINDOWS if "friction" in missing and num_warmup else 0
    kernel_at = langevin_at(posterior, own, _BIAS, 1.0, factory, **chosen)
    tuned = warm_up(key, posterior, kernel_at=kernel_at, max_windows=windows)
    kernel = with_law(jax.random.fold_in(key, 1), tuned)[0] if windows else tuned.kernel
    values = dict(kernel.settings)
    return Tuning(
        kernel=kernel,
        start=_around(tuned.approximation.unravel, tuned.pool),
        settings={name: values[name] for name in _FOUND if name in values},
        center=None if own is not None else center_at(posterior, tuned.center),
        mass=values.get("mass") if "mass" in missing else None,
        step_size=tuned.step_size,
        warm_up=tuned if windows else None,
    )


def _around(unravel: Callable, pool: Any) -> Callable:
    """A start at one of some draws."""
    positions = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(unravel, pool))
    count = len(pool)

    def start(key):
        i = jax.random.randint(key, (), 0, count)
        return jax.tree.map(lambda x: x[i], positions)

    return start
