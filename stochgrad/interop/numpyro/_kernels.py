"""SG-MCMC kernels for ``numpyro.infer.MCMC``."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from stochgrad.core import Kernel, Noise, Order, StepSize
from stochgrad.interop.numpyro._sg_kernel import SGKernel
from stochgrad.interop.numpyro._tuning import GradientName
from stochgrad.sgmcmc import cyclical, psgld, replica_exchange, sghmc, sgld, sgnht

_OPTIONS = """

    Args:
        model: A numpyro model; ``batch_size`` subsamples its plate of observations where it does
            not itself.
        {settings}
        **options: ``gradient``, one of ``"minibatch"`` (the default), ``"control_variate"`` (whose
            center is found first), ``"svrg"`` and ``"saga"``; ``batch_size``, ``rows``,
            ``order`` and ``layout`` as in ``stochgrad.from_numpyro``; ``num_steps``, steps of the
            kernel per iteration of ``MCMC``, 1 by default; ``share_batches`` as in
            ``stochgrad.sample``, with ``chain_method="vectorized"``.

    Raises:
        ValueError: as the functions it stands for do, when ``MCMC`` runs.

    Warns:
        DivergenceWarning, GradientNoiseWarning, ConvergenceWarning: after each run of ``MCMC``, as
            ``stochgrad.sample`` does.
"""


def _documented(settings: str) -> Callable[[type], type]:
    """Add to a class what the arguments of all kernels have in common."""

    def add(cls: type) -> type:
        cls.__doc__ = (cls.__doc__ or "").rstrip() + _OPTIONS.format(settings=settings)
        return cls

    return add


@_documented(
    "step_size: As in ``stochgrad.sgld``; left out, ``stochgrad.find_step_size`` finds it.\n"
    "        temperature, noise: As in ``stochgrad.sgld``."
)
class SGLD(SGKernel):
    """``stochgrad.sgld`` as a kernel for ``numpyro.infer.MCMC``.

    ``MCMC(SGLD(model, step_size=1e-4), num_warmup=..., num_samples=..., thinning=...)`` works with
    all chain methods. With ``progress_bar=False`` numpyro runs the loop as one program, several
    times faster; ``extra_fields`` may name ``potential_energy``, ``step_size``, ``gradient_norm``
    and ``noise_ratio``.
    """

    def __init__(
        self,
        model: Callable,
        step_size: StepSize | None = None,
        *,
        temperature: StepSize = 1.0,
        noise: Noise = "auto",
        **options: Any,
    ):
        settings = {"step_size": step_size, "temperature": temperature, "noise": noise}
        super().__init__(model, sgld, settings, tuned=True, **options)


@_documented(
    "step_size, friction, mass: As in ``stochgrad.sghmc``; left out, they are found.\n"
    "        noise_estimate, temperature, integrator, noise: As in ``stochgrad.sghmc``; what is a\n"
    "            tree is a dict by site name.\n"
    '        gradient, order: As below; ``"control_variate"`` and ``"symmetric"`` by default.'
)
class SGHMC(SGKernel):
    """``stochgrad.sghmc`` as a kernel for ``numpyro.infer.MCMC``.

    ``MCMC(SGHMC(model), num_warmup=..., num_samples=...)`` is all that a model needs: BAOAB,
    symmetric sweeps and a control variate are the defaults, and what is left out is found before
    the first step. The mode by ``stochgrad.find_center``, a diagonal mass by
    ``stochgrad.find_mass``, friction in proportion (damping at the rate 1 in units of the mass),
    the step by ``stochgrad.find_step_size``; the chains then start around the mode.
    ``kernel.tuning`` holds the results. A model without a mode is refused.
    """

    def __init__(
        self,
        model: Callable,
        step_size: StepSize | None = None,
        friction: Any = None,
        *,
        mass: Any = None,
        noise_estimate: Any = 0.0,
        temperature: StepSize = 1.0,
        integrator: str = "BAOAB",
        noise: Noise = "auto",
        gradient: GradientName = "control_variate",
        order: Order = "symmetric",
        **options: Any,
    ):
        settings = {
            "step_size": step_size,
            "friction": friction,
            "mass": mass,
            "noise_estimate": noise_estimate,
            "temperature": temperature,
            "integrator": integrator,
            "noise": noise,
        }
        options |= {"gradient": gradient, "order": order}
        super().__init__(model, sghmc, settings, tuned=True, **options)


@_documented("step_size, settings: As in ``stochgrad.psgld``.")
class PSGLD(SGKernel):
    """``stochgrad.psgld`` as a kernel for ``numpyro.infer.MCMC``."""

    def __init__(self, model: Callable, step_size: StepSize, **settings: Any):
        super().__init__(model, psgld, {"step_size": step_size}, **settings)


@_documented("step_size, diffusion, settings: As in ``stochgrad.sgnht``.")
class SGNHT(SGKernel):
    """``stochgrad.sgnht`` as a kernel for ``numpyro.infer.MCMC``."""

    def __init__(self, model: Callable, step_size: StepSize, diffusion: float, **settings: Any):
        super().__init__(model, sgnht, {"step_size": step_size, "diffusion": diffusion}, **settings)


@_documented(
    "kernel_factory: As in ``stochgrad.cyclical``: ``stochgrad.sgld``, or\n"
    "            ``functools.partial(stochgrad.sghmc, friction=10.0)``.\n"
    "        step_size, settings: As in ``stochgrad.cyclical``, in steps of the kernel."
)
class Cyclical(SGKernel):
    """``stochgrad.cyclical`` as a kernel for ``numpyro.infer.MCMC``.

    ``extra_fields=("info.sampling",)`` marks the draws of the sampling stages.
    """

    def __init__(
        self,
        model: Callable,
        kernel_factory: Callable[..., Kernel],
        step_size: float,
        **settings: Any,
    ):
        factory = partial(cyclical, kernel_factory)
        super().__init__(model, factory, {"step_size": step_size}, **settings)


@_documented(
    "kernel_factory: As in ``stochgrad.replica_exchange``.\n"
    "        step_size, settings: As in ``stochgrad.replica_exchange``."
)
class ReplicaExchange(SGKernel):
    """``stochgrad.replica_exchange`` as a kernel for ``numpyro.infer.MCMC``.

    ``extra_fields=("info.swap_probability",)`` is how often replicas swap.
    """

    def __init__(
        self,
        model: Callable,
        kernel_factory: Callable[..., Kernel],
        step_size: float | Sequence[float],
        **settings: Any,
    ):
        factory = partial(replica_exchange, kernel_factory)
        super().__init__(model, factory, {"step_size": step_size}, **settings)
