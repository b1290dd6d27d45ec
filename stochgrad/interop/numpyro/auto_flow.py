"""Any flowjax flow as a numpyro autoguide."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flowjax.bijections import AbstractBijection
from flowjax.distributions import AbstractDistribution, AbstractTransformed, VmapMixture
from flowjax.experimental.numpyro import _DistributionToNumpyro, distribution_to_numpyro
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform

from stochgrad.core import Draws, check_callable, check_instance, describe, first_line
from stochgrad.flows import beyond_reach, check_flow, sample, split_flow, unwrap_flow
from stochgrad.gradients import Pushed, push_score
from stochgrad.interop.numpyro._guide_sites import is_fixed
from stochgrad.interop.numpyro._guide_strata import Components, components_of, is_stratified
from stochgrad.interop.numpyro._model import from_numpyro


class FlowTransform(Transform):
    r"""A flowjax bijection as a numpyro transform, differentiable in its condition as well.

    Args:
        bijection: The bijection.
        condition: Its condition, of shape (\*batch, \*cond_shape), or None.
    """

    def __init__(self, bijection: AbstractBijection, condition: Any = None):
        self.bijection = bijection
        self.condition = condition

    @property
    def domain(self):
        return constraints.independent(constraints.real, len(self.bijection.shape))

    codomain = domain

    def __call__(self, x):
        return self.call_with_intermediates(x)[0]

    def _inverse(self, y):
        return self.over_batch(lambda b, y, c: b.inverse(y, c), y)

    def call_with_intermediates(self, x):
        return self.over_batch(lambda b, x, c: b.transform_and_log_det(x, c), x)

    def push(self, x, score):
        """Output, its intermediates, which are the log-determinant, and the score behind it."""
        return self.over_batch(push_score, x, score)

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def over_batch(self, function, *arrays):
        """A function of ``(bijection, *points, condition)`` over the leading axes."""
        event, cond = len(self.bijection.shape), self.bijection.cond_shape
        batch = arrays[0].shape[: arrays[0].ndim - event]
        condition = self.condition
        if cond is not None:
            condition = jnp.broadcast_to(condition, (*batch, *cond))

        def one(arrays, condition):
            return function(self.bijection, *arrays, condition)

        for _ in batch:
            one = jax.vmap(one, in_axes=(0, None if cond is None else 0))
        return one(arrays, condition)

    def tree_flatten(self):
        arrays, rest = eqx.partition((self.bijection, self.condition), eqx.is_array)
        return (arrays,), (("arrays",), {"rest": rest})

    @classmethod
    def tree_unflatten(cls, aux_data, params):
        bijection, condition = eqx.combine(params[0], aux_data[1]["rest"])
        return cls(bijection, condition)

    def eq(self, other: object, static: bool = False):
        return isinstance(other, FlowTransform) and self.bijection is other.bijection


@push_score.register(FlowTransform)
def _flow_transform(layer, x, score, condition=None) -> Pushed:
    return Pushed(*layer.push(x, score))


@components_of.register(_DistributionToNumpyro)
def _mixture(base) -> Components | None:
    if not isinstance(base.dist, VmapMixture) or base.batch_shape != ():
        return None
    mixture: Any = base.dist
    width = len(mixture.log_normalized_weights)

    def draw(key):
        draw = eqx.filter_vmap(lambda component, key: component._sample(key, base.condition))
        return draw(mixture.dist, jax.random.split(key, width))

    return Components(jnp.exp(mixture.log_normalized_weights), draw)


class AutoFlow(AutoContinuous):
    """A guide over all latent variables, in unconstrained space, from a flowjax flow.

    Draws are made by the flow's forward map, which should be its cheap direction (flowjax:
    ``invert=False``).

    Args:
        model: A numpyro model.
        flow: A flowjax distribution of vectors as long as there are latent numbers, or a function
            ``latent_dim -> flow``.
        condition: For a conditional flow: ``(*args, **kwargs) -> array``, computed from the
            arguments of the guide; its gradient is kept. With ``flowjax.bijections.EmbedCondition``
            the flow has a network of its own for it.
        prefix: Prefix of the parameters' names.
        init_loc_fn: As in numpyro; where the model is first looked at.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the flow has no layers, is of another dimension than the model, or conditional
            without a ``condition``. When a gradient is taken: the flow's base is a mixture whose
            weights are trained, which needs ``PathGradientELBO``.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from flowjax.distributions import StandardNormal
        >>> from flowjax.flows import coupling_flow
        >>> from numpyro.infer import SVI
        >>> from stochgrad.numpyro import AutoFlow, PathGradientELBO
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x**2, 0.5))
        >>> guide = AutoFlow(model, lambda dim: coupling_flow(
        ...     jax.random.key(0), base_dist=StandardNormal((dim,)), invert=False, flow_layers=2))
        >>> svi = SVI(model, guide, optax.adam(3e-3), loss=PathGradientELBO())
        >>> result = svi.run(jax.random.key(1), 100, progress_bar=False)
        >>> guide.sample_posterior(jax.random.key(2), result.params, sample_shape=(5,))["x"].shape
        (5,)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: AbstractDistribution | Callable[[int], AbstractDistribution],
        *,
        condition: Callable[..., Any] | None = None,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_uniform,
    ):
        check_callable("model", model, "a numpyro model")
        if not isinstance(flow, AbstractDistribution):
            wanted = "a flowjax distribution or a function latent_dim -> flow"
            if isinstance(flow, type):
                raise TypeError(f"flow must be {wanted}, got {describe(flow)}.")
            check_callable("flow", flow, wanted)
        if condition is not None:
            check_callable("condition", condition, "a function of the guide's arguments")
        check_instance("prefix", prefix, str, "text")
        check_callable("init_loc_fn", init_loc_fn, "an initialization strategy of numpyro")
        self._flow, self._condition, self._condition_value = flow, condition, None
        self._beyond: list[str] = []
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        flow = self._flow
        if not isinstance(flow, AbstractDistribution):
            flow = self._called("flow", flow, self.latent_dim)
            check_instance(
                "what flow returns", flow, AbstractDistribution, "a flowjax distribution"
            )
        plain = unwrap_flow(flow)
        if not isinstance(plain, AbstractTransformed):
            raise ValueError("the flow must have layers, got a base distribution.")
        if plain.shape != (self.latent_dim,):
            raise ValueError(
                f"the flow must have shape ({self.latent_dim},), as many as the model has latent "
                f"numbers, got {plain.shape}."
            )
        if plain.cond_shape is not None and self._condition is None:
            raise ValueError("a conditional flow needs condition, a function of the arguments.")
        if plain.cond_shape is None and self._condition is not None:
            raise ValueError("condition must be None for a flow that takes no condition.")
        value = None
        if self._condition is not None:
            with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=0):
                value = self._conditioned(*args, **kwargs)
        check_flow(flow, value)
        self._beyond = beyond_reach(flow, value)
        self._arrays, self._static = split_flow(flow)

    def _sample_latent(self, *args, **kwargs):
        shape = kwargs.pop("sample_shape", ())
        if self._condition is not None:
            self._condition_value = self._conditioned(*args, **kwargs)
        return super()._sample_latent(sample_shape=shape)

    def _get_posterior(self):
        arrays = numpyro.param(f"{self.prefix}_flow", lambda key: self._arrays)
        site = f"_{self.prefix}_latent"
        if self._beyond and not is_fixed(site) and not is_stratified(site):
            arrays = _without_gradient(arrays, self._beyond, site)
        flow = self._made(arrays)
        transform = FlowTransform(flow.bijection, self._condition_value)
        return dist.TransformedDistribution(distribution_to_numpyro(flow.base_dist), [transform])

    def _conditioned(self, *args, **kwargs):
        value = self._called("condition", self._condition, *args, **kwargs)
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"condition must return an array, got {describe(value)}.") from error

    @staticmethod
    def _called(name, function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"{name} fails: {first_line(error)}.") from error

    def get_base_dist(self):
        """The flow's base distribution."""
        return distribution_to_numpyro(self._made(self._arrays).base_dist)

    def _made(self, arrays) -> AbstractTransformed:
        flow = unwrap_flow(eqx.combine(arrays, self._static))
        assert isinstance(flow, AbstractTransformed)  # checked when the guide was set up
        return flow

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs):
        """Draws of the posterior in the model's own space.

        Args:
            rng_key: A PRNG key.
            params: Parameters, as ``svi.run`` returns them.
            *args: Arguments of the guide, for a conditional flow.
            sample_shape: Shape of the draws.
            **kwargs: Keyword arguments likewise.
        """
        seeded = numpyro.handlers.seed(self._sample_latent, rng_key)
        latent = numpyro.handlers.substitute(seeded, params)(
            *args, sample_shape=sample_shape, **kwargs
        )
        return self._unpack_and_constrain(latent, params)

    def to_draws(self, rng_key, params, num_samples: int, *args, **kwargs) -> Draws:
        """Draws of the guide, weighted to the model's posterior and resampled, with a verdict.

        As ``stochgrad.sample`` returns draws, with ArviZ's groups by ``to_datatree``; ``attrs``
        have k-hat of the weights, their effective sample size, and the log evidence ``log_z``.

        Args:
            rng_key: A PRNG key.
            params: Parameters, as ``svi.run`` returns them.
            num_samples: How many draws, both of the guide and of the result.
            *args: Arguments of the model, with all its data.
            **kwargs: Keyword arguments likewise.

        Raises:
            ValueError: the guide has not been set up by ``svi.init``, the parameters are not its
                own, or the model has parameters itself.

        Warns:
            stochgrad.flows.WeightsWarning: k-hat is too large for the weights to be trusted.
        """
        name = f"{self.prefix}_flow"
        if self.prototype_trace is None or not isinstance(params, Mapping) or name not in params:
            raise ValueError(
                f"params must be those of svi.run with this guide, with {name!r} among them, got "
                f"{describe(params)}."
            )
        posterior = from_numpyro(self.model, *args, order="full", **kwargs)
        condition = None
        if self._condition is not None:
            with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=0):
                substituted = numpyro.handlers.substitute(self._conditioned, dict(params))
                condition = substituted(*args, **kwargs)

        def log_density(x):
            return posterior.log_density(self._unpack_latent(x), posterior.batches.full)

        flow = self._made(params[name])
        weighted = sample(rng_key, flow, num_samples, log_density, condition)
        draws = weighted.to_draws()
        unpack = jax.jit(jax.vmap(jax.vmap(self._unpack_latent)))
        positions = jax.tree.map(np.asarray, unpack(jnp.asarray(draws.positions)))
        return replace(draws, positions=positions, posterior=posterior)


def _without_gradient(arrays: Any, names: list[str], site: str) -> Any:
    """The same arrays, which refuse to be differentiated along the path of a draw."""

    @jax.custom_jvp
    def refusing(arrays):
        return arrays

    @refusing.defjvp
    def _(primals, tangents):
        raise ValueError(
            f"flow: {' and '.join(names)} cannot be trained along the path of a draw. As the "
            "weights of a mixture, they decide what is drawn, and that has no derivative: train "
            "with PathGradientELBO, which draws each component of a VmapMixture, or with its "
            f"estimators={{{site!r}: 'score'}}, or hold them fixed with paramax.non_trainable."
        )

    return refusing(arrays)
