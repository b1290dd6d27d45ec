"""Bad arguments of stochgrad.flower: each is refused in a sentence that names it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from tests.bad_inputs.test_federated import (
    COUNTS,
    FLAGS,
    FUNCTIONS,
    KEYS,
    NUMBERS,
    POSITIONS,
    PROBABILITIES,
    fails,
    refuses,
)
from tests.federated.toys import log_likelihood, log_prior, rows

flower = pytest.importorskip("stochgrad.flower")
from flwr.app import Context, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

AT = jnp.zeros(2)
NAMES = ["north", "south", "west"]


def kernel(gradient):
    return stochgrad.sgld(gradient, 1e-3)


def of_node(context):
    mine = rows()[NAMES.index(context.node_config["name"])]
    return federated.posterior(log_prior, log_likelihood, [mine], batch_size=5)


def app(**changes):
    good = {"posterior": of_node, "kernel": kernel, "init": AT, "secret": b"0123456789abcdef"}
    return flower.client_app(**{**good, **changes})


def grid(**options):
    made = app()
    nodes = {i: (made, {"name": name}) for i, name in enumerate(NAMES)}
    return flower.LoopbackGrid(nodes, **options)


RUN = {
    "kernel": kernel,
    "init": AT,
    "key": jax.random.key(0),
    "clients": NAMES,
    "num_visits": 1,
    "num_chains": 1,
    "local_steps": 2,
    "poll": 0.0,
    "timeout": 0.5,
}


def federate(**changes):
    arguments = {"grid": None, **RUN, **changes}
    over = changes.get("grid") if "grid" in changes else grid()
    del arguments["grid"]
    return flower.federate(over, **arguments)


def cases():
    for value in FUNCTIONS:
        yield "posterior", lambda value=value: app(posterior=value)
        yield "kernel", lambda value=value: app(kernel=value)
        yield "finish", lambda value=value: flower.server_app(value, fails)
        yield "make", lambda value=value: flower.server_app(fails, value)
        yield "fault", lambda value=value: grid(fault=value)
        yield "tap", lambda value=value: grid(tap=value)
    yield "kernel", lambda: app(kernel=stochgrad.core.Kernel)
    for value in POSITIONS[1:]:
        if not callable(value) and not isinstance(value, jax.Array):
            yield "init", lambda value=value: app(init=value)
            yield "init", lambda value=value: federate(init=value)
    yield "init", lambda: federate(init=None)
    yield "init", lambda: federate(init=lambda key: AT)
    for value in ("text", 3, b"short", bytearray(32), bytes, [1] * 32):
        yield "secret", lambda value=value: app(secret=value)
    for value in (3, "all", {}, flower.PrivacyPolicy):
        yield "privacy", lambda value=value: app(privacy=value)
    for value in (None, 3, flower.LoopbackGrid, "grid", {}):
        yield "grid", lambda value=value: federate(grid=value)
    for value in (*FUNCTIONS, fails, lambda g: 3, stochgrad.core.Kernel):
        yield "kernel", lambda value=value: federate(kernel=value)
    for value in KEYS:
        yield "key", lambda value=value: federate(key=value)
    for value in ("north", None, 3, [], ["a", "a"], [1, 2], [""], {"a": 1}, [None], b"ab"):
        yield "clients", lambda value=value: federate(clients=value)
    for name in ("num_visits", "num_chains", "local_steps", "thin"):
        for value in COUNTS:
            yield name, lambda name=name, value=value: federate(**{name: value})
    for value in COUNTS[1:]:
        yield "most_failures", lambda value=value: federate(most_failures=value)
        yield "max_rounds", lambda value=value: federate(max_rounds=value)
    yield "thin", lambda: federate(thin=3, local_steps=4)
    for value in PROBABILITIES:
        yield "probabilities", lambda value=value: federate(probabilities=value)
    for value in ("exact", 3, None, federated.exact):
        yield "surrogate", lambda value=value: federate(surrogate=value)
        yield "curvature", lambda value=value: federate(curvature=value)
    for value in NUMBERS:
        yield "timeout", lambda value=value: federate(timeout=value)
        yield "deadline", lambda value=value: federate(deadline=value)
    for value in NUMBERS[1:]:
        yield "strength", lambda value=value: federate(strength=value)
        yield "poll", lambda value=value: federate(poll=value)
    for value in FLAGS:
        yield "control_variate", lambda value=value: federate(control_variate=value)
        yield "resume", lambda value=value: federate(resume=value)
    yield "checkpoint", lambda: federate(resume=True)
    for value in (3, b"file", "", "no/such/folder/file.npz", "/", ["a"]):
        yield "checkpoint", lambda value=value: federate(checkpoint=value)
    for value in (None, 3, [1, 2], {1: 2}, {1: (1, 2, 3)}, "ab"):
        yield "nodes", lambda value=value: flower.LoopbackGrid(value)
    for value in (-1, 1.5, True, "one", None):
        yield "node", lambda value=value: flower.LoopbackGrid({value: (app(), {"name": "n"})})
        yield "node", lambda value=value: grid().leave(value)
    yield "node", lambda: grid().leave(77)
    for value in (None, 3, ClientApp, fails):
        yield "app", lambda value=value: grid().join(9, value, {"name": "n"})
    for value in (None, 3, "name", {"name": None}, {3: "a"}, {"name": np.ones(2)}):
        yield "config", lambda value=value: grid().join(9, app(), value)
    for value in ("explode", 3, True):
        yield "fault", lambda value=value: federate(grid=grid(fault=lambda message: value))
    yield "messages", lambda: grid().push_messages([3])
    yield "messages", lambda: grid().push_messages(3)
    yield "message_ids", lambda: grid().pull_messages("message-0")
    yield "content", lambda: grid().create_message(3, "train.visit", 1, "")
    yield "dst_node_id", lambda: grid().create_message(RecordDict(), "train.visit", "one", "")
    yield "run", lambda: grid().set_run(3)


def test_bad_arguments_are_refused_by_name():
    wrong, count = [], 0
    for count, (name, call) in enumerate(cases(), 1):
        try:
            refuses(call, name)
        except BaseException as error:
            wrong.append(f"{name}, case {count}: {type(error).__name__}: {str(error)[:300]}")
    assert count > 150
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda context: None, "make"),
        (lambda context: {**RUN, "grid": 3}, "make"),
        (lambda context: {**RUN, "number_of_visits": 3}, "number_of_visits"),
    ],
)
def test_a_server_app_refuses_arguments_that_are_none(make, name):
    served = flower.server_app(fails, make)
    context = Context(1, 1, {}, RecordDict(), {})
    refuses(lambda: served(grid(), context), name)


@pytest.mark.parametrize("content", [b"", b"not an archive", None])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "run.npz"
    if content is None:
        np.savez(path, a=np.ones(3))
    else:
        path.write_bytes(content)
    refuses(lambda: federate(checkpoint=path, resume=True), "checkpoint")
    refuses(lambda: federate(checkpoint=path), "checkpoint")


@pytest.mark.parametrize(
    ("posterior", "reason"),
    [
        (lambda context: 3, "posterior must be"),
        (
            lambda context: stochgrad.posterior(log_prior, log_likelihood, rows()[0], order="full"),
            "is not federated",
        ),
        (
            lambda context: federated.posterior(log_prior, log_likelihood, rows(), batch_size=5),
            "posterior must return one of this client's own data",
        ),
    ],
)
def test_a_client_says_to_its_own_log_what_is_wrong(posterior, reason, caplog):
    """And the server, whose words could hold data, hears of a failure alone."""
    over = flower.LoopbackGrid({1: (app(posterior=posterior), {"name": "north"})})
    with pytest.raises(TimeoutError, match="north"):
        federate(grid=over, clients=["north"], timeout=0.05)
    assert reason in caplog.text
