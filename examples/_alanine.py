"""A coarse-grained potential of alanine dipeptide: a classical prior energy and a small network."""

from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad import potentials

KT = 0.00831446 * 300.0  # kJ/mol
BONDS = ((0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (4, 6), (6, 7), (6, 8), (8, 9))
PHI, PSI = (1, 3, 4, 6), (3, 4, 6, 8)
IMPROPER = (3, 4, 6, 5)  # of the chiral carbon
MASSES = np.array(
    [15.0, 12.0, 16.0, 15.0, 13.0, 15.0, 12.0, 16.0, 15.0, 15.0]
)  # amu, with hydrogens


def _angles():
    for middle in range(10):
        ends = sorted({a for bond in BONDS for a in bond if middle in bond} - {middle})
        for i, k in combinations(ends, 2):
            yield i, middle, k


ANGLES = tuple(_angles())
_NEAR = {tuple(sorted(b)) for b in BONDS} | {tuple(sorted((i, k))) for i, _, k in ANGLES}
PAIRS = tuple(pair for pair in combinations(range(10), 2) if pair not in _NEAR)


class Data(NamedTuple):
    """Training and test frames, and the reference's histogram of each nanosecond."""

    train: potentials.Configurations
    test: potentials.Configurations
    counts: np.ndarray


def load(frames: int | None = None, offset: int = 0) -> Data:
    """The frames that ship with the examples; training frames from ``offset`` on."""
    raw = np.load(Path(__file__).parent / "data" / "alanine_dipeptide.npz")
    chosen = slice(offset, None if frames is None else offset + frames)
    together = partial(potentials.configurations, species=np.arange(10))
    return Data(
        together(raw["positions"][chosen], raw["forces"][chosen]),
        together(raw["test_positions"], raw["test_forces"]),
        raw["counts"].astype(np.float64),
    )


def _differences(rows):
    """The matrix that takes positions to differences of pairs of atoms."""
    matrix = np.zeros((len(rows), 10), np.float32)
    for n, (i, j) in enumerate(rows):
        matrix[n, i], matrix[n, j] = -1, 1
    return matrix


_BONDS_OF_ANGLES = np.array(
    [[BONDS.index(tuple(sorted((i, j)))), BONDS.index(tuple(sorted((j, k))))] for i, j, k in ANGLES]
)
_TURNS = (PHI, PSI, IMPROPER)
_ALL_PAIRS = _differences([*BONDS, *((i, k) for i, _, k in ANGLES), *PAIRS])
_ARMS = _differences([(turn[n], turn[n + 1]) for n in range(3) for turn in _TURNS])
_TWO = np.stack([np.eye(len(BONDS), dtype=np.float32)[side] for side in _BONDS_OF_ANGLES.T])


def internal(positions):
    """Bonds and cosines of angles; distances of the other pairs; cosines and sines of dihedrals.

    Matrices take positions to all differences at once, coordinates in rows: many times faster on
    a CPU than to gather three numbers at a time, and back again for the forces.
    """
    delta = _ALL_PAIRS @ positions
    squares = jnp.sum(delta * delta, axis=1)
    r = jnp.sqrt(squares)
    bonds, ends, loose = r[:9], squares[9:20], r[20:]
    one, other = _TWO[0] @ bonds, _TWO[1] @ bonds
    cosines = (one * one + other * other - ends) / (2 * one * other)
    x, y, z = (_ARMS @ positions).T.reshape(3, 3, 3)  # of each coordinate: first, axis, last arm

    def cross(a, b):
        return y[a] * z[b] - z[a] * y[b], z[a] * x[b] - x[a] * z[b], x[a] * y[b] - y[a] * x[b]

    first, last = cross(0, 1), cross(1, 2)
    length = jnp.sqrt(x[1] ** 2 + y[1] ** 2 + z[1] ** 2)
    sine = (x[0] * last[0] + y[0] * last[1] + z[0] * last[2]) * length
    cosine = first[0] * last[0] + first[1] * last[1] + first[2] * last[2]
    size = jnp.sqrt(sine**2 + cosine**2)
    return jnp.concatenate([bonds, cosines]), loose, cosine / size, sine / size


def energy_of(train: potentials.Configurations, widths=(64, 64), turns: bool = True):
    """Energy function and ``key -> params``, with the prior energy's constants from the data.

    With ``turns=False`` the network sees neither dihedrals nor bonds and angles: a model that
    cannot be right.
    """
    bent, loose, _, s = map(np.asarray, jax.vmap(internal)(jnp.asarray(train.positions)))
    stiff = np.concatenate([bent, s[:, 2:]], 1)
    middle, spread = stiff.mean(0), stiff.std(0)
    center, scale = loose.mean(0), loose.std(0)
    closest = 0.9 * loose.min(0)

    def features(positions):
        bent, loose, c, s = internal(positions)
        white = (jnp.concatenate([bent, s[2:]]) - middle) / spread
        apart = (loose - center) / scale
        prior = 0.5 * jnp.sum(white**2) + jnp.sum((closest / loose) ** 12)
        if not turns:
            return prior, apart
        circles = jnp.stack(
            [c[0], s[0], c[1], s[1], c[0] * c[1], c[0] * s[1], s[0] * c[1], s[0] * s[1]]
        )
        return prior, jnp.concatenate([apart, circles, white / 2])

    def energy(params, positions, species=None):
        prior, x = features(positions)
        *hidden, last = params
        for layer in hidden:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return np.float32(KT) * (prior + x @ last["w"])

    size = jax.eval_shape(features, jnp.zeros((10, 3)))[1].shape[0]

    def init(key):
        sizes = (size, *widths)
        params = []
        for n, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            w = jax.random.normal(jax.random.fold_in(key, n), (fan_in, fan_out)) / np.sqrt(fan_in)
            params.append({"w": w.astype(jnp.float32), "b": jnp.zeros(fan_out)})
        w = jax.random.normal(jax.random.fold_in(key, 99), (widths[-1],)) / np.sqrt(widths[-1])
        return [*params, {"w": w.astype(jnp.float32)}]

    return energy, init
