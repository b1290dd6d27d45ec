"""Federated sampling by Flower's messages: what arrives, what never leaves, what may go wrong."""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from tests.conftest import Z
from tests.federated.toys import log_likelihood, log_prior, rows
from tests.helpers import mean_and_error

flower = pytest.importorskip("stochgrad.flower")
from flwr.app import Array, ArrayRecord, ConfigRecord  # noqa: E402

SIZES = (30, 50, 20)
NAMES = ["north", "south", "west"]
INIT = jnp.zeros(2)


def kernel(gradient):
    return stochgrad.sghmc(gradient, 0.02, 5.0)


@cache
def app():
    data = rows(SIZES)

    def of_node(context):
        mine = data[NAMES.index(context.node_config["name"])]
        return federated.posterior(log_prior, log_likelihood, [mine], batch_size=5)

    return flower.client_app(of_node, kernel, INIT, secret=b"north, south or west")


def grid(**options):
    nodes = {10 + i: (app(), {"name": name}) for i, name in enumerate(NAMES)}
    return flower.LoopbackGrid(nodes, **options)


def run(over, **options):
    settings = {
        "clients": NAMES,
        "num_visits": 4,
        "num_chains": 3,
        "local_steps": 20,
        "thin": 5,
        "poll": 0.0,
        "timeout": 0.2,
    }
    key = jax.random.key(0)
    return flower.federate(key, over, kernel, INIT, **{**settings, **options})


@pytest.mark.slow
def test_the_posterior_is_that_of_all_data():
    """A prior counted thrice, a wrong share, a surrogate of the wrong client would show."""
    draws = run(
        grid(),
        surrogate="global_quadratic",
        num_visits=60,
        num_chains=8,
        local_steps=200,
        thin=20,
    )
    mean, error = mean_and_error(draws.positions[:, 20:])
    truth = np.concatenate(rows(SIZES)).sum(axis=0) / 101
    assert np.all(np.abs(mean - truth) < Z * error)
    assert np.all(np.abs(draws.positions.var(axis=(0, 1)) * 101 - 1) < 0.15)
    visits = draws.stats["client"][:, ::10]
    share = np.bincount(visits.ravel(), minlength=3) / visits.size
    assert np.all(np.abs(share - [0.3, 0.5, 0.2]) < Z * np.sqrt(0.25 / visits.size))


def records(content):
    for name, record in content.items():
        for key, value in record.items():
            if isinstance(value, Array):
                yield name, key, value.numpy()
            else:
                yield name, key, value


def test_nothing_but_states_surrogates_and_counts_crosses_the_wire():
    """Every number of every message is accounted for; rows of data would be too many, or known."""
    seen = []
    run(grid(tap=lambda way, message: seen.append((way, message))), surrogate="global_diagonal")
    arrays = {
        "down": {"position", "state", "key", "origin", "total"},
        "up": {"slope", "precision", "state", "draws"},
    }
    words = {
        "down": {"form", "curvature", "prior", "chain", "version", "share", "steps", "thin"}
        | {"scale", "centered", "strength", "seed", "kernel", "minibatches"},
        "up": {"status", "name", "rows", "value", "minibatches"},
    }
    values = np.unique(np.concatenate(rows(SIZES)))
    for way, message in seen:
        assert not message.has_error()
        for name, key, value in records(message.content):
            if name == "metadata":
                assert key in words[way]
                assert isinstance(value, int | float | str)
                assert not isinstance(value, str) or len(value) < 20
            else:
                assert name in arrays[way]
                assert value.size <= (8 if name == "draws" else 2)
                assert not np.isin(value, values).any()
    assert {message.metadata.message_type for _, message in seen} == {
        "query.hello",
        "train.expand",
        "train.visit",
    }


def test_an_error_of_a_client_does_not_tell_its_data():
    def failing(context):
        raise ValueError(f"row 3 is {rows(SIZES)[0][3]}")

    seen = []
    bad = flower.client_app(failing, kernel, INIT)
    over = flower.LoopbackGrid(
        {1: (bad, {"name": "north"})}, tap=lambda way, message: seen.append(message)
    )
    with pytest.raises(TimeoutError, match="north"):
        run(over, clients=["north"])
    assert dict(seen[-1].content["metadata"]) == {"status": "failed"}


class Faulty:
    """Something goes wrong with some of the visits, in turn."""

    def __init__(self, *faults):
        self.faults = faults
        self.count = 0

    def __call__(self, message):
        if message.metadata.message_type != "train.visit":
            return None
        self.count += 1
        return self.faults[self.count // 2 % len(self.faults)] if self.count % 2 else None


def spoiled(change):
    def reply(message):
        change(message.content)
        return message

    return reply


def arrays(record, value):
    return lambda content: content.__setitem__(record, ArrayRecord({"0": Array(value)}))


MALFORMED = {
    "a wrong shape": arrays("draws", np.zeros((4, 3), np.float32)),
    "a wrong type": arrays("draws", np.zeros((4, 2), np.float64)),
    "not finite": arrays("draws", np.full((4, 2), np.nan, np.float32)),
    "too large": arrays("draws", np.zeros((10_000, 2), np.float32)),
    "unknown records": arrays("rows", np.zeros((4, 2), np.float32)),
    "no state": lambda content: content.pop("state"),
    "no metadata": lambda content: content.pop("metadata"),
    "a word for a number": lambda content: content.__setitem__(
        "metadata", ConfigRecord({"status": 3})
    ),
    "a lie about its shape": lambda content: content["draws"]["0"].__dict__.update(shape=(9, 9)),
}


def test_whatever_goes_wrong_with_a_visit_the_draws_are_the_same(caplog):
    """Each is tried again at the drawn client, under one key: what failed leaves no trace."""
    faults = Faulty("error", "drop", *map(spoiled, MALFORMED.values()))
    with pytest.warns(flower.FederationWarning, match="left no trace in the draws: .* of south"):
        draws = run(grid(fault=faults), num_visits=8, most_refusals=20)
    assert draws.attrs["lost_visits"] >= len(MALFORMED) + 2
    text = caplog.text
    for reason in ("no reply in time", "error", "float64", "not finite", "most", "unknown records"):
        assert reason in text
    assert "tried again" in text
    undisturbed = run(grid(), num_visits=8)
    np.testing.assert_array_equal(draws.stats["client"], undisturbed.stats["client"])
    np.testing.assert_array_equal(draws.positions, undisturbed.positions)


@pytest.mark.parametrize("returns", [False, True])
def test_a_client_that_dies_is_waited_for(returns, caplog, tmp_path):
    """To visit others in its place would bias the draws."""
    over = grid()

    def fault(message):
        if message.metadata.dst_node_id != 11 or message.metadata.message_type != "train.visit":
            return None
        if returns:
            over.join(21, app(), {"name": "south"})
        return "die"

    over._fault = fault
    path = tmp_path / "server.npz"
    go = lambda over, **more: run(over, num_visits=6, deadline=1.0, checkpoint=path, **more)
    undisturbed = run(grid(), num_visits=6)
    if returns:
        draws = go(over)
    else:
        with pytest.raises(RuntimeError, match=r"client south failed.*The checkpoint has all"):
            go(over)
        assert "client south is gone" in caplog.text
        draws = go(grid(), resume=True)
    np.testing.assert_array_equal(draws.positions, undisturbed.positions)


def test_a_visit_that_fails_again_and_again_ends_the_run_with_a_sentence():
    """At the drawn client each time: the others would have answered."""
    visited = []

    def fault(message):
        if message.metadata.message_type != "train.visit":
            return None
        visited.append(message.metadata.dst_node_id)
        return "error"

    with pytest.raises(
        RuntimeError, match=r"failed 4 times .* would bias the draws.*no checkpoint"
    ):
        run(grid(fault=fault), most_failures=3, num_chains=1)
    assert len(visited) == 4
    assert len(set(visited)) == 1


def test_two_nodes_of_one_name_are_refused():
    nodes = {1: (app(), {"name": "north"}), 2: (app(), {"name": "north"})}
    with pytest.raises(ValueError, match="nodes 1 and 2 both report the client name 'north'"):
        run(flower.LoopbackGrid(nodes), clients=["north"])


def test_a_second_node_that_comes_later_is_left_out_while_the_first_is_there(caplog):
    """Its data would be visited in place of those that the surrogates are of."""
    from stochgrad.interop.flower._network import Network

    over = grid()
    network = Network(over, NAMES, 1.0, 0.0)
    network.barrier(starting=True)
    over.join(5, app(), {"name": "south"})
    for _ in range(2):
        network.refresh_nodes()
    assert network.nodes["south"] == 11
    assert caplog.text.count("both report the client name 'south'") == 1
    over.leave(11)
    network.refresh_nodes()
    assert network.nodes["south"] == 5


def visits_of(over_secret, **changes):
    """The requests of first visits, and a function that has a client answer one."""
    data = rows(SIZES)
    of_node = lambda context: federated.posterior(
        log_prior, log_likelihood, [data[1]], batch_size=5
    )
    made = flower.client_app(of_node, kernel, INIT, secret=over_secret)
    seen = []
    over = flower.LoopbackGrid(
        {1: (made, {"name": "south"})}, tap=lambda way, m: seen.append((way, m))
    )
    settings = {"clients": ["south"], "num_visits": 2, "num_chains": 1, "local_steps": 6, "thin": 1}
    draws = run(over, **{**settings, **changes})
    visits = [m for way, m in seen if way == "down" and m.metadata.message_type == "train.visit"]
    return draws, visits, over


@pytest.mark.slow
def test_the_server_cannot_compute_a_visit_that_a_secret_is_in():
    """With the key it sent it could otherwise, and subtract the noise from what comes back."""
    from stochgrad.interop.flower._owner import Owner
    from stochgrad.interop.flower._wire import unpack

    posterior = federated.posterior(log_prior, log_likelihood, [rows(SIZES)[1]], batch_size=5)
    outcomes = {}
    for secret in (b"", b"sixteen bytes or more", None):
        draws, (visit, _), over = visits_of(secret)
        context = over._contexts[1]
        guess = Owner(posterior, kernel, INIT, b"").visit(visit.content, context)
        like = jax.ShapeDtypeStruct((6, 2), np.float32)
        outcomes[secret] = draws.positions[0]
        same = np.array_equal(unpack(guess, "draws", like), draws.positions[0, :6])
        assert same is (secret == b"")
        assert not any("secret" in m.content for m in (visit,))
    again, _, _ = visits_of(b"sixteen bytes or more")
    np.testing.assert_array_equal(again.positions[0], outcomes[b"sixteen bytes or more"])
    unlike, _, _ = visits_of(None)
    assert not np.array_equal(unlike.positions[0], outcomes[None])


def test_one_key_for_two_states_does_not_give_the_same_noise():
    """A server that sent one key twice could subtract the noise, and would have gradients."""
    from stochgrad.interop.flower._secret import secret_key

    words = np.array([1, 2], np.uint32)
    data = lambda state, *numbers: np.asarray(
        jax.random.key_data(secret_key(b"sixteen bytes or more", "visit", numbers, (words, state)))
    )
    here, there = np.zeros(2, np.float32), np.array([0.0, 1e-7], np.float32)
    np.testing.assert_array_equal(data(here, 1), data(here, 1))
    assert not np.array_equal(data(here, 1), data(there, 1))
    assert not np.array_equal(data(here, 1), data(here, 2))


def test_a_node_keeps_its_secret_and_other_nodes_have_others():
    """In the state that Flower keeps at the node: a new process for each message has it too."""
    from flwr.app import Context, RecordDict

    from stochgrad.interop.flower._secret import secret_of

    one, other = (Context(1, n, {}, RecordDict(), {}) for n in (1, 2))
    assert secret_of(one) == secret_of(one)
    assert secret_of(one) != secret_of(other)
    assert len(secret_of(one)) == 32


def test_a_client_with_another_kernel_is_named():
    other = flower.client_app(
        lambda context: federated.posterior(log_prior, log_likelihood, rows((9,)), batch_size=3),
        lambda gradient: stochgrad.sghmc(gradient, 0.02, 6.0),
        INIT,
    )
    over = flower.LoopbackGrid({1: (other, {"name": "north"})})
    with pytest.raises(ValueError, match="kernel is another one at client 'north'"):
        run(over, clients=["north"])


def test_a_server_that_stops_goes_on_from_its_checkpoint(tmp_path):
    path = tmp_path / "server.npz"
    visits = []

    def tap(way, message):
        visits.append(message.metadata.message_type)
        if visits.count("train.visit") == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(grid(tap=tap), num_visits=6, checkpoint=path)
    draws = run(grid(), num_visits=6, checkpoint=path, resume=True)
    whole = run(grid(), num_visits=6)
    np.testing.assert_array_equal(draws.stats["client"], whole.stats["client"])
    np.testing.assert_array_equal(draws.positions, whole.positions)
    fewer = run(grid(), num_visits=3, checkpoint=path, resume=True)
    np.testing.assert_array_equal(fewer.positions, whole.positions[:, :12])
    with pytest.raises(
        ValueError, match="was written by a different run: steps was 20 and is now 40"
    ):
        run(grid(), checkpoint=path, resume=True, local_steps=40)
    with pytest.raises(ValueError, match="resume=True"):
        run(grid(), checkpoint=path)
    with pytest.raises(ValueError, match="a different run: probabilities was None"):
        run(grid(), checkpoint=path, resume=True, probabilities=[0.2, 0.3, 0.5])
    go = lambda kernel: flower.federate(
        jax.random.key(0),
        grid(),
        kernel,
        INIT,
        clients=NAMES,
        num_visits=6,
        num_chains=3,
        local_steps=20,
        thin=5,
        checkpoint=path,
        resume=True,
    )
    with pytest.raises(ValueError, match=r"kernel's friction was '5\.0'"):
        go(lambda gradient: stochgrad.sghmc(gradient, 0.02, 6.0))

    def flipped(gradient):
        inner = kernel(gradient)
        return inner._replace(step=lambda key, state: inner.step(jax.random.fold_in(key, 1), state))

    with pytest.raises(ValueError, match="a different run: kernel's program"):
        go(flipped)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a row", "a row more"])
def test_a_client_with_other_data_is_named_on_resuming(tmp_path, change):
    data = [x.copy() for x in rows(SIZES)]

    def of_node(context):
        mine = data[NAMES.index(context.node_config["name"])]
        return federated.posterior(log_prior, log_likelihood, [mine], batch_size=5)

    def nodes():
        made = flower.client_app(of_node, kernel, INIT)
        return flower.LoopbackGrid({i: (made, {"name": name}) for i, name in enumerate(NAMES)})

    path = tmp_path / "server.npz"
    run(nodes(), num_visits=1, checkpoint=path)
    run(nodes(), num_visits=2, checkpoint=path, resume=True)
    if change == "a row":
        data[1][7] += 0.5
        message = "was written by a different run: the data of client 'south' are others"
    else:
        data[1] = np.concatenate([data[1], data[1][:1]])
        message = "client 'south' had 50 rows and is now there with 51"
    with pytest.raises(ValueError, match=message):
        run(nodes(), num_visits=2, checkpoint=path, resume=True)


def until_killed(path):
    run(grid(tap=lambda way, message: time.sleep(0.02)), num_visits=1000, checkpoint=path)


@pytest.mark.slow
def test_a_server_killed_goes_on_from_its_checkpoint(tmp_path):
    path = tmp_path / "server.npz"
    code = f"from tests.interop.test_flower import until_killed; until_killed({str(path)!r})"
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, start_new_session=True)
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    from stochgrad.core import load_notes

    done = max(map(len, load_notes(path)["clients"]))
    draws = run(grid(), num_visits=done + 2, checkpoint=path, resume=True)
    assert draws.positions.shape == (3, 4 * (done + 2), 2)
    assert np.isfinite(draws.positions).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thin": 3}, "multiple of thin"),
        ({"surrogate": "best"}, "surrogate must be one of"),
        ({"clients": []}, "different names"),
        ({"clients": ["north", "north"]}, "different names"),
        ({"num_visits": 0}, "num_visits"),
        ({"probabilities": [0.5, 0.5]}, "3 positive numbers"),
    ],
)
def test_a_run_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(grid(), **options)


def test_a_client_that_is_not_there_is_named():
    with pytest.raises(TimeoutError, match="east"):
        run(grid(), clients=[*NAMES, "east"])


def test_a_server_app_hands_its_draws_on():
    from flwr.app import Context, RecordDict

    found = {}
    make = lambda context: {
        "kernel": kernel,
        "init": INIT,
        "key": jax.random.key(0),
        "clients": NAMES,
        "num_visits": int(context.run_config["visits"]),
        "num_chains": 1,
        "local_steps": 10,
        "poll": 0.0,
    }
    served = flower.server_app(lambda draws, context: found.update(draws=draws), make)
    served(grid(), Context(1, 1, {}, RecordDict(), {"visits": 2}))
    assert found["draws"].positions.shape == (1, 20, 2)


@pytest.mark.slow
def test_a_numpyro_model_visits_clients_too():
    """Positions are dicts; the client app knows their shapes from the model."""
    import numpyro
    import numpyro.distributions as dist

    def model(x):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("rows", len(x), subsample_size=5):
            row = numpyro.subsample(x, event_dim=1)
            numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=row)

    data = rows(SIZES)
    of_node = lambda context: stochgrad.from_numpyro(
        model, clients=[(data[NAMES.index(context.node_config["name"])],)]
    )
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        mine = flower.client_app(of_node, kernel)
        nodes = {i: (mine, {"name": name}) for i, name in enumerate(NAMES)}
        draws = flower.federate(
            jax.random.key(0),
            flower.LoopbackGrid(nodes),
            kernel,
            {"mean": INIT},
            clients=NAMES,
            num_visits=4,
            num_chains=2,
            local_steps=400,
            thin=20,
            poll=0.0,
        )
    truth = np.concatenate(data).sum(axis=0) / 101
    assert np.all(np.abs(draws.positions["mean"].mean(axis=(0, 1)) - truth) < 0.1)
