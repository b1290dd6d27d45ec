"""The path gradient in numpyro's SVI."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import autoguide
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import compute_log_probs
from numpyro.util import check_model_guide_match

from stochgrad.core import (
    check_callable,
    check_choice,
    check_count,
    check_instance,
    check_key,
    check_number,
    describe,
)
from stochgrad.gradients import freeze, leave_one_out, optimal_mixing_weights, score_function
from stochgrad.interop.numpyro._guide_sites import (
    FixedDraws,
    along_the_path,
    check_reach,
    draw,
    is_delta,
    score_function_sites,
)
from stochgrad.interop.numpyro._sites import is_latent

SiteEstimator = Literal["score", "optimal", "straight_through"]

_DAIS = (autoguide.AutoDAIS, autoguide.AutoSurrogateLikelihoodDAIS, autoguide.AutoSemiDAIS)


class PathGradientWarning(UserWarning):
    """The path gradient is known to be the worse one here."""


class GradientVariances(NamedTuple):
    """How the estimates of one particle vary, summed over all parameters.

    Attributes:
        path: Variance of the path gradient.
        total: Variance of the total gradient, ``Trace_ELBO``'s.
        blend: Variance of the blend of both with measured coefficients.
        score_coef: Mean of those coefficients: 0 is the path gradient, 1 the total one.
    """

    path: Array
    total: Array
    blend: Array
    score_coef: Array


class _Particles(NamedTuple):
    """What particles give: a value with the path gradient, and what may be added to it."""

    path: Array
    score: Array
    discrete: Array


class PathGradientELBO(ELBO):
    r"""The evidence lower bound with path gradients, for ``numpyro.infer.SVI``.

    The value is that of ``Trace_ELBO``. The gradient is, particle by particle,

    $$g = \underbrace{(\partial_\phi z)^\top\nabla_z[\log p(x, z) - \log q_\phi(z)]}_{\text{path}}
      \;-\; c\,\underbrace{\partial_\phi\log q_\phi(z)|_z}_{\text{mean zero}},$$

    $c = 1$ being exactly ``Trace_ELBO``'s, $c = 0$ the path gradient, whose variance vanishes where
    the guide fits. Far from there the path gradient can have the *larger* variance, by orders of
    magnitude from numpyro's narrow starting scales. So by default c is measured, at each step, for
    the least variance between particles, each particle's from the others, so that the gradient
    stays unbiased (``gradients.optimal_mixing_weights``). That needs four particles, and one
    derivative more of each, of eight at most, in a random direction.

    Scores of flows are carried along the forward pass; nothing is inverted but cheap layers. It
    works for autoguides and reparameterized guides, hierarchical ones, plates, subsampling, masks,
    ``flax_module`` and mutable state. Parameters of the model have their ordinary gradient.

    Discrete latent sites of the guide, and mixtures, whose weights no path reaches, need an
    estimator of their own and are refused without one: ``"score"``, the score function with a
    leave-one-out baseline; ``"optimal"``, with the baseline of least variance for each parameter;
    ``"straight_through"``, biased, for ``Bernoulli`` and a ``Multinomial`` of one trial.

    Args:
        num_particles: Draws of the guide in a step.
        vectorize_particles: As in numpyro.
        score_coef: c between 0 and 1, or ``"auto"``.
        estimators: Names of sites that cannot be reparameterized, and their estimators.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: ``"auto"`` with fewer than four particles; an unknown estimator. When run: a
            site that cannot be reparameterized has no estimator, no path reaches a parameter, or a
            distribution has no way to its score.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoMultivariateNormal
        >>> from stochgrad.numpyro import PathGradientELBO
        >>> def model():
        ...     numpyro.sample("x", dist.MultivariateNormal(jnp.ones(2), jnp.eye(2) + 0.5))
        >>> guide = AutoMultivariateNormal(model)
        >>> svi = SVI(model, guide, optax.adam(0.05), loss=PathGradientELBO())
        >>> result = svi.run(jax.random.key(0), 1000, progress_bar=False)
        >>> bool(jnp.abs(result.losses[-1]) < 1e-3)  # the divergence itself, with no noise left
        True
    """

    def __init__(
        self,
        num_particles: int = 4,
        vectorize_particles: Any = True,
        *,
        score_coef: float | Literal["auto"] = "auto",
        estimators: Mapping[str, SiteEstimator] | None = None,
    ):
        num_particles = check_count("num_particles", num_particles)
        if not isinstance(vectorize_particles, bool) and not callable(vectorize_particles):
            raise TypeError(
                "vectorize_particles must be True, False or a function like jax.vmap, got "
                f"{describe(vectorize_particles)}."
            )
        if isinstance(score_coef, str):
            check_choice("score_coef (a number, or a name)", score_coef, ["auto"])
            if num_particles < 4:
                raise ValueError(
                    "score_coef='auto' measures variances between particles and needs "
                    f"num_particles >= 4, got {num_particles}; with fewer, 0.0 is the path "
                    "gradient and 1.0 that of Trace_ELBO."
                )
        else:
            score_coef = check_number("score_coef", score_coef, zero=True, most=1.0)
        self.score_coef = score_coef
        if estimators is not None:
            wanted = "a dictionary of names of sites and estimators"
            check_instance("estimators", estimators, Mapping, wanted)
        self.estimators = dict(estimators or {})
        for site, estimator in self.estimators.items():
            check_instance("a name in estimators", site, str, "the name of a site")
            choices = ("score", "optimal", "straight_through")
            check_choice(f"estimators[{site!r}]", estimator, choices)
        self.scored = score_function_sites(self.estimators)
        if self.scored and num_particles < 2:
            raise ValueError(
                "score-function estimators take their baselines from other particles and need "
                f"num_particles >= 2, got {num_particles}."
            )
        if {"score", "optimal"} <= set(self.estimators.values()):
            raise ValueError("'score' and 'optimal' cannot be mixed in one objective.")
        self.can_infer_discrete = bool(self.estimators)
        super().__init__(num_particles, vectorize_particles)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The negative bound, with this objective's gradient, as numpyro asks for it."""
        _check_call(rng_key, param_map, model, guide)
        if isinstance(guide, _DAIS) and self.score_coef not in ("auto", 1.0):
            warnings.warn(
                f"the path gradient of {type(guide).__name__} had up to thousands of times the "
                "variance of Trace_ELBO's: let score_coef='auto' measure it, or take 1.0.",
                PathGradientWarning,
                stacklevel=2,
            )
        check_reach(guide, rng_key, param_map, args, kwargs, self.estimators)
        particle = partial(self._particle, model=model, guide=guide, args=args, kwargs=kwargs)
        key = jax.random.fold_in(rng_key, self.num_particles)
        keys = jax.random.split(rng_key, self.num_particles)
        if self.num_particles == 1:
            keys = rng_key[None]  # the draw of Trace_ELBO with one particle
        particles, mutable = self._over(particle, keys, param_map)
        constant = lax.stop_gradient(particles.path)
        c = self.score_coef
        if c == "auto":
            c = self._measured(particle, keys, param_map, key)
        bound = jnp.mean(particles.path + c * particles.score)
        if self.scored:
            bound = bound + self._discrete(particle, keys, param_map, particles, constant)
        bound = bound + lax.stop_gradient(jnp.mean(constant) - bound)
        return {"loss": -bound, "mutable_state": _mean(mutable) if mutable else None}

    def variances(
        self, rng_key, param_map, model, guide, *args, num_particles: int = 64, **kwargs
    ) -> GradientVariances:
        """Measure how the path, the total and the blended gradient vary at given parameters.

        It compiles at every call; wrap it in ``jax.jit`` to measure often. What score functions
        of sites with estimators add is not in it.

        Args:
            rng_key: A PRNG key.
            param_map: Parameters, as ``svi.get_params(state)`` gives them.
            model: The model.
            guide: The guide.
            *args: Arguments of both.
            num_particles: How many particles to measure with.
            **kwargs: Keyword arguments of both.
        """
        _check_call(rng_key, param_map, model, guide)
        keys = jax.random.split(rng_key, check_count("num_particles", num_particles, least=4))
        check_reach(guide, rng_key, param_map, args, kwargs, self.estimators)

        particle = partial(self._particle, model=model, guide=guide, args=args, kwargs=kwargs)

        @jax.jit
        def measure(keys, params):
            moving, fill = _floating(params)

            def of_one(key):
                value, pull = jax.vjp(lambda p: particle(key, fill(p))[0], moving)
                one, none = jnp.ones_like(value.path), jnp.zeros_like(value.path)
                (path,), (score,) = (
                    pull(_Particles(one, none, none)),
                    pull(_Particles(none, one, none)),
                )
                return tuple(ravel_pytree(part)[0] for part in (path, score))

            path, score = jax.vmap(of_one)(keys)
            c = self._measured(particle, keys, params, rng_key)

            def spread(rows):
                return jnp.sum(jnp.var(rows, axis=0, ddof=1))

            return GradientVariances(
                spread(path), spread(path + score), spread(path + c[:, None] * score), jnp.mean(c)
            )

        return measure(keys, param_map)

    def _over(self, particle, keys, params):
        """All particles, by ``vectorize_particles``."""
        if len(keys) == 1:
            return jax.tree.map(lambda x: x[None], particle(keys[0], params))
        return self.vectorize_particles_fn(lambda key: particle(key, params), keys)

    def _measured(self, particle, keys, params, key):
        """The particles' coefficients of least variance."""
        moving, fill = _floating(params)
        return optimal_mixing_weights(
            lambda p, key: particle(key, fill(p))[0][:2], moving, keys, key
        )

    def _discrete(self, particle, keys, params, particles, rewards):
        """The score-function part of a gradient, as the gradient of something of value zero."""
        if "score" in self.estimators.values():
            moved = particles.discrete - lax.stop_gradient(particles.discrete)
            return jnp.mean((rewards - leave_one_out(rewards)) * moved)
        moving, fill = _floating(params)

        def scores(key):
            return jax.grad(lambda p: particle(key, fill(p))[0].discrete)(freeze(moving))

        gradient = freeze(score_function(rewards, jax.vmap(scores)(keys), "optimal"))
        products = jax.tree.map(lambda g, p: jnp.sum(g * (p - freeze(p))), gradient, moving)
        return sum(products, start=jnp.zeros_like(rewards[0]))

    def _particle(self, rng_key, param_map, *, model, guide, args, kwargs):
        """One particle: the bound by path, total minus path, log density of discrete sites."""
        params, still = dict(param_map), freeze(param_map)
        model_key, guide_key = jax.random.split(rng_key)
        log_q, drawn = draw(guide, guide_key, params, args, kwargs, self.estimators)
        mutable = _mutable(drawn)
        params.update(mutable)

        replayed = replay(seed(model, model_key), trace=drawn)
        log_p, model_trace = compute_log_probs(replayed, args, kwargs, params)
        check_model_guide_match(model_trace, drawn)
        mutable.update(_mutable(model_trace))

        known = {
            name: site["value"]
            for name, site in drawn.items()
            if (is_latent(site) and not is_delta(site["fn"])) or site["type"] == "plate"
        }
        again = substitute(seed(guide, guide_key), data={**still, **known})
        with FixedDraws(self.scored):
            frozen = trace(again).get_trace(*args, **kwargs)
        along = sum(
            (
                along_the_path(site, drawn[name])
                for name, site in frozen.items()
                if site["type"] == "sample"
            ),
            start=jnp.zeros(()),
        )
        total_p = sum(log_p.values(), start=jnp.zeros(()))
        total_q = sum(log_q.values(), start=jnp.zeros(()))
        value = lax.stop_gradient(total_p - total_q)
        path = total_p - along
        path = path + lax.stop_gradient(value - path)
        discrete = sum((log_q[name] for name in self.scored), start=jnp.zeros_like(value))
        return _Particles(path, along - total_q, discrete), mutable


def _check_call(rng_key, param_map, model, guide) -> None:
    if not (isinstance(rng_key, jax.Array) and rng_key.dtype == jnp.uint32):  # a legacy key
        check_key(rng_key, "rng_key")
    check_instance("param_map", param_map, Mapping, "a dictionary of parameters")
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_map):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, float | int):
            where = "param_map" + jax.tree_util.keystr(path)
            raise TypeError(f"{where} must be an array, got {describe(leaf)}.")
    check_callable("model", model, "a numpyro model")
    check_callable("guide", guide, "a numpyro guide")


def _floating(tree):
    """The floating-point leaves of a tree, and how to put them back."""
    leaves, structure = jax.tree.flatten(tree)
    moves = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    moving = [leaf for leaf, flag in zip(leaves, moves, strict=True) if flag]

    def fill(moving):
        values = iter(moving)
        filled = [next(values) if flag else leaf for leaf, flag in zip(leaves, moves, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return moving, fill


def _mean(mutable):
    """One state of what several particles left: the mean of what is a number."""

    def mean(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.mean(leaf, axis=0) if floating else leaf[0]

    return jax.tree.map(mean, mutable)


def _mutable(sites) -> dict[str, Any]:
    return {name: site["value"] for name, site in sites.items() if site["type"] == "mutable"}
