"""Lists of neighbors of configurations, against ASE's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from stochgrad import potentials
from stochgrad.potentials import Neighbors, configurations, pair_vectors

RNG = np.random.default_rng(0)
SHEARED = np.array([[3.0, 0.8, 0.4], [0.0, 2.9, -0.6], [0.0, 0.0, 6.2]])
BOXES = {
    "none": None,
    "lengths": np.array([3.0, 4.0, 9.0]),
    "matrices": SHEARED * np.array([1.0, 1.5])[:, None, None],
}
AT = RNG.uniform(-4.0, 8.0, size=(2, 7, 3))


def as_set(i, j, vectors):
    return {(int(a), int(b), *np.round(v, 4)) for a, b, v in zip(i, j, vectors, strict=True)}


@pytest.mark.parametrize("cutoff", [1.5, 4.1])
@pytest.mark.parametrize("kind", BOXES)
def test_pairs_are_those_of_ase(kind, cutoff):
    """Atoms outside of the cell, several images of one, an atom's own images."""
    box = BOXES[kind]
    data = configurations(AT, AT, box=box).with_neighbors(cutoff)
    assert data.cutoff == cutoff
    for n in range(2):
        own = None if box is None else box if box.ndim == 1 else box[n]
        cell = None if own is None else np.diag(own) if own.ndim == 1 else own.T
        frame = Atoms(numbers=np.ones(7), positions=AT[n], cell=cell, pbc=cell is not None)
        i, j, vectors = neighbor_list("ijD", frame, cutoff)
        one = Neighbors(*(x[n] for x in data.neighbors))
        with jax.enable_x64(True):
            found = np.asarray(pair_vectors(jnp.asarray(AT[n]), one, own))
        there = one.mask
        assert as_set(one.receivers[there], one.senders[there], found[there]) == as_set(
            i, j, vectors
        )
        assert there.sum() == len(i)
        np.testing.assert_allclose(np.linalg.norm(found[~there], axis=-1), 2 * cutoff)


def test_padding_has_no_neighbors():
    there = np.ones((2, 7), bool)
    there[0, 4:] = False
    data = configurations(AT, AT, mask=there).with_neighbors(20.0)
    pairs = data.neighbors.mask.sum(1)
    np.testing.assert_array_equal(pairs, [4 * 3, 7 * 6])
    assert data.neighbors.receivers[0, data.neighbors.mask[0]].max() == 3


def test_two_dimensions():
    flat = RNG.uniform(size=(3, 5, 2))
    data = configurations(flat, flat, box=np.ones(2)).with_neighbors(0.5)
    r = np.asarray(jax.vmap(lambda x: potentials.distances(x, box=jnp.ones(2)))(flat))
    np.testing.assert_array_equal(data.neighbors.mask.sum(1), 2 * (r <= 0.5).sum(1))


def test_rows_and_sets_keep_their_lists():
    data = configurations(AT, AT).with_neighbors(3.0)
    one = data[1]
    np.testing.assert_array_equal(one.neighbors.senders, data.neighbors.senders[1:])
    both = potentials.concatenate([data, one])
    assert both.cutoff == 3.0
    np.testing.assert_array_equal(both.neighbors.mask.sum(1), data.neighbors.mask.sum(1)[[0, 1, 1]])
    assert potentials.concatenate([data, configurations(AT, AT)]).neighbors is None
    assert potentials.concatenate([data, data[0].with_neighbors(2.0)]).neighbors is None


@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan, "3"])
def test_a_cutoff_is_a_positive_number(cutoff):
    with pytest.raises((ValueError, TypeError), match="cutoff"):
        configurations(AT, AT).with_neighbors(cutoff)


def test_what_is_no_list_is_refused():
    with pytest.raises(TypeError, match="with_neighbors makes them, got ndarray"):
        pair_vectors(AT[0], np.zeros((2, 4), int))
