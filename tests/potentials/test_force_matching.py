"""Log densities against numpy, posteriors against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import stochgrad
from stochgrad import potentials
from tests.conftest import Z
from tests.helpers import mean_and_error

N, ATOMS = 7, 3
SPECIES = np.array([0, 1, 1])
RNG = np.random.default_rng(5)
R = RNG.normal(size=(N, ATOMS, 3)).astype(np.float32)
F = RNG.normal(size=(N, ATOMS, 3)).astype(np.float32)
U = RNG.normal(size=N).astype(np.float32)
W = (np.einsum("nai,nai->ni", F, R) + 0.1 * RNG.normal(size=(N, 3))).astype(np.float32)
FULL = (np.einsum("nai,naj->nij", F, R) + 0.1 * RNG.normal(size=(N, 3, 3))).astype(np.float32)

PARAMS = {"k": jnp.array([0.7, -1.3]), "b": jnp.float32(0.4)}


def springs(params, positions, species=None, mask=None, **rest):
    """Each atom tied to the origin by its species' spring: forces -k r, virial -k r r'."""
    k = params["k"][jnp.zeros(len(positions), int) if species is None else species]
    each = 0.5 * k * jnp.sum(positions**2, -1)
    return jnp.sum(each if mask is None else jnp.where(mask, each, 0)) + params["b"]


def density(target, position):
    return float(jax.jit(lambda p: target.log_density(p, target.batches.full))(position))


def matched(data=None, energy=springs, **options):
    if data is None:
        data = potentials.configurations(R, F, species=SPECIES)
    return potentials.force_matching(
        energy, data, **{"init": PARAMS, "noise": 0.5, "order": "full", **options}
    )


def at(params=PARAMS, **noise):
    return {"params": params, "noise": {k: jnp.asarray(v, jnp.float32) for k, v in noise.items()}}


def expected(sigma, k=(0.7, -1.3), b=0.4, energies=None, diagonal=None, full=None, prior_sd=1.0):
    """Of the springs, by numpy alone."""
    k, b = np.float32(k).astype(float), float(np.float32(b))
    stiff = k[SPECIES]
    sigma_atoms = np.broadcast_to(np.asarray(sigma), (2,))[SPECIES]
    r = R.astype(float)
    total = norm.logpdf(F, -stiff[:, None] * r, sigma_atoms[:, None]).sum()
    if energies:
        found = 0.5 * (stiff * (r**2).sum(-1)).sum(1) + b
        total += norm.logpdf(U / ATOMS, found / ATOMS, energies).sum()
    virial = -np.einsum("a,nai,naj->nij", stiff, r, r)
    if diagonal:
        one = np.diagonal(virial, axis1=1, axis2=2)
        total += norm.logpdf(W / ATOMS, one / ATOMS, diagonal).sum()
    if full:
        total += norm.logpdf(FULL / ATOMS, virial / ATOMS, full).sum()
    return total - 0.5 * ((k**2).sum() + b**2) / prior_sd**2


def test_forces_alone():
    np.testing.assert_allclose(density(matched(), at()), expected(0.5), rtol=1e-5)


def test_energies_and_virials_count_per_atom():
    """Diagonal virials in a box of lengths, full ones without a box and in a box of matrices."""
    together = partial(potentials.configurations, R, F, species=SPECIES, energies=U)
    noise = {"forces": 0.5, "energies": 0.2, "virials": 0.3}
    diagonal = matched(together(virials=W, box=np.full(3, 50.0)), noise=noise)
    whole = matched(together(virials=FULL), noise=noise)
    matrices = matched(together(virials=FULL, box=np.tile(50 * np.eye(3), (N, 1, 1))), noise=noise)
    np.testing.assert_allclose(
        density(diagonal, at()), expected(0.5, energies=0.2, diagonal=0.3), rtol=1e-5
    )
    for target in (whole, matrices):
        np.testing.assert_allclose(
            density(target, at()), expected(0.5, energies=0.2, full=0.3), rtol=1e-5
        )
    no_virials = matched(together(), noise={"forces": 0.5, "energies": 0.2})
    np.testing.assert_allclose(density(no_virials, at()), expected(0.5, energies=0.2), rtol=1e-5)


def pair_springs(k, positions, box):
    """Harmonic in the distances of nearest images, so that the box has a say in the virial."""
    return 0.5 * k * jnp.sum(potentials.distances(positions, box=box) ** 2)


def pair_energy(r, box):
    total = 0.0
    for i, j in zip(*np.triu_indices(ATOMS, 1), strict=True):
        d = r[j] - r[i]
        d = d - box @ np.round(np.linalg.inv(box) @ d)
        total += 0.5 * 1.7 * d @ d
    return total


def strained(box, strain):
    """Minus the derivatives of the energy by central differences."""
    found = np.zeros((N, len(strain)))
    for n, m in np.ndindex(*found.shape):
        up, down = ((np.eye(3) + h * strain[m]) for h in (1e-4, -1e-4))
        r = R[n].astype(float)
        ends = [pair_energy(r @ e.T, e @ box[n]) for e in (up, down)]
        found[n, m] = -(ends[0] - ends[1]) / 2e-4
    return found


SKEW = np.array([[3.0, 0.8, 0.4], [0.0, 2.9, -0.6], [0.0, 0.0, 3.2]])
UNITS = np.eye(9).reshape(9, 3, 3)


def density_of_virials(virials, box):
    """Of virials that have no error, in double precision, less that of the forces."""
    with jax.enable_x64(True):
        targets = []
        for more in ({}, {"virials": virials}):
            data = potentials.configurations(R.astype(float), F.astype(float), box=box, **more)
            noise = {"forces": 1.0, **dict.fromkeys(more, 1e-4)}
            targets.append(matched(data, pair_springs, init=jnp.array(1.7), noise=noise))

        @jax.jit
        def difference(k):
            position = {"params": k, "noise": {}}
            one, both = (t.log_density(position, t.batches.full) for t in targets)
            return both - one

        return float(difference(jnp.array(1.7)))


@pytest.mark.parametrize("kind", ["lengths", "each its lengths", "matrices"])
def test_virials_are_derivatives_by_the_strain(kind):
    """The box is strained along with the atoms; a wrong one loses thousands of units."""
    if kind == "matrices":
        box = SKEW * (1 + 0.02 * np.arange(N))[:, None, None]
        virials = strained(box, UNITS).reshape(N, 3, 3)
        given = box
    else:
        edges = np.array([3.0, 2.5, 2.8]) * (1 + 0.02 * np.arange(N))[:, None]
        given = edges[0] if kind == "lengths" else edges
        matrices = np.array([np.diag(e) for e in np.broadcast_to(given, (N, 3))])
        virials = strained(matrices, UNITS[::4])
    best = norm.logpdf(0, scale=1e-4) * virials.size
    np.testing.assert_allclose(density_of_virials(virials, given), best, rtol=1e-5)


def test_diagonal_virials_in_a_box_of_matrices():
    box = np.tile(SKEW, (N, 1, 1))
    virials = strained(box, UNITS[::4])
    best = norm.logpdf(0, scale=1e-4) * virials.size
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(density_of_virials(virials, box), best, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lengths", "matrices"])
def test_a_box_of_integers_is_strained_too(kind):
    lengths = np.array([3, 2, 4])
    box = lengths if kind == "lengths" else np.tile(np.diag(lengths), (N, 1, 1))
    matrices = np.tile(np.diag(lengths).astype(float), (N, 1, 1))
    virials = strained(matrices, UNITS if kind == "matrices" else UNITS[::4])
    virials = virials.reshape(N, 3, 3) if kind == "matrices" else virials
    best = norm.logpdf(0, scale=1e-4) * virials.size
    np.testing.assert_allclose(density_of_virials(virials, box), best, rtol=1e-5)


def test_a_species_has_its_own_noise():
    target = matched(noise=np.array([0.5, 2.0]))
    np.testing.assert_allclose(density(target, at()), expected([0.5, 2.0]), rtol=1e-5)


def test_learned_scales_have_exponential_priors_and_a_jacobian():
    """One for each species, beside a fixed one, and beside one for the energies."""
    data = potentials.configurations(R, F, species=SPECIES, energies=U)
    noise = {"forces": potentials.learned([0.5, 2.0]), "energies": potentials.learned(0.2)}
    target = matched(data, noise=noise)
    s, e = np.array([0.3, -0.2]), 0.5
    sigma = [0.5, 2.0] * np.exp(s)
    prior = -np.exp(s).sum() + s.sum() - np.exp(e) + e
    found = density(target, at(forces=s, energies=e))
    likelihood = expected(sigma, energies=0.2 * np.exp(e))
    np.testing.assert_allclose(found, likelihood + prior, rtol=1e-5)
    start = target.initial(jax.random.key(0))
    assert jax.tree.map(jnp.shape, start["noise"]) == {"forces": (2,), "energies": ()}
    mixed = matched(data, noise={"forces": potentials.learned(0.5), "energies": 0.2})
    np.testing.assert_allclose(
        density(mixed, at(forces=0.3)),
        expected(0.5 * np.exp(0.3), energies=0.2) - np.exp(0.3) + 0.3,
        rtol=1e-5,
    )


def test_temperature_sharpens_prior_and_likelihood_and_not_the_jacobian():
    noise, s = potentials.learned(0.5), 0.3
    cold = density(matched(noise=noise, temperature=0.25), at(forces=s))
    np.testing.assert_allclose(cold, (expected(0.5 * np.exp(s)) - np.exp(s)) / 0.25 + s, rtol=1e-5)


def test_constrain_gives_scales_in_their_units():
    target = matched(noise=potentials.learned([0.5, 2.0]))
    s = np.array([0.3, -0.2])
    found = target.constrain(at(forces=s))
    np.testing.assert_allclose(found["sigma_forces"], [0.5, 2.0] * np.exp(s), rtol=1e-6)
    np.testing.assert_array_equal(found["params.k"], PARAMS["k"])
    np.testing.assert_array_equal(found["params.b"], PARAMS["b"])


def test_padded_atoms_count_for_nothing():
    """Of every term: with two atoms more in each configuration, all NaN."""
    pad = ((0, 0), (0, 2), (0, 0))
    there = np.arange(ATOMS + 2) < ATOMS
    data = potentials.configurations(
        np.pad(R, pad, constant_values=np.nan),
        np.pad(F, pad, constant_values=np.nan),
        energies=U,
        virials=W,
        species=np.pad(SPECIES, (0, 2), constant_values=1),
        mask=np.tile(there, (N, 1)),
    )
    noise = {"forces": np.array([0.5, 2.0]), "energies": 0.2, "virials": 0.3}
    found = density(matched(data, noise=noise), at())
    np.testing.assert_allclose(found, expected([0.5, 2.0], energies=0.2, diagonal=0.3), rtol=1e-5)


def test_configurations_of_different_sizes():
    """Each counts its own atoms: the sum of the densities of each size alone."""
    whole = potentials.configurations(R[:4], F[:4], species=SPECIES, energies=U[:4])
    few = potentials.configurations(R[4:, :2], F[4:, :2], species=SPECIES[:2], energies=U[4:])
    there = np.ones((N, ATOMS), bool)
    there[4:, 2] = False
    both = potentials.configurations(R, F, species=SPECIES, energies=U, mask=there)
    options = {"noise": {"forces": 0.5, "energies": 0.2}, "prior": "flat"}
    parts = [density(matched(data, **options), at()) for data in (whole, few, both)]
    np.testing.assert_allclose(parts[2], parts[0] + parts[1], rtol=1e-5)


def test_species_and_graph_of_each_configuration_reach_the_energy():
    """In their own row's order, in every minibatch too."""

    def energy(k, positions, species, charge):
        return 0.5 * charge * jnp.sum(k[species] * jnp.sum(positions**2, -1))

    species, charge = RNG.integers(0, 2, size=(N, ATOMS)), np.arange(1.0, N + 1)
    data = potentials.configurations(R, F, species=species, charge=charge)
    k = np.array([0.5, 2.0])
    found = -(charge[:, None, None] * k[species][..., None]) * R
    want = norm.logpdf(F, found, np.array([0.3, 0.6])[species][..., None])
    options = {"init": jnp.asarray(k, jnp.float32), "noise": np.array([0.3, 0.6]), "prior": "flat"}
    position = {"params": jnp.asarray(k, jnp.float32), "noise": {}}
    full = matched(data, energy, **options)
    np.testing.assert_allclose(density(full, position), want.sum(), rtol=1e-5)


def test_priors():
    """A number, flat, scaled by the fan-in, and a function; constants do not count."""
    params = {
        "w": jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32),
        "b": jnp.asarray(RNG.normal(size=5), jnp.float32),
        "c": jnp.float32(1.5),
    }
    squares = {k: float((np.asarray(v, float) ** 2).sum()) for k, v in params.items()}

    def energy(params, positions):
        return 0.0 * params["c"] * jnp.sum(positions)

    data = potentials.configurations(R, F)
    of = lambda prior: density(
        matched(data, energy, init=params, prior=prior), {"params": params, "noise": {}}
    )
    flat = of("flat")
    np.testing.assert_allclose(flat, norm.logpdf(F, 0, 0.5).sum(), rtol=1e-5)
    np.testing.assert_allclose(of(2.0) - flat, -0.5 * sum(squares.values()) / 4, rtol=1e-3)
    scaled = -0.5 * (6 * squares["w"] + squares["b"] + squares["c"])
    np.testing.assert_allclose(of("scaled") - flat, scaled, rtol=1e-3)
    own = of(lambda p: -jnp.sum(jnp.abs(p["b"])))
    np.testing.assert_allclose(own - flat, -np.abs(params["b"]).sum(), rtol=1e-2)


def test_a_prior_may_return_a_number():
    """As stochgrad.posterior's may."""
    flat, own = matched(prior="flat"), matched(prior=lambda params: 0.0)
    assert density(own, at()) == density(flat, at())


@pytest.mark.parametrize("prior", [1.0, "scaled"])
def test_coarse_weights_keep_their_type(prior):
    """No silent promotion of weights in bfloat16, as everywhere else in the library."""

    def energy(w, positions):
        return jnp.sum(w.astype(positions.dtype)) * jnp.sum(positions**2)

    w = jnp.ones((2, 2), jnp.bfloat16)
    target = matched(potentials.configurations(R, F), energy, init=w, prior=prior)
    assert np.isfinite(density(target, {"params": w, "noise": {}}))


def test_the_mean_over_an_epoch_is_the_density_of_all_data():
    """A partial last minibatch included, with everything that is each configuration's own."""
    there = np.ones((N, ATOMS), bool)
    there[2, 1:] = False
    data = potentials.configurations(
        R, F, energies=U, virials=W, mask=there, box=30.0 + np.arange(3.0 * N).reshape(N, 3),
        species=RNG.integers(0, 2, size=(N, ATOMS)),
    )  # fmt: skip
    noise = {"forces": potentials.learned([0.5, 1.0]), "energies": 0.2, "virials": 0.3}
    target = matched(data, noise=noise, order="reshuffled", batch_size=3)
    position = at(forces=[0.1, -0.3])
    blocks = target.batches.blocks
    assert blocks.count == 3
    of_block = jax.jit(lambda n: target.log_density(position, blocks.at(n)))
    mean = np.mean([float(of_block(n)) for n in range(3)])
    np.testing.assert_allclose(mean, density(target, position), rtol=1e-5)


def test_every_chain_starts_from_its_own_weights():
    """And a tree given stands for all."""
    target = matched(init=lambda key: {"k": jax.random.normal(key, (2,)), "b": jnp.zeros(())})
    one, other = (target.initial(jax.random.key(n))["params"]["k"] for n in range(2))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(matched().initial(jax.random.key(0))["params"]["k"], PARAMS["k"])


def vector_energy(params, positions, species):
    return jnp.sum(positions**2, -1)


def clamped(params, positions, species):
    return jnp.sum(params["k"][species] * jnp.sum(positions**2, -1))


def filled(params, positions, species):
    return jnp.sum(jnp.take(params["k"], species, axis=0) * jnp.sum(positions**2, -1))


THREE = potentials.configurations(R, F, species=np.array([0, 2, 1]))
LARGER = {"k": np.ones(3, np.float32), "b": np.float32(0)}
BOTH = potentials.configurations(R, F, species=SPECIES, energies=U)
BAD = {
    "noise without energies": (
        {"data": BOTH},
        r"noise must name a scale .*\['forces', 'energies'\]",
    ),
    "noise of what there is not": (
        {"noise": {"forces": 1.0, "virials": 1.0}},
        r"noise must name a scale for each of \['forces'\]",
    ),
    "noise of zero": ({"noise": 0.0}, "noise of forces must be a positive number"),
    "noise of a species negative": ({"noise": np.array([1.0, -1.0])}, "noise of forces must be a"),
    "noise of too few species": (
        {"noise": np.array([1.0]), "data": THREE, "init": LARGER},
        "noise has 1 species, the data have a species 2",
    ),
    "learned noise of too few species": (
        {"noise": potentials.learned([1.0, 1.0]), "data": THREE, "init": LARGER},
        "noise has 2 species, the data have a species 2",
    ),
    "noise of species without species": (
        {"noise": np.ones(2), "data": potentials.configurations(R, F)},
        "needs species in the data",
    ),
    "energies' noise of each species": (
        {"noise": {"forces": 1.0, "energies": np.ones(2)}, "data": BOTH},
        "noise of energies must be one number, got shape",
    ),
    "noise of two axes": ({"noise": np.ones((2, 2))}, "noise of forces must be one number or one"),
    "temperature of zero": ({"temperature": 0.0}, "temperature must be a positive number"),
    "a prior of zero": ({"prior": 0.0}, "prior must be a positive number"),
    "an unknown prior": (
        {"prior": "wide"},
        "prior must be a number, 'scaled', 'flat' or a function",
    ),
    "an energy of each atom": ({"energy": vector_energy}, "energy_fn must return a scalar"),
    "an energy that takes no species": (
        {"energy": lambda params, positions: jnp.sum(positions)},
        r"energy_fn fails on positions of shape \(3, 3\) with \['species'\]",
    ),
    "an energy of other weights": (
        {"init": {"b": jnp.float32(0.0)}},
        "energy_fn fails on positions",
    ),
    "an energy without the last species": (
        {"energy": clamped, "data": THREE},
        "energy_fn has no parameters for species 2, the largest .*beyond the end of a table",
    ),
    "an order unknown": ({"order": "random", "batch_size": 2}, "order"),
    "no batch size": ({"order": "reshuffled"}, "batch_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    given, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        matched(**given)


def test_only_configurations_are_data():
    with pytest.raises(TypeError, match=r"dataset must be configurations, as .*got a dict"):
        potentials.force_matching(springs, {"positions": R}, init=PARAMS, noise=1.0)


def test_a_learned_scale_is_positive():
    for mean in (0.0, -1.0, np.nan, [1.0, 0.0], []):
        with pytest.raises(ValueError, match="mean must be a positive number"):
            potentials.learned(mean)


def test_species_of_each_configuration_without_parameters_are_refused():
    """The last species occurs in one configuration alone."""
    species = np.tile(SPECIES, (N, 1))
    species[4, 2] = 2
    data = potentials.configurations(R, F, species=species)
    with pytest.raises(ValueError, match="no parameters for species 2"):
        matched(data, clamped)


def test_an_embedding_that_fills_with_nan_is_refused():
    with pytest.raises(ValueError, match="no parameters for species 2"):
        matched(THREE, filled)


def test_positions_of_integers_pass():
    grid = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), -1).reshape(1, 8, 3)
    data = potentials.configurations(grid, -grid)
    target = matched(
        data, lambda k, r: 0.5 * k * jnp.sum(r.astype(k.dtype) ** 2), init=jnp.float32(1), noise=1.0
    )
    found = density(target, {"params": jnp.float32(1.0), "noise": {}})
    np.testing.assert_allclose(found, norm.logpdf(np.zeros(24)).sum() - 0.5, rtol=1e-5)


def test_a_table_of_equal_rows_is_a_table():
    """Two species that start alike were taken for one without parameters."""
    alike = {"k": np.float32([1.0, 2.0, 2.0]), "b": np.float32(0)}
    assert np.isfinite(density(matched(THREE, clamped, init=alike), at(alike)))


def test_differences_that_rounding_swallows_are_no_missing_rows():
    def high(params, positions, species):
        return np.float32(1e8) * params["k"][0] ** 2 + clamped(params, positions, species)

    far = {"k": np.float32([1.0, 40.0, 2.0]), "b": np.float32(0)}
    assert matched(THREE, high, init=far).batches.size == N


def test_an_embedding_of_one_row_is_told_from_an_energy_without_species():
    """Their values are the same: what is read tells them apart."""
    one = {"k": np.float32([1.0]), "b": np.float32(0)}
    ignores = lambda params, positions, species: params["k"][0] * jnp.sum(positions**2)
    assert matched(energy=ignores, init=one).batches.size == N
    with pytest.raises(ValueError, match="no parameters for species 1"):
        matched(energy=clamped, init=one)


def test_species_of_padding_need_no_parameters():
    """Nor noise: a number beyond the table, or below zero, stands for no atom."""
    there = np.ones((N, ATOMS), bool)
    there[3, 2] = False

    def masked(params, positions, species, mask):
        each = params["k"][species] * jnp.sum(positions**2, -1)
        return jnp.sum(jnp.where(mask, each, 0))

    for nobody in (9, -1):
        species = np.where(there, SPECIES, nobody)
        data = potentials.configurations(R, F, species=species, mask=there)
        target = matched(data, masked, noise=np.array([0.5, 2.0]))
        assert np.isfinite(density(target, at()))


def test_a_gradient_that_is_not_finite_is_named_before_training():
    """The leaf of the weights, and the first configuration."""
    charge = np.where(np.arange(N) < 4, 1, 0).astype(np.float32)
    data = potentials.configurations(R, F, charge=charge)
    weights = {"a": jnp.float32(0), "k": jnp.float32(1)}

    def norm(params, r, charge):
        length = jnp.sqrt(charge * jnp.sum(r**2))
        return params["a"] + params["k"] * jnp.where(charge > 0, length, 0)

    with pytest.raises(ValueError, match="gives forces that are not finite in configuration 4"):
        matched(data, norm, init=weights)
    root = lambda params, r, charge: jnp.sqrt(params["a"]) * jnp.sum(r)
    with pytest.raises(ValueError, match=r"gradient by params\['a'\].*in configuration 0"):
        matched(data, root, init=weights)


def test_padding_that_spoils_no_gradient_passes():
    """A norm of a zero distance between atoms of padding: its NaN is multiplied by nothing."""
    there = np.ones((N, ATOMS), bool)
    there[4:, 1:] = False
    data = potentials.configurations(np.where(there[..., None], R, 0), F, mask=there)

    def chain(k, r, mask):
        length = jnp.linalg.norm(r[1:] - r[:-1], axis=-1)
        return k * jnp.sum(jnp.where(mask[1:], length, 0))

    target = matched(data, chain, init=jnp.float32(1))
    assert np.isfinite(density(target, {"params": jnp.float32(1), "noise": {}}))


class Weights(dict):
    """Weights that can be called, as modules and structs can."""

    def __call__(self, positions):
        return springs(self, positions)


jax.tree_util.register_pytree_with_keys(
    Weights,
    lambda tree: ([(jax.tree_util.DictKey(k), tree[k]) for k in sorted(tree)], tuple(sorted(tree))),
    lambda names, leaves: Weights(zip(names, leaves, strict=True)),
)


def test_weights_that_can_be_called_are_weights():
    """They were called with a key."""
    data = potentials.configurations(R, F)
    target = matched(data, lambda params, r: params(r), init=Weights(PARAMS))
    start = target.initial(jax.random.key(0))["params"]
    assert isinstance(start, Weights)
    np.testing.assert_array_equal(start["k"], PARAMS["k"])
    partial_ = jax.tree_util.Partial(lambda scale, key: {**PARAMS, "b": scale}, jnp.float32(3.0))
    assert matched(data, init=partial_).initial(jax.random.key(0))["params"]["b"] == 3


def test_total_energies_that_rounding_swallows_are_warned_of():
    """A spacing of 0.25 at 4e6; noise of 0.2 for each of three atoms. In double precision none."""
    noise = {"forces": 0.5, "energies": 0.2}
    far = potentials.configurations(R, F, species=SPECIES, energies=U + np.float32(4e6))
    with pytest.warns(stochgrad.PrecisionWarning, match="apart in float32.*of their noise"):
        matched(far, noise=noise)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, float), PARAMS)
        matched(potentials.configurations(
            R.astype(float), F.astype(float), species=SPECIES, energies=U.astype(float) + 4e6
        ), noise=noise, init=wide)  # fmt: skip


# --- libraries of networks ------------------------------------------------------------------------


def assert_forces_match(energy, init):
    """A gradient of the density exists, and the weights come back in their structure."""
    data = potentials.configurations(R, F)
    target = matched(data, energy, init=init, order="reshuffled", batch_size=4, prior="scaled")
    position = target.initial(jax.random.key(0))
    slope = jax.jit(jax.grad(lambda p: target.log_density(p, target.batches.full)))(position)
    assert jax.tree.structure(slope) == jax.tree.structure(position)
    size = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(slope["params"]))
    assert 0 < size < np.inf
    return target


def test_flax_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.tanh(nn.Dense(4)(x)))[0]

    net = Net()
    features = lambda r: potentials.distances(r)
    with jax.numpy_rank_promotion("allow"):
        assert_forces_match(
            lambda params, r: net.apply(params, features(r)),
            lambda key: net.init(key, jnp.zeros(3)),
        )


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    def make(key):
        return nnx.Linear(3, 1, rngs=nnx.Rngs(key))

    structure = nnx.graphdef(make(jax.random.key(0)))

    def energy(params, r):
        return jnp.tanh(nnx.merge(structure, params)(potentials.distances(r)[None]))[0, 0]

    with jax.numpy_rank_promotion("allow"):
        assert_forces_match(energy, lambda key: nnx.state(make(key)))


def test_equinox():
    eqx = pytest.importorskip("equinox")
    make = lambda key: eqx.nn.MLP(3, "scalar", 4, 1, jax.nn.tanh, key=key)
    static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)[1]

    def energy(params, r):
        return eqx.combine(params, static)(potentials.distances(r))

    assert_forces_match(energy, lambda key: eqx.filter(make(key), eqx.is_inexact_array))


# --- posteriors -----------------------------------------------------------------------------------


def basis(positions):
    """Two energies with different forces."""
    return jnp.stack([0.5 * jnp.sum(positions**2), jnp.sum(jnp.sin(positions))])


def linear(theta, positions):
    return theta @ basis(positions)


def design():
    """Forces of each basis function, a column each."""
    r = R.astype(float)
    return np.stack([-r.ravel(), -np.cos(r).ravel()], 1)


@pytest.mark.slow
def test_a_linear_gaussian_posterior():
    """BAOAB leaves the positions of a Gaussian as they are, at any step."""
    sigma, sd = 0.7, 1.5
    x = design()
    covariance = np.linalg.inv(x.T @ x / sigma**2 + np.eye(2) / sd**2)
    mean = covariance @ (x.T @ F.ravel().astype(float)) / sigma**2
    data = potentials.configurations(R, F)
    target = matched(data, linear, init=jnp.zeros(2), noise=sigma, prior=sd)
    mass = np.linalg.inv(covariance)
    kernel = stochgrad.sghmc(target, 0.7, 1.5 * mass, mass=mass, integrator="BAOAB")
    draws = stochgrad.sample(
        jax.random.key(3), kernel, num_samples=4000, num_warmup=50, thin=2, num_chains=8,
        progress=False,
    )  # fmt: skip
    theta = np.asarray(draws.positions["params"], float)
    found, error = mean_and_error(theta)
    assert np.all(np.abs(found - mean) < Z * error)
    products = np.einsum("cdi,cdj->cdij", theta - mean, theta - mean).reshape(8, -1, 4)
    found, error = mean_and_error(products)
    assert np.all(np.abs(found - covariance.ravel()) < Z * error)


@pytest.mark.slow
def test_a_learned_scale_has_the_marginal_of_quadrature():
    """Weights integrated out in closed form, the scale on a grid; a missing Jacobian shows."""
    mean = 2.0
    x, y = design(), F.ravel().astype(float)
    s = np.linspace(-2.5, 0.5, 3001)
    values, vectors = np.linalg.eigh(x.T @ x)
    along = vectors.T @ x.T @ y
    sigma = mean * np.exp(s)
    precision = values / sigma[:, None] ** 2 + 1
    log_p = (
        -y.size * np.log(sigma)
        - 0.5 * (y @ y) / sigma**2
        + 0.5 * (along**2 / sigma[:, None] ** 4 / precision).sum(1)
        - 0.5 * np.log(precision).sum(1)
        - np.exp(s)
        + s
    )
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    assert max(p[0], p[-1]) < 1e-12
    first, second = (p * sigma).sum(), (p * sigma**2).sum()
    without = p * np.exp(-s) / (p * np.exp(-s)).sum()  # without the Jacobian

    data = potentials.configurations(R, F)
    target = matched(data, linear, init=jnp.zeros(2), noise=potentials.learned(mean))
    mass = {"params": np.diag(x.T @ x) / first**2 + 1, "noise": {"forces": 2.0 * y.size}}
    friction = jax.tree.map(lambda m: 1.5 * m, mass)
    kernel = stochgrad.sghmc(target, 0.1, friction, mass=mass, integrator="BAOAB")
    start = {"params": jnp.zeros(2), "noise": {"forces": jnp.float32(np.log(first / mean))}}
    draws = stochgrad.sample(
        jax.random.key(4), kernel, init=start, num_samples=4000, num_warmup=20, thin=10,
        num_chains=8, progress=False,
    )  # fmt: skip
    found = mean * np.exp(np.asarray(draws.positions["noise"]["forces"], float))
    value, error = mean_and_error(np.stack([found, found**2], -1))
    assert np.all(np.abs(value - [first, second]) < Z * error)
    assert np.abs(value[0] - (without * sigma).sum()) > Z * error[0]
