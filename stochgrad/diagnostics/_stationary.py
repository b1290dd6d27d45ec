"""Stationary second moments of linear maps that minibatch noise drives in some order."""

from typing import NamedTuple

import numpy as np

from stochgrad.kernels import LinearMaps

_CHUNK = 20_000
_LARGEST_KRONECKER = 4
_MOST_DOUBLINGS = 60


class NoiseOrder(NamedTuple):
    """How the noise of minibatches is correlated in time.

    Attributes:
        num_batches: Minibatches of an epoch, K.
        kind: ``"iid"``, ``"reshuffled"`` or ``"symmetric"``; with one minibatch, none matters.
    """

    num_batches: int = 1
    kind: str = "iid"

    @property
    def cancels(self) -> bool:
        """Whether the noise of an epoch sums to zero."""
        return self.kind != "iid" and self.num_batches > 1


class Moments(NamedTuple):
    """Second moments of the positions, shape (d, d), or (d,) where only a diagonal was wanted.

    Attributes:
        covariance: Their stationary covariance, an average over the steps of an epoch.
        long_run: The sum of their autocovariances over all lags.
        at_gradient: Their covariance where a step evaluates its last gradient.
        joint: Covariances of all that a mode consists of: shape (pairs, n, n) for the pairs of
            modes i <= j, or of a mode with itself where only a diagonal was wanted.
    """

    covariance: np.ndarray
    long_run: np.ndarray
    at_gradient: np.ndarray
    joint: np.ndarray


def stationary_moments(
    maps: LinearMaps, noise: np.ndarray, curvature: np.ndarray, order: NoiseOrder
) -> Moments:
    r"""Moments of $z_i' = A_i z_i + F_i u_i + N_i\xi_i$, by discrete Lyapunov equations.

    $$S_{ij} = A_i S_{ij} A_j^\top + F_i V_{ij} F_j^\top + \delta_{ij} N_i N_i^\top$$

    for independent u. In a reshuffled epoch $\operatorname{Cov}(u_t, u_s) = -V/(K-1)$ for
    $t \ne s$, in a symmetric sweep V at the two visits of a minibatch: the sums over an epoch, and
    their average over the place in the epoch, are in closed form.

    Args:
        maps: The modes.
        noise: V, shape (m, m), or (m,) to leave out correlations of modes; (d, d) for joint maps.
        curvature: $\lambda$, shape (m,); or H, shape (d, d), for joint maps.
        order: Correlations of u in time.
    """
    modes, size, _ = maps.matrix.shape
    joint = len(maps.position) > 1
    if joint or noise.ndim == 1:
        first = second = np.arange(modes)
        v = noise[None] if joint else noise[:, None, None]
    else:
        first, second = np.triu_indices(modes)
        v = noise[first, second][:, None, None]
    a, b = maps.matrix[first], maps.matrix[second]
    pushed = maps.force[first] @ v @ _t(maps.force[second])
    same = (first == second)[:, None, None]
    injected = np.where(same, maps.noise[first] @ _t(maps.noise[second]), 0.0)

    s = lyapunov(a, b, injected + (0 if order.cancels else pushed))
    long_run = injected + (0 if order.cancels else pushed)
    if order.cancels:
        s = s + _BALANCED[order.kind](a, b, pushed, order.num_batches)
    inverse = np.linalg.inv(np.eye(size) - maps.matrix)
    long_run = inverse[first] @ long_run @ _t(inverse[second])

    seen = maps.score_matrix[first] @ s @ _t(maps.score_matrix[second])
    seen += np.where(same, maps.score_noise[first] @ _t(maps.score_noise[second]), 0.0)
    q = maps.position
    if joint:
        inward = np.linalg.inv(curvature)
        seen = inward @ seen[0] @ inward.T
        return Moments(s[0][np.ix_(q, q)], long_run[0][np.ix_(q, q)], seen, s)
    seen = seen[:, 0, 0] / (curvature[first] * curvature[second])
    found = s[:, q[0], q[0]], long_run[:, q[0], q[0]], seen
    if noise.ndim == 2:
        found = tuple(_symmetric(x, first, second) for x in found)
    covariance, total, at_gradient = found
    return Moments(covariance, total, at_gradient, s)


def squared_autocorrelations(maps: LinearMaps, moments: Moments, root: np.ndarray) -> np.ndarray:
    r"""$\sum_{l=-\infty}^\infty \rho_l^2$ of each coordinate of $Wu$: the time of its square.

    With $C_l = w^\top e A^l S e^\top w$, for the positions e of z. Where modes are taken by
    themselves and W mixes them, an upper bound: their mean, weighed by their variances.

    Args:
        maps: The modes.
        moments: Their moments.
        root: W, shape (d, d), or (d,) for a diagonal.
    """
    q = maps.position
    modes, size, _ = maps.matrix.shape
    if len(q) > 1:  # one map for all
        values, vectors = np.linalg.eig(maps.matrix[0])
        later = root @ vectors[q]
        share = later * np.linalg.solve(vectors, moments.joint[0][:, q] @ root.T).T
        sums = np.sum((share @ (1 / (1 - np.outer(values, values)))) * share, axis=1).real
        return 2 * sums / np.einsum("ij,jk,ik->i", root, moments.covariance, root) ** 2 - 1
    unit = np.zeros((size, size))
    unit[q[0], q[0]] = 1
    first, second = np.arange(modes), np.arange(modes)
    if moments.covariance.ndim == 2:
        first, second = np.triu_indices(modes)
    unit = np.broadcast_to(unit, moments.joint.shape)
    weight = lyapunov(_t(maps.matrix[first]), _t(maps.matrix[second]), unit)
    column, row = moments.joint[:, :, q[0]], moments.joint[:, q[0], :]
    if moments.covariance.ndim == 1:
        variance = moments.covariance
        own = 2 * np.einsum("pi,pij,pj->p", column, weight, column) / variance**2 - 1
        shares = root**2 * variance
        return shares @ own / np.sum(shares, axis=1) if root.ndim == 2 else own
    lagged, weights = np.empty((modes, modes, size)), np.empty((modes, modes, size, size))
    lagged[first, second], lagged[second, first] = column, row
    weights[first, second], weights[second, first] = weight, _t(weight)
    share = root[:, :, None] * np.tensordot(root, lagged, (1, 1))
    flat = share.reshape(len(root), -1)
    wide = weights.swapaxes(1, 2).reshape(modes * size, modes * size)
    variance = np.einsum("ij,jk,ik->i", root, moments.covariance, root)
    return 2 * np.sum((flat @ wide) * flat, axis=1) / variance**2 - 1


def lyapunov(a: np.ndarray, b: np.ndarray, q: np.ndarray) -> np.ndarray:
    r"""X of $X = aXb^\top + q$, for stacks of n x n matrices whose powers vanish."""
    size = a.shape[-1]
    if size > _LARGEST_KRONECKER:
        x, a, b = q, a, b
        for _ in range(_MOST_DOUBLINGS):
            added = a @ x @ _t(b)
            x = x + added
            if np.max(np.abs(added)) <= 1e-17 * np.max(np.abs(x)):
                break
            a, b = a @ a, b @ b
        return x
    x = np.empty_like(q)
    for i in range(0, len(q), _CHUNK):
        part = slice(i, i + _CHUNK)
        product = np.einsum("pij,pkl->pikjl", a[part], b[part]).reshape(-1, size**2, size**2)
        x[part] = np.linalg.solve(
            np.eye(size**2) - product, q[part].reshape(-1, size**2, 1)
        ).reshape(-1, size, size)
    return x


def _reshuffled(a, b, pushed, k: int) -> np.ndarray:
    """What noise adds that has covariance -V/(K-1) within an epoch and none beyond."""
    ja, jb, ak, bk = *map(_resolvent, (a, b)), *(np.linalg.matrix_power(x, k) for x in (a, b))
    white = lyapunov(a, b, pushed)
    held = ja @ pushed @ _t(jb)  # what noise that never changed would add
    over_epoch = lyapunov(ak, bk, _minus(held, ak, bk))
    rest = -(over_epoch + held) / (k - 1)
    return (k * white - _mean_departure(a, b, ak, bk, ja, jb, held, k)) / (k - 1) + _mean_of_powers(
        a, b, ak, bk, rest, k
    )


def _symmetric_sweep(a, b, pushed, k: int) -> np.ndarray:
    """Likewise, with V at the two visits of a minibatch in a sweep and its way back."""
    ja, jb = map(_resolvent, (a, b))
    ap, bp = (np.linalg.matrix_power(x, 2 * k) for x in (a, b))
    white = lyapunov(a, b, pushed)
    held = ja @ pushed @ _t(jb)
    twice = _twice(a, b, pushed, k) + _t(_twice(b, a, _t(pushed), k))
    mean_twice = _mean_twice(a, b, pushed, white, k) + _t(
        _mean_twice(b, a, _t(pushed), _t(white), k)
    )
    period = (k * (white - ap @ white @ _t(bp) + twice) - _minus(held, ap, bp)) / (k - 1)
    start = lyapunov(ap, bp, period)
    rest = start - (k * white + held) / (k - 1)
    return (k * (white + mean_twice) - _mean_departure(a, b, ap, bp, ja, jb, held, 2 * k)) / (
        k - 1
    ) + _mean_of_powers(a, b, ap, bp, rest, 2 * k)


_BALANCED = {"reshuffled": _reshuffled, "symmetric": _symmetric_sweep}


def _minus(held, ak, bk) -> np.ndarray:
    r"""$(1 - a^K)\,\text{held}\,(1 - b^K)^\top$."""
    one = np.eye(ak.shape[-1])
    return (one - ak) @ held @ _t(one - bk)


def _mean_departure(a, b, ak, bk, ja, jb, held, k: int) -> np.ndarray:
    r"""Mean over t < K of $(1 - a^t)h(1 - b^t)^\top - a^t h b^{t\top}$."""
    one = np.eye(a.shape[-1])
    mean_a, mean_b = ja @ (one - ak) / k, jb @ (one - bk) / k
    return held - mean_a @ held - held @ _t(mean_b)


def _mean_of_powers(a, b, ak, bk, x, k: int) -> np.ndarray:
    r"""Mean over t < K of $a^t x b^{t\top}$."""
    total = lyapunov(a, b, x)
    return (total - ak @ total @ _t(bk)) / k


def _opposed(a, b, x, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""$T_k = \sum_{i<k} a^{k-1-i} x b^{i\top}$ with $a^k$ and $b^k$, by halving k."""
    if k == 1:
        return x, a, b
    total, ak, bk = _opposed(a, b, x, k // 2)
    total, ak, bk = ak @ total + total @ _t(bk), ak @ ak, bk @ bk
    if k % 2:
        total, ak, bk = a @ total + x @ _t(bk), a @ ak, b @ bk
    return total, ak, bk


def _twice(a, b, x, k: int) -> np.ndarray:
    r"""$\sum_{i<k} a^{2k-1-i} x b^{i\top}$: both visits of each minibatch, after two sweeps."""
    total, ak, _ = _opposed(a, b, x, k)
    return ak @ total


def _mean_twice(a, b, x, white, k: int) -> np.ndarray:
    """The mean over the 2K places in two sweeps of what both visits have added by then."""
    r = k - 1
    total, ar, br = _opposed(a, b, x, r)
    so_far = a @ (white - ar @ white @ _t(br)) - a @ a @ ar @ total
    return _resolvent(a @ a) @ so_far / (2 * k)


def _resolvent(a) -> np.ndarray:
    return np.linalg.inv(np.eye(a.shape[-1]) - a)


def _t(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def _symmetric(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    size = first[-1] + 1
    matrix = np.empty((size, size))
    matrix[first, second] = matrix[second, first] = values
    return matrix
