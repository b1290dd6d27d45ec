"""What a dishonest client can do over a network: caught and named, or harmless."""

import json
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from tests.federated.toys import log_likelihood, log_prior, rows
from tests.interop.test_flower import INIT, NAMES, SIZES, grid, kernel, run

flower = pytest.importorskip("stochgrad.flower")
from flwr.app import Array, ArrayRecord, ConfigRecord  # noqa: E402

LIAR = 12  # the node of west, whose 20 rows are a fifth of all
LONG = {"num_visits": 30, "num_chains": 8, "local_steps": 100, "thin": 20}


def lying(action, change, node=LIAR):
    """A network in which one node's replies to some messages are changed."""

    def fault(message):
        where = message.metadata
        if where.dst_node_id != node or where.message_type != action:
            return None

        def reply(message):
            change(message.content)
            return message

        return reply

    return grid(fault=fault)


def leaf(content, record, change, number="0"):
    values = change(content[record][number].numpy())
    content[record] = ArrayRecord({**content[record], number: Array(np.asarray(values))})


def everywhere(value):
    """The end of a visit and its draws at one value in all coordinates."""

    def change(content):
        for record in ("state", "draws"):
            leaf(content, record, lambda x: np.full_like(x, value))

    return change


def declared(count):
    def change(content):
        content["metadata"] = ConfigRecord({**content["metadata"], "rows": count})

    return change


@cache
def truth():
    data = np.concatenate(rows(SIZES))
    return data.sum(axis=0) / (1 + len(data)), 1 / np.sqrt(1 + len(data))


def error_in_sds(draws):
    mean, sd = truth()
    return float(np.max(np.abs(np.asarray(draws.positions).mean(axis=(0, 1)) - mean)) / sd)


@pytest.mark.parametrize("value", [5.0, 1e30])
@pytest.mark.parametrize("surrogate", ["global_first_order", "global_quadratic"])
def test_a_client_that_always_answers_one_number_is_quarantined(value, surrogate):
    """It would move the mean by six standard deviations."""
    over = lying("train.visit", everywhere(value))
    with pytest.raises(RuntimeError, match=r"6 replies of client west in a row were refused.*away"):
        run(over, surrogate=surrogate)


@pytest.mark.parametrize(("leaf_number", "reason"), [("1", "momentum"), ("0", "away")])
def test_a_state_that_would_spoil_the_next_visit_is_refused_where_it_comes_from(
    leaf_number, reason
):
    change = lambda content: leaf(content, "state", lambda x: x + 1e4, leaf_number)
    with pytest.raises(RuntimeError, match=rf"client west in a row were refused.*{reason}"):
        run(lying("train.visit", change))


@pytest.mark.slow
def test_a_client_that_is_quarantined_can_be_left_to_its_surrogate():
    """Likelihoods are Gaussian: its surrogate of second order is as good as its data."""
    over = lying("train.visit", everywhere(5.0))
    options = {**LONG, "surrogate": "global_quadratic", "on_absent": "surrogate"}
    with pytest.warns(flower.FederationWarning, match=r"west was visited no more.*second order"):
        draws = run(over, **options)
    assert draws.attrs["gone"][0].startswith("west: 6 replies of client west in a row")
    assert draws.attrs["refusals_of"] == ["west: 6"]
    assert not np.any(draws.stats["client"] == NAMES.index("west"))
    assert error_in_sds(draws) < 0.5
    assert any("west was visited no more" in reason for reason in draws.verdict.reasons)
    json.dumps(draws.attrs)


@pytest.mark.slow
def test_a_lie_within_what_a_visit_reaches_is_found_between_clients():
    """Half a unit, five standard deviations, is less than the diffusion of a visit."""

    def change(content):
        for record in ("state", "draws"):
            leaf(content, record, lambda x: x + np.float32(0.5))

    with pytest.warns(flower.FederationWarning, match=r"off while west is visited") as warned:
        draws = run(lying("train.visit", change), **LONG)
    assert len(warned) == 1
    assert error_in_sds(draws) > 0.5
    assert not draws.verdict.ok


@pytest.mark.parametrize("when", ["always", "at the reference"])
def test_slopes_that_are_not_of_the_log_likelihood_are_refused(when):
    """300 added to its slopes would move the posterior by thirty standard deviations."""
    asked = []

    def change(content):
        asked.append(1)
        if when == "always" or len(asked) == expected:
            leaf(content, "slope", lambda x: x + np.float32(300))

    expected = None
    honest = lying("train.expand", change)
    run(honest, num_visits=1, num_chains=1) if when != "always" else None
    expected, asked = len(asked), []
    with pytest.raises(ValueError, match=r"client 'west' does not send slopes"):
        run(lying("train.expand", change))


def test_rows_beyond_what_is_allowed_are_refused_and_others_that_starve_clients_are_told():
    over = lambda: lying("query.hello", declared(10**9))
    for most in (100, {"west": 20}):
        with pytest.raises(ValueError, match=r"'west' \(1,000,000,000, at most .* most_rows"):
            run(over(), most_rows=most)
    with pytest.warns(flower.FederationWarning, match=r"north, south will hardly be visited"):
        draws = run(over())
    assert any("will hardly be visited" in reason for reason in draws.verdict.reasons)


def test_a_second_node_of_a_name_is_named_at_the_end():
    """44 standard deviations, if its rows were visited in place of the first one's."""
    over = grid()
    other = flower.client_app(
        lambda context: federated.posterior(
            log_prior, log_likelihood, [rows(SIZES)[1] + 10], batch_size=5
        ),
        kernel,
        INIT,
    )
    count = []

    def fault(message):
        count.append(1)
        if message.metadata.message_type == "train.visit" and 21 not in over.get_node_ids():
            over.join(21, other, {"name": "south"})
        return "drop" if len(count) % 7 == 0 else None

    over._fault = fault
    with pytest.warns(flower.FederationWarning, match="Second nodes were not taken in, of south"):
        draws = run(over, num_visits=6)
    assert draws.attrs["second_nodes_of"] == ["south"]
    np.testing.assert_array_equal(draws.positions, run(grid(), num_visits=6).positions)


def test_a_client_that_stays_away_can_be_left_to_its_surrogate(tmp_path):
    over = grid()

    def fault(message):
        leaves = message.metadata.dst_node_id == 11
        return "die" if leaves and message.metadata.message_type == "train.visit" else None

    over._fault = fault
    go = lambda over, **more: run(
        over,
        num_visits=6,
        deadline=0.5,
        checkpoint=tmp_path / "server.npz",
        on_absent="surrogate",
        **more,
    )
    with pytest.warns(flower.FederationWarning, match="a slope without curvature"):
        draws = go(over)
    assert draws.attrs["left_and_waited_for"] == ["south"]
    with pytest.warns(flower.FederationWarning, match="south was visited no more"):
        again = go(over, resume=True)
    np.testing.assert_array_equal(draws.positions, again.positions)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_flaky_client_keeps_its_share(share):
    """Redrawn at any client, its visits fell to nothing, and sds rose from 0.133 to 0.194."""
    random = np.random.default_rng(0)

    def fault(message):
        where = message.metadata
        fails = where.dst_node_id == LIAR and where.message_type == "train.visit"
        return "error" if fails and random.random() < share else None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = run(grid(fault=fault), **LONG, most_failures=200)
    np.testing.assert_array_equal(draws.positions, run(grid(), **LONG).positions)
    visits = draws.stats["client"].size
    assert draws.attrs["realized_shares"] == pytest.approx(
        [0.3, 0.5, 0.2], abs=4 * np.sqrt(0.25 / (visits / 5))
    )


def test_honest_runs_are_not_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for surrogate in ("global_first_order", "global_diagonal", "global_quadratic"):
            draws = run(grid(), surrogate=surrogate)
            assert draws.attrs["refusals_of"] == draws.attrs["gone"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most_refusals": -1}, "most_refusals"),
        ({"most_move": 0.0}, "most_move"),
        ({"most_rows": 0}, "most_rows"),
        ({"most_rows": {"east": 3}}, "most_rows must be of the clients"),
        ({"on_absent": "pray"}, "on_absent must be one of"),
    ],
)
def test_limits_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(grid(), **options)


@pytest.mark.slow
def test_visits_that_run_away_are_warned_of_before_they_do():
    """Bernoulli rows, straight far away, with an effect for each client; not normal ones."""

    def bernoulli(p, batch):
        y, s = batch
        z = p[s]
        return y * z - jnp.logaddexp(jnp.zeros_like(z), z)

    def normal(p, batch):
        y, s = batch
        return -0.5 * (y - p[s]) ** 2

    def go(likelihood):
        def of_node(context):
            s = NAMES.index(context.node_config["name"])
            y = np.arange(SIZES[s]) % 3 == 0
            data = (y.astype(np.float32), np.full(SIZES[s], s))
            return federated.posterior(log_prior, likelihood, [data], batch_size=5)

        start = jnp.zeros(3)
        quick = lambda gradient: stochgrad.sgld(gradient, 0.005)
        made = flower.client_app(of_node, quick, start)
        nodes = {i: (made, {"name": name}) for i, name in enumerate(NAMES)}
        return flower.federate(
            jax.random.key(0),
            flower.LoopbackGrid(nodes),
            quick,
            start,
            clients=NAMES,
            num_visits=2,
            num_chains=3,
            local_steps=50,
            thin=50,
            poll=0.0,
            surrogate="global_quadratic",
        )

    with pytest.warns(federated.StabilityWarning, match="unstable at .* which are north"):
        go(bernoulli)
    with warnings.catch_warnings():
        warnings.simplefilter("error", federated.StabilityWarning)
        go(normal)
