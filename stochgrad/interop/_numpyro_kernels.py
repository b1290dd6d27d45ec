"""SG-MCMC kernels for ``numpyro.infer.MCMC``."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    check_count,
    share_first,
    shared_axes,
)
from stochgrad.interop._numpyro_model import from_numpyro
from stochgrad.sgmcmc import sghmc, sgld


class SGState(NamedTuple):
    """State of a chain, or of several.

    Attributes:
        z: The latent sites, unconstrained.
        potential_energy: Minibatch estimate of minus the log density.
        step_size: h.
        gradient_norm: Euclidean norm of the gradient estimate.
        noise_ratio: Gradient noise over injected noise; see ``stochgrad.sghmc``.
        rng_key: The chain's key.
        kernel_state: The state of the kernel underneath.
    """

    z: Any
    potential_energy: jax.Array
    step_size: jax.Array
    gradient_norm: jax.Array
    noise_ratio: jax.Array
    rng_key: jax.Array
    kernel_state: Any


class _SGKernel(MCMCKernel):
    """What the kernels share: everything but the dynamics."""

    sample_field = "z"  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        model: Callable,
        make: Callable[[Posterior], Kernel],
        *,
        batch_size: int | Mapping[str, int] | None = None,
        order: Order = "reshuffled",
        layout: Layout = "blocks",
        num_steps: int = 1,
        share_batches: bool = False,
    ):
        if not callable(model):
            raise TypeError(f"model must be a numpyro model, got {type(model).__name__}.")
        self._model = model
        self._make = make
        self._options = {"batch_size": batch_size, "order": order, "layout": layout}
        self._num_steps = check_count("num_steps", num_steps)
        self._share_batches = share_batches
        self._sample_fn: Callable | None = None
        self._bound: tuple[Any, Kernel] | None = None

    @property
    def model(self) -> Callable:
        return self._model

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z",)

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs) -> SGState:
        kernel = self._kernel(model_args, model_kwargs)
        self._sample_fn = kernel.step

        def one(key, position):
            position_key, init_key, run_key = jax.random.split(key, 3)
            if position is None:
                position = kernel.posterior.initial(position_key)  # pyright: ignore
            state = kernel.init(position, init_key)
            unknown = jnp.full((), jnp.nan)
            return SGState(position, unknown, unknown, unknown, unknown, run_key, state)

        if is_prng_key(rng_key):
            return one(rng_key, init_params)
        states = jax.vmap(one)(rng_key, init_params)
        return share_first(states, self._share_batches)

    def sample(self, state: SGState, model_args, model_kwargs) -> SGState:
        step = self._kernel(model_args, model_kwargs).step

        def one(state: SGState) -> SGState:
            def body(carry, key):
                following, info = step(key, carry)
                return following, info

            rng_key, run_key = jax.random.split(state.rng_key)
            keys = jax.random.split(run_key, self._num_steps)
            inner, infos = lax.scan(body, state.kernel_state, keys)
            info = jax.tree.map(lambda values: values[-1], infos)
            return SGState(
                inner.position,
                -info.log_density,
                info.step_size,
                info.gradient_norm,
                info.noise_ratio,
                rng_key,
                inner,
            )

        if is_prng_key(state.rng_key):
            return one(state)
        axes = shared_axes(state, self._share_batches)
        return jax.vmap(one, in_axes=(axes,), out_axes=axes)(state)

    def postprocess_fn(self, model_args, model_kwargs) -> Callable:
        return self._kernel(model_args, model_kwargs).posterior.constrain  # pyright: ignore

    def get_diagnostics_str(self, state: SGState) -> str:
        return f"step size {state.step_size:.2e}, |gradient| {state.gradient_norm:.2e}"

    def _kernel(self, model_args, model_kwargs) -> Kernel:
        """The kernel for these arguments, made once for each set of them."""
        given = (model_args, model_kwargs or {})
        identity = tuple(id(leaf) for leaf in jax.tree.leaves(given))
        if self._bound is None or self._bound[0][0] != identity:
            posterior = from_numpyro(self._model, *given[0], **self._options, **given[1])
            self._bound = ((identity, given), self._make(posterior))  # given: to keep the ids
        return self._bound[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None, "_sample_fn": None}


class _Make:
    """A kernel factory with its hyper-parameters, in a form that can be pickled."""

    def __init__(self, factory: Callable[..., Kernel], **settings: Any):
        self.factory = factory
        self.settings = settings

    def __call__(self, posterior: Posterior) -> Kernel:
        return self.factory(posterior, **self.settings)


class SGLD(_SGKernel):
    """``stochgrad.sgld`` as a kernel for ``numpyro.infer.MCMC``.

    ``MCMC(SGLD(model, step_size=1e-4), num_warmup=..., num_samples=..., thinning=...)`` works with
    all chain methods. With ``progress_bar=False`` numpyro runs the loop as one program, several
    times faster; ``extra_fields`` may name ``potential_energy``, ``step_size``, ``gradient_norm``
    and ``noise_ratio``.

    Args:
        model: A numpyro model with a subsampled plate.
        step_size, temperature, noise: As in ``stochgrad.sgld``.
        **options: ``batch_size``, ``order`` and ``layout`` as in ``stochgrad.from_numpyro``;
            ``num_steps``, steps of the kernel per iteration of ``MCMC``, 1 by default;
            ``share_batches`` as in ``stochgrad.sample``, with ``chain_method="vectorized"``.

    Raises:
        ValueError: as ``stochgrad.sgld`` and ``stochgrad.from_numpyro`` do, when ``MCMC`` runs.
    """

    def __init__(
        self,
        model: Callable,
        step_size: StepSize,
        *,
        temperature: float = 1.0,
        noise: Noise = "normal",
        **options: Any,
    ):
        make = _Make(sgld, step_size=step_size, temperature=temperature, noise=noise)
        super().__init__(model, make, **options)


class SGHMC(_SGKernel):
    """``stochgrad.sghmc`` as a kernel for ``numpyro.infer.MCMC``.

    Args:
        model: A numpyro model with a subsampled plate.
        step_size, friction, mass, noise_estimate, temperature, integrator, noise: As in
            ``stochgrad.sghmc``; a mass that is a tree is a dict by site name.
        **options: ``batch_size``, ``order`` and ``layout`` as in ``stochgrad.from_numpyro``;
            ``num_steps``, steps of the kernel per iteration of ``MCMC``, 1 by default;
            ``share_batches`` as in ``stochgrad.sample``, with ``chain_method="vectorized"``.

    Raises:
        ValueError: as ``stochgrad.sghmc`` and ``stochgrad.from_numpyro`` do, when ``MCMC`` runs.
    """

    def __init__(
        self,
        model: Callable,
        step_size: StepSize,
        friction: float,
        *,
        mass: Any = 1.0,
        noise_estimate: float = 0.0,
        temperature: float = 1.0,
        integrator: str = "SGHMC",
        noise: Noise = "normal",
        **options: Any,
    ):
        make = _Make(
            sghmc,
            step_size=step_size,
            friction=friction,
            mass=mass,
            noise_estimate=noise_estimate,
            temperature=temperature,
            integrator=integrator,
            noise=noise,
        )
        super().__init__(model, make, **options)
