r"""What each draw of a score function answers for: the terms of the bound that it has a part in.

The gradient of $\mathbb E_q[\sum_c f_c]$ in the law of a site $z_k$, entry by entry of its plates,

$$\mathbb E\Bigl[\nabla\log q(z_{k,i})\sum_{c\,\text{after}\,k} f_{c,i}\Bigr],$$

needs only the terms that are computed from the draw. Of those in a plate that the site is in, entry
i needs entry i's [Schulman et al. 2015]; that a plate's entries are independent is taken from the
plate, as ``TraceGraph_ELBO`` does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, PyTree
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import Messenger

from stochgrad.interop.numpyro._rows import scaled_log_density

Sites = Mapping[str, Any]
Dependencies = Mapping[str, frozenset[str]]
"""By a term's name, the sites that it is computed from."""


class _Given(Messenger):
    """Draws that are as given, and count as computed from what they would have been drawn from."""

    def __init__(self, values: Mapping[str, Array]):
        self.values = values
        super().__init__(None)

    def postprocess_message(self, msg):
        if msg["type"] == "sample" and msg["name"] in self.values:
            drawn = msg["value"]
            given = self.values[msg["name"]]
            msg["value"] = jnp.where(jnp.zeros(jnp.shape(drawn), bool), drawn, given)


def dependencies(run: Callable[[], tuple[Sites, Sites]], scored: set[str]) -> Dependencies:
    """From which of the sites each term of the bound is computed.

    Args:
        run: Gives the traces of model and guide.
        scored: The sites.
    """
    shapes: Any = jax.eval_shape(lambda: {name: run()[1][name]["value"] for name in scored})
    values = {name: jnp.zeros(like.shape, like.dtype) for name, like in shapes.items()}

    def terms(**given):
        with _Given(given):
            return dict(_terms(*run()))

    return eval_provenance(terms, **values)


def costs_after(model: Sites, guide: Sites, found: Dependencies, name: str) -> Array:
    """The sum of the terms that are computed from a site, for each entry of its plates."""
    site = guide[name]
    law = law_of(site)
    total = jnp.zeros_like(law)
    own = set(site["cond_indep_stack"])
    stacks = _stacks(model, guide)
    for term, value in _terms(model, guide).items():
        if name not in found[term]:
            continue
        shared = {frame.dim for frame in stacks[term] if frame in own}
        rest = [axis for axis in range(-value.ndim, 0) if axis not in shared]
        value = jnp.sum(value, axis=rest, keepdims=True)
        total = total + value.reshape(value.shape[max(value.ndim - total.ndim, 0) :])
    return jax.lax.stop_gradient(total.astype(law.dtype))


def law_of(site: Any) -> Array:
    """Log density by which a site was drawn, entry by entry: no mask or scale has a part in it."""
    fn = _unmasked(site["fn"])
    return fn.log_prob(site["value"], *([site["intermediates"]] if site["intermediates"] else []))


def least_variance(products: PyTree, scores: PyTree) -> PyTree:
    r"""A gradient of n particles by score functions, its baselines of least variance.

    $$\hat g = \frac1n\sum_i\Bigl(p_i - s_i\,
      \frac{\sum_{j\ne i} p_j s_j}{\sum_{j\ne i} s_j^2}\Bigr),$$

    parameter by parameter: ``gradients.score_function(..., "optimal")`` for several costs.

    Args:
        products: $p_i = \sum_k f_{ik}\,\partial\log q_k(z_{ik})$, leaves of shape (n, ...).
        scores: $s_i = \sum_k\partial\log q_k(z_{ik})$, likewise.
    """

    def others(rows):
        return jnp.sum(rows, axis=0, keepdims=True) - rows

    def estimate(p, s):
        under = others(s**2)
        return jnp.mean(p - s * others(p * s) / jnp.where(under > 0, under, 1.0), axis=0)

    return jax.tree.map(estimate, products, scores)


def _unmasked(fn):
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, dist.Independent):
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    return fn


def _terms(model: Sites, guide: Sites) -> dict[str, Array]:
    densities = {
        f"{where} {name}": sign * scaled_log_density(site)
        for where, sign, sites in (("model", 1.0, model), ("guide", -1.0, guide))
        for name, site in sites.items()
        if site["type"] == "sample"
    }
    return {name: jnp.asarray(value) for name, value in densities.items()}


def _stacks(model: Sites, guide: Sites) -> dict[str, Any]:
    return {
        f"{where} {name}": site["cond_indep_stack"]
        for where, sites in (("model", model), ("guide", guide))
        for name, site in sites.items()
        if site["type"] == "sample"
    }
