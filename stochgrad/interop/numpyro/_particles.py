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
from stochgrad.gradients import freeze
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
        discrete: Log density of the sites with score functions.
        total_rows: Gradient of the model's log density in the draws.
        score_rows: Gradient of the guide's.
    """

    path: Array
    direct: Array
    score: Array
    discrete: Array
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
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    estimators: Mapping[str, Any]
    strata: Stratified | None = None
    inspect: Callable[[Mapping[str, Any]], None] = lambda sites: None


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
        jnp.sum(still * parts.discrete),
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
        log_q, drawn = draw(guide, guide_key, params, args, kwargs, estimators, programs.strata)
    left = _mutable(drawn)
    params.update(left)
    latent = {name: site for name, site in drawn.items() if is_latent(site)}
    total_q = sum(log_q.values(), start=jnp.zeros(()))
    known = {name: site["value"] for name, site in latent.items() if not is_delta(site["fn"])}
    factor = sum((q for name, q in log_q.items() if name not in known), start=jnp.zeros(()))
    density = total_q - factor
    zero, none = jnp.zeros_like(total_q), jnp.zeros(0, total_q.dtype)
    discrete = sum((log_q[name] for name in scored), start=jnp.zeros_like(total_q))

    def log_density(values, params):
        given: Any = {
            name: {**site, "value": values[name]} if name in values else site
            for name, site in drawn.items()
        }
        replayed = replay(seed(model, model_key), trace=given)
        log_p, sites = compute_log_probs(replayed, args, kwargs, params)
        check_model_guide_match(sites, drawn)
        programs.inspect(sites)
        return sum(log_p.values(), start=jnp.zeros(())), _mutable(sites)

    plates = {name: site["value"] for name, site in drawn.items() if site["type"] == "plate"}
    moving = {name: x for name, x in known.items() if _is_float(x) and name not in scored}

    def along(moving):
        """Of the guide of constant parameters: log density of draws, all else, and points."""
        again = substitute(seed(guide, guide_key), data={**still, **plates, **known, **moving})
        with FixedDraws(scored):
            sites = trace(again).get_trace(*args, **kwargs)
        of_draws, of_points = zero, zero
        for name, site in sites.items():
            if site["type"] != "sample":
                continue
            log_prob = along_the_path(site, drawn[name])
            if name in known:
                of_draws = of_draws + log_prob
            else:
                of_points = of_points + log_prob
        points = {
            name: sites[name]["value"]
            for name, site in latent.items()
            if name not in known and _is_float(site["value"])
        }
        return of_draws, of_points, points

    if not apart:
        total_p, more = log_density({}, params)
        along_q, _, _ = along(moving)
        value = lax.stop_gradient(total_p - total_q)
        path = total_p - factor - along_q
        path = path + lax.stop_gradient(value - path)
        return Particle(path, zero, along_q - density, discrete, none, none), {**left, **more}

    values = {name: site["value"] for name, site in latent.items() if _is_float(site["value"])}
    own, fill = floating_leaves(params)
    total_p, (in_values, in_own), more = _backward(
        lambda values, own: log_density(values, fill(own)), freeze(values), freeze(own)
    )
    (_, _, points), pull = jax.vjp(along, freeze(moving))
    in_points = {name: in_values[name] for name in points}
    one = jnp.ones_like(zero)
    (s,) = pull((one, zero, jax.tree.map(jnp.zeros_like, in_points)))
    (by_points,) = pull((zero, -one, in_points))
    t = {name: in_values[name] + by_points[name] for name in moving}

    score = _moved(s, moving)
    path = lax.stop_gradient(total_p - total_q) + _moved(t, moving) - score
    direct = (
        _moved(in_own, own)
        + _moved(in_points, {name: values[name] for name in points})
        - (factor - lax.stop_gradient(factor))
        - _moved(by_points, moving)
    )
    score = score - (density - lax.stop_gradient(density))
    rows = (freeze(ravel_pytree(tree)[0]) if moving else none for tree in (t, s))
    return Particle(path, direct, score, discrete, *rows), {**left, **more}


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
    products = jax.tree.map(lambda g, x: jnp.sum(freeze(g) * (x - freeze(x))), gradient, tree)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


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
