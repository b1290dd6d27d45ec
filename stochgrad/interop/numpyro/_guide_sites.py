"""Sites of a numpyro guide: how their draws, and log densities, carry gradients."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array
from numpyro.handlers import seed
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger

from stochgrad.core import first_line
from stochgrad.gradients import beyond_the_path, path_log_density, push_score
from stochgrad.interop.numpyro._guide_strata import DrawComponent, Stratified, is_stratified
from stochgrad.interop.numpyro._sites import is_latent
from stochgrad.interop.numpyro._transforms import score_of_base


class StraightThrough(Messenger):
    """Gives discrete draws the gradient of their probabilities."""

    def __init__(self, sites: set[str]):
        self.sites = sites
        super().__init__(None)

    def postprocess_message(self, msg):
        if msg["type"] != "sample" or msg["name"] not in self.sites:
            return
        probs = getattr(msg["fn"], "probs", None)
        if probs is None or jnp.shape(probs) != jnp.shape(msg["value"]):
            raise ValueError(
                f"straight_through is for Bernoulli and Multinomial(1), site {msg['name']!r} is "
                f"a {kind_of(msg['fn'])}."
            )
        hard = msg["value"].astype(probs.dtype)
        msg["value"] = lax.stop_gradient(hard - probs) + probs


_FIXED: list[set[str]] = []
"""Sites whose draws are fixed at the moment, innermost last."""


class FixedDraws(Messenger):
    """Takes the gradient from draws whose site has a score function for its estimator.

    The score is the derivative of the log density at a fixed draw: what reaches the draw along its
    path would be counted twice. What the draw was made of is dropped likewise.
    """

    def __init__(self, sites: set[str]):
        self.sites = sites
        super().__init__(None)

    def __enter__(self):
        _FIXED.append(self.sites)
        return super().__enter__()

    def __exit__(self, exc_type, exc_value, traceback):
        _FIXED.pop()
        return super().__exit__(exc_type, exc_value, traceback)

    def postprocess_message(self, msg):
        if msg["type"] == "sample" and msg["name"] in self.sites and not msg["is_observed"]:
            msg["value"] = lax.stop_gradient(msg["value"])
            msg["intermediates"] = None


def is_fixed(name: str) -> bool:
    """Whether a site is drawn for a score function at the moment."""
    return any(name in sites for sites in _FIXED)


class PushScores(Messenger):
    """Draws flows that can push a score along with the draw, and keeps the scores by site.

    Layers in a loop are then gone through once; a loop of its own for the scores would evaluate
    all conditioners a second time.
    """

    def __init__(self, scored: set[str]):
        self.scored = scored
        self.scores: dict[str, Array] = {}
        super().__init__(None)

    def process_message(self, msg):
        if msg["type"] != "sample" or msg["value"] is not None:
            return
        if msg["name"] in self.scored or is_stratified(msg["name"]):
            return
        flow = _layers_of(msg["fn"])
        if flow is None or not all(hasattr(layer, "push") for layer in flow.transforms):
            return
        x = flow.base_dist.sample(msg["kwargs"]["rng_key"])
        score, between = score_of_base(flow.base_dist, x), []
        for layer in flow.transforms:
            start = x
            push: Any = layer.push  # pyright: ignore[reportAttributeAccessIssue]
            x, more, score = push(x, score)
            between.append([start, more])
        msg["value"], msg["intermediates"] = x, between
        self.scores[msg["name"]] = score


def score_function_sites(estimators: Mapping[str, str]) -> set[str]:
    """Sites whose estimator is a score function."""
    return {name for name, estimator in estimators.items() if estimator != "straight_through"}


def draw(
    guide, key, params, args, kwargs, estimators: Mapping[str, str],
    strata: Stratified | None = None,
):  # fmt: skip
    """Log densities and trace of a guide, and scores of flows that were drawn with them.

    Draws have the gradients of their estimators.
    """
    scored = score_function_sites(estimators)
    pushed = PushScores(scored)
    with pushed, StraightThrough(set(estimators) - scored), FixedDraws(scored):
        try:
            log_q, drawn = compute_log_probs(seed(guide, key), args, kwargs, params)
        except NotImplementedError as error:
            raise ValueError(
                f"estimators: a score function needs the density of the draws, which a site of "
                f"{sorted(scored)} does not give: {first_line(error)}."
            ) from error
    _check_sites(drawn, estimators, strata)
    return log_q, drawn, pushed.scores


def _check_sites(drawn, estimators: Mapping[str, str], strata: Stratified | None) -> None:
    """Raise unless every latent site has a way to its gradient."""
    for name, site in drawn.items():
        if not is_latent(site) or name in estimators or (strata and name == strata.name):
            continue
        if not (is_delta(site["fn"]) or site["fn"].has_rsample):
            raise ValueError(
                f"site {name!r} of the guide, a {kind_of(site['fn'])}, cannot be "
                f"reparameterized{_why_not(site['fn'])}: give it an estimator, "
                f"estimators={{{name!r}: 'score'}}."
            )
    missing = set(estimators) - {n for n, s in drawn.items() if s["type"] == "sample"}
    if missing:
        raise ValueError(f"estimators are given for sites the guide lacks: {sorted(missing)}.")


def _why_not(fn) -> str:
    if "Mixture" not in kind_of(fn):
        return ""
    return (
        ", and only one mixture of a guide is drawn component by component, if it is no batch, "
        "its components can be reparameterized and no site has an estimator"
    )


def check_reach(
    guide, key, params, args, kwargs, estimators: Mapping[str, str],
    strata: Stratified | None = None,
) -> None:  # fmt: skip
    """Raise unless the paths of the draws reach all parameters that move their density."""
    scored, names = score_function_sites(estimators), []

    def values_and_density(params):
        drawing = None if strata is None else DrawComponent(strata, jnp.array(0))
        with drawing or nullcontext():
            log_q, drawn, _ = draw(guide, key, dict(params), args, kwargs, estimators, strata)
        latent = {name: site["value"] for name, site in drawn.items() if is_latent(site)}
        values = [x for x in latent.values() if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        names[:] = [name for name in latent if not is_delta(drawn[name]["fn"])]
        by_path = [log_q[name] for name in names if name not in scored]
        weights = () if drawing is None else drawing.weight
        return (values, weights), sum(by_path, start=jnp.zeros(()))

    beyond = beyond_the_path(values_and_density, dict(params))
    if beyond:
        site = names[0] if len(names) == 1 else "name of the site"
        raise ValueError(
            f"guide: {' and '.join(sorted(beyond))} cannot be trained along the path of a "
            "draw. As the weights of a mixture, they decide what is drawn, and that has no "
            f"derivative: give the site an estimator, estimators={{{site!r}: 'score'}}."
        )


def is_delta(fn) -> bool:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def kind_of(fn) -> str:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def along_the_path(site, drawn, score=None) -> Array:
    """Log density of a site, whose parameters are constant, along the path of its draw.

    Args:
        site: The site in a trace with constant parameters.
        drawn: The same as it was drawn.
        score: Its score, where that is known and its distribution depends on no other draw.
    """
    fn, value = site["fn"], site["value"]
    flow = _layers_of(fn)
    if score is not None:
        constant = lax.stop_gradient(fn.log_prob(drawn["value"], drawn["intermediates"]))
        log_prob = path_log_density(value, constant, score)
    elif drawn["intermediates"] and flow is not None:
        log_prob = _along_layers(fn, flow, drawn["intermediates"][0][0], value)
    else:
        try:
            log_prob = fn.log_prob(value)
        except NotImplementedError as error:
            raise ValueError(
                f"site {site['name']!r} of the guide, a {kind_of(fn)}, has no score: {error}"
            ) from error
    if site["scale"] is not None:
        log_prob = site["scale"] * log_prob
    return jnp.sum(log_prob)


def _layers_of(fn) -> dist.TransformedDistribution | None:
    """The transformed distribution within, where nothing around it changes shapes of draws."""
    while isinstance(fn, dist.Independent) or (
        isinstance(fn, dist.ExpandedDistribution) and fn.batch_shape == fn.base_dist.batch_shape
    ):
        fn = fn.base_dist
    return fn if isinstance(fn, dist.TransformedDistribution) else None


def _along_layers(fn, flow, start, value) -> Array:
    r"""The same for a flow, forward from the start of its draw.

    With the flow's parameters $\varphi$ depending on other latents, at the fixed start $z_0$,

    $$\partial_\varphi\log q_\varphi(x)|_x
      = \partial_\varphi\bigl[\log q_\varphi(T_\varphi(z_0))\bigr]
      - s^\top\partial_\varphi T_\varphi(z_0).$$
    """
    x = lax.stop_gradient(start)
    score, between = score_of_base(flow.base_dist, x), []
    for layer in flow.transforms:
        y, more = layer.call_with_intermediates(x)
        between.append([x, more])
        score = push_score(layer, lax.stop_gradient(x), score).score
        x = y
    log_prob = fn.log_prob(x, between)
    constant = lax.stop_gradient(log_prob)
    moved = log_prob - path_log_density(x, constant, score)
    return moved + path_log_density(value, constant, score)
