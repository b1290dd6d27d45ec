"""SG-MCMC kernels for ``numpyro.infer.MCMC``."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from stochgrad.core import (
    Kernel,
    Layout,
    Noise,
    Order,
    Posterior,
    StepSize,
    Target,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_order,
    check_position,
    compiled,
    share_first,
    shared_axes,
    tree_isfinite,
)
from stochgrad.interop.numpyro._handler import all_rows
from stochgrad.interop.numpyro._model import from_numpyro
from stochgrad.interop.numpyro._report import report_after_runs
from stochgrad.interop.numpyro._tuning import GradientName, Tuning, as_named_gradient, tune
from stochgrad.sgmcmc import cyclical, psgld, replica_exchange, sghmc, sgld, sgnht

_BASE = ("gradient", "batch_size", "order", "layout", "num_steps", "share_batches")


class SGState(NamedTuple):
    """State of a chain, or of several.

    Attributes:
        z: The latent sites, unconstrained.
        potential_energy: Minibatch estimate of minus the log density.
        step_size: h.
        gradient_norm: Euclidean norm of the gradient estimate.
        noise_ratio: Gradient noise over injected noise; see ``stochgrad.sghmc``.
        diverging: Whether the position is not finite.
        info: All that the kernel reports of its last step; ``extra_fields`` may name any of it, as
            ``"info.kinetic_temperature"``.
        rng_key: The chain's key.
        kernel_state: The state of the kernel underneath.
    """

    z: Any
    potential_energy: jax.Array
    step_size: jax.Array
    gradient_norm: jax.Array
    noise_ratio: jax.Array
    diverging: jax.Array
    info: Any
    rng_key: jax.Array
    kernel_state: Any


class _SGKernel(MCMCKernel):
    """What the kernels share: everything but the dynamics."""

    sample_field = "z"  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        model: Callable,
        make: "_Make",
        *,
        gradient: GradientName = "minibatch",
        batch_size: int | Mapping[str, int] | None = None,
        order: Order = "reshuffled",
        layout: Layout = "blocks",
        num_steps: int = 1,
        share_batches: bool = False,
    ):
        check_callable("model", model, "a numpyro model")
        self._model = model
        self._make = make
        check_choice("gradient", gradient, get_args(GradientName))
        check_order(order, layout)
        self._gradient: GradientName = gradient
        if order == "streamed":
            raise ValueError(
                "order='streamed' needs stochgrad.sample(stochgrad.from_numpyro(model, ...)): "
                "numpyro's MCMC does not bring the next rows into memory."
            )
        self.tuning: Tuning | None = None
        self._options = {"batch_size": batch_size, "order": order, "layout": layout}
        self._num_steps = check_count("num_steps", num_steps)
        self._share_batches = check_flag("share_batches", share_batches)
        self._sample_fn: Callable | None = None
        self._bound: tuple[Any, Kernel, Callable] | None = None

    @property
    def model(self) -> Callable:
        """The model on all rows, for whoever runs it: ``Predictive``, ``log_likelihood``, ArviZ."""
        return all_rows(self._model)

    @property
    def settings(self) -> dict[str, Any]:
        """What the kernel was made with, and what was found where nothing was said."""
        tuned = {} if self.tuning is None else self.tuning.settings
        base = {**self._options, "gradient": self._gradient, "num_steps": self._num_steps}
        return {**base, **self._make.settings, **tuned}

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "diverging", "noise_ratio", "potential_energy")

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs) -> SGState:
        kernel, start = self._kernel(model_args, model_kwargs)
        self._sample_fn = kernel.step
        if init_params is not None:
            _check_start(init_params, start, jnp.shape(rng_key))

        def unknown(shape):
            fill = jnp.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 0
            return jnp.full(shape.shape, fill, shape.dtype)

        def one(key, position):
            position_key, init_key, run_key = jax.random.split(key, 3)
            if position is None:
                position = start(position_key)
            state = kernel.init(position, init_key)
            info = jax.tree.map(unknown, jax.eval_shape(kernel.step, run_key, state)[1])
            return _state(state, info, run_key)

        if is_prng_key(rng_key):
            return compiled(one)(rng_key, init_params)
        states = compiled(jax.vmap(one))(rng_key, init_params)
        return share_first(states, self._share_batches)

    def sample(self, state: SGState, model_args, model_kwargs) -> SGState:
        step = self._kernel(model_args, model_kwargs)[0].step

        def one(state: SGState) -> SGState:
            def body(carry, key):
                following, info = step(key, carry)
                return following, info

            rng_key, run_key = jax.random.split(state.rng_key)
            keys = jax.random.split(run_key, self._num_steps)
            inner, infos = lax.scan(body, state.kernel_state, keys)
            info = jax.tree.map(lambda values: values[-1], infos)
            return _state(inner, info, rng_key)

        if is_prng_key(state.rng_key):
            return one(state)
        axes = shared_axes(state, self._share_batches)
        return jax.vmap(one, in_axes=(axes,), out_axes=axes)(state)

    def postprocess_fn(self, model_args, model_kwargs) -> Callable:
        return self._kernel(model_args, model_kwargs)[0].posterior.constrain  # pyright: ignore

    def get_diagnostics_str(self, state: SGState) -> str:
        return f"step size {state.step_size:.2e}, |gradient| {state.gradient_norm:.2e}"

    def _kernel(self, model_args, model_kwargs) -> tuple[Kernel, Callable]:
        """The kernel for these arguments and where it starts, made once for each set of them."""
        given = (model_args, model_kwargs or {})
        identity = tuple(id(leaf) for leaf in jax.tree.leaves(given))
        if self._bound is None or self._bound[0][0] != identity:
            with jax.ensure_compile_time_eval():  # numpyro may be tracing
                posterior = from_numpyro(self._model, *given[0], **self._options, **given[1])
                self.tuning = self._make.tune(posterior, self._gradient)
                target = as_named_gradient(self._gradient, posterior, self.tuning.center)
                kernel = self._make(target, self.tuning)
            start = self.tuning.start(posterior)
            self._bound = ((identity, given), kernel, start)  # given: to keep the ids
        return self._bound[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None, "_sample_fn": None}


def _state(inner: Any, info: Any, rng_key: jax.Array) -> SGState:
    return SGState(
        inner.position,
        -info.log_density,
        info.step_size,
        info.gradient_norm,
        info.noise_ratio,
        ~tree_isfinite(inner.position),
        info,
        rng_key,
        inner,
    )


def _check_start(init_params: Any, start: Callable, lead: tuple[int, ...]) -> None:
    """Raise unless ``init_params`` are unconstrained positions of the model, one for each chain."""
    model = jax.eval_shape(start, jax.random.key(0))
    wanted = {name: (*lead, *shape.shape) for name, shape in model.items()}
    shapes = jax.tree.map(jnp.shape, init_params)
    if shapes != wanted:
        raise ValueError(
            "init_params must have the model's latent sites, unconstrained, with shapes "
            f"{wanted}, got {shapes}."
        )
    check_position(init_params, "init_params")


class _Make:
    """A kernel factory with its hyper-parameters, in a form that can be pickled."""

    def __init__(self, factory: Callable[..., Kernel], **settings: Any):
        signature(factory).bind_partial(**settings)  # a wrong name is told now, not in a run
        self.factory = factory
        self.settings = settings

    def tune(self, posterior: Posterior, gradient: GradientName) -> Tuning:
        """What has to be found before the kernel can be made."""
        return tune(posterior, gradient)

    def __call__(self, target: Target, tuning: Tuning) -> Kernel:
        return self.factory(target, **self.settings)


class _MakeTuned(_Make):
    """One whose step size, and friction and mass if it has them, may be left to be found."""

    def tune(self, posterior: Posterior, gradient: GradientName) -> Tuning:
        return tune(posterior, gradient, **self.settings)

    def __call__(self, target: Target, tuning: Tuning) -> Kernel:
        return self.factory(target, **{**self.settings, **tuning.settings})


class _MakeOver(_Make):
    """A kernel over a kernel: ``outer(factory, target, ...)``."""

    def __init__(self, outer: Callable[..., Kernel], factory: Callable[..., Kernel], **settings):
        signature(outer).bind_partial(**settings)
        self.factory, self.settings = factory, settings
        self.outer = outer

    def __call__(self, target: Target, tuning: Tuning) -> Kernel:
        return self.outer(self.factory, target, **self.settings)


report_after_runs(lambda sampler: sampler if isinstance(sampler, _SGKernel) else None)

_OPTIONS = """

    Args:
        model: A numpyro model with a subsampled plate.
        {settings}
        **options: ``gradient``, one of ``"minibatch"`` (the default), ``"control_variate"`` (whose
            center is found first), ``"svrg"`` and ``"saga"``; ``batch_size``, ``order`` and
            ``layout`` as in ``stochgrad.from_numpyro``; ``num_steps``, steps of the kernel per
            iteration of ``MCMC``, 1 by default; ``share_batches`` as in ``stochgrad.sample``, with
            ``chain_method="vectorized"``.

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
class SGLD(_SGKernel):
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
        noise: Noise = "normal",
        **options: Any,
    ):
        make = _MakeTuned(sgld, step_size=step_size, temperature=temperature, noise=noise)
        super().__init__(model, make, **options)


@_documented(
    "step_size, friction, mass: As in ``stochgrad.sghmc``; left out, they are found.\n"
    "        noise_estimate, temperature, integrator, noise: As in ``stochgrad.sghmc``; what is a\n"
    "            tree is a dict by site name.\n"
    '        gradient, order: As below; ``"control_variate"`` and ``"symmetric"`` by default.'
)
class SGHMC(_SGKernel):
    """``stochgrad.sghmc`` as a kernel for ``numpyro.infer.MCMC``.

    ``MCMC(SGHMC(model), num_warmup=..., num_samples=...)`` is all that a model needs: BAOAB,
    symmetric sweeps and a control variate are the defaults, and what is left out is found before
    the first step. The mode by ``stochgrad.find_center``, a diagonal mass by
    ``stochgrad.find_mass``, friction in proportion (damping at the rate 1 in units of the mass),
    the step by ``stochgrad.find_step_size``; the chains then start around the mode.
    ``kernel.tuning`` tells what was found. A model without a mode is refused.
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
        noise: Noise = "normal",
        gradient: GradientName = "control_variate",
        order: Order = "symmetric",
        **options: Any,
    ):
        make = _MakeTuned(
            sghmc,
            step_size=step_size,
            friction=friction,
            mass=mass,
            noise_estimate=noise_estimate,
            temperature=temperature,
            integrator=integrator,
            noise=noise,
        )
        super().__init__(model, make, gradient=gradient, order=order, **options)


class _Split(_SGKernel):
    """One whose keyword arguments are the factory's and the base's in one."""

    def __init__(self, model: Callable, make: Callable[..., _Make], settings: dict[str, Any]):
        options = {name: settings.pop(name) for name in _BASE if name in settings}
        super().__init__(model, make(**settings), **options)


@_documented("step_size, settings: As in ``stochgrad.psgld``.")
class PSGLD(_Split):
    """``stochgrad.psgld`` as a kernel for ``numpyro.infer.MCMC``."""

    def __init__(self, model: Callable, step_size: StepSize, **settings: Any):
        super().__init__(model, partial(_Make, psgld, step_size=step_size), settings)


@_documented("step_size, diffusion, settings: As in ``stochgrad.sgnht``.")
class SGNHT(_Split):
    """``stochgrad.sgnht`` as a kernel for ``numpyro.infer.MCMC``."""

    def __init__(self, model: Callable, step_size: StepSize, diffusion: float, **settings: Any):
        make = partial(_Make, sgnht, step_size=step_size, diffusion=diffusion)
        super().__init__(model, make, settings)


@_documented(
    "kernel_factory: As in ``stochgrad.cyclical``: ``stochgrad.sgld``, or\n"
    "            ``functools.partial(stochgrad.sghmc, friction=10.0)``.\n"
    "        step_size, settings: As in ``stochgrad.cyclical``, in steps of the kernel."
)
class Cyclical(_Split):
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
        make = partial(_MakeOver, cyclical, kernel_factory, step_size=step_size)
        super().__init__(model, make, settings)


@_documented(
    "kernel_factory: As in ``stochgrad.replica_exchange``.\n"
    "        step_size, settings: As in ``stochgrad.replica_exchange``."
)
class ReplicaExchange(_Split):
    """``stochgrad.replica_exchange`` as a kernel for ``numpyro.infer.MCMC``.

    ``extra_fields=("info.swap_probability",)`` tells how often replicas trade places.
    """

    def __init__(
        self,
        model: Callable,
        kernel_factory: Callable[..., Kernel],
        step_size: float | Sequence[float],
        **settings: Any,
    ):
        make = partial(_MakeOver, replica_exchange, kernel_factory, step_size=step_size)
        super().__init__(model, make, settings)
