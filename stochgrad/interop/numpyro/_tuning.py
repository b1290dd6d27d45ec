"""What a kernel needs to know of a model before it can run, found when nobody has said it."""

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
    """What was found.

    Attributes:
        center: The mode, where it was looked for.
        mass: The mass, where it was looked for.
        step_size: The step size and its reasons, where it was looked for.
        settings: The hyper-parameters that follow.
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
    whole = {"step_size": 1.0, "friction": 1.0, "mass": 1.0, **settings}
    missing = {name for name in ("step_size", "friction", "mass") if whole[name] is None}
    given = {"mass": 1.0} if "mass" in missing and "friction" not in missing else {}
    if gradient != "control_variate" and missing <= {"mass"} and len(missing) == len(given):
        return Tuning(settings=given)
    keys = jax.random.split(jax.random.key(_SEED), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # refused instead
        center = find_center(posterior, keys[0])
    if reason := why_no_mode(center.distance, tree_size(center.position)):
        raise ValueError(f"model: {reason}")
    mass = None
    if "friction" in missing:
        mass = whole["mass"]
        if mass is None:
            mass = find_mass(posterior, keys[1], center)
        given = {"mass": mass, "friction": mass}
    report = None
    if "step_size" in missing:
        target: Target = as_named_gradient(gradient, posterior, center)
        report = find_step_size(
            target,
            keys[2],
            center,
            **{
                name: {**settings, **given}[name]
                for name in ("friction", "mass", "integrator")
                if name in settings
            },
        )
        given["step_size"] = report.step_size
    return Tuning(center, mass if isinstance(mass, dict) else None, report, given)
