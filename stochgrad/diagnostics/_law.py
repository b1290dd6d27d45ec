"""The law of a chain, predicted before it runs."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Gradient,
    Kernel,
    PRNGKey,
    check_instance,
    check_key,
    tree_size,
)
from stochgrad.diagnostics._around_center import (
    check_fits,
    gradient_residuals,
    third_derivative_along,
)
from stochgrad.diagnostics._mass_frame import (
    PROBES,
    Frame,
    curvature_and_reference,
    frame_of,
    multiply,
    root_of_draws,
)
from stochgrad.diagnostics._stationary import (
    Moments,
    NoiseOrder,
    squared_autocorrelations,
    stationary_moments,
)
from stochgrad.kernels import LinearMaps, joint_maps, mode_maps
from stochgrad.sgmcmc import as_position, sghmc, sgld

_DENSE_DIMENSION = 500
_SAME = 1e-5
_METRIC_PASSES = 4


class Law(NamedTuple):
    r"""The stationary law of a chain to leading order, and how fast it forgets.

    Attributes:
        covariance: Stationary covariance of the raveled position, shape (d, d); its diagonal,
            shape (d,), where ``dense`` is false.
        sd: Standard deviations of the coordinates, a tree of the position's structure.
        sd_bias: Their relative errors, likewise.
        mean_bias: Errors of the means, in posterior standard deviations, likewise.
        autocorrelation_time: $\sum_{l=-\infty}^\infty \rho_l$ of each coordinate, in steps,
            likewise, which the error of their means follows. Noise that cancels over an epoch is
            not in it, and underdamped chains swing back: what ``arviz.ess`` finds is longer where
            autocorrelations turn negative, by up to a third at a friction of
            $\sqrt{\text{curvature}}$, as it counts them until then.
        square_autocorrelation_time: $\sum_l \rho_l^2$, likewise, which the error of their
            variances follows: with too little friction it is the longer.
        gradients_per_draw: Gradient estimates to an effective draw of the slowest coordinate: the
            larger of the two times, times the gradients of a step.
        gradients_per_draw_slowest: The same of the slowest direction, by the first time (of the
            slowest coordinate where ``dense`` is false).
        noise_share: What gradient noise adds to the variances, relative to the posterior's, on
            average over the coordinates.
        dense: Whether all of H and V were used; for more than 500 numbers, only their diagonals.
    """

    covariance: np.ndarray
    sd: PyTree
    sd_bias: PyTree
    mean_bias: PyTree
    autocorrelation_time: PyTree
    square_autocorrelation_time: PyTree
    gradients_per_draw: float
    gradients_per_draw_slowest: float
    noise_share: float
    dense: bool

    def __str__(self) -> str:
        bias = _largest(self.sd_bias)
        width = "wide" if bias > 0 else "narrow"
        return (
            f"about {self.gradients_per_draw:.2g} gradients an effective draw; "
            f"sds up to {abs(bias):.1%} too {width}; "
            f"means off by up to {abs(_largest(self.mean_bias)):.2g} sd"
        )


@key_first
def predict_law(
    key: PRNGKey,
    kernel: Kernel,
    center: Any,
    *,
    hessian: Float[Array, "d d"] | None = None,
    covariance: Float[Array, "d d"] | np.ndarray | None = None,
) -> Law:
    r"""What a chain will have for a law, before it runs.

    Around a center the log density is quadratic, $-\tfrac12 q^\top H q$, and the gradient has noise
    of covariance V, so that a step is linear, $z' = Az + Fu + N\xi$. A, F and N come from
    evaluating the kernel's own step. The stationary covariance solves the discrete Lyapunov
    equation

    $$S = A S A^\top + F V F^\top + N N^\top$$

    for independent minibatches; for reshuffled and symmetric ones, whose noise cancels over an
    epoch, the sums over an epoch are in closed form. The sum of all autocovariances is
    $(1-A)^{-1}(FVF^\top + NN^\top)(1-A)^{-\top}$ (without V where it cancels). The means move by

    $$\tfrac12 H^{-1} \nabla \operatorname{tr}\left[\nabla^2\log\pi\,(S - TH^{-1})\right],$$

    as E of the gradient is zero under both laws. Where the friction is a multiple of the mass the
    equations are those of d modes with two or three numbers each.

    V is measured at points around the center, one posterior standard deviation away, so that the
    noise of a control variate is what it is where draws are: 1,000 minibatch gradients. H takes d
    Hessian-vector products on all data (on 50,000 rows, if there are more), the bias of the means
    up to 64. For more than 500 numbers only diagonals of H (from 64 random signs) and V are used,
    each coordinate (of the mass) by itself.

    Args:
        key: A typed PRNG key.
        kernel: From ``stochgrad.sgld``, ``stochgrad.sghmc`` or ``stochgrad.psgld``, with a constant
            step size and temperature. pSGLD's preconditioner is held at its stationary mean.
        center: A position near the mode or the mean, or what ``stochgrad.find_center`` found.
        hessian: H, minus the Hessian of the log density over the raveled position, if known.
        covariance: The covariance of the draws, if known, with which the chain's is compared and
            over which V is averaged; $TH^{-1}$ by default. Without ``hessian``, H is
            $T\,\text{covariance}^{-1}$: in a hierarchical model that describes the bulk, which the
            mode may not.

    Raises:
        TypeError: it is no kernel.
        ValueError: the kernel is another one, or follows a schedule; the log density is not
            strictly concave at the center; the chain is unstable.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(99), order="full"
        ... )
        >>> law = stochgrad.diagnostics.predict_law(
        ...     jax.random.key(0), stochgrad.sgld(target, 0.001), jnp.float32(1.0)
        ... )
        >>> print(law)
        about 19 gradients an effective draw; sds up to 2.6% too wide; means off by up to 0 sd
    """
    check_key(key)
    gradient, settings = _settings(kernel)
    center = as_position("center", center)
    check_fits(gradient, center)
    size = tree_size(center)
    temperature = settings["temperature"]
    dense = size <= _DENSE_DIMENSION
    frame = frame_of(kernel, settings, center)
    root = np.diag(frame.root) if dense and frame.root.ndim == 1 else frame.root
    keys = jax.random.split(key, 3)
    curvature, reference = curvature_and_reference(
        gradient, keys[0], center, root, dense, temperature, hessian, covariance
    )
    residuals = gradient_residuals(gradient, keys[1], center, root_of_draws(root, reference))
    solve = partial(_solve, settings, residuals, noise_order(gradient))
    if kernel.method == "pSGLD":
        solved = _preconditioned(settings, gradient, solve, frame, curvature, reference, residuals)
    else:
        solved = solve(frame._replace(root=root), curvature, reference)
    maps, moments, quiet, curvature, root, reference = solved
    shift = _mean_shift(gradient, keys[2], center, root, curvature, moments.at_gradient - reference)
    return _law(center, maps, moments, quiet, reference, root, shift)


def _settings(kernel: Any) -> tuple[Gradient, dict[str, Any]]:
    check_instance("kernel", kernel, Kernel, "a kernel, such as stochgrad.sghmc makes")
    settings = dict(kernel.settings)
    if kernel.method not in ("SGLD", "SGHMC", "pSGLD") or kernel.gradient is None:
        why = ": its thermostat multiplies the momentum" if kernel.method == "SGNHT" else ""
        raise ValueError(
            "kernel: predict_law needs a step that is linear on a Gaussian, as in stochgrad.sgld, "
            f"sghmc and psgld; that of {kernel.method} is not{why}."
        )
    posterior = kernel.gradient.posterior
    if posterior is not None and posterior.batches.owners is not None:
        raise ValueError(
            "kernel: of data that clients own the gradient's noise lasts as long as a visit, which "
            "predict_law does not know; stochgrad.federated.stability predicts that spread."
        )
    for name in ("step_size", "temperature"):
        if callable(settings[name]):
            raise ValueError(
                f"kernel: a {name} that follows a schedule has no stationary law; give a number."
            )
    return kernel.gradient, settings


def _preconditioned(settings, gradient, solve, frame, curvature, reference, residuals):
    """The solution in the frame of pSGLD's metric, which follows from the squares it leads to."""
    rows = 1 if gradient.posterior is None else max(gradient.posterior.batches.size, 1)
    noise = np.sum(residuals**2, axis=0)
    covariance: np.ndarray = reference
    solved: Any = None
    for _ in range(_METRIC_PASSES):
        if curvature.ndim == 2:
            spread = np.einsum("ij,jk,ik->i", curvature, covariance, curvature)
        else:
            spread = curvature**2 * covariance
        scale = 1 / np.sqrt(settings["regularizer"] + np.sqrt(noise + spread) / rows)
        if curvature.ndim == 2:
            outer, root = np.outer(scale, scale), np.diag(scale)
        else:
            outer, root = scale**2, scale
        solved = solve(frame._replace(root=root), curvature * outer, reference / outer)
        moments, root = solved[1], solved[4]
        covariance = moments.covariance
        covariance = root @ covariance @ root.T if root.ndim == 2 else root**2 * covariance
    return solved


def _solve(settings, residuals, order: NoiseOrder, frame: Frame, curvature, reference):
    """Maps and moments, with and without gradient noise, in coordinates that suit them best."""
    root = frame.root
    inside = multiply(residuals, root)
    noise = inside.T @ inside if curvature.ndim == 2 else np.sum(inside**2, axis=0)
    if frame.online:
        diagonal = np.diag(noise) if noise.ndim == 2 else noise
        frame = frame._replace(noise=settings["step_size"] * diagonal / 2)
    h, temperature = settings["step_size"], settings["temperature"]
    given = (frame.friction, frame.noise)
    uniform = all(x is None or np.ptp(x) <= _SAME * np.max(np.abs(x)) for x in given)
    if curvature.ndim == 2:
        values, vectors = np.diag(curvature), np.eye(len(curvature))
        apart = np.max(np.abs(curvature - np.diag(values))) <= _SAME * np.max(values)
        if uniform and not apart:
            values, vectors = np.linalg.eigh(curvature)
        if uniform or apart:
            curvature, root = values, root @ vectors
            noise, reference = (vectors.T @ x @ vectors for x in (noise, reference))
    if frame.friction is None or frame.noise is None:
        factory = partial(sgld, temperature=temperature)
    else:
        friction = float(np.mean(frame.friction)) if uniform else frame.friction
        estimate = np.minimum(frame.noise, frame.friction * temperature)
        factory = partial(
            sghmc,
            friction=friction,
            noise_estimate=np.maximum(estimate, 0.0),
            integrator=settings["integrator"],
            temperature=temperature,
        )
    make = mode_maps if curvature.ndim == 1 else joint_maps
    maps = make(factory, h, curvature)
    radius = maps.radius
    if not radius < 1:
        raise ValueError(
            f"kernel: unstable with step_size {h:g} (a spectral radius of {radius:.3g}): take a "
            "smaller one; stochgrad.find_step_size gives the limit."
        )
    moments = stationary_moments(maps, noise, curvature, order)
    quiet = stationary_moments(maps, np.zeros_like(noise), curvature, NoiseOrder())
    return maps, moments, quiet, curvature, root, reference


def _mean_shift(gradient, key, center, root, curvature, excess) -> np.ndarray:
    r"""$\tfrac12 H^{-1}\nabla\operatorname{tr}(\nabla^2\log\pi\,\Delta)$, for unit mass."""
    values, vectors = excess, None
    if excess.ndim == 2:
        values, vectors = np.linalg.eigh((excess + excess.T) / 2)
    parts = np.sqrt(np.maximum([values, -values], 0))
    if vectors is not None and len(values) <= PROBES:
        half = np.concatenate([np.diag(part)[part > 0] for part in parts])
        signs = np.repeat([1.0, -1.0], np.sum(parts > 0, axis=1))
    else:  # random signs
        count = PROBES // 2
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        z = rng.choice([-1.0, 1.0], (2, count, len(values)))
        half = (z * parts[:, None]).reshape(-1, len(values)) / np.sqrt(count)
        signs = np.repeat([1.0, -1.0], count)
    if not len(half):
        return np.zeros(len(values))
    directions = multiply(half if vectors is None else half @ vectors.T, root.T)
    pull = multiply(third_derivative_along(gradient, key, center, directions, signs), root) / 2
    return pull / curvature if curvature.ndim == 1 else np.linalg.solve(curvature, pull)


def _law(center, maps: LinearMaps, moments: Moments, quiet: Moments, reference, root, shift) -> Law:
    unravel = ravel_pytree(center)[1]

    def variances(x):
        if x.ndim == 2:
            return np.einsum("ij,jk,ik->i", root, x, root)
        return root**2 @ x if root.ndim == 2 else root**2 * x

    def tree(x):
        return jax.tree.map(np.asarray, unravel(jnp.asarray(x, jnp.float32)))

    found, expected, long_run, silent = map(
        variances, (moments.covariance, reference, moments.long_run, quiet.covariance)
    )
    times = long_run / found
    squares = squared_autocorrelations(maps, moments, root)
    dense = moments.covariance.ndim == 2
    slowest = np.max(times)
    if dense:
        inverse = np.linalg.inv(np.linalg.cholesky(moments.covariance))
        slowest = np.linalg.eigvalsh(inverse @ moments.long_run @ inverse.T).max()
    return Law(
        covariance=root @ moments.covariance @ root.T if dense else found,
        sd=tree(np.sqrt(found)),
        sd_bias=tree(np.sqrt(found / expected) - 1),
        mean_bias=tree(multiply(shift, root.T) / np.sqrt(expected)),
        autocorrelation_time=tree(times),
        square_autocorrelation_time=tree(squares),
        gradients_per_draw=float(maps.evaluations * max(np.max(times), np.max(squares))),
        gradients_per_draw_slowest=float(maps.evaluations * slowest),
        noise_share=float(np.mean((found - silent) / expected)),
        dense=dense,
    )


def noise_order(gradient: Gradient) -> NoiseOrder:
    """How the noise of a gradient's minibatches is correlated in time."""
    if gradient.posterior is None or not gradient.posterior.batches.balanced:
        return NoiseOrder()
    batches = gradient.posterior.batches
    kind = "symmetric" if batches.order == "symmetric" else "reshuffled"
    return NoiseOrder(batches.epoch, kind)


def _largest(tree: PyTree) -> float:
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return float(values[np.argmax(np.abs(values))])
