"""Slopes taken anew where chains are, over Flower's messages."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.gradients import minibatch
from tests.conftest import Z
from tests.federated.toys import log_likelihood, log_prior, logistic, logistic_likelihood, rows
from tests.helpers import mean_and_error

flower = pytest.importorskip("stochgrad.flower")
from flwr.app import ConfigRecord  # noqa: E402

from stochgrad.interop.flower._wire import unpack  # noqa: E402

NAMES = ["north", "south", "west"]
INIT = jnp.zeros(3)
STEPS = 6
POSITION = jax.ShapeDtypeStruct((3,), np.float32)
SECRET = b"north, south or west"


def kernel(gradient):
    """The step size is made of an array, which a kernel must not be made of within a trace."""
    return stochgrad.sghmc(gradient, jnp.float32(0.02), 5.0)


@cache
def data():
    return logistic(clients=3, num_rows=60, skew=5.0)


@cache
def app(secret=SECRET, policy=None):
    def of_node(context):
        mine = data()[NAMES.index(context.node_config["name"])]
        return federated.posterior(log_prior, logistic_likelihood, [mine], batch_size=4)

    return flower.client_app(of_node, kernel, INIT, secret=secret, privacy=policy)


def grid(of=None, **options):
    of = app() if of is None else of
    nodes = {10 + i: (of, {"name": name}) for i, name in enumerate(NAMES)}
    return flower.LoopbackGrid(nodes, **options)


def run(over, init=INIT, **options):
    settings = {
        "clients": NAMES,
        "num_visits": 6,
        "num_chains": 2,
        "local_steps": STEPS,
        "surrogate": "global_first_order",
        "surrogate_period": 2,
        "most_move": 1e6,
        "poll": 0.0,
        "timeout": 0.1,
    }
    key = jax.random.key(0)
    return flower.federate(key, over, kernel, init, **{**settings, **options})


def slope(client, w):
    """Of a client's log likelihood, in double precision."""
    x, y = (np.asarray(part, np.float64) for part in data()[client])
    return x.T @ (y - 1 / (1 + np.exp(-x @ np.asarray(w, np.float64))))


class Log:
    """The messages of a run, by their kind."""

    def __init__(self):
        self.all = []

    def __call__(self, way, message):
        self.all.append((way, message.metadata.message_type.split(".")[1], message))

    def of(self, way, kind):
        return [m for w, k, m in self.all if (w, k) == (way, kind)]

    def anchored(self):
        """``(client, chain, renewals before, message)`` of each visit."""
        visits, renewals = [], 0
        for way, kind, message in self.all:
            renewals += way == "down" and kind == "slopes"
            if way == "down" and kind == "visit":
                client = message.metadata.dst_node_id - 10
                chain = message.content["metadata"]["chain"]
                visits.append((client, chain, renewals // 3, message))
        return visits


def read(message, *names):
    return [unpack(message.content, name, POSITION) for name in names]


def test_each_visit_has_the_slopes_at_the_last_anchor_of_its_chain():
    """In closed form; one message a client for all chains; every conducive term sums to zero."""
    log = Log()
    draws = run(grid(tap=log), thin=1)
    assert len(log.of("down", "slopes")) == len(log.of("up", "slopes")) == 2 * 3
    ends = np.stack([draws.positions[:, visit * STEPS - 1] for visit in (2, 4)])
    for client, chain, renewals, message in log.anchored():
        anchor, own, total = read(message, "anchor", "own", "sum")
        if renewals:
            np.testing.assert_array_equal(anchor, ends[renewals - 1, chain])
        else:
            assert np.linalg.norm(sum(slope(s, anchor) for s in range(3)) - anchor) < 0.05
        np.testing.assert_allclose(own, slope(client, anchor), rtol=1e-4, atol=1e-4)
        whole = np.sum([slope(s, anchor) for s in range(3)], axis=0)
        np.testing.assert_allclose(total, whole, rtol=1e-4, atol=1e-4)
    assert draws.attrs["surrogate_period"] == 2
    assert draws.attrs["kept_slopes_of"] == []
    np.testing.assert_array_equal(draws.stats["renewals"][0], np.repeat([0, 0, 1, 1, 2, 2], STEPS))


@pytest.mark.parametrize("surrogate", ["global_first_order", "global_quadratic"])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.slow
def test_a_visit_is_that_of_a_gradient_made_in_this_process(surrogate, centered):
    """With the anchor, the slopes and the curvature at the reference; the last of a run."""
    from stochgrad.interop.flower._protocol import kernel_without_data, state_shapes
    from stochgrad.interop.flower._steps import visit_program

    log = Log()
    options = {"surrogate": surrogate, "control_variate": centered, "num_visits": 3}
    draws = run(grid(app(b""), tap=log), thin=1, num_chains=1, **options)
    client, _, renewals, message = log.anchored()[-1]
    assert renewals == 1
    anchor, own, total = map(jnp.asarray, read(message, "anchor", "own", "sum"))
    first = [m for m in log.of("down", "visit") if "origin" in m.content]
    origin = jnp.asarray(read(first[0], "origin")[0])
    told = {m.metadata.dst_node_id: m.content["metadata"] for m in first}[10 + client]
    target = federated.posterior(log_prior, logistic_likelihood, data(), batch_size=4)
    precision = None
    if surrogate == "global_quadratic":
        matrices = federated.global_quadratic(target, origin).precision.matrices
        precision = federated.Full(
            jnp.stack([matrices[client], jnp.sum(matrices, axis=0) - matrices[client]])
        )
    made = federated.Surrogates(anchor, jnp.stack([own, total - own]), precision)
    mine = federated.posterior(log_prior, logistic_likelihood, [data()[client]], batch_size=4)
    mine = federated.set_share(mine, told["share"])
    gradient = minibatch(mine)
    if centered:
        gradient = stochgrad.control_variate(mine, anchor)
    gradient = federated.with_conducive(gradient, made, np.array([told["share"], 1.0]), 1.0)
    go = visit_program(kernel(gradient), mine, STEPS, 1)
    state = unpack(message.content, "state", state_shapes(kernel_without_data(kernel, INIT), INIT))
    words = unpack(message.content, "key", jax.ShapeDtypeStruct((2,), np.uint32))
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    order = jax.random.fold_in(jax.random.key(told["seed"], impl="threefry2x32"), 0)
    before = np.array([message.content["metadata"]["minibatches"]], np.uint32)
    _, again, _ = go(False, key, order, jax.tree.map(jnp.asarray, state), before)
    np.testing.assert_allclose(again, draws.positions[0, -STEPS:], rtol=1e-4, atol=1e-5)


@cache
def gaussian_app():
    """Unit variance, for which curvature and control variates are exact; no secret."""
    sizes = (30, 50, 20)

    def of_node(context):
        mine = rows(sizes, 3)[NAMES.index(context.node_config["name"])]
        return federated.posterior(log_prior, log_likelihood, [mine], batch_size=5)

    return flower.client_app(of_node, kernel, INIT, secret=b"")


@pytest.mark.slow
def test_for_gaussian_clients_with_their_curvature_renewals_change_nothing():
    options = {"surrogate": "global_quadratic", "surrogate_period": 1}
    renewed = run(grid(gaussian_app()), **options)
    plain = run(grid(gaussian_app()), **{**options, "surrogate_period": None})
    assert "renewals" not in plain.stats
    assert np.ptp(plain.positions) > 0.1
    np.testing.assert_allclose(renewed.positions, plain.positions, atol=2e-4)


@pytest.mark.slow
def test_the_posterior_mean_is_that_of_all_data_with_slopes_renewed():
    draws = run(
        grid(gaussian_app()), surrogate_period=1, num_visits=80, num_chains=8, local_steps=20
    )
    truth = np.concatenate(rows((30, 50, 20), 3)).sum(axis=0) / 101
    mean, error = mean_and_error(draws.positions[:, 400:])
    assert np.all(np.abs(mean - truth) < Z * error)


def away_once(name="south"):
    """A fault: the first time a client is asked for slopes anew, it is away."""
    count = iter(range(100))

    def fault(message):
        mine = message.metadata.dst_node_id == 10 + NAMES.index(name)
        if message.metadata.message_type == "train.slopes" and mine and next(count) < 3:
            return "drop"
        return None

    return fault


def test_a_client_that_is_away_keeps_its_last_slope_and_the_run_says_so():
    """The sum has the very slope that its visits subtract: gradients stay unbiased."""
    log = Log()
    with pytest.warns(flower.FederationWarning, match=r"kept their last: south \(1 times\)"):
        draws = run(grid(tap=log, fault=away_once()), num_chains=3)
    assert draws.attrs["kept_slopes_of"] == ["south: 1"]
    assert any("south (1 times)" in note for note in draws.notes)
    visits = [(c, read(m, "anchor", "own", "sum")) for c, _, _, m in log.anchored()]
    reference = visits[0][1][0]
    kept = 0
    for number, (client, (anchor, own, total)) in enumerate(visits):
        period = number // 6
        at = reference if period == 1 else anchor
        here = {s: slope(s, at if s == 1 else anchor) for s in range(3)}
        kept += period == 1 and client == 1
        np.testing.assert_allclose(own, here[client], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(total, sum(here.values()), rtol=1e-4, atol=1e-4)
    assert kept > 0


@pytest.mark.parametrize("stop", [3, 4, 5])
@pytest.mark.filterwarnings("ignore::stochgrad.flower.FederationWarning")
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(stop, tmp_path):
    """Before, at and after a renewal; the slope that was kept at the first is kept on."""
    path = tmp_path / "server.npz"
    run(grid(fault=away_once()), num_visits=stop, checkpoint=path)
    draws = run(grid(), checkpoint=path, resume=True)
    whole = run(grid(fault=away_once()))
    np.testing.assert_array_equal(draws.positions, whole.positions)
    assert draws.attrs["kept_slopes_of"] == whole.attrs["kept_slopes_of"] == ["south: 1"]
    with pytest.raises(ValueError, match="surrogate_period was 2 and is now None"):
        run(grid(), checkpoint=path, resume=True, surrogate_period=None)


def test_a_server_that_stops_within_a_renewal_goes_on_to_the_bit(tmp_path):
    path = tmp_path / "server.npz"
    asked = []

    def tap(way, message):
        asked.append(message.metadata.message_type)
        if asked.count("train.slopes") == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(grid(tap=tap), checkpoint=path)
    draws = run(grid(), checkpoint=path, resume=True)
    np.testing.assert_array_equal(draws.positions, run(grid()).positions)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["auto", "global_diagonal"])
def test_positions_with_names_are_renewed_too(surrogate):
    """The same draws: a dict's leaves are the array."""

    def of_node(context):
        mine = data()[NAMES.index(context.node_config["name"])]
        return federated.posterior(
            lambda p: log_prior(p["w"]),
            lambda p, batch: logistic_likelihood(p["w"], batch),
            [mine],
            batch_size=4,
        )

    named = flower.client_app(of_node, kernel, {"w": INIT}, secret=SECRET)
    options = {"surrogate": surrogate, "num_visits": 3}
    draws = run(grid(named), init={"w": INIT}, **options)
    plain = run(grid(), **options)
    assert draws.attrs["surrogate"] == plain.attrs["surrogate"]
    np.testing.assert_allclose(draws.positions["w"], plain.positions, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_bytes_are_those_that_crossed_the_wire():
    log = Log()
    draws = run(grid(tap=log))
    plain = run(grid(), surrogate_period=None)

    def size(messages, names):
        records = [m.content[name] for m in messages for name in names if name in m.content]
        return sum(array.numpy().nbytes for record in records for array in record.values())

    up = size(log.of("up", "visit"), ["state", "draws"]) + size(log.of("up", "slopes"), ["slopes"])
    assert draws.stats["bytes_up"][:, -1].sum() == up
    more = size(log.of("down", "visit"), ["anchor", "own", "sum"])
    more += size(log.of("down", "slopes"), ["positions"])
    gap = draws.stats["bytes_down"] - plain.stats["bytes_down"]
    assert gap[:, -1].sum() == more
    for name in ("setup_bytes_up", "setup_bytes_down"):
        assert draws.attrs[name] == plain.attrs[name]


def test_a_client_that_does_not_know_of_anchors_is_refused():
    """It would take the slopes at the reference, and bias the draws."""
    count = iter(range(100))

    def forget(reply):
        told = dict(reply.content["metadata"])
        told.pop("anchored")
        reply.content["metadata"] = ConfigRecord(told)
        return reply

    def fault(message):
        visit = message.metadata.message_type == "train.visit"
        return forget if visit and next(count) == 3 else None

    with pytest.warns(flower.FederationWarning, match="Replies were refused"):
        draws = run(grid(fault=fault))
    np.testing.assert_array_equal(draws.positions, run(grid()).positions)


def test_a_client_whose_answers_are_used_up_declines():
    """Each anchor is an answer: two chains and the reference fit, two more do not."""
    of = app(policy=flower.PrivacyPolicy(most_answers=3))
    options = {"max_rounds": 0, "num_visits": 4}
    assert run(grid(of), **options).attrs["surrogate_period"] == 2
    with pytest.raises(ValueError, match="declines by its privacy policy: its answers are used up"):
        run(grid(of), **{**options, "num_visits": 5})


def test_clients_that_count_privacy_are_not_asked_for_slopes_anew(tmp_path):
    from stochgrad.interop.flower._network import Network, PolicyError
    from stochgrad.interop.flower._wire import check_reply

    policy = flower.PrivacyPolicy(
        epsilon=5.0, delta=1e-5, norm=3.0, slope_noise=50.0, ledger=tmp_path / "one.npz"
    )
    make = lambda gradient: stochgrad.sgld(gradient, 1e-3)
    of_node = lambda context: federated.posterior(
        log_prior, logistic_likelihood, [data()[0]], batch_size=4
    )
    of = flower.client_app(of_node, make, INIT, secret=SECRET, privacy=policy)
    over = flower.LoopbackGrid({1: (of, {"name": "one"})})
    options = {"num_visits": 2, "num_chains": 1, "local_steps": 2, "max_rounds": 0, "poll": 0.0}
    options |= {"control_variate": False, "timeout": 1.0}
    with pytest.raises(ValueError, match=r"count privacy, .* must have surrogate_period=None"):
        flower.federate(
            jax.random.key(0), over, make, INIT, clients=["one"], surrogate_period=1, **options
        )
    network = Network(over, ["one"], 1.0, 0.0)
    network.barrier(starting=True)
    ask = lambda name: ({}, {"count": 1})
    with pytest.raises(PolicyError, match="wants: surrogate_period=None"):
        network.gather(["one"], "train.slopes", ask, lambda n, r: check_reply(r, "train.slopes", 9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"surrogate_period": 0}, ValueError, "surrogate_period must be"),
        ({"surrogate_period": 1.5}, (TypeError, ValueError), "surrogate_period must be"),
        ({"surrogate_period": "two"}, (TypeError, ValueError), "surrogate_period must be"),
        ({"on_absent": "surrogate"}, ValueError, "on_absent must be 'stop' with surrogate_period"),
    ],
)
def test_a_renewal_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(grid(), **options)
