"""What the SG-MCMC kernels for ``numpyro.infer.MCMC`` have in common: all but the dynamics."""

from collections.abc import Callable, Mapping, Sequence
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
    Order,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_order,
    check_position,
    hoisted_jit,
    share_first,
    shared_axes,
    tree_isfinite,
)
from stochgrad.interop.numpyro._handler import all_rows
from stochgrad.interop.numpyro._model import from_numpyro
from stochgrad.interop.numpyro._report import report_after_runs
from stochgrad.interop.numpyro._tuning import GradientName, Tuning, tune


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


class SGKernel(MCMCKernel):
    """A numpyro kernel over one of ours, ``factory(target, **settings)``.

    Where it is ``tuned``, step size, friction and mass that are None are found.
    """

    sample_field = "z"  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        model: Callable,
        factory: Callable[..., Kernel],
        settings: dict[str, Any],
        *,
        tuned: bool = False,
        gradient: GradientName = "minibatch",
        batch_size: int | Mapping[str, int] | None = None,
        rows: str | Sequence[str] | None = None,
        order: Order = "reshuffled",
        layout: Layout = "blocks",
        num_steps: int = 1,
        share_batches: bool = False,
        **more: Any,
    ):
        self._factory, self._settings, self._tuned = factory, {**settings, **more}, tuned
        signature(factory).bind_partial(**self._settings)  # a wrong name fails here, not in a run
        self._model = check_callable("model", model, "a numpyro model")
        check_choice("gradient", gradient, get_args(GradientName))
        check_order(order, layout)
        self._gradient: GradientName = gradient
        if order == "streamed":
            raise ValueError(
                "order='streamed' needs stochgrad.sample(stochgrad.from_numpyro(model, ...)): "
                "numpyro's MCMC does not bring the next rows into memory."
            )
        self.tuning: Tuning | None = None
        self._options = {
            "batch_size": batch_size,
            "rows": rows,
            "order": order,
            "layout": layout,
        }
        self._num_steps = check_count("num_steps", num_steps)
        self._share_batches = check_flag("share_batches", share_batches)
        self._sample_fn: Callable | None = None
        self._num_warmup = 1
        self._bound: tuple[Any, Kernel, Callable] | None = None

    @property
    def model(self) -> Callable:
        """The model on all rows, for whoever runs it: ``Predictive``, ``log_likelihood``, ArviZ."""
        return all_rows(self._model)

    @property
    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, with those that were left out as they were found."""
        tuned = {} if self.tuning is None else self.tuning.settings
        base = {**self._options, "gradient": self._gradient, "num_steps": self._num_steps}
        return {**base, **self._settings, **tuned}

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "diverging", "noise_ratio", "potential_energy")

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs) -> SGState:
        self._num_warmup = num_warmup
        kernel, start = self._kernel(model_args, model_kwargs)
        self._sample_fn = kernel.step
        if init_params is not None:
            _check_start(init_params, start, jnp.shape(rng_key))

        def unknown(shape):
            fill = jnp.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 0
            return jnp.full(shape.shape, fill, shape.dtype)

        def init_chain(key, position):
            position_key, init_key, run_key = jax.random.split(key, 3)
            if position is None:
                position = start(position_key)
            state = kernel.init(position, init_key)
            info = jax.tree.map(unknown, jax.eval_shape(kernel.step, run_key, state)[1])
            return _state(state, info, run_key)

        if is_prng_key(rng_key):
            return hoisted_jit(init_chain)(rng_key, init_params)
        states = hoisted_jit(jax.vmap(init_chain))(rng_key, init_params)
        return share_first(states, self._share_batches)

    def sample(self, state: SGState, model_args, model_kwargs) -> SGState:
        step = self._kernel(model_args, model_kwargs)[0].step

        def sample_chain(state: SGState) -> SGState:
            def body(carry, key):
                following, info = step(key, carry)
                return following, info

            rng_key, run_key = jax.random.split(state.rng_key)
            keys = jax.random.split(run_key, self._num_steps)
            inner, infos = lax.scan(body, state.kernel_state, keys)
            info = jax.tree.map(lambda values: values[-1], infos)
            return _state(inner, info, rng_key)

        if is_prng_key(state.rng_key):
            return sample_chain(state)
        axes = shared_axes(state, self._share_batches)
        return jax.vmap(sample_chain, in_axes=(axes,), out_axes=axes)(state)

    def postprocess_fn(self, model_args, model_kwargs) -> Callable:
        return self._kernel(model_args, model_kwargs)[0].posterior.constrain  # pyright: ignore

    def get_diagnostics_str(self, state: SGState) -> str:
        return f"step size {state.step_size:.2e}, |gradient| {state.gradient_norm:.2e}"

    def _kernel(self, model_args, model_kwargs) -> tuple[Kernel, Callable]:
        """The kernel for these arguments and where it starts, made once for each set of them."""
        args, kwargs = arguments = (model_args, model_kwargs or {})
        identity = tuple(id(leaf) for leaf in jax.tree.leaves(arguments))
        if self._bound is None or self._bound[0][0] != identity:
            with jax.ensure_compile_time_eval():  # numpyro may be tracing
                posterior = from_numpyro(self._model, *args, **self._options, **kwargs)
                self.tuning = tune(
                    posterior,
                    self._factory,
                    self._gradient,
                    self._settings,
                    self._tuned,
                    self._num_warmup,
                )
            # holds on to the ids
            self._bound = ((identity, arguments), self.tuning.kernel, self.tuning.start)
        return self._bound[1:]

    def __getstate__(self) -> dict[str, Any]:
        tuning = self.tuning  # without its functions
        if tuning is not None:
            tuning = tuning._replace(kernel=None, start=None, warm_up=None)
        return {**self.__dict__, "_bound": None, "_sample_fn": None, "tuning": tuning}


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
    shapes = {name: (*lead, *shape.shape) for name, shape in model.items()}
    start_shapes = jax.tree.map(jnp.shape, init_params)
    if start_shapes != shapes:
        raise ValueError(
            "init_params must have the model's latent sites, unconstrained, with shapes "
            f"{shapes}, got {start_shapes}."
        )
    check_position(init_params, "init_params")


report_after_runs(lambda sampler: sampler if isinstance(sampler, SGKernel) else None)
