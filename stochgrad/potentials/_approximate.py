"""Gaussian approximations around trained networks: SWAG and last-layer Laplace."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import (
    ConvergenceWarning,
    Posterior,
    check_callable,
    check_count,
    check_number,
    chosen_leaves,
    sample,
    split_leaves,
)
from stochgrad.kernels import ascend
from stochgrad.sgmcmc import swag as swag_online


class Approximation(NamedTuple):
    """A way to draw networks around trained ones.

    Attributes:
        name: What it is called.
        draw: ``(key, posterior, positions, num_samples, options) -> positions``: from trained
            positions with a leading axis of chains to draws with axes of chains and draws;
            ``options`` are for ``stochgrad.sample``.
    """

    name: str
    draw: Callable[..., PyTree]


def swag(*, learning_rate: float, num_steps: int, thin: int = 10, rank: int = 20) -> Approximation:
    """SWAG around each trained network (Maddox et al., NeurIPS 2019), by ``stochgrad.swag``.

    Args:
        learning_rate: Of the stochastic gradient ascent that wanders about the mode, on the log
            density over the number of configurations.
        num_steps: Its steps.
        thin: Steps between the positions that the Gaussian is fitted to.
        rank: Deviations kept.

    Raises:
        ValueError: a number is out of range, or fewer than two positions would be used.
    """
    learning_rate = check_number("learning_rate", learning_rate)
    thin = check_count("thin", thin)
    draws = check_count("num_steps", num_steps) // thin
    check_count("num_steps // thin", draws, least=2)
    online = swag_online(check_count("rank", rank, least=2))

    def draw(key, posterior: Posterior, positions, num_samples: int, options):
        import optax

        chains = _chains(positions)
        run_key, draw_key = jax.random.split(key)
        rate = learning_rate / max(posterior.batches.size, 1)
        kernel = ascend(posterior, optax.sgd(rate, momentum=0.9))
        one = positions if chains > 1 else jax.tree.map(lambda x: x[0], positions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it wanders about one mode
            run = sample(
                run_key,
                kernel,
                init=one,
                num_samples=draws,
                thin=thin,
                num_chains=chains,
                collect=online,
                **options,
            )
        bad = np.flatnonzero(run.first_bad >= 0)
        if len(bad):
            raise ValueError(
                f"SWAG's ascent diverged in chain {bad[0]} at step "
                f"{run.first_bad[bad[0]]}: take a learning_rate below {learning_rate:g}."
            )
        gaussians = jax.tree.map(jnp.asarray, run.summary)
        if chains == 1:
            gaussians = jax.tree.map(lambda x: x[None], gaussians)
        keys = jax.random.split(draw_key, (chains, num_samples))
        return jax.vmap(lambda g, k: jax.vmap(g.sample)(k))(gaussians, keys)

    return Approximation("SWAG", draw)


def last_layer_laplace(last: Callable[[str], bool], *, ridge: float = 1e-6) -> Approximation:
    r"""Laplace's approximation over a network's last layer, the rest as trained.

    With $\lambda$ the last layer's weights and the log density on all data,

    $$\Lambda = -\nabla^2_\lambda \log\pi(\hat\lambda), \qquad
      \lambda \sim \mathcal N(\hat\lambda, \Lambda^{-1}).$$

    Energies and forces are linear in the weights of a linear last layer, so that this Hessian is
    the Gauss-Newton matrix and nothing else is approximated in it.

    Args:
        last: ``name -> bool``, which leaves of the weights belong to the last layer; names are
            paths, ``layers.2.w``.
        ridge: The least eigenvalue of the precision, relative to its largest: directions that
            neither data nor prior determine (a constant added to the energy).

    Raises:
        TypeError: ``last`` is no function.
        ValueError: ``ridge`` is out of range. On use: no leaf, or every leaf, is the last layer's;
            ``last`` fails or returns no boolean; a Hessian is not finite; data are streamed.

    Example:
        >>> import stochgrad
        >>> method = stochgrad.potentials.last_layer_laplace(lambda name: name.startswith("2."))
        >>> method.name
        'last-layer Laplace'
    """
    ridge = check_number("ridge", ridge)
    check_callable("last", last, "a function name -> bool")

    def draw(key, posterior: Posterior, positions, num_samples: int, options):
        if posterior.batches.stream is not None:
            raise ValueError("last_layer_laplace needs a posterior of data in memory, no stream.")
        chosen = chosen_leaves("last", last, positions["params"])

        def of_chain(position):
            head, join = split_leaves(position["params"], chosen)
            flat, unravel = ravel_pytree(head)

            def log_density(flat, batch):
                return posterior.log_density({**position, "params": join(unravel(flat))}, batch)

            return flat, _mean_hessian(log_density, flat, posterior.batches)

        heads, hessians = jax.jit(lambda x: lax.map(of_chain, x))(positions)
        bad = np.flatnonzero(~np.isfinite(np.asarray(hessians)).all((1, 2)))
        if len(bad):
            raise ValueError(
                f"the Hessian of the last layer is not finite at the network of chain {bad[0]}: "
                "its training has failed, or energy_fn has no second derivative there."
            )
        roots = jnp.asarray(_roots(-np.asarray(hessians, np.float64), ridge), heads.dtype)
        xi = jax.random.normal(key, (*heads.shape[:1], num_samples, heads.shape[1]), heads.dtype)
        drawn = heads[:, None] + jnp.einsum("cij,csj->csi", roots, xi)

        def put_back(position, drawn):
            head, join = split_leaves(position["params"], chosen)
            unravel = ravel_pytree(head)[1]
            params = jax.vmap(lambda x: join(unravel(x)))(drawn)
            noise = jax.tree.map(
                lambda s: jnp.broadcast_to(s, (num_samples, *s.shape)), position["noise"]
            )
            return {"params": params, "noise": noise}

        return jax.vmap(put_back)(positions, drawn)

    return Approximation("last-layer Laplace", draw)


def _mean_hessian(log_density, flat, batches):
    """Of the log density on all data: the mean over the minibatches of an epoch."""
    hessian = jax.hessian(log_density)
    if batches.blocks is None:
        return hessian(flat, batches.full)

    def add(total, block):
        return total + hessian(flat, batches.blocks.at(block)), None

    zero = jnp.zeros((flat.size, flat.size), flat.dtype)
    count = batches.blocks.count
    return lax.scan(add, zero, jnp.arange(count, dtype=jnp.int32))[0] / count


def _roots(precision: np.ndarray, ridge: float) -> np.ndarray:
    """Roots A of the inverses, A A' = precision^-1, with eigenvalues bounded from below."""
    values, vectors = np.linalg.eigh((precision + np.swapaxes(precision, 1, 2)) / 2)
    values = np.maximum(values, ridge * values[:, -1:])
    return vectors / np.sqrt(values)[:, None, :]


def _chains(positions: PyTree) -> int:
    return jax.tree.leaves(positions)[0].shape[0]
