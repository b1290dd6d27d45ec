"""One site of a numpyro guide: how its log density follows the path of its draw."""

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array
from numpyro.primitives import Messenger

from stochgrad.gradients import path_log_density, push_score
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


def is_delta(fn) -> bool:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def kind_of(fn) -> str:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def along_the_path(site, drawn) -> Array:
    """Log density of a site, whose parameters are constant, along the path of its draw."""
    fn, value = site["fn"], site["value"]
    flow = _layers_of(fn)
    if drawn["intermediates"] and flow is not None:
        log_prob = _along_layers(fn, flow, drawn["intermediates"][0][0], drawn["value"])
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
