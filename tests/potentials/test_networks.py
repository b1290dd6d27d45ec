"""Chains of networks by every method: what they share, what they must not, and closed forms."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import potentials
from tests.conftest import Z

pytestmark = pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")

RNG = np.random.default_rng(11)
R = RNG.normal(size=(10, 3, 3)).astype(np.float32)
CHAINS, DRAWS = 3, 4


def features(w, positions):
    return jnp.sum(jnp.tanh(positions[:, :2] * w[None]), 0)


def energy(params, positions):
    """Linear in its last layer."""
    return params["last"] @ features(params["body"], positions)


TRUE = {"body": np.float32([[0.5, 1.5]]), "last": np.float32([[3.0, -4.0]])}
F = potentials.predict(energy, TRUE, potentials.configurations(R, R)).forces[0]
F = F + 0.1 * RNG.normal(size=F.shape).astype(np.float32)
DATA = potentials.configurations(R, F)


def once(make):
    """A method that makes one kernel of each posterior, so that it is compiled once."""
    made = {}

    def method(target):
        return made.setdefault(id(target), (target, make(target)))[1]

    return method


def init(key):
    one, other = jax.random.split(key)
    return {"body": jax.random.normal(one, (2,)), "last": jax.random.normal(other, (2,))}


def matched(**options):
    given = {"init": init, "noise": potentials.learned(1.0), "batch_size": 4, **options}
    return potentials.force_matching(energy, DATA, **given)


METHODS = {
    "Deep Ensemble": None,
    "SGLD": once(partial(stochgrad.sgld, step_size=1e-4)),
    "SGHMC": once(partial(stochgrad.sghmc, step_size=1e-2, friction=1.0)),
    "cyclical": lambda target: stochgrad.cyclical(
        stochgrad.sgld, target, 1e-4, steps_per_cycle=4, exploration=0.25
    ),
    "SWAG": potentials.swag(learning_rate=1e-3, num_steps=12, thin=2, rank=3),
    "last-layer Laplace": potentials.last_layer_laplace(lambda name: name == "last"),
}
KERNELS = ("SGLD", "SGHMC", "cyclical")
SAMPLED = tuple(name for name in METHODS if METHODS[name] is not None)


@pytest.fixture(scope="module")
def target():
    return matched()


@pytest.fixture(scope="module")
def trained(target):
    return potentials.networks(
        jax.random.key(0), target, num_chains=CHAINS, train_steps=400, learning_rate=0.02
    )


@pytest.fixture(scope="module")
def alike(trained):
    """All chains at one place."""
    return jax.tree.map(lambda x: jnp.stack([x[0]] * CHAINS), trained.trained)


@pytest.fixture(autouse=True, scope="module")
def _strict_but_for_optax():
    """For fixtures of the module as for tests, so that both have the same programs."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def draw(target, name, start, seed=1, **options):
    return potentials.networks(
        jax.random.key(seed),
        target,
        METHODS[name],
        **{
            "num_chains": CHAINS, "train_steps": 0, "init": start, "num_samples": DRAWS,
            "num_warmup": 1, "share_batches": True, "thin": 2, **options,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(target, alike):
    """One run of each method from one place, all chains on the same minibatches."""
    return {name: draw(target, name, alike) for name in SAMPLED}


def flat(tree):
    """One row of all numbers for each chain."""
    return np.concatenate([np.asarray(x[:]).reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:], y[:]), a, b)


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_have_axes_of_chains_and_draws(found, target, trained, name):
    result = found[name]
    shapes = jax.tree.map(lambda x: x.shape, result.positions)
    assert shapes == {
        "params": {"body": (CHAINS, DRAWS, 2), "last": (CHAINS, DRAWS, 2)},
        "noise": {"forces": (CHAINS, DRAWS)},
    }
    assert np.all(np.isfinite(flat(result.positions)))
    assert result.params is result.positions["params"]
    assert result.posterior is target
    assert (result.run is not None) == (name in KERNELS)
    assert name == result.method or name == "cyclical"


def test_a_deep_ensemble_is_the_trained_networks(trained):
    assert trained.method == "Deep Ensemble"
    assert trained.run is None
    assert_equal(jax.tree.map(lambda x: x[:, 0], trained.positions), trained.trained)
    assert trained.params["last"].shape == (CHAINS, 1, 2)


@pytest.mark.parametrize("name", SAMPLED)
def test_chains_from_one_place_part(found, name):
    """With one key for all, as in a library that maps chains over positions alone, they cannot."""
    free = found[name].params["last"] if "Laplace" in name else None
    rows = flat(found[name].params) if free is None else flat(free)
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert np.all(rows[one] != rows[other])


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_of_a_chain_differ(found, name):
    last = found[name].params["last"]
    assert np.all(last[:, 1:] != last[:, :-1])


@pytest.mark.parametrize("name", ["SGLD", "last-layer Laplace"])
def test_another_key_gives_another_run(found, target, alike, name):
    other = draw(target, name, alike, seed=2)
    assert np.all(np.asarray(other.params["last"]) != found[name].params["last"])


def test_the_same_key_gives_the_same_run(found, target, alike):
    again = draw(target, "SGLD", alike)
    assert_equal(again.positions, found["SGLD"].positions)


def test_chains_start_as_widely_as_their_initialization(target):
    """64 starts have its mean and variance: none is another's copy."""
    start = potentials.networks(jax.random.key(5), target, num_chains=64, train_steps=0)
    rows = flat(start.trained["params"]).astype(float)
    assert len(np.unique(rows[:, 0])) == 64
    assert abs(rows.mean()) < Z / np.sqrt(rows.size)
    assert abs(rows.var() - 1) < Z * np.sqrt(2 / rows.size)


def test_training_climbs_from_each_start_and_chains_stay_apart(target, trained):
    """Every chain ends higher than where any of as many starts."""
    density = jax.jit(jax.vmap(lambda p: target.log_density(p, target.batches.full)))
    start = potentials.networks(jax.random.key(0), target, num_chains=CHAINS, train_steps=0)
    assert np.all(density(trained.trained) > density(start.trained).max())
    rows = flat(trained.trained["params"])
    assert all(np.all(rows[i] != rows[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


def test_training_need_not_be_done_anew(target, trained):
    """The networks that chains start from are those given, each its own."""
    result = draw(target, "SGLD", trained.trained)
    assert_equal(result.trained, trained.trained)
    moved = np.abs(
        flat(jax.tree.map(lambda x: x[:, 0], result.params)) - flat(trained.trained["params"])
    )
    # three steps of sd sqrt(2e-4) and a drift: no chain has come from another's start
    apart = flat(trained.trained["params"])
    assert moved.max() < 0.5 * min(
        np.abs(apart[i] - apart[j]).max() for i, j in [(0, 1), (0, 2), (1, 2)]
    )


def test_a_store_holds_the_same_draws(found, target, alike, tmp_path):
    pytest.importorskip("zarr")
    stored = draw(target, "SGLD", alike, store=tmp_path / "draws.zarr")
    assert (tmp_path / "draws.zarr").exists()
    assert_equal(stored.positions, found["SGLD"].positions)
    assert_equal(stored.members(2), found["SGLD"].members(2))


@pytest.mark.parametrize("name", ["Deep Ensemble", "SWAG", "last-layer Laplace"])
def test_a_store_is_refused_where_nothing_is_sampled(target, alike, tmp_path, name):
    with pytest.raises(ValueError, match="store"):
        draw(target, name, alike, store=tmp_path / "draws.zarr")


def test_a_run_in_two_parts_is_the_run_in_one(target, trained, tmp_path):
    """Training and sampling each go on from their own checkpoint; another key trains others."""

    def run(num_samples, **more):
        given = {"train_steps": 400, "learning_rate": 0.02, **more}
        return draw(target, "SGLD", None, seed=3, num_samples=num_samples, **given)

    first = run(2, checkpoint=tmp_path)
    assert np.all(flat(first.trained["params"]) != flat(trained.trained["params"]))
    again = run(DRAWS, checkpoint=tmp_path, resume=True)
    assert_equal(again.trained, first.trained)
    whole = run(DRAWS, train_steps=0, init=first.trained)
    assert_equal(again.positions, whole.positions)


def test_swag_from_a_checkpoint_is_the_same(found, target, alike, tmp_path):
    for resume in (False, True):
        again = draw(target, "SWAG", alike, checkpoint=tmp_path, resume=resume)
        assert_equal(again.positions, found["SWAG"].positions)


def test_members_are_all_or_the_last_of_each_chain(found):
    result = found["SGLD"]
    every = result.members()
    assert every["params"]["last"].shape == (CHAINS * DRAWS, 2)
    assert every["noise"]["forces"].shape == (CHAINS * DRAWS,)
    np.testing.assert_array_equal(
        every["params"]["last"], np.asarray(result.params["last"]).reshape(-1, 2)
    )
    np.testing.assert_array_equal(result.members(1)["params"]["last"], result.params["last"][:, -1])
    np.testing.assert_array_equal(
        result.members(2)["params"]["last"], result.params["last"][:, [1, 3]].reshape(-1, 2)
    )
    assert_equal(result.members(99), every)
    with pytest.raises(ValueError, match="per_chain must be an integer of at least 1"):
        result.members(0)


@pytest.mark.parametrize("name", ["SGLD", "SWAG", "last-layer Laplace"])
def test_one_chain_has_its_axis_too(target, trained, name):
    """And starts where it is told."""
    start = jax.tree.map(lambda x: x[1:2], trained.trained)
    result = draw(target, name, start, num_chains=1)
    assert result.params["last"].shape == (1, DRAWS, 2)
    assert result.positions["noise"]["forces"].shape == (1, DRAWS)
    assert_equal(result.trained, start)
    assert result.members(1)["params"]["last"].shape == (1, 2)


def test_one_chain_is_trained(target):
    result = potentials.networks(jax.random.key(0), target, num_chains=1, train_steps=5)
    assert result.params["last"].shape == (1, 1, 2)


def test_starts_of_another_number_of_chains_are_refused(target, trained):
    with pytest.raises(ValueError, match="leading axis of the 2 chains"):
        draw(target, "SGLD", trained.trained, num_chains=2)
    one = jax.tree.map(lambda x: x[0], trained.trained)
    with pytest.raises(ValueError, match="leading axis of the 3 chains"):
        draw(target, "SGLD", one)


def test_training_that_leaves_the_finite_numbers_says_of_what(target):
    """Of Adam's learning rate, and not of a step size that nobody gave."""
    with pytest.raises(ValueError, match=r"training of . of 3 chains .*smaller learning_rate"):
        potentials.networks(
            jax.random.key(0), target, num_chains=CHAINS, train_steps=400, learning_rate=1e30
        )


def test_weights_are_not_judged_by_their_coordinates(target, alike, monkeypatch):
    """Warnings of chains that have not mixed are of weights, which says nothing of functions."""
    from stochgrad.potentials import _networks

    whole = _networks.sample

    def sample(*args, **kwargs):
        warnings.warn("not mixed", stochgrad.ConvergenceWarning, stacklevel=2)
        return whole(*args, **kwargs)

    monkeypatch.setattr(_networks, "sample", sample)
    assert draw(target, "SGLD", alike).params["last"].shape == (CHAINS, DRAWS, 2)


@pytest.mark.parametrize("method", ["sgld", 1.0, (stochgrad.sgld,)])
def test_what_is_no_method_is_refused(target, method):
    with pytest.raises(TypeError, match="method must be a function from a posterior to a kernel"):
        potentials.networks(jax.random.key(0), target, method)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_chains": 0}, "num_chains"),
        ({"train_steps": -1}, "train_steps"),
        ({"num_samples": 0}, "num_samples"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_numbers_out_of_range_are_refused(target, options, words):
    with pytest.raises(ValueError, match=words):
        potentials.networks(jax.random.key(0), target, **options)


def test_an_old_key_is_refused(target):
    with pytest.raises(TypeError, match="typed PRNG key"):
        potentials.networks(jax.random.PRNGKey(0), target)


def test_numbers_of_approximations_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rank must be an integer of at least 2"):
        potentials.swag(learning_rate=0.1, num_steps=100, rank=1)
    with pytest.raises(ValueError, match="num_steps"):
        potentials.swag(learning_rate=0.1, num_steps=19, thin=10)
    with pytest.raises(ValueError, match="learning_rate must be a positive number"):
        potentials.swag(learning_rate=-1.0, num_steps=100)
    with pytest.raises(ValueError, match="ridge must be a positive number"):
        potentials.last_layer_laplace(lambda name: True, ridge=0.0)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_last_layer_is_some_of_the_weights(target, trained, all_of_them):
    method = potentials.last_layer_laplace(lambda name: all_of_them)
    with pytest.raises(ValueError, match=r"last must choose some .*\['body', 'last'\]"):
        potentials.networks(
            jax.random.key(0), target, method, num_chains=CHAINS, train_steps=0,
            init=trained.trained,
        )  # fmt: skip


# --- closed forms ---------------------------------------------------------------------------------


def precision_of_last(body, sigma):
    """Of weights of prior N(0, 1), from forces that they are linear in."""
    with jax.enable_x64(True):
        slope = jax.vmap(lambda r: jax.jacobian(features, 1)(jnp.asarray(body, float), r))
        x = -np.moveaxis(np.asarray(slope(jnp.asarray(R, float))), 1, -1).reshape(-1, 2)
    return x.T @ x / sigma**2 + np.eye(2)


@pytest.mark.parametrize("batch_size", [4, 10])
def test_last_layer_laplace_has_its_closed_form(trained, batch_size):
    """Each chain about its own network; the rest as trained. By minibatches and all at once."""
    sigma, draws = 0.5, 4000
    target = matched(noise=sigma, batch_size=batch_size)
    start = {"params": trained.trained["params"], "noise": {}}
    found = potentials.networks(
        jax.random.key(2), target, METHODS["last-layer Laplace"], num_chains=CHAINS,
        train_steps=0, init=start, num_samples=draws,
    )  # fmt: skip
    for chain in range(CHAINS):
        body, last = (np.asarray(start["params"][k][chain]) for k in ("body", "last"))
        np.testing.assert_array_equal(found.params["body"][chain], np.tile(body, (draws, 1)))
        x = np.asarray(found.params["last"][chain], float)
        covariance = np.linalg.inv(precision_of_last(body, sigma))
        sd = np.sqrt(np.diag(covariance))
        assert np.all(np.abs(x.mean(0) - last) < Z * sd / np.sqrt(draws))
        errors = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / draws)
        assert np.all(np.abs(np.cov(x.T) - covariance) < Z * errors)


def test_the_noise_stays_as_trained_under_laplace(found, alike):
    noise = np.asarray(found["last-layer Laplace"].positions["noise"]["forces"])
    np.testing.assert_array_equal(noise, np.tile(alike["noise"]["forces"][:, None], DRAWS))


def test_a_direction_that_nothing_determines_is_bounded_by_the_ridge():
    """A constant added to the energy, under a flat prior: variance 1/(ridge * largest)."""

    def with_constant(params, positions):
        x = features(params["body"], positions)
        return params["last"][:2] @ x + params["last"][2]

    start = {"body": jnp.ones((1, 2)) * jnp.array([[0.4, 1.1]]), "last": jnp.zeros((1, 3))}
    target = potentials.force_matching(
        with_constant, DATA, init=jax.tree.map(lambda x: x[0], start), noise=0.5, prior="flat",
        order="full",
    )  # fmt: skip
    found = potentials.networks(
        jax.random.key(4),
        target,
        potentials.last_layer_laplace(lambda name: name == "last", ridge=1e-4),
        num_chains=1, train_steps=0, init={"params": start, "noise": {}}, num_samples=4000,
    )  # fmt: skip
    largest = np.linalg.eigvalsh(precision_of_last([0.4, 1.1], 0.5) - np.eye(2)).max()
    constant = np.asarray(found.params["last"][0, :, 2], float)
    variance = 1 / (1e-4 * largest)
    assert abs(constant.var() / variance - 1) < Z * np.sqrt(2 / 4000)


def quadratic_target():
    data = potentials.configurations(R, -2.0 * R + F)
    return potentials.force_matching(
        lambda k, r: 0.5 * jnp.sum(k[None] * r**2), data, init=jnp.zeros(3), noise=1.0,
        prior="flat", order="full",
    )  # fmt: skip


def mode():
    r, f = R.astype(float).reshape(-1, 3), (-2.0 * R + F).astype(float).reshape(-1, 3)
    return -(r * f).sum(0) / (r**2).sum(0)


def test_swag_of_a_quadratic_has_its_mode():
    """All data at once, from the mode: ascent stands still, and so does every draw."""
    start = {"params": jnp.asarray(np.tile(mode(), (2, 1)), jnp.float32), "noise": {}}
    swag = potentials.swag(learning_rate=0.01, num_steps=20, thin=2, rank=3)
    found = potentials.networks(
        jax.random.key(0), quadratic_target(), swag, num_chains=2, train_steps=0,
        init=start, num_samples=5,
    )  # fmt: skip
    np.testing.assert_allclose(found.params, np.broadcast_to(mode(), (2, 5, 3)), atol=1e-3)
