"""A warm-up that needs no mode: where the bulk is, and a kernel that fits it."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Gradient,
    Kernel,
    Position,
    Posterior,
    PRNGKey,
    check_callable,
    check_choice,
    check_count,
    check_instance,
    check_key,
    check_number,
    is_function,
    tree_size,
)
from stochgrad.gradients import control_variate, minibatch
from stochgrad.sgmcmc._mean_field import mean_field
from stochgrad.sgmcmc._normal import NormalApproximation
from stochgrad.sgmcmc._pathfinder import pathfinder
from stochgrad.sgmcmc._precision import Precision
from stochgrad.sgmcmc._sghmc import sghmc
from stochgrad.sgmcmc._step_size import StepSizeReport, find_step_size
from stochgrad.sgmcmc._windows import KernelAt, Place, TunedKernel, Window, run_window

_FIRST_LENGTH = 60.0
_MOST_STEPS = 20_000
_SMALL_STEP = 0.03
_POOL = 64
_MANY_NUMBERS = 5000


class WarmUp(NamedTuple):
    """Where a posterior lies, and a kernel for it.

    Attributes:
        kernel: The kernel.
        starts: Where the chains go on, with a leading axis if there are several: ``init`` of
            ``stochgrad.sample``.
        pool: Some draws of the last window, one row each, raveled.
        center: The posterior's mean.
        precision: The inverse of its covariance, the kernel's mass.
        windows: What each window found.
        settled: Whether the last window changed nothing any more.
        approximation: What the search before the windows found.
        step_size: What the kernel's step size rests on, where ``find_step_size`` found it.
        seconds: What it took.
    """

    kernel: Kernel
    starts: Position
    pool: Float[np.ndarray, "n d"]
    center: Position
    precision: Precision
    windows: tuple[Window, ...]
    settled: bool
    approximation: NormalApproximation
    step_size: StepSizeReport | None
    seconds: float

    @property
    def gradients(self) -> float:
        """Gradients of the density that the windows took, over all chains."""
        return float(sum(window.gradients for window in self.windows))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it has not settled, in words."""
        if self.settled or not self.windows:
            return ()
        if _apart(self.windows):
            return (
                "the chains of the warm-up lie in modes of their own: each mixes by itself, and "
                f"they disagree (R-hat {self.windows[-1].rhat:.2f}). Order or fix what can change "
                "places, or take a kernel that crosses between modes (stochgrad.replica_exchange, "
                "stochgrad.cyclical).",
            )
        return (
            f"the warm-up has not settled after {len(self.windows)} windows "
            f"(the last: {self.windows[-1]}): center, mass and step size are not those of the "
            "posterior yet. Give it more windows, or a model whose directions move at one pace "
            "(a hierarchy non-centered, columns centered and scaled).",
        )


@key_first
def warm_up(
    key: PRNGKey,
    target: Posterior | Gradient,
    *,
    init: Position | Callable[[PRNGKey], Position] | None = None,
    num_chains: int = 4,
    bias: float = 0.04,
    rate: float = 1.0,
    start: Literal["auto", "pathfinder", "mean_field"] = "auto",
    max_windows: int = 8,
    kernel_at: KernelAt | None = None,
    max_seconds: float | None = None,
    report: Callable[[str], Any] = lambda line: None,
) -> WarmUp:
    r"""Find where a posterior lies and how wide it is, and tune a kernel to that.

    ``stochgrad.pathfinder`` on all rows, or ``stochgrad.mean_field`` on minibatches, gives a first
    center, covariance and spread starts. Then windows of BAOAB with a control variate run from
    there, each twice as long as the one before; center, mass, friction and step size are renewed
    from its second half. They end when chains agree (R-hat below 1.05) and the last window has left
    center (0.3 standard deviations) and variances (a factor of 2.5) as they were; or where two of
    them find chains that mix well, each by itself, and disagree.

    Args:
        key: A typed PRNG key.
        target: A posterior, or a gradient of one, which then takes the control variate's place.
        init: Where to start, as in ``stochgrad.pathfinder``.
        num_chains: Chains.
        bias: As in ``stochgrad.find_step_size``.
        rate: Friction over mass.
        start: ``"pathfinder"`` (passes over all rows, some 2,000), ``"mean_field"`` (minibatches
            alone), or ``"auto"``: the second for data that are streamed or spread over devices and
            for more than 5,000 numbers.
        max_windows: Windows, at most. With zero the kernel is that of the first approximation.
        kernel_at: ``(place, key, shrink) -> kernel``, another kernel than BAOAB.
        max_seconds: No window begins after this time.
        report: Called with a line about each stage.

    Raises:
        ValueError: no start has a finite density; all chains diverge at any step size.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), batch_size=9
        ... )
        >>> tuned = stochgrad.warm_up(jax.random.key(0), target, init=jnp.float32(0.0))
        >>> tuned.settled, round(float(tuned.center), 1)
        (True, 1.0)
    """
    check_instance("target", target, (Posterior, Gradient), "a Posterior or a Gradient")
    check_key(key)
    num_chains = check_count("num_chains", num_chains)
    bias, rate = check_number("bias", bias), check_number("rate", rate)
    max_windows = check_count("max_windows", max_windows, least=0)
    check_callable("report", report, "a function of a line of text")
    if kernel_at is not None:
        check_callable("kernel_at", kernel_at, "a function (place, key, shrink) -> TunedKernel")
    begun = time.perf_counter()
    limit = np.inf if max_seconds is None else check_number("max_seconds", max_seconds)
    posterior = target if isinstance(target, Posterior) else target.posterior
    if posterior is None:
        raise ValueError("target must be a posterior, or a gradient that knows its posterior.")
    if kernel_at is None:
        own = None if isinstance(target, Posterior) else target
        kernel_at = langevin_at(posterior, own, bias, rate)

    search_key, start_key, window_key, last_key = jax.random.split(key, 4)
    first = _approximation(posterior, search_key, init, start, report)
    best = first.paths[0]
    pool = first.starts(start_key, max(_POOL, num_chains))
    place = Place(best.mean, best.precision, pool[:num_chains], first.unravel, pool)

    windows: list[Window] = []
    before: Place | None = None
    length = _FIRST_LENGTH
    for i in range(max_windows):
        if time.perf_counter() - begun > limit:
            break
        window = jax.random.fold_in(window_key, i)
        try:
            following, found = run_window(kernel_at, place, window, length, _MOST_STEPS)
        except ValueError as error:  # where chains went astray their mean is no center
            if before is None:
                raise
            report(f"window {i + 1}: back to where the one before began ({error})")
            place, before = before, None
            continue
        before, place = place, following
        windows.append(found)
        report(f"window {i + 1}: {found}")
        if found.settled or _apart(windows):
            break
        length *= 2
    settled = bool(windows) and windows[-1].settled
    try:
        tuned = kernel_at(place, last_key, 1.0)
    except ValueError:
        if before is None:
            raise
        place, settled = before, False
        tuned = kernel_at(place, last_key, 1.0)
    return WarmUp(
        kernel=tuned.kernel,
        starts=place.positions,
        pool=place.pool,
        center=place.center,
        precision=place.precision,
        windows=tuple(windows),
        settled=settled,
        approximation=first,
        step_size=tuned.step_size,
        seconds=time.perf_counter() - begun,
    )


def _apart(windows: Sequence[Window]) -> bool:
    """Whether two windows in a row found chains in modes of their own, where more do not help."""
    return len(windows) > 1 and windows[-1].apart and windows[-2].apart


def _approximation(posterior, key, init, start: str, report) -> NormalApproximation:
    """A first normal approximation, by passes over all rows or by minibatches."""
    batches = posterior.batches
    check_choice("start", start, ("auto", "pathfinder", "mean_field"))
    if start == "auto":
        like = posterior.initial if init is None else init
        size = 0 if like is None else tree_size(_one_position(like))
        large = batches.stream is not None or batches.mesh is not None or size > _MANY_NUMBERS
        start = "mean_field" if large else "pathfinder"
    if start == "pathfinder":
        report("looking for the posterior's bulk (Pathfinder on all rows)")
        first = pathfinder(key, posterior, init=init)
        report(f"Pathfinder: {first.passes} passes, evidence bound {first.elbo:.1f}")
    else:
        report("looking for the posterior's bulk (mean-field approximation on minibatches)")
        first = mean_field(key, posterior, init=init)
        report(f"mean-field approximation: evidence bound {first.elbo:.1f}")
    return first


def _one_position(init: Any) -> Any:
    init = getattr(init, "position", init)
    return jax.eval_shape(init, jax.random.key(0)) if is_function(init) else init


def langevin_at(
    posterior: Posterior,
    own: Gradient | None,
    bias: float,
    rate: float,
    factory: Callable[..., Kernel] = sghmc,
    **settings: Any,
) -> KernelAt:
    """A kernel with the gradient of least noise at a place: a control variate, if not ``own``.

    Args:
        posterior: A posterior.
        own: A gradient to take instead.
        bias: As in ``find_step_size``.
        rate: Friction over mass.
        factory: ``stochgrad.sghmc`` or ``stochgrad.sgld``.
        **settings: Its settings; those among ``step_size``, ``friction`` and ``mass`` that are left
            out fit the place.
    """
    underdamped = factory is sghmc

    def kernel_at(place: Place, key: PRNGKey, shrink: float) -> TunedKernel:
        values = dict(settings)
        if underdamped:
            mass = 1.0 if "friction" in values else place.precision.padded()
            values.setdefault("mass", mass)
            values.setdefault("friction", jax.tree.map(lambda m: rate * m, values["mass"]))
            values.setdefault("integrator", "BAOAB")
        names = ("mass", "friction", "integrator", "temperature")
        dynamics = {name: values[name] for name in names if name in values}
        if callable(dynamics.get("temperature")):
            del dynamics["temperature"]
        gradient = own
        if own is None and posterior.batches.batch_size >= posterior.batches.size:
            gradient = minibatch(posterior)
        elif own is None:
            gradient = control_variate(posterior, place.center)
        assert gradient is not None
        center = place.center if gradient is not own else None
        if "step_size" in values:
            step = values.pop("step_size")
            step = step if callable(step) else shrink * step
            return TunedKernel(factory(gradient, step, **values), center)
        report = find_step_size(key, gradient, place.center, bias=bias, **dynamics)
        if own is None and report.step_size < _SMALL_STEP:  # far from where the chains are
            plain = minibatch(posterior)
            other = find_step_size(key, plain, place.center, bias=bias, **dynamics)
            if other.step_size > report.step_size:
                report, gradient = other, plain
        return TunedKernel(factory(gradient, shrink * report.step_size, **values), center, report)

    return kernel_at
