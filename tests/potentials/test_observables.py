"""Observables of frames made by hand, exactly; of an ideal gas, in standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import potentials
from stochgrad.potentials import Observable, adf, average, dihedrals, free_energy, rdf
from tests.conftest import Z


@pytest.mark.parametrize("box", [(2.0, 3.0, 2.5), (2.0, 3.0)])
def test_an_ideal_gas_has_one_at_every_distance(box):
    """Frames are independent; in two dimensions shells are rings."""
    box = np.array(box)
    gas = np.random.default_rng(0).uniform(size=(2000, 1, 6, len(box))) * box
    g = rdf(box, bins=8)
    each = average(g, gas.astype(np.float32))
    assert each.shape == (2000, 8)
    assert each.dtype == np.float64
    np.testing.assert_allclose(g.at[0], (np.arange(8) + 0.5) / 8)
    # pairs of a frame are pairwise independent, so that a bin's count is binomial in variance
    edges = np.linspace(0, 1, 9)
    volume = np.diff(4 / 3 * np.pi * edges**3 if len(box) == 3 else np.pi * edges**2)
    share = volume / box.prod()
    error = np.sqrt(share * (1 - share) / (15 * 2000)) / share
    assert np.all(np.abs(each.mean(0) - 1) < Z * error)


def lattice(dim, edge=4):
    """A square or cubic lattice with a spacing of one."""
    return np.stack(np.meshgrid(*[np.arange(edge)] * dim), -1).reshape(-1, dim).astype(np.float32)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_lattice_has_its_counts(dim):
    """Neighbors at 1, sqrt(2) and sqrt(3), across the boundaries too."""
    at, bins = lattice(dim), 8  # of width a quarter
    g = average(rdf(np.full(dim, 4.0), bins=bins), at[None])
    edges = np.linspace(0, 2, bins + 1)
    volume = np.diff(4 / 3 * np.pi * edges**3 if dim == 3 else np.pi * edges**2)
    counts = g * volume * len(at) / 4**dim * (len(at) - 1) / len(at)
    expected = np.zeros(bins)
    expected[4] = 2 * dim
    expected[5] = 4 if dim == 2 else 12
    if dim == 3:
        expected[6] = 8
    # those at 2, the end, are beyond the last bin
    np.testing.assert_allclose(counts, expected, rtol=1e-5)


def test_a_shorter_range_has_the_same_counts():
    at = lattice(3) + 0.01 * np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    long = average(rdf(np.full(3, 4.0), bins=8), at[None])
    short = average(rdf(np.full(3, 4.0), r_max=1.5, bins=6), at[None])
    np.testing.assert_allclose(short, long[:6], rtol=1e-5)


def test_partial_functions_of_an_ideal_gas_and_their_sum():
    """One at every distance, in a sheared box too; pairs of all kinds make up the whole."""
    rng = np.random.default_rng(1)
    box = np.array([[2.0, 0.4, 0.1], [0.0, 2.2, -0.3], [0.0, 0.0, 2.5]])
    species = np.array([0, 1, 1, 0, 1])
    gas = (rng.uniform(size=(3000, 1, 5, 3)) @ box.T).astype(np.float32)
    kinds = {(0, 0): 1, (0, 1): 6, (1, 1): 3}
    parts = {k: average(rdf(box, bins=6, species=species, pair=k), gas) for k in kinds}
    half = (1 / np.linalg.norm(np.linalg.inv(box), axis=1)).min() / 2
    share = np.diff(4 / 3 * np.pi * np.linspace(0, half, 7) ** 3) / np.linalg.det(box)
    for k, count in kinds.items():
        error = np.sqrt(share * (1 - share) / (count * 3000)) / share
        assert np.all(np.abs(parts[k].mean(0) - 1) < Z * error), k
    whole = sum(count * parts[k] for k, count in kinds.items()) / 10
    np.testing.assert_allclose(whole, average(rdf(box, bins=6), gas), rtol=1e-5)
    swapped = average(rdf(box, bins=6, species=species, pair=(1, 0)), gas)
    np.testing.assert_array_equal(swapped, parts[0, 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"species": [0, 1]}, "pair is needed too"),
        ({"pair": (0, 1)}, "species is needed too"),
        ({"species": [0, 1], "pair": (0, 2)}, r"species that there are, got \(0, 2\)"),
        ({"species": [0, 1], "pair": (0, 0)}, "species that there are"),
        ({"species": [0, 1], "pair": (0, 1, 1)}, "two numbers"),
        ({"species": [0.5, 1], "pair": (0, 1)}, "species"),
    ],
)
def test_partial_functions_of_nothing_are_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        rdf(np.ones(3), **options)


def test_species_of_another_number_of_atoms_are_refused():
    g = rdf(np.ones(3), species=[0, 1, 1], pair=(0, 1))
    with pytest.raises(ValueError, match="species are of 3 atoms, and a frame has 4"):
        average(g, np.zeros((2, 4, 3)))


def test_a_square_lattice_has_its_angles():
    """Four right ones and two straight ones at each atom, and eight of 45 degrees with the next."""
    at, box, bins = lattice(2), np.full(2, 4.0), 15
    width = np.pi / bins
    a = adf(box, cutoff=1.2, bins=bins)
    found = average(a, at[None]) * width
    place = lambda degrees: min(int(np.deg2rad(degrees) / width), bins - 1)
    expected = np.zeros(bins)
    expected[place(90)], expected[place(180)] = 4, 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(a.at[0], (np.arange(bins) + 0.5) * width)
    wider = average(adf(box, cutoff=1.7, bins=14), at[None]) * np.pi / 14
    wide = np.zeros(14)  # 28 pairs of 8 neighbors at multiples of 45 degrees: 8, 8, 8 and 4
    for degrees, count in ((45, 8), (135, 8), (180, 4)):
        wide[min(int(degrees / 180 * 14), 13)] += count
    right = wider[6] + wider[7]  # on an edge
    np.testing.assert_allclose(right, 8, rtol=1e-5)
    wider[6:8] = 0
    np.testing.assert_allclose(wider, wide, rtol=1e-5)


def test_angles_without_a_box_end_at_the_surface():
    """Three atoms in a corner: one angle, of the one in the middle alone."""
    at = np.array([[1.0, 0, 0], [0, 0, 0], [0, 1, 0]], np.float32)
    found = average(adf(cutoff=1.2, bins=3), at[None]) * np.pi / 3
    np.testing.assert_allclose(found, [0, 1 / 3, 0], rtol=1e-6)


def chain(*degrees):
    """Atoms in a row whose dihedrals are those named; bonds of one length at right angles."""
    at = [np.array([1.0, 0, 0]), np.zeros(3), np.array([0, 0, 1.0])]
    for turn in np.deg2rad(degrees):
        first, axis = at[-3] - at[-2], at[-1] - at[-2]
        across = np.cross(axis, first)
        at.append(at[-1] + np.cos(turn) * first + np.sin(turn) * across)
    return np.array(at, np.float32)


def test_chains_have_the_dihedrals_they_are_made_of():
    at = chain(-100.0, 40.0)
    found = np.rad2deg(potentials.dihedral(at, [(0, 1, 2, 3), (1, 2, 3, 4)]))
    np.testing.assert_allclose(found, [-100, 40], atol=1e-3)


def test_one_dihedral_falls_into_its_bin():
    """Also at the two ends, which are one angle."""
    degrees = [-179.9, -100.0, -100.0, 1.0, 179.9]
    frames = np.stack([chain(d, 0.0) for d in degrees])
    found = average(dihedrals((0, 1, 2, 3), bins=12), frames)
    expected = np.zeros(12)
    for d in degrees:
        expected[int((d + 180) // 30)] += 0.2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    half = average(dihedrals((0, 1, 2, 3), bins=12), chain(180.0, 0.0)[None])
    assert half.sum() == half[0] + half[-1] == 1


def test_two_dihedrals_are_a_map_of_the_first_by_the_second():
    """phi along the first axis: a transposed map would have them at other places."""
    frames = np.stack([chain(-100.0, 40.0), chain(-100.0, 50.0), chain(170.0, -1.0)])
    turns = dihedrals((0, 1, 2, 3), (1, 2, 3, 4), bins=12)
    found = average(turns, frames)
    expected = np.zeros((12, 12))
    expected[2, 7], expected[11, 5] = 2 / 3, 1 / 3
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(turns.at) == 2
    np.testing.assert_allclose(turns.at[0], np.deg2rad(np.arange(-165, 180, 30)))


def test_dihedrals_in_a_box_see_the_nearest_images():
    at = chain(-100.0, 40.0)
    split = at + 10.0 * np.array(
        [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, -1, 0], [0, 0, 0]], np.float32
    )
    whole = average(dihedrals((0, 1, 2, 3), (1, 2, 3, 4)), at[None])
    boxed = average(dihedrals((0, 1, 2, 3), (1, 2, 3, 4), box=np.full(3, 10.0)), split[None])
    np.testing.assert_array_equal(boxed, whole)


COORDINATE = Observable((np.arange(3.0),), lambda frame: frame[0])
FRAMES = np.random.default_rng(4).normal(size=(2, 9, 5, 1, 3)).astype(np.float32)
WEIGHTS = np.random.default_rng(5).uniform(size=(2, 9, 5))


def test_averages_are_numpys():
    """More trajectories than are done at once; weights need not add up to one."""
    found = average(COORDINATE, FRAMES)
    assert found.shape == (2, 9, 3)
    np.testing.assert_allclose(found, FRAMES[..., 0, :].mean(2), atol=1e-6)
    weighted = average(COORDINATE, FRAMES, WEIGHTS)
    expected = (FRAMES[..., 0, :] * WEIGHTS[..., None]).sum(2) / WEIGHTS.sum(2)[..., None]
    np.testing.assert_allclose(weighted, expected, atol=1e-6)
    np.testing.assert_allclose(average(COORDINATE, FRAMES, 1e6 * WEIGHTS), expected, atol=1e-6)
    np.testing.assert_allclose(average(COORDINATE, FRAMES[0, 0]), found[0, 0], atol=1e-6)


def test_weights_of_any_size_will_do():
    """Those of a far network's replica are as small as e^-300."""
    expected = average(COORDINATE, FRAMES, WEIGHTS)
    found = average(COORDINATE, FRAMES, 1e-60 * WEIGHTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights must have shape \(2, 9, 5\), got \(2, 9\)"):
        average(COORDINATE, FRAMES, WEIGHTS[..., 0])


def test_frames_that_are_no_numbers_are_refused():
    """A pair at a distance of NaN was dropped, in silence."""
    frames = np.array(FRAMES)
    frames[1, 4, 2, 0, 1] = np.nan
    with pytest.raises(ValueError, match=r"positions .*frame 2 of trajectory \(1, 4\) holds NaN"):
        average(COORDINATE, frames)


@pytest.mark.parametrize(
    ("observable", "words"),
    [
        (dihedrals((0, 1, 2, 5)), "numbers of atoms|of 6 atoms at least, got .5, 3."),
        (dihedrals((0, 1, 2, 3), (4, 3, 2, 7)), "of 8 atoms at least, got .5, 3."),
        (rdf(np.full(2, 4.0)), "shape .atoms, 2. of 2 atoms at least, got .5, 3."),
        (adf(np.full(2, 4.0), cutoff=1.0), "shape .atoms, 2."),
        (Observable((np.arange(4.0),), lambda r: r[0]), "of its bins, shape .4,. .*got shape .3,."),
        (Observable((np.arange(3.0),), lambda r: (r[0], r[0])), "must return one array"),
        (
            Observable((np.arange(3.0),), lambda r: r[0, 0] / "a"),
            "fails on a frame of shape .5, 3.",
        ),
    ],
)
def test_observables_that_do_not_fit_the_frames_are_refused(observable, words):
    """Numbers of atoms that are not there were clamped to the last one."""
    with pytest.raises(ValueError, match=words):
        average(observable, np.stack([chain(-100.0, 40.0)]))


@pytest.mark.parametrize("kind", [bool, int])
def test_counts_and_indicators_are_averaged_as_numbers(kind):
    turned = Observable((np.arange(3.0),), lambda frame: (frame[0] > 0).astype(kind))
    np.testing.assert_allclose(average(turned, FRAMES), (FRAMES[..., 0, :] > 0).mean(2), atol=1e-6)


def test_a_trajectory_without_weight_has_no_average():
    weights = np.array(WEIGHTS)
    weights[1, 2] = 0
    found = average(COORDINATE, FRAMES, weights)
    assert np.isnan(found[1, 2]).all()
    assert np.isfinite(found).sum() == found.size - 3


def test_free_energies_are_logarithms_above_the_floor():
    p = np.array([0.5, 0.25, 0.0])
    np.testing.assert_allclose(free_energy(p, 2.0, floor=0.1), -2 * np.log([0.5, 0.25, 0.1]))
    assert free_energy(p)[2] == np.inf


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rdf(np.array([4.0, 3.0, 4.0]), r_max=1.6), "at most half the shortest edge, 1.5"),
        (lambda: rdf(np.ones(3), r_max=0.0), "r_max must be a positive number"),
        (lambda: rdf(np.ones(4)), "box must be two or three positive edge lengths"),
        (lambda: rdf(np.array([1.0, 0.0, 1.0])), "box must be two or three positive"),
        (lambda: rdf(np.zeros((3, 3))), "span a volume"),
        (lambda: rdf(np.ones(3), bins=0), "bins must be an integer"),
        (lambda: adf(np.array([4.0, 3.0]), cutoff=1.6), "cutoff must be at most half .* 1.5"),
        (lambda: adf(cutoff=-1.0), "cutoff must be a positive number"),
        (lambda: adf(cutoff=1.0, bins=0), "bins must be an integer"),
        (lambda: dihedrals(), "one or two times four atoms"),
        (lambda: dihedrals((0, 1, 2)), "one or two times four atoms"),
        (lambda: dihedrals(*[(0, 1, 2, 3)] * 3), "one or two times four atoms"),
        (lambda: dihedrals((0, 1, 2, 3), bins=0), "bins must be an integer"),
    ],
)
def test_bad_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_observables_of_trajectories_run_in_single_precision():
    """And take frames in double where there are any, without a promotion."""
    with jax.enable_x64(True):
        for observable in (rdf(np.full(3, 4.0)), adf(np.full(3, 4.0), cutoff=1.2)):
            assert average(observable, jnp.asarray(lattice(3), float)[None]).sum() > 0
