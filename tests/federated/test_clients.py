"""Who is visited when, and what a step sees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.federated import current_visit
from tests.conftest import Z
from tests.federated.toys import gaussian_mean, rows


def model(x, scale):
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=4):
        row = numpyro.subsample(x, event_dim=1)
        numpyro.sample("x", dist.Normal(theta, scale).to_event(1), obs=row)


def walk(target, position, steps, key=1):
    """Log densities, clients and numbers of visits of successive steps."""

    def step(state, _):
        batch, state = target.batches.next(state)
        visit = current_visit(state)
        return state, (target.log_density(position, batch), visit.client, visit.number)

    start = target.batches.init(jax.random.key(key))
    _, found = jax.jit(lambda state: jax.lax.scan(step, state, None, length=steps))(start)
    return [np.asarray(x) for x in found]


def targets():
    plain, data, _ = gaussian_mean(sizes=(3, 37, 8), batch_size=4)
    # a numpyro model promotes, which these tests forbid
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        made = stochgrad.from_numpyro(model, clients=[(x, 1.0) for x in data])
    constant = -48 * np.log(2 * np.pi) - np.log(2 * np.pi)
    return [(plain, jnp.full(2, 0.3), 0.0), (made, {"theta": jnp.full(2, 0.3)}, constant)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "visits",
    [{}, {"local_steps": [1, 5, 2]}, {"selection": "permuted", "local_steps": [4, 1, 2]}],
)
def test_every_schedule_is_unbiased_over_clients_and_minibatches(which, visits):
    """A wrong share, a padded row that counts, or 1/f on the prior would move the mean."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        target, position, constant = targets()[which]
        whole = target.log_density(position, target.batches.full)
        target = federated.visiting(target, **visits)
        values, _, _ = walk(target, position, 20_000)
    data = np.concatenate(rows((3, 37, 8)))
    expected = -0.09 - 0.5 * np.sum((data - 0.3) ** 2) + constant
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    blocks = values.reshape(100, -1).mean(axis=1)
    error = blocks.std() / 10
    assert abs(values.mean() - expected) < Z * error + 1e-5 * abs(expected)


def test_visits_last_as_long_as_they_should_and_come_as_often():
    target = federated.visiting(
        gaussian_mean()[0], local_steps=[2, 3, 5], probabilities=[0.2, 0.3, 0.5]
    )
    _, clients, numbers = walk(target, jnp.zeros(2), 60_000)
    starts = np.flatnonzero(np.diff(numbers, prepend=0))
    lengths = np.diff(starts)
    assert np.all(lengths == np.array([2, 3, 5])[clients[starts[:-1]]])
    share = np.bincount(clients[starts]) / len(starts)
    assert np.all(np.abs(share - [0.2, 0.3, 0.5]) < Z * np.sqrt(0.25 / len(starts)))
    shares = np.array([0.4, 0.9, 2.5])
    np.testing.assert_allclose(target.batches.owners.shares, shares / shares.sum())


def test_permuted_visits_come_once_a_round():
    target = federated.visiting(gaussian_mean()[0], local_steps=2, selection="permuted")
    _, clients, _ = walk(target, jnp.zeros(2), 600)
    rounds = clients[::2].reshape(-1, 3)
    assert np.all(np.sort(rounds, axis=1) == np.arange(3))
    assert len({tuple(r) for r in rounds}) == 6


def test_a_client_gives_each_of_its_minibatches_once_an_epoch():
    """Across visits too: an order that began anew with every visit would repeat some."""
    target, data, _ = gaussian_mean(sizes=(6, 15, 9), batch_size=2)
    target = federated.visiting(target, local_steps=2)
    seen: dict[int, list] = {0: [], 1: [], 2: []}
    state = target.batches.init(jax.random.key(0))
    step = jax.jit(target.batches.next)
    for _ in range(300):
        batch, state = step(state)
        keep = np.asarray(batch.weight) > 0
        seen[int(current_visit(state).client)].append(np.asarray(batch.data)[keep])
    for s, blocks in ((0, 3), (1, 8), (2, 5)):
        for epoch in range(len(seen[s]) // blocks):
            found = np.concatenate(seen[s][epoch * blocks : (epoch + 1) * blocks])
            np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(data[s], axis=0))


@pytest.mark.slow
def test_a_thousand_clients_are_one_program():
    sizes = np.random.default_rng(0).integers(1, 40, 1000)
    target, _, mean = gaussian_mean(sizes=tuple(sizes), batch_size=4)
    draws = federated.sample(
        jax.random.key(0),
        target,
        local_steps=20,
        step_size=0.1 / sizes.sum(),
        init=jnp.zeros(2),
        num_samples=2000,
        num_warmup=200,
        thin=10,
        num_chains=2,
        progress=False,
    )
    assert draws.timings["compile"] < 60
    assert np.all(np.abs(draws.positions.mean((0, 1)) - mean) < 0.5 / np.sqrt(sizes.sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probabilities": [0.5, 0.2, 0.2]}, "sum to one"),
        ({"probabilities": [0.5, 0.5, 0.0]}, "client 2 has 0"),
        ({"probabilities": [0.5, 0.5]}, "each of the 3 clients"),
        ({"probabilities": [0.2, 0.3, 0.5], "selection": "permuted"}, "selection='random'"),
        ({"selection": "fastest"}, "selection must be one of"),
        ({"local_steps": 0}, "local_steps"),
        ({"local_steps": [1, 2]}, "each of the 3 clients"),
        ({"local_steps": [1, 0, 2]}, "local_steps of client 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        federated.visiting(gaussian_mean()[0], **options)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "at least one client"),
        ([np.zeros((3, 2)), np.zeros((0, 2))], "client 1"),
        ([np.zeros((3, 2)), np.full((1, 2), np.nan)], "client 1.*row 0"),
        ([np.zeros((3, 2)), np.zeros((3, 3))], "one structure"),
        ([np.zeros((3, 2)), np.zeros((3, 2), np.float32)], "one structure"),
        ([np.zeros((3, 2)), (np.zeros((3, 2)),)], "one structure"),
        ([(np.zeros((3, 2)), 1.0), (np.zeros((3, 2)), 2.0)], "same for all clients"),
    ],
)
def test_clients_that_cannot_be_are_refused(clients, message):
    with pytest.raises(ValueError, match=message):
        federated.posterior(lambda p: 0.0, lambda p, x: x[:, 0], clients, batch_size=1)


def test_a_batch_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch_size must be from 1"):
        gaussian_mean(batch_size=61)
    with pytest.raises(ValueError, match="streamed"):
        gaussian_mean(order="streamed")
    with pytest.raises(TypeError, match=r"federated\.posterior"):
        federated.visiting(
            stochgrad.posterior(lambda p: 0.0, lambda p, x: x, jnp.ones(3), order="full")
        )
    with pytest.raises(ValueError, match="either as they are or by clients"):
        stochgrad.from_numpyro(model, jnp.ones((3, 2)), clients=[(jnp.ones((3, 2)), 1.0)])


def test_a_run_in_two_parts_is_a_run_in_one(tmp_path):
    """The place in a visit, and each client's in its epoch, are part of the state."""
    kernel = federated.with_visits(
        stochgrad.sgld(federated.visiting(gaussian_mean(batch_size=4)[0], local_steps=7), 1e-3)
    )
    once = partial(
        stochgrad.sample,
        jax.random.key(0),
        kernel,
        init=jnp.zeros(2),
        num_chains=2,
        thin=3,
        progress=False,
    )
    whole = once(num_samples=30)
    once(num_samples=11, checkpoint=tmp_path)
    again = once(num_samples=30, checkpoint=tmp_path, resume=True)
    np.testing.assert_array_equal(whole.positions[:, 11:], again.positions[:, -19:])
    np.testing.assert_array_equal(whole.stats["client"], again.stats["client"])
