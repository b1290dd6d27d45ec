r"""A guide's mixture, drawn component by component: its weights are on no path, but on strata.

Of a site $x \sim \sum_k w_k q_k$, and of whatever is drawn after it,

$$\mathbb E[g] = \sum_k w_k\,\mathbb E[g\mid x\sim q_k],$$

whose derivative in the weights is that of the weights.
"""

from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions.mixtures import _MixtureBase
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from stochgrad.interop.numpyro._sites import is_latent


class Components(NamedTuple):
    """Components of a mixture.

    Attributes:
        weights: Their weights, of shape (K,).
        draw: ``key -> draws``, one of each, of shape (K, ...).
    """

    weights: Float[Array, " K"]
    draw: Callable[[Array], Array]


class Stratified(NamedTuple):
    """A site of a guide that is drawn component by component, and the number of components."""

    name: str
    width: int


@singledispatch
def components_of(distribution: Any) -> Components | None:
    """The components of a mixture that is no batch of mixtures; of all else None."""
    return None


@components_of.register(_MixtureBase)
def _mixture(mixture) -> Components | None:
    parts = getattr(mixture, "component_distributions", None)
    parts = [mixture.component_distribution] if parts is None else parts
    if mixture.batch_shape != () or not all(part.has_rsample for part in parts):
        return None

    def draw(key):
        return jnp.moveaxis(mixture.component_sample(key), mixture.mixture_dim, 0)

    return Components(mixture.mixing_distribution.probs, draw)


def site_components(fn: Any) -> Components | None:
    """The components of a site's distribution, if it is one mixture, transformed or not."""
    base: Any = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    parts = components_of(base)
    if parts is None or fn.batch_shape != () or start_of(fn).shape() != base.shape():
        return None
    return parts


def start_of(fn: Any) -> Any:
    """What the first transform of a distribution is applied to."""
    start = fn
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.TransformedDistribution):
            start = fn.base_dist
        fn = fn.base_dist
    return start


def transforms_of(fn: Any) -> list[Any]:
    """The transforms that a site's draw goes through, from the start."""
    found = []
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.TransformedDistribution):
            found = [*fn.transforms, *found]
        fn = fn.base_dist
    return found


_DRAWN: list[str] = []
"""Sites that are drawn component by component at the moment, innermost last."""


def is_stratified(name: str) -> bool:
    """Whether a site is drawn component by component at the moment."""
    return name in _DRAWN


class DrawComponent(Messenger):
    """Draws a site from one of its components; ``weight`` is what that counts for."""

    weight: Array

    def __init__(self, site: Stratified, component: Array):
        self.site, self.component = site, component
        self.weight = jnp.ones(())
        super().__init__(None)

    def __enter__(self):
        _DRAWN.append(self.site.name)
        return super().__enter__()

    def __exit__(self, exc_type, exc_value, traceback):
        _DRAWN.pop()
        return super().__exit__(exc_type, exc_value, traceback)

    def process_message(self, msg):
        if msg["type"] != "sample" or msg["name"] != self.site.name or msg["value"] is not None:
            return
        parts = site_components(msg["fn"])
        assert parts is not None  # as when the guide was looked at
        x = parts.draw(msg["kwargs"]["rng_key"])[self.component]
        self.weight = parts.weights[self.component]
        between = []
        for transform in transforms_of(msg["fn"]):
            start = x
            x, more = transform.call_with_intermediates(x)
            between.append([start, more])
        msg["value"], msg["intermediates"] = x, between


def stratified_site(guide, key, params, args, kwargs, estimators: Mapping) -> Stratified | None:
    """The one mixture of a guide that is drawn component by component, if there is one.

    There is none where sites have estimators of their own, where there are several mixtures, or a
    batch of them, of which all combinations would have to be drawn.
    """
    found = []

    def look(params):
        drawn = trace(substitute(seed(guide, key), data=dict(params))).get_trace(*args, **kwargs)
        for name, site in drawn.items():
            parts = site_components(site["fn"]) if is_latent(site) else None
            if parts is not None:
                found.append(Stratified(name, len(parts.weights)))
        return ()

    if not estimators:
        jax.eval_shape(look, dict(params))
    return found[0] if len(found) == 1 else None
