"""The path gradient in numpyro's SVI."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from jaxtyping import Array
from numpyro.infer.elbo import ELBO

from stochgrad.core import (
    check_callable,
    check_choice,
    check_count,
    check_instance,
    check_key,
    check_number,
    describe,
)
from stochgrad.gradients import (
    freeze,
    jensen_shannon_family,
    leave_one_out,
    leave_one_out_coefficients,
    renyi,
)
from stochgrad.interop.numpyro._guide_costs import least_variance
from stochgrad.interop.numpyro._guide_sites import check_reach, score_function_sites
from stochgrad.interop.numpyro._guide_strata import stratified_site
from stochgrad.interop.numpyro._particles import (
    Particle,
    Programs,
    floating_leaves,
    mean_state,
    particle,
    site_dependencies,
)

SiteEstimator = Literal["score", "optimal", "straight_through"]


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


class PathGradientELBO(ELBO):
    r"""The evidence lower bound with path gradients, for ``numpyro.infer.SVI``.

    The value is that of ``Trace_ELBO``. The gradient is, particle by particle,

    $$g = \underbrace{(\partial_\phi z)^\top\nabla_z[\log p(x, z) - \log q_\phi(z)]}_{\text{path}}
      \;-\; c\,\underbrace{\partial_\phi\log q_\phi(z)|_z}_{\text{mean zero}},$$

    $c = 1$ being exactly ``Trace_ELBO``'s, $c = 0$ the path gradient, whose variance vanishes where
    the guide fits. Far from there the path gradient can have the *larger* variance, by orders of
    magnitude from numpyro's narrow starting scales. So by default c is found at each step from what
    the step has anyway, the gradients of model and guide in the draws, each particle's from the
    other particles', so that the gradient stays unbiased:
    ``gradients.leave_one_out_coefficients``. It goes to 0 as the guide fits. That needs four
    particles, and no further derivative.

    Scores of flows are carried along the forward pass; nothing is inverted but cheap layers. It
    works for autoguides and reparameterized guides, hierarchical ones, plates, subsampling, masks,
    ``flax_module`` and mutable state. Parameters of the model have their ordinary gradient.

    A mixture, numpyro's or the base of an ``AutoFlow``, is drawn once from each component, weight
    by weight: $\sum_k w_k\,g_k$, the weights' own gradient included. Where that cannot be (two
    mixtures, a batch of them, discrete latent sites) the site needs an estimator of its own and is
    refused without one: ``"score"``, the score function with a leave-one-out baseline;
    ``"optimal"``, with the baseline of least variance for each parameter; ``"straight_through"``,
    biased, for ``Bernoulli`` and a ``Multinomial`` of one trial. A score function weighs each draw
    by the terms of the bound that are computed from it, within a plate by those of its own entry.

    Other objectives take the particles together, of log weights $\log w = \log p - \log q$:

    - ``"renyi"``: Rényi's bound of order alpha; at 0, the default, the importance-weighted bound.
      Its path gradient is the doubly reparameterized one, $\sum_i[\alpha\tilde w_i +
      (1-\alpha)\tilde w_i^2]\,P_i$; parameters of the model get
      $\sum_i\tilde w_i\,\partial\log p_i$.
    - ``"jensen_shannon"``: the Jensen-Shannon divergence. The evidence is estimated from the same
      particles, which biases it by the order of one over their number: take 64 or more.

    Args:
        num_particles: Draws of the guide in a step.
        vectorize_particles: As in numpyro.
        objective: ``"elbo"``, ``"renyi"`` or ``"jensen_shannon"``.
        alpha: Order of Rényi's bound, not negative and not 1.
        score_coef: c between 0 and 1, or ``"auto"``. With another objective than ``"elbo"`` it is
            0.0, which is what ``"auto"`` is there, or 1.0 for the plain derivative.
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
        objective: Literal["elbo", "renyi", "jensen_shannon"] = "elbo",
        alpha: float | None = None,
        score_coef: float | Literal["auto"] = "auto",
        estimators: Mapping[str, SiteEstimator] | None = None,
    ):
        num_particles = check_count("num_particles", num_particles)
        if not isinstance(vectorize_particles, bool) and not callable(vectorize_particles):
            raise TypeError(
                "vectorize_particles must be True, False or a function like jax.vmap, got "
                f"{describe(vectorize_particles)}."
            )
        check_choice("objective", objective, ("elbo", "renyi", "jensen_shannon"))
        self.objective, self.alpha = objective, _order(objective, alpha)
        if isinstance(score_coef, str):
            check_choice("score_coef (a number, or a name)", score_coef, ["auto"])
            if objective == "elbo" and num_particles < 4:
                raise ValueError(
                    "score_coef='auto' measures variances between particles and needs "
                    f"num_particles >= 4, got {num_particles}; with fewer, 0.0 is the path "
                    "gradient and 1.0 that of Trace_ELBO."
                )
        else:
            score_coef = check_number("score_coef", score_coef, zero=True, most=1.0)
        if objective != "elbo":
            score_coef = 0.0 if score_coef == "auto" else score_coef
            if score_coef not in (0.0, 1.0):
                raise ValueError(
                    f"score_coef must be 0.0 or 1.0 with objective={objective!r}, got {score_coef}."
                )
            if estimators:
                raise ValueError(
                    f"estimators must be None with objective={objective!r}: score functions of "
                    "single sites are for objective='elbo'."
                )
            if objective == "jensen_shannon" and num_particles < 2:
                raise ValueError(
                    "objective='jensen_shannon' estimates the evidence from its particles and "
                    f"needs num_particles >= 2, got {num_particles}."
                )
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
        programs = self._programs(rng_key, param_map, model, guide, args, kwargs)
        key = jax.random.split(rng_key, self.num_particles)
        if self.num_particles == 1:
            key = rng_key[None]  # the draw of Trace_ELBO with one particle
        apart = self.score_coef == "auto" or self.objective != "elbo"
        particles, mutable = self._over(partial(particle, programs, apart=apart), key, param_map)
        constant = lax.stop_gradient(particles.path)
        if self.objective == "elbo":
            c = _coefficients(particles) if self.score_coef == "auto" else self.score_coef
            bound = jnp.mean(particles.path + particles.direct + c * particles.score)
            if self.scored:
                bound = bound + self._discrete(programs, key, param_map, particles)
            value = jnp.mean(constant)
        else:
            bound, value = self._joint(particles, constant)
        loss = -(bound + lax.stop_gradient(value - bound))
        return {"loss": loss, "mutable_state": mean_state(mutable) if mutable else None}

    def _joint(self, particles: Particle, log_weights) -> tuple[Array, Array]:
        """An objective of all particles together: its gradient, and its value."""
        total = self.score_coef == 1.0
        moved = particles.path - log_weights + (particles.score if total else 0.0)
        if self.objective == "renyi":
            found = renyi(log_weights, self.alpha)
            by_draws = found.share if total else found.coefficient
            gradient = jnp.sum(by_draws * moved + found.share * particles.direct)
            return gradient, found.bound
        family = jensen_shannon_family()
        log_u = log_weights - logsumexp(log_weights) + jnp.log(float(len(log_weights)))
        by_draws = -family.slope(log_u) if total else family.coefficient(log_u)
        gradient = jnp.mean(by_draws * moved - family.slope(log_u) * particles.direct)
        return gradient, -jnp.mean(family.value(log_u))

    def _programs(self, rng_key, param_map, model, guide, args, kwargs) -> Programs:
        """What is run, looked at once."""
        strata = stratified_site(guide, rng_key, param_map, args, kwargs, self.estimators)
        check_reach(guide, rng_key, param_map, args, kwargs, self.estimators, strata)
        programs = Programs(model, guide, args, kwargs, self.estimators, strata)
        found = site_dependencies(programs, rng_key, param_map)
        programs = programs._replace(dependencies=found)
        if self.objective == "elbo":
            return programs
        if strata is not None:
            raise ValueError(
                f"guide: site {strata.name!r} is a mixture, drawn component by component, which "
                f"objective={self.objective!r} does not know: take objective='elbo'."
            )
        return programs._replace(inspect=partial(_check_joint, self.objective))

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
        programs = self._programs(rng_key, param_map, model, guide, args, kwargs)

        @jax.jit
        def measure(keys, params):
            moving, fill = floating_leaves(params)

            def of_one(key):
                found, pull = jax.vjp(lambda p: particle(programs, key, fill(p), True)[0], moving)
                none = jax.tree.map(jnp.zeros_like, found)
                one = jnp.ones_like(found.path)
                (path,) = pull(none._replace(path=one, direct=one))
                (score,) = pull(none._replace(score=one))
                return found, ravel_pytree(path)[0], ravel_pytree(score)[0]

            found, path, score = jax.vmap(of_one)(keys)
            c = _coefficients(found)

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

    def _discrete(self, programs, keys, params, particles: Particle):
        """The score-function part of a gradient, as the gradient of something of value zero."""
        if "score" in self.estimators.values():
            terms = [
                jnp.sum((costs - leave_one_out(costs)) * (law - freeze(law)))
                for costs, law in ((particles.costs[k], particles.laws[k]) for k in particles.laws)
            ]
            return sum(terms, start=jnp.zeros(())) / self.num_particles
        moving, fill = floating_leaves(params)

        def of_one(key):
            def laws(moving):
                found = particle(programs, key, fill(moving), False)[0]
                return found.laws, found.costs

            found, pull, costs = jax.vjp(laws, freeze(moving), has_aux=True)
            return pull(costs)[0], pull(jax.tree.map(jnp.ones_like, found))[0]

        gradient = freeze(least_variance(*jax.vmap(of_one)(keys)))
        products = jax.tree.map(lambda g, p: jnp.sum(g * (p - freeze(p))), gradient, moving)
        return sum(products, start=jnp.zeros(()))


def _coefficients(particles: Particle) -> Array:
    """How much of the score each particle's gradient keeps."""
    if particles.score_rows.shape[1] == 0:  # no draw moves, and there is no score
        return jnp.zeros_like(particles.path)
    return freeze(leave_one_out_coefficients(particles.total_rows, particles.score_rows))


def _order(objective: str, alpha) -> float:
    if alpha is None:
        return 0.0
    if objective != "renyi":
        raise ValueError(f"alpha must be None with objective={objective!r}: it is that of 'renyi'.")
    alpha = check_number("alpha", alpha, zero=True)
    if alpha == 1:
        raise ValueError("alpha must not be 1: that bound is objective='elbo'.")
    return alpha


def _check_joint(objective: str, sites: Mapping[str, Any]) -> None:
    """Raise unless the weights of a model are those of all its data, and of fixed evidence."""
    for name, site in sites.items():
        if site["type"] == "plate" and site["args"][0] != site["args"][1]:
            raise ValueError(
                f"model: plate {name!r} subsamples its data, and objective={objective!r} is no "
                "mean over rows: take objective='elbo', or all rows."
            )
        if site["type"] == "param" and objective == "jensen_shannon":
            raise ValueError(
                f"model: parameter {name!r} moves the evidence, which objective={objective!r} "
                "takes for fixed: take objective='elbo' or 'renyi'."
            )


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
