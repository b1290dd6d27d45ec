"""The hyper-parameters of a numpyro kernel that were left out."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from stochgrad.core import ConvergenceWarning, Gradient, Posterior, Target, noise_like, tree_size
from stochgrad.gradients import control_variate, minibatch, saga, svrg, why_no_mode
from stochgrad.sgmcmc import Center, StepSizeReport, find_center, find_mass, find_step_size

GradientName: TypeAlias = Literal["minibatch", "control_variate", "svrg", "saga"]

_SEED = 20260501


class Tuning(NamedTuple):
    """Hyper-parameters that were left out, and what they follow from.

    Attributes:
        center: The mode, where it was needed.
        mass: The mass, where it was left out.
        step_size: The step size and its reasons, where it was left out.
        settings: The hyper-parameters by name.
    """

    center: Center | None = None
    mass: PyTree | None = None
    step_size: StepSizeReport | None = None
    settings: dict[str, Any] = {}

    def start(self, posterior: Posterior) -> Callable:
        """Where chains start: around the mode where it is known, one standard deviation wide."""
        center, mass = self.center, self.mass
        if center is None:
            assert posterior.initial is not None  # which a numpyro model has
            return posterior.initial
        if mass is None:
            return lambda key: jax.tree.map(jnp.asarray, center.position)

        def around(key):
            xi = noise_like("normal")(key, jax.tree.map(jnp.asarray, center.position))
            return jax.tree.map(lambda c, m, xi: c + xi / jnp.sqrt(m), center.position, mass, xi)

        return around


def as_named_gradient(name: GradientName, posterior: Posterior, center: Any) -> Gradient:
    """The gradient of a name."""
    if name == "control_variate":
        return control_variate(posterior, center)
    return {"minibatch": minibatch, "svrg": svrg, "saga": saga}[name](posterior)


def tune(posterior: Posterior, gradient: GradientName, **settings: Any) -> Tuning:
    """Find what is None among step size, friction and mass, and the center where one is needed.

    Without a friction the mass is taken from the curvature, and the friction is the mass: damping
    at the rate one in units in which every coordinate has a standard deviation of about one.

    Raises:
        ValueError: the posterior has no mode near where the search ended.
    """
    values = {"step_size": 1.0, "friction": 1.0, "mass": 1.0, **settings}
    missing = {name for name in ("step_size", "friction", "mass") if values[name] is None}
    mass, report = None, None
    chosen: dict[str, Any] = {}
    if "mass" in missing and "friction" not in missing:
        chosen["mass"] = 1.0
    if gradient != "control_variate" and missing == chosen.keys():
        return Tuning(settings=chosen)
    keys = jax.random.split(jax.random.key(_SEED), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # refused instead
        center = find_center(posterior, keys[0])
    if reason := why_no_mode(center.distance, tree_size(center.position)):
        raise ValueError(f"model: {reason}")
    if "friction" in missing:
        mass = values["mass"]
        if mass is None:
            mass = find_mass(posterior, keys[1], center)
        chosen |= {"mass": mass, "friction": mass}
    if "step_size" in missing:
        target: Target = as_named_gradient(gradient, posterior, center)
        values = {**settings, **chosen}
        dynamics = {n: values[n] for n in ("friction", "mass", "integrator") if n in settings}
        report = find_step_size(target, keys[2], center, **dynamics)
        chosen["step_size"] = report.step_size
    return Tuning(center, mass if isinstance(mass, dict) else None, report, chosen)
