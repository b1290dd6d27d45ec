"""One particle of an objective: values whose gradients run along the path, or beside it."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.util import compute_log_probs
from numpyro.util import check_model_guide_match

from stochgrad.core import first_line
from stochgrad.gradients import depends, freeze
from stochgrad.interop.numpyro._guide_costs import costs_after, dependencies, law_of
from stochgrad.interop.numpyro._guide_sites import (
    FixedDraws,
    along_the_path,
    draw,
    is_delta,
    score_function_sites,
)
from stochgrad.interop.numpyro._guide_strata import DrawComponent, Stratified
from stochgrad.interop.numpyro._sites import is_latent


class Particle(NamedTuple):
    """What a particle gives.

    Attributes:
        path: Its log weight, whose gradient runs along the path of its draws.
        direct: Zero, with the gradient in what the model, and points and factors of the guide,
            have of their own beside the draws; where gradients were not taken apart, that is in
            ``path``.
        score: Zero, with the gradient that is to be added to have the total one.
        laws: Log densities of the sites with score functions, entry by entry.
        costs: What each of those entries answers for.
        total_rows: Gradient of the model's log density in the draws.
        score_rows: Gradient of the guide's.
    """

    path: Array
    direct: Array
    score: Array
    laws: dict[str, Array]
    costs: dict[str, Array]
    total_rows: Float[Array, " m"]
    score_rows: Float[Array, " m"]


class Programs(NamedTuple):
    """Model and guide with their arguments, and how the guide's sites are estimated.

    Attributes:
        model: The model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        estimators: Names of sites and their estimators.
        strata: The site that is drawn component by component.
        inspect: What to look at the model's trace with.
        dependencies: From which sites with score functions each term of the bound is computed.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    estimators: Mapping[str, Any]
    strata: Stratified | None = None
    inspect: Callable[[Mapping[str, Any]], None] = lambda sites: None
    dependencies: Mapping[str, frozenset[str]] = {}


def particle(programs: Programs, key, param_map, apart: bool) -> tuple[Particle, Any]:
    """A particle and the mutable state that it leaves.

    Args:
        programs: What to run.
        key: Its key.
        param_map: Parameters.
        apart: Whether to take the gradients of model and guide in the draws apart, which is what
            coefficients are made of. It costs no further derivative of the model, whose gradient
            is kept, but the model has to go backward.
    """
    if programs.strata is None:
        return _one(programs, key, param_map, apart)
    strata = programs.strata

    def of_component(k):
        drawing = DrawComponent(strata, k)
        found, mutable = _one(programs, key, param_map, apart, drawing)
        return drawing.weight, found, mutable

    weights, parts, mutable = jax.vmap(of_component)(jnp.arange(strata.width))
    still = lax.stop_gradient(weights)

    def rows(of_each):
        return (still[:, None] * of_each).ravel()

    found = Particle(
        jnp.sum(weights * parts.path),
        jnp.sum(still * parts.direct),
        jnp.sum(still * parts.score),
        {},
        {},
        rows(parts.total_rows),
        rows(parts.score_rows),
    )
    return found, mean_state(mutable)


def _one(programs: Programs, key, param_map, apart: bool, drawing=None) -> tuple[Particle, Any]:
    model, guide, args, kwargs, estimators = programs[:5]
    params, still = dict(param_map), freeze(param_map)
    scored = score_function_sites(estimators)
    model_key, guide_key = jax.random.split(key)
    with drawing or nullcontext():
        log_q, drawn, scores = draw(
            guide, guide_key, params, args, kwargs, estimators, programs.strata
        )
    left = _mutable(drawn)
    params.update(left)
    latent = {name: site for name, site in drawn.items() if is_latent(site)}
    total_q = sum(log_q.values(), start=jnp.zeros(()))
    known = {name: site["value"] for name, site in latent.items() if not is_delta(site["fn"])}
    factor = sum((q for name, q in log_q.items() if name not in known), start=jnp.zeros(()))
    density = total_q - factor
    zero, none = jnp.zeros_like(total_q), jnp.zeros(0, total_q.dtype)
    laws = {name: law_of(drawn[name]) for name in scored}

    used: set[str] = set()

    def log_density(values, params):
        given: Any = {
            name: {**site, "value": values[name]} if name in values else site
            for name, site in drawn.items()
        }
        replayed = replay(seed(model, model_key), trace=given)
        log_p, sites = compute_log_probs(replayed, args, kwargs, params)
        check_model_guide_match(sites, drawn)
        programs.inspect(sites)
        used.update(sites)
        costs = {name: costs_after(sites, drawn, programs.dependencies, name) for name in scored}
        return sum(log_p.values(), start=jnp.zeros(())), (_mutable(sites), costs)

    plates = {name: site["value"] for name, site in drawn.items() if site["type"] == "plate"}
    moving = {name: x for name, x in known.items() if _is_float(x) and name not in scored}
    alone = len(moving) == 1

    def run_again(moving, params):
        """The guide at the same draws."""
        again = substitute(seed(guide, guide_key), data={**params, **plates, **known, **moving})
        with drawing or nullcontext(), FixedDraws(scored):
            sites = trace(again).get_trace(*args, **kwargs)
        return {name: site for name, site in sites.items() if site["type"] == "sample"}

    def density_along(moving):
        """Log density of the draws under the guide of constant parameters."""
        sites = run_again(moving, still)
        return sum(
            (
                along_the_path(sites[name], drawn[name], scores.get(name) if alone else None)
                for name in known
            ),
            start=zero,
        )

    def beside(moving, params):
        """What the guide makes of the draws: log density of all else, and points."""
        sites = run_again(moving, params)
        densities = (
            along_the_path(site, drawn[name]) for name, site in sites.items() if name not in known
        )
        points = {
            name: sites[name]["value"]
            for name, site in latent.items()
            if name not in known and _is_float(site["value"])
        }
        return sum(densities, start=zero), points

    if not apart:
        total_p, (more, costs) = log_density({}, params)
        along_q = density_along(moving)
        value = lax.stop_gradient(total_p - total_q)
        path = total_p - factor - along_q
        path = path + lax.stop_gradient(value - path)
        return Particle(path, zero, along_q - density, laws, costs, none, none), {**left, **more}

    values = {name: site["value"] for name, site in latent.items() if _is_float(site["value"])}
    total_p, (in_values, in_own), (more, costs) = _backward(
        lambda values, own: log_density(values, _filled(params, own)),
        freeze(values),
        freeze(_floating(params)),
    )
    in_own = {name: slopes for name, slopes in in_own.items() if name in used}
    s = jax.grad(density_along)(freeze(moving))
    t = {name: in_values[name] for name in moving}
    direct = _moved(in_own, {name: _floating(params)[name] for name in in_own})
    if len(latent) > len(known):
        (_, points), pull = jax.vjp(lambda m: beside(m, still), freeze(moving))
        in_points = {name: in_values[name] for name in points}
        (by_points,) = pull((-jnp.ones_like(zero), in_points))
        t = {name: t[name] + by_points[name] for name in moving}
        if depends(lambda params: beside(freeze(moving), params), params):
            direct = (
                direct
                + _moved(in_points, {name: values[name] for name in points})
                - (factor - lax.stop_gradient(factor))
                - _moved(by_points, moving)
            )

    path = jax.tree.map(jnp.subtract, t, s)
    path = lax.stop_gradient(total_p - total_q) + _moved(path, moving)
    score = _moved(s, moving) - (density - lax.stop_gradient(density))
    rows = (freeze(ravel_pytree(tree)[0]) if moving else none for tree in (t, s))
    return Particle(path, direct, score, laws, costs, *rows), {**left, **more}


def site_dependencies(programs: Programs, key, param_map) -> Mapping[str, frozenset[str]]:
    """From which sites with score functions each term of the bound is computed."""
    scored = score_function_sites(programs.estimators)
    if not scored:
        return {}
    model, guide, args, kwargs, estimators = programs[:5]
    model_key, guide_key = jax.random.split(key)

    def run():
        params = dict(param_map)
        _, drawn, _ = draw(guide, guide_key, params, args, kwargs, estimators)
        params.update(_mutable(drawn))
        replayed = substitute(replay(seed(model, model_key), trace=drawn), data=params)
        return trace(replayed).get_trace(*args, **kwargs), drawn

    return dependencies(run, scored)


def _backward(function, *arguments):
    """Value, gradients and what else comes of a function."""
    try:
        value, pull, more = jax.vjp(function, *arguments, has_aux=True)
        return value, pull(jnp.ones_like(value)), more
    except ValueError as error:
        if "everse-mode" not in str(error):
            raise
        raise ValueError(
            "score_coef='auto', and every objective but 'elbo', takes the model's gradient "
            "backward, which this model does not allow: take score_coef=0.0 or 1.0. "
            f"({first_line(error)})"
        ) from error


def _moved(gradient, tree) -> Array:
    """Zero, with this gradient in the leaves of a tree."""
    slopes = freeze(jax.tree.leaves(gradient))
    return _zero_with_slopes(slopes, jax.tree.leaves(tree))


@jax.custom_jvp
def _zero_with_slopes(slopes, leaves) -> Array:
    return jnp.zeros((), jnp.result_type(float, *slopes))


@_zero_with_slopes.defjvp
def _(primals, tangents):
    slopes, leaves = primals
    zero = _zero_with_slopes(slopes, leaves)
    products = [jnp.sum(g * dx) for g, dx in zip(slopes, tangents[1], strict=True)]
    return zero, sum(products, start=jnp.zeros_like(zero)).astype(zero.dtype)


def _floating(params) -> dict[str, Any]:
    """The floating-point leaves of parameters, by name."""
    return {name: floating_leaves(value)[0] for name, value in params.items()}


def _filled(params, leaves) -> dict[str, Any]:
    """Parameters with other floating-point leaves."""
    return {name: floating_leaves(value)[1](leaves[name]) for name, value in params.items()}


def _is_float(value) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def floating_leaves(tree):
    """The floating-point leaves of a tree, and how to put them back."""
    leaves, structure = jax.tree.flatten(tree)
    moves = [_is_float(leaf) for leaf in leaves]
    moving = [leaf for leaf, flag in zip(leaves, moves, strict=True) if flag]

    def fill(moving):
        values = iter(moving)
        filled = [next(values) if flag else leaf for leaf, flag in zip(leaves, moves, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return moving, fill


def mean_state(mutable):
    """One state of what several particles left: the mean of what is a number."""

    def mean(leaf):
        return jnp.mean(leaf, axis=0) if _is_float(leaf) else leaf[0]

    return jax.tree.map(mean, mutable)


def _mutable(sites) -> dict[str, Any]:
    return {name: site["value"] for name, site in sites.items() if site["type"] == "mutable"}
