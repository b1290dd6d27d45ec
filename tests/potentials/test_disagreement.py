"""Chains that agree on forces whatever their weights, and configurations that networks dispute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad.diagnostics import rhat
from stochgrad.potentials import configurations, distances, force_rhat, novelty, predict
from tests.conftest import Z

RNG = np.random.default_rng(1)
R = RNG.normal(size=(3, 4, 3)).astype(np.float32)
PROBE = configurations(R, R)


def mlp(params, positions):
    """Of the distances of one configuration's atoms."""
    x = jnp.tanh(distances(positions)[:, None] * params["w"][None] + params["b"][None])
    return jnp.sum(x @ params["out"])


CHAINS, DRAWS, HIDDEN = 4, 200, 6
CENTER = {
    "w": np.linspace(0.3, 2, HIDDEN),
    "b": np.linspace(-2, 1, HIDDEN),
    "out": np.linspace(1, -2, HIDDEN),
}


@pytest.fixture(scope="module")
def independent():
    """Draws of one law in every chain."""
    return {
        name: (x + 0.1 * np.random.default_rng(3).normal(size=(CHAINS, DRAWS, HIDDEN))).astype("f4")
        for name, x in CENTER.items()
    }


def test_chains_of_one_law_agree(independent):
    """R-hat squared less one is about chi-squared: (F_{3,796} - 1)/200, within its 1 - 4e-8."""
    found = force_rhat(mlp, independent, PROBE)
    assert found.shape == (3, 4, 3)
    from scipy.stats import f, norm

    largest = f.isf(norm.sf(Z), CHAINS - 1, CHAINS * (DRAWS - 1))
    assert np.all(found**2 < 1 + (largest - 1) / DRAWS)


def test_it_is_the_rhat_of_the_forces(independent):
    """Draws in their order, chain by chain."""
    flat = jax.tree.map(lambda x: x.reshape(-1, HIDDEN), independent)
    forces = predict(mlp, flat, PROBE).forces.reshape(CHAINS, DRAWS, 3, 4, 3)
    from stochgrad import Draws

    draws = Draws(forces, {}, np.ones((CHAINS, DRAWS), bool), np.full(CHAINS, -1))
    np.testing.assert_array_equal(force_rhat(mlp, independent, PROBE), rhat(draws))


def test_chains_that_are_stuck_disagree(independent):
    apart = dict(independent)
    apart["out"] = apart["out"] + 2 * np.arange(CHAINS, dtype="f4")[:, None, None]
    assert np.all(force_rhat(mlp, apart, PROBE) > 1.1)


def test_permuted_hidden_units_are_the_same_network(independent):
    """Weights say that chains are far apart, forces that they are one."""
    orders = [np.roll(np.arange(HIDDEN), n) for n in range(CHAINS)]
    permuted = {
        name: np.stack([x[chain][:, order] for chain, order in enumerate(orders)])
        for name, x in independent.items()
    }
    np.testing.assert_allclose(
        force_rhat(mlp, permuted, PROBE), force_rhat(mlp, independent, PROBE), atol=1e-3
    )
    from stochgrad import Draws

    weights = Draws(permuted, {}, np.ones((CHAINS, DRAWS), bool), np.full(CHAINS, -1))
    assert min(x.min() for x in rhat(weights).values()) > 2


@pytest.mark.parametrize(("chains", "draws"), [(1, 10), (2, 3)])
def test_too_few_chains_or_draws_are_refused(independent, chains, draws):
    few = jax.tree.map(lambda x: x[:chains, :draws], independent)
    with pytest.raises(ValueError, match="two chains of four draws at least"):
        force_rhat(mlp, few, PROBE)


def test_predictions_do_not_depend_on_the_batch(independent):
    """Energies and forces of every network on every configuration, a last batch in part."""
    some = jax.tree.map(lambda x: x[0, :3], independent)
    whole, parts = predict(mlp, some, PROBE), predict(mlp, some, PROBE, batch_size=2)
    assert whole.energy.shape == (3, 3)
    assert whole.forces.shape == (3, 3, 4, 3)
    assert whole.virial is None
    np.testing.assert_allclose(parts.energy, whole.energy, rtol=1e-5)
    np.testing.assert_allclose(parts.forces, whole.forces, rtol=1e-4, atol=1e-5)
    one = jax.tree.map(lambda x: x[1], some)
    energy, slope = jax.jit(jax.value_and_grad(mlp, 1))(one, jnp.asarray(R[2]))
    np.testing.assert_allclose(whole.energy[1, 2], energy, rtol=1e-5)
    np.testing.assert_allclose(whole.forces[1, 2], -slope, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        predict(mlp, some, PROBE, batch_size=0)


def test_predictions_take_species_boxes_and_graphs_by_name():
    """Rows each their own, in every batch."""

    def energy(k, positions, species, box, charge):
        return charge * jnp.sum(k[species]) + jnp.sum(positions / box[None])

    species = RNG.integers(0, 2, size=(3, 4))
    data = configurations(R, R, species=species, box=np.full(3, 8.0), charge=np.arange(3.0))
    k = RNG.normal(size=(5, 2)).astype("f4")
    found = predict(energy, k, data, batch_size=2)
    expected = np.arange(3.0) * k[:, species].sum(-1) + (R / 8).sum((1, 2))
    np.testing.assert_allclose(found.energy, expected, rtol=1e-4, atol=1e-5)


FORCES = RNG.normal(size=(6, 5, 4, 3)) * np.array([1.0, 0.1, 3.0, 0.5, 10.0])[:, None, None]


def test_novelty_is_the_spread_over_the_noise():
    by_hand = np.sqrt(FORCES.var(0, ddof=1).mean((1, 2)))
    np.testing.assert_allclose(novelty(FORCES), by_hand)
    np.testing.assert_allclose(novelty(FORCES, 2.0), by_hand / 2)
    sigma = np.array([1.0, 2.0, 1.0, 3.0])[:, None]
    each = np.sqrt((FORCES.var(0, ddof=1) / sigma**2).mean((1, 2)))
    np.testing.assert_allclose(novelty(FORCES, sigma), each)


def padded(rng, networks=30, frames=400, big=20):
    """Frames of 5 and of 20 atoms, observations of unit noise, predictions of spread 0.3."""
    size = np.where(np.arange(frames) % 2, 5, big)
    mask = np.arange(big)[None] < size[:, None]
    truth = rng.normal(size=(frames, big, 3))
    observed = np.where(mask[..., None], truth + rng.normal(size=truth.shape), 0)
    noise = 0.3 * rng.normal(size=(networks, frames, big, 3))
    return mask, observed, np.where(mask[..., None], truth + noise, 0)


def test_novelty_counts_atoms_that_exist():
    """Each frame's score is that of its own atoms alone: large molecules are not favored."""
    mask, _, predicted = padded(np.random.default_rng(0))
    found = novelty(predicted, 1.0, mask=mask)
    for n in (0, 1):
        alone = predicted[:, n : n + 1, : mask[n].sum()]
        np.testing.assert_allclose(found[n : n + 1], novelty(alone), rtol=1e-12)
    np.testing.assert_allclose(found[mask.all(1)].mean(), 0.3, rtol=0.01)
    np.testing.assert_allclose(found[~mask.all(1)].mean(), 0.3, rtol=0.02)
    garbage = np.where(mask[..., None], predicted, np.nan)
    np.testing.assert_array_equal(novelty(garbage, 1.0, mask=mask), found)
    ranks = novelty(predicted, known=predicted, mask=mask, known_mask=mask)
    assert abs(ranks[mask.all(1)].mean() - 0.5) < 0.1
    with pytest.raises(ValueError, match=r"atom 5 in configuration 1 .*pass mask=data\.mask"):
        novelty(predicted, 1.0)
    with pytest.raises(ValueError, match=r"known of atom 5 .*pass known_mask"):
        novelty(predicted, mask=mask, known=predicted)


def test_padding_has_no_forces_and_no_rhat(independent):
    """Whatever an energy that knows nothing of the mask makes of it."""
    there = np.ones((3, 4), bool)
    there[1, 2:] = False
    data = configurations(R, R, mask=there)
    blind = lambda params, positions, mask: mlp(params, positions)
    some = jax.tree.map(lambda x: x[0, :2], independent)
    assert np.all(predict(blind, some, data).forces[:, ~there] == 0)
    found = force_rhat(blind, independent, data)
    assert np.isnan(found[~there]).all()
    np.testing.assert_array_equal(found[there], force_rhat(mlp, independent, PROBE)[there])


def test_novelty_ranks_what_networks_dispute():
    assert np.argsort(novelty(FORCES)).tolist() == [1, 3, 0, 2, 4]


def test_novelty_among_known_configurations_is_their_share():
    known = RNG.normal(size=(6, 200, 4, 3))
    found = novelty(FORCES, known=known)
    scores = np.sqrt(known.var(0, ddof=1).mean((1, 2)))
    expected = (scores[None] < novelty(FORCES)[:, None]).mean(1)
    np.testing.assert_allclose(found, expected)
    assert found[1] == 0
    assert found[4] == 1
    # of the known themselves: each rank once
    np.testing.assert_allclose(np.sort(novelty(known, known=known)), np.arange(200) / 200)


def test_a_far_configuration_is_more_novel_than_near_ones(independent):
    """Networks that agree where atoms are near, by a term that grows with the distance."""

    def grows(a, positions):
        return a * jnp.sum(distances(positions) ** 3)

    near = RNG.normal(size=(20, 4, 3)).astype("f4")
    far = 4 * near[:2]
    a = 1 + 0.1 * RNG.normal(size=5).astype("f4")
    of = lambda at: predict(grows, a, configurations(at, at)).forces
    assert novelty(of(far)).min() > novelty(of(near)).max()
    np.testing.assert_array_equal(novelty(of(far), known=of(near)), 1)


def test_bad_input_is_refused_in_words():
    with pytest.raises(ValueError, match="two networks at least"):
        novelty(FORCES[:1])
    with pytest.raises(ValueError, match="two networks at least"):
        novelty(FORCES[0])
    with pytest.raises(ValueError, match="two networks at least"):
        novelty(FORCES, known=FORCES[:1])
    with pytest.raises(ValueError, match="noise must be a positive number"):
        novelty(FORCES, 0.0)
