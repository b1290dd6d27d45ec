"""The surrogates that a server without data chooses are those of a run in process."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from stochgrad.gradients import as_gradient
from tests.federated.test_hierarchies import (
    SIZES,
    START,
    STEP,
    bernoulli,
    exact_sds,
    hospitals,
    log_prior,
    normal,
)

flower = pytest.importorskip("stochgrad.flower")

pytestmark = pytest.mark.filterwarnings("ignore::stochgrad.flower.FederationWarning")

NAMES = [f"hospital {s}" for s in range(len(SIZES))]


def kernel(gradient):
    return stochgrad.sgld(gradient, STEP)


@cache
def clients():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=5)
    return [
        (rng.normal(effect, 1.0, rows).astype(np.float32), np.full(rows, s))
        for s, (rows, effect) in enumerate(zip(SIZES, effects, strict=True))
    ]


@cache
def app(log_likelihood=normal, policy=None):
    def of_node(context):
        mine = clients()[context.node_config["number"]]
        return federated.posterior(log_prior, log_likelihood, [mine], batch_size=10)

    return flower.client_app(of_node, kernel, START, secret=b"", privacy=policy)


def run(of=None, tap=lambda way, message: None, **options):
    made = app() if of is None else of
    nodes = {10 + s: (made, {"name": name, "number": s}) for s, name in enumerate(NAMES)}
    settings = {
        "clients": NAMES,
        "num_visits": 2,
        "num_chains": 2,
        "local_steps": 100,
        "thin": 20,
        "poll": 0.0,
    }
    over = flower.LoopbackGrid(nodes, tap=tap)
    return flower.federate(jax.random.key(0), over, kernel, START, **{**settings, **options})


def in_process(log_likelihood, reference, local_steps):
    """The posterior of all clients, and the surrogates that a run in process would take."""
    from stochgrad.federated._precautions import enforce_stability

    target = federated.visiting(
        federated.posterior(log_prior, log_likelihood, clients(), batch_size=10),
        local_steps=local_steps,
    )
    first = federated.global_first_order(target, reference)
    made = kernel(as_gradient(target))
    return target, *enforce_stability(target, first, "ignore", made, choose=True)


def first_visit(messages):
    return next(m.content for m in messages if m.metadata.message_type == "train.visit")


def read(content, name, like):
    from stochgrad.interop.flower._wire import unpack

    return unpack(content, name, like)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.slow
def test_the_surrogates_and_the_draws_are_those_of_a_run_in_process():
    """A visit made anew in this process, with the surrogates that ``federated.sample`` takes."""
    from stochgrad.interop.flower._steps import visit_program

    sent = []
    draws = run(tap=lambda way, message: sent.append(message), num_chains=1, num_visits=1)
    assert draws.attrs["surrogate"] == "global_quadratic"
    visit = first_visit(sent)
    origin = read(visit, "origin", shapes(START))
    target, surrogates, kind = in_process(normal, origin, 100)
    assert kind == "global_quadratic"
    matrix = federated.Full(jax.ShapeDtypeStruct((6, 6), np.float32))
    total = read(visit, "total", {"precision": matrix, "slope": shapes(START)})
    both = {"precision": surrogates.precision, "slope": surrogates.slope}
    summed = jax.tree.map(lambda x: np.sum(x, axis=0), both)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2), total, summed)

    settings, s = visit["metadata"], int(draws.stats["client"][0, 0])
    share = settings["share"]
    own = federated.posterior(log_prior, normal, [clients()[s]], batch_size=10)
    own = federated.set_share(own, share)
    split = jax.tree.map(lambda x: jnp.stack([x[s], jnp.sum(x, axis=0) - x[s]]), both)
    made = federated.Surrogates(jax.tree.map(jnp.asarray, origin), **split)
    gradient = stochgrad.control_variate(own, made.origin)
    gradient = federated.with_conducive(gradient, made, np.array([share, 1.0]), 1.0)
    go = visit_program(kernel(gradient), own, 100, 20)
    words = read(visit, "key", jax.ShapeDtypeStruct((2,), np.uint32))
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    order = jax.random.fold_in(jax.random.key(settings["seed"], impl="threefry2x32"), 0)
    _, again, _ = go(True, key, order, made.origin, np.array([0], np.uint32))
    sds = exact_sds()
    gap = np.abs(np.asarray(again["own"]) - draws.positions["own"][0]) / sds[:5]
    assert gap.max() < 1e-3


@pytest.mark.slow
def test_the_default_is_the_surrogate_that_it_chose_and_sends_nothing_twice():
    seen = {}

    def counted(**options):
        told = seen.setdefault(options.get("surrogate"), [])
        return run(tap=lambda way, m: told.append((way, m.metadata.message_type)), **options)

    chosen, given = counted(), counted(surrogate="global_quadratic")
    jax.tree.map(np.testing.assert_array_equal, chosen.positions, given.positions)
    expand, prior = ("up", "train.expand"), ("up", "train.prior")
    looks = seen["global_quadratic"].count(expand) - seen[None].count(expand)
    assert looks == 3 * 5  # a given one has Hessians of clients sent at two more points
    assert seen[None].count(prior) == 1
    assert seen[None].count(("up", "train.margin")) == 5
    matrix, position, margins = 4 * 36, 4 * 6, 3 * 8
    search = given.attrs["setup_bytes_up"] - 4 * 5 * (matrix + position)
    assert chosen.attrs["setup_bytes_up"] == search + 5 * (matrix + position + margins) + matrix
    down = chosen.attrs["setup_bytes_down"] - given.attrs["setup_bytes_down"]
    assert down == 5 * (position + matrix + 12 * position) + position - 3 * 5 * position
    short = counted(local_steps=1, thin=1)
    assert short.attrs["surrogate"] == "global_first_order"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::stochgrad.federated.StabilityWarning")
def test_as_much_curvature_is_taken_as_in_process():
    """Of Bernoulli likelihoods, by what clients say of points far away."""
    sent = []
    of = app(bernoulli)
    with pytest.warns(federated.StabilityWarning, match="visits are too long for these surrogates"):
        run(of, lambda way, message: sent.append(message), num_visits=1, num_chains=16)
    found = {}
    for message in sent:
        content = message.content
        if message.metadata.message_type == "train.visit" and "total" in content:
            found[message.metadata.dst_node_id - 10] = content["metadata"]["scale"]
            origin = read(content, "origin", shapes(START))
    target, surrogates, _ = in_process(bernoulli, origin, 100)
    full = federated.global_quadratic(target, origin).precision.matrices
    for s, scale in found.items():
        expected = surrogates.precision.matrices[s, s + 1, s + 1] / full[s, s + 1, s + 1]
        assert scale == pytest.approx(float(expected), rel=1e-4)
    assert min(found.values()) < 1


@pytest.mark.slow
def test_curvature_of_low_rank_beyond_a_hundred_dimensions():
    """121 dimensions: three clients with an effect of forty numbers each, and one in common."""
    rng = np.random.default_rng(1)
    data = [(rng.normal(s, 1.0, (20, 40)).astype(np.float32), np.full(20, s)) for s in range(3)]
    start = {"own": jnp.zeros((3, 40)), "common": jnp.float32(0.0)}
    make = lambda gradient: stochgrad.sgld(gradient, 1e-3)

    def likelihood(p, batch):
        y, s = batch
        return -0.5 * jnp.sum((y - p["own"][s]) ** 2, axis=-1)

    def of_node(context):
        mine = data[context.node_config["number"]]
        return federated.posterior(log_prior, likelihood, [mine], batch_size=20)

    made = flower.client_app(of_node, make, start, secret=b"")
    names = ["a", "b", "c"]
    nodes = {s + 1: (made, {"name": name, "number": s}) for s, name in enumerate(names)}
    draws = flower.federate(
        jax.random.key(0),
        flower.LoopbackGrid(nodes),
        make,
        start,
        clients=names,
        num_visits=40,
        num_chains=8,
        local_steps=100,
        thin=20,
        poll=0.0,
    )
    target = federated.posterior(log_prior, likelihood, data, batch_size=20)
    same = federated.sample(
        jax.random.key(0), target, local_steps=100, step_size=1e-3, init=start, num_samples=2
    )
    assert draws.attrs["surrogate"] == same.attrs["surrogate"] == "low rank 4"
    precision = np.block([[21 * np.eye(120), -np.ones((120, 1))], [-np.ones((1, 120)), 121.0]])
    truth = np.linalg.inv(precision)[0, 0]
    own = draws.positions["own"][:, 20:]
    square = np.mean((own - own.mean(axis=(0, 1))) ** 2, axis=(1, 2, 3)) / truth
    assert abs(np.sqrt(square.mean()) - 1) < 0.1


@pytest.mark.slow
def test_every_sd_of_five_hospitals_is_right_by_default():
    """Visits of 1,000 steps: of first order they would be up to 9.1 times too wide."""
    draws = run(num_visits=200, num_chains=16, local_steps=1000, thin=250)
    x = np.concatenate(
        [draws.positions["own"], np.asarray(draws.positions["common"])[..., None]], axis=2
    )[:, 40:]
    square = np.mean((x - x.mean(axis=(0, 1))) ** 2, axis=1) / exact_sds() ** 2
    assert np.all(np.abs(np.sqrt(square.mean(axis=0)) - 1) < 0.1)


@pytest.mark.slow
def test_a_choice_is_kept_in_the_checkpoint(tmp_path):
    path = tmp_path / "server.npz"
    run(num_visits=1, checkpoint=path)
    seen = []
    tap = lambda way, message: seen.append(message.metadata.message_type)
    draws = run(tap=tap, checkpoint=path, resume=True)
    assert not {"train.prior", "train.margin"} & set(seen)
    whole = run()
    jax.tree.map(np.testing.assert_array_equal, draws.positions, whole.positions)
    for name in ("surrogate", "setup_bytes_up", "setup_bytes_down"):
        assert draws.attrs[name] == whole.attrs[name]
    with pytest.raises(ValueError, match=r"a different run: form was .auto. and is now .full."):
        run(checkpoint=path, resume=True, surrogate="global_quadratic")


@pytest.mark.filterwarnings("ignore::stochgrad.federated.StabilityWarning")
@pytest.mark.parametrize("answers", [1, 2])
def test_a_client_that_declines_gets_first_order_and_the_run_says_so(answers):
    """Of one answer the slope at the reference; of two its curvature too, but no margins."""
    of = app(policy=flower.PrivacyPolicy(most_answers=answers))
    with pytest.warns(flower.FederationWarning, match="was not to be had.*of first order"):
        draws = run(of, max_rounds=0)
    assert draws.attrs["surrogate"] == "global_first_order"
    assert "declines by its privacy policy" in draws.attrs["surrogate_reason"]
    assert any("was not to be had" in note for note in draws.notes)


def test_other_curvature_than_hessians_is_for_surrogates_by_name():
    with pytest.raises(ValueError, match="curvature must be 'hessian' with surrogate='auto'"):
        run(curvature="fisher")


def test_the_hospitals_are_those_of_the_test_in_process():
    for (mine, _), theirs in zip(clients(), SIZES, strict=True):
        assert len(mine) == theirs
    assert hospitals().batches.size == sum(SIZES)
