"""What a server can rebuild of rows, what a client declines, and what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad import federated
from tests.conftest import Z
from tests.federated.toys import log_likelihood, log_prior, logistic_likelihood, rows
from tests.helpers import mean_and_error

flower = pytest.importorskip("stochgrad.flower")
pytest.importorskip("dp_accounting")
from stochgrad.interop.flower._wire import metadata, unpack  # noqa: E402

H = 1e-3
SECRET = b"sixteen bytes or more"


def kernel(gradient):
    return stochgrad.sgld(gradient, H)


def ten_rows():
    rng = np.random.default_rng(1)
    x = np.c_[rng.normal(size=(10, 4)), np.ones(10)].astype(np.float32)
    return x, (rng.random(10) < 0.5).astype(np.float32)


def owner(data, likelihood, init, *, batch_size=1, make=kernel, **options):
    of_node = lambda context: federated.posterior(
        log_prior, likelihood, [data], batch_size=batch_size
    )
    return flower.client_app(of_node, make, init, **options)


def run(app, init, tap=lambda way, message: None, make=kernel, **options):
    over = flower.LoopbackGrid({1: (app, {"name": "one"})}, tap=tap)
    settings = {
        "clients": ["one"],
        "num_visits": 8,
        "num_chains": 1,
        "local_steps": 10,
        "thin": 1,
        "poll": 0.0,
        "timeout": 5.0,
    }
    options = {**settings, **options}
    return flower.federate(jax.random.key(0), over, make, init, **options)


def rebuilt(secret):
    """How many of ten rows, and labels, a server finds that subtracts the noise of its own keys."""
    x, y = ten_rows()
    seen = []
    keep = lambda way, message: seen.append((way, message))
    app = owner((x, y), logistic_likelihood, jnp.zeros(5), secret=secret)
    options = {"control_variate": False, "strength": 0.0, "num_visits": 6}
    run(app, jnp.zeros(5), keep, **options)
    noise_alone = stochgrad.sgld(
        stochgrad.Gradient(lambda k, p: None, lambda k, p, s: ((lambda p: (0.0, jnp.zeros(5))), s)),
        H,
    )
    shape = jax.ShapeDtypeStruct((5,), np.float32)
    found, last = set(), np.zeros(5, np.float32)
    ours = jax.jit(lambda k, p: noise_alone.step(k, noise_alone.init(p, k))[0].position)
    visits = [(way, m) for way, m in seen if m.metadata.message_type == "train.visit"]
    for (_, request), (_, reply) in zip(visits[::2], visits[1::2], strict=True):
        words = unpack(request.content, "key", jax.ShapeDtypeStruct((2,), np.uint32))
        key = jax.random.wrap_key_data(jnp.asarray(words))
        draws = unpack(reply.content, "draws", jax.ShapeDtypeStruct((10, 5), np.float32))
        if "position" in request.content:
            last = unpack(request.content, "position", shape)
        for number, draw in enumerate(draws):
            step_key = jax.random.split(jax.random.fold_in(key, number), 1)[0]
            gradient = (draw - np.asarray(ours(step_key, last))) / H + last
            last = draw
            row = gradient / gradient[-1]
            near = np.flatnonzero(np.max(np.abs(x - row), axis=1) < 0.02)
            if near.size and (gradient[-1] > 0) == (y[near[0]] == 1):
                found.add(int(near[0]))
    return len(found)


@pytest.mark.slow
def test_a_server_that_knows_the_noise_rebuilds_rows_and_labels_and_with_a_secret_none():
    assert rebuilt(b"") == 10
    assert rebuilt(SECRET) == 0
    assert rebuilt(None) == 0


def test_the_last_gradient_of_a_visit_stays_at_the_client():
    """It has no noise, and no step uses it: it was a minibatch's gradient for the asking."""
    seen = []
    x, y = ten_rows()
    app = owner((x, y), logistic_likelihood, jnp.zeros(5), secret=SECRET)
    run(app, jnp.zeros(5), lambda way, message: seen.append((way, message)), num_visits=2)
    states = [m.content["state"] for way, m in seen if way == "up" and "state" in m.content]
    assert len(states) == 2
    for state in states:
        arrays = [array.numpy() for array in state.values()]
        position, gradient = arrays[:2]
        assert np.any(position != 0)
        assert np.all(gradient == 0)


@pytest.mark.parametrize(
    ("make", "used"),
    [
        (kernel, False),
        (lambda g: stochgrad.sghmc(g, 0.02, 5.0), False),
        (lambda g: stochgrad.sghmc(g, 0.02, 5.0, integrator="BAOAB"), True),
        (lambda g: stochgrad.sghmc(g, 0.02, 5.0, noise_estimate="online"), True),
    ],
)
def test_a_gradient_travels_where_a_step_uses_it_alone(make, used):
    from stochgrad.interop.flower._protocol import kernel_without_data
    from stochgrad.interop.flower._steps import uses_last_gradient

    shape = jax.ShapeDtypeStruct((2,), np.float32)
    assert uses_last_gradient(kernel_without_data(make, shape), shape) is used


@pytest.mark.parametrize(
    ("policy", "asked", "message"),
    [
        ({"least_steps": 20}, {}, r"client 'one' declines .* wants: local_steps >= 20\. Ask"),
        ({"least_thin": 5}, {}, r"wants: thin >= 5\."),
    ],
)
def test_what_a_policy_does_not_allow_is_declined_whatever_the_data(policy, asked, message):
    for data in (rows((10,))[0], 100 * rows((10,))[0]):
        policy_of = flower.PrivacyPolicy(**policy)
        app = owner(data, log_likelihood, jnp.zeros(2), batch_size=5, privacy=policy_of)
        with pytest.raises(ValueError, match=message):
            run(app, jnp.zeros(2), **asked)


@pytest.mark.parametrize("kept", ["in a ledger", "in Flower's state"])
def test_slopes_are_answered_so_often_and_the_same_one_again(kept, tmp_path):
    """A position that was asked for is no news; the eleventh other one is declined."""
    ledger = tmp_path / "one.npz" if kept == "in a ledger" else None
    policy = flower.PrivacyPolicy(most_answers=4, ledger=ledger)
    data = rows((10,))[0]
    app = owner(data, log_likelihood, jnp.zeros(2), batch_size=5, privacy=policy, secret=SECRET)
    options = {"max_rounds": 0, "num_visits": 1}
    for _ in range(3):
        run(app, jnp.zeros(2), **options)
    with pytest.raises(ValueError, match="its answers are used up"):
        run(app, jnp.full(2, 9.0))
    again = owner(data, log_likelihood, jnp.zeros(2), batch_size=5, privacy=policy, secret=SECRET)
    if ledger is not None:
        run(again, jnp.zeros(2), **options)
        with pytest.raises(ValueError, match="its answers are used up"):
            run(again, jnp.full(2, 7.0), **options)


def counted(tmp_path, **changes):
    good = {
        "epsilon": 5.0,
        "delta": 1e-5,
        "norm": 3.0,
        "slope_noise": 50.0,
        "ledger": tmp_path / "one.npz",
    }
    return flower.PrivacyPolicy(**{**good, **changes})


PRIVATE = {"max_rounds": 0, "control_variate": False}
COST = federated.langevin_cost(H, 2.0, 3.0, "replace")


def private_app(tmp_path, data=None, secret=None, **changes):
    data = rows((10,))[0] if data is None else data
    policy = counted(tmp_path, **changes)
    return owner(data, log_likelihood, jnp.zeros(2), batch_size=5, privacy=policy, secret=secret)


def test_a_budget_is_counted_by_minibatch_and_spent_for_good(tmp_path):
    """By the formula to the digit; a new process with the ledger goes on, and then declines."""
    app = private_app(tmp_path)
    run(app, jnp.zeros(2), **PRIVATE, num_visits=3)
    spent = federated.epsilon_of(15 * COST + 2 / 50**2, 1e-5)
    ledger = tmp_path / "one.npz"
    np.testing.assert_allclose(flower.privacy_spent(ledger, 1e-5), spent, rtol=1e-6)
    assert (ledger.stat().st_mode & 0o777) == 0o600
    run(private_app(tmp_path), jnp.zeros(2), **PRIVATE, num_visits=3)
    np.testing.assert_allclose(flower.privacy_spent(ledger, 1e-5), spent, rtol=1e-6)
    fits = int((federated.most_cost(5.0, 1e-5) - 2 / 50**2) / (5 * COST))
    with pytest.raises(RuntimeError, match=r"client 'one' declines .* its budget is spent"):
        run(private_app(tmp_path), jnp.zeros(2), **PRIVATE, num_visits=fits + 1)
    whole = federated.epsilon_of(5 * fits * COST + 2 / 50**2, 1e-5)
    np.testing.assert_allclose(flower.privacy_spent(ledger, 1e-5), whole, rtol=1e-6)
    assert whole <= 5.0
    with pytest.raises(RuntimeError, match="its budget is spent"):
        run(private_app(tmp_path), jnp.ones(2), **PRIVATE, strength=0.0, local_steps=20)


def test_a_budget_that_is_spent_leaves_a_run_to_the_surrogate(tmp_path):
    other = owner(rows((20,), seed=1)[0], log_likelihood, jnp.zeros(2), batch_size=5)
    nodes = {1: (private_app(tmp_path), {"name": "one"}), 2: (other, {"name": "two"})}
    options = {**PRIVATE, "num_visits": 60, "num_chains": 2, "local_steps": 100, "thin": 50}
    options["most_move"] = np.inf  # the reference is not near the mode
    with pytest.warns(flower.FederationWarning, match=r"one was visited no more .*budget is spent"):
        draws = flower.federate(
            jax.random.key(0),
            flower.LoopbackGrid(nodes),
            kernel,
            jnp.zeros(2),
            clients=["one", "two"],
            on_absent="surrogate",
            poll=0.0,
            **options,
        )
    assert draws.attrs["gone"]
    assert flower.privacy_spent(tmp_path / "one.npz", 1e-5) <= 5.0


def test_a_server_that_asks_for_one_minibatch_again_and_again_pays_for_it(tmp_path):
    """The count of minibatches is the server's: chosen so that each step has the same block."""
    requests = []
    app = private_app(tmp_path)

    def tap(way, message):
        if way == "down" and message.metadata.message_type == "train.visit":
            requests.append(message)

    run(app, jnp.zeros(2), tap, **PRIVATE, local_steps=1, num_visits=1)
    over = flower.LoopbackGrid({1: (app, {"name": "one"})})
    context = over._contexts[1]
    before = flower.privacy_spent(tmp_path / "one.npz", 1e-5)
    message = requests[0]
    content = dict(message.content)
    for n in range(4):
        message.content["key"] = type(content["key"])(
            {"0": type(content["key"]["0"])(np.array([n, n], np.uint32))}
        )
        assert metadata(app(message, context).content, status=str)["status"] == "done"
    after = federated.epsilon_of(5 * COST + 2 / 50**2, 1e-5)
    np.testing.assert_allclose(flower.privacy_spent(tmp_path / "one.npz", 1e-5), after, rtol=1e-6)
    assert after > before
    for _ in range(3):
        app(message, context)
    np.testing.assert_allclose(flower.privacy_spent(tmp_path / "one.npz", 1e-5), after, rtol=1e-6)


def test_one_noise_is_never_of_two_laws_or_two_data(tmp_path):
    """The difference of two answers under one noise would be exact."""
    from stochgrad.interop.flower._owner import Owner

    def slope(data, **changes):
        of = federated.posterior(log_prior, log_likelihood, [data], batch_size=5)
        made = Owner(of, kernel, jnp.zeros(2), SECRET, counted(tmp_path, **changes))
        return np.asarray(made.private_answer(SECRET, jnp.zeros(2), "none")["slope"])

    data = rows((10,))[0]
    clipped = np.sum(data * np.minimum(1, 3 / np.linalg.norm(data, axis=1, keepdims=True)), axis=0)
    first = slope(data)
    np.testing.assert_array_equal(first, slope(data))
    unit = (first - clipped) / 50
    for other in (
        (slope(data, slope_noise=25.0) - clipped) / 25,
        (slope(data + 1e-3) - clipped) / 50,
    ):
        assert np.max(np.abs(other - unit)) > 1e-2


def test_a_run_that_counting_clients_would_decline_is_refused_before_it_starts(tmp_path):
    app = private_app(tmp_path)
    with pytest.raises(ValueError, match=r"count privacy.*max_rounds=0, control_variate=False"):
        run(app, jnp.zeros(2))
    with pytest.raises(ValueError, match="must have curvature='fisher'"):
        run(app, jnp.zeros(2), **PRIVATE, surrogate="global_quadratic")
    assert flower.privacy_spent(tmp_path / "one.npz", 1e-5) == 0


@pytest.mark.parametrize("surrogate", ["global_diagonal", "global_quadratic"])
def test_curvature_is_sent_with_noise_and_costs(surrogate, tmp_path):
    app = private_app(tmp_path, secret=SECRET, curvature_noise=20.0)
    options = {**PRIVATE, "surrogate": surrogate, "curvature": "fisher", "num_visits": 1}
    run(app, jnp.zeros(2), **options, most_move=1e6)
    cost = 5 * COST + 2 / 50**2 + 1 / 20**2
    spent = flower.privacy_spent(tmp_path / "one.npz", 1e-5)
    np.testing.assert_allclose(spent, federated.epsilon_of(cost, 1e-5), rtol=1e-6)


def test_a_client_that_counts_answers_no_look_at_its_curvature(tmp_path):
    from stochgrad.interop.flower._network import Network, PolicyError
    from stochgrad.interop.flower._wire import check_reply

    over = flower.LoopbackGrid({1: (private_app(tmp_path), {"name": "one"})})
    network = Network(over, ["one"], 5.0, 0.0)
    network.barrier(starting=True)
    for action in ("train.prior", "train.margin"):
        read = lambda name, reply, action=action: check_reply(reply, action, 0)
        with pytest.raises(PolicyError, match="wants: surrogate='global_first_order'"):
            network.gather(["one"], action, lambda name: ({}, {}), read)


def test_a_run_says_that_rows_are_clipped(tmp_path):
    """All of ten, under noise of a tenth of a row; nothing is said where none is."""
    app = private_app(tmp_path, secret=SECRET, norm=0.01, slope_noise=0.1, epsilon=1e4)
    with pytest.warns(flower.FederationWarning, match=r"clipped at the reference \(10 \+- 0 of 10"):
        draws = run(app, jnp.zeros(2), **PRIVATE, num_visits=2)
    assert any("posterior of clipped rows" in reason for reason in draws.verdict.reasons)
    assert draws.attrs["count_privacy"] == ["one"]
    assert draws.attrs["surrogate"] == "global_first_order"
    assert "['one'] count privacy, and are not asked" in draws.attrs["surrogate_reason"]
    (tmp_path / "one.npz").unlink()
    app = private_app(tmp_path, secret=SECRET, norm=99.0, slope_noise=0.1, epsilon=1e6)
    draws = run(app, jnp.zeros(2), **PRIVATE, num_visits=2)
    assert not any("clipped" in note for note in draws.notes)


@pytest.mark.slow
def test_private_draws_are_of_the_posterior_where_no_row_is_clipped(tmp_path):
    """Short visits: conducive gradients average to zero, and so does the noise of slopes."""
    names, data = ["north", "south"], rows((40, 60), seed=3)

    def of_node(context):
        mine = data[names.index(context.node_config["name"])]
        return federated.posterior(log_prior, log_likelihood, [mine], order="full")

    def policy(context):
        ledger = tmp_path / f"{context.node_config['name']}.npz"
        return counted(tmp_path, ledger=ledger, epsilon=1e6, norm=30.0, slope_noise=0.05)

    app = flower.client_app(of_node, kernel, jnp.zeros(2), privacy=policy)
    draws = flower.federate(
        jax.random.key(0),
        flower.LoopbackGrid({n: (app, {"name": name}) for n, name in enumerate(names)}),
        kernel,
        jnp.zeros(2),
        clients=names,
        num_visits=250,
        num_chains=4,
        local_steps=2,
        thin=2,
        poll=0.0,
        **PRIVATE,
    )
    kept = draws.positions[:, 50:]
    mean, error = mean_and_error(kept)
    truth = np.concatenate(data).sum(axis=0) / 101
    assert np.all(np.abs(mean - truth) < Z * error)
    square, error = mean_and_error(101 * (kept - truth) ** 2)
    wider = 2 * H * 101 * (1 - 0.4) / 0.4  # of two steps a visit, with slopes alone
    assert np.all(square - 1 < wider + Z * error)
    assert np.all(square - 1 > -Z * error)


@pytest.mark.slow
def test_the_best_test_of_a_row_over_the_wire_has_the_power_that_is_counted(tmp_path):
    """By all positions of a visit, and the likelihood ratio, which is known: rows pull evenly."""
    visits, steps, h, norm = 300, 8, 0.01, 4.0
    make = lambda gradient: stochgrad.sgld(gradient, h)
    found, costs = [], []
    for number, first in enumerate((9.0, -9.0)):
        policy = counted(
            tmp_path, norm=norm, epsilon=1e7, slope_noise=1e3, ledger=tmp_path / f"{number}.npz"
        )
        data = np.r_[np.float32(first), np.full(5, 0.1, np.float32)]
        of_node = lambda context, data=data: federated.posterior(
            lambda w: -0.5 * w**2, lambda w, x: w * x, [data], order="full"
        )
        app = flower.client_app(of_node, make, jnp.float32(0), privacy=policy, secret=SECRET)
        options = {**PRIVATE, "strength": 0.0, "most_move": 1e6, "num_chains": visits}
        draws = run(app, jnp.float32(0), make=make, **options, local_steps=steps, num_visits=1)
        x = np.asarray(draws.positions, np.float64)
        before = np.c_[np.zeros(visits), x[:, :-1]]
        found.append((x - (1 - h) * before).sum(axis=1))
        costs.append(steps * federated.langevin_cost(h, 1.0, norm, "replace"))
        spent = federated.epsilon_of(visits * costs[0] + 2 / 1e3**2, 1e-5)
        np.testing.assert_allclose(
            flower.privacy_spent(tmp_path / f"{number}.npz", 1e-5), spent, rtol=1e-6
        )
    a, b = found
    power = (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)
    error = np.sqrt(2 / visits * (1 + costs[0] / 8))
    assert abs(power - np.sqrt(costs[0])) < Z * error
    assert Z * error < np.sqrt(costs[0]) / 2


def test_a_ledger_belongs_to_one_secret_and_outlasts_a_change_of_data(tmp_path):
    from stochgrad.interop.flower._ledger import Item, Ledger, read_ledger

    path = tmp_path / "one.npz"
    first = Ledger(path, 10, 5, None)
    assert first.charge([Item("visit a", np.array([1.0, 2.0]))], 5.0, None) == ""
    assert first.charge([Item("visit b", 4.0)], 5.0, None) == "its budget is spent"
    assert first.charge([Item("visit a", 4.0)], 5.0, None) == ""
    assert Ledger(path, 10, 5, None).secret == first.secret
    with pytest.raises(ValueError, match="another secret"):
        Ledger(path, 10, 5, SECRET)
    Ledger(path, 12, 4, None)
    np.testing.assert_array_equal(read_ledger(path).cost, [2.0, 2.0, 2.0])
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        Ledger(path, 10, 5, None)
    given = Ledger(tmp_path / "two.npz", 10, 5, SECRET)
    assert given.secret == SECRET
    assert read_ledger(tmp_path / "two.npz").secret == ""
    with pytest.raises(ValueError, match="give it again"):
        Ledger(tmp_path / "two.npz", 10, 5, None)


def charge_in_turn(path, process):
    from stochgrad.interop.flower._ledger import Item, Ledger

    ledger = Ledger(path, 10, 5, SECRET)
    for n in range(10):
        assert ledger.charge([Item(f"visit {process} {n}", 1.0)], 1e9, None) == ""


@pytest.mark.slow
def test_nothing_is_lost_where_processes_and_threads_charge_at_once(tmp_path):
    """Flower may answer several messages of a node at once, each in a process of its own."""
    import subprocess
    import sys
    import threading
    from pathlib import Path

    from stochgrad.interop.flower._ledger import read_ledger

    path = tmp_path / "one.npz"
    code = "from tests.interop.test_flower_privacy import charge_in_turn as charge; from pathlib "
    code += f"import Path; import sys; charge(Path({str(path)!r}), sys.argv[1])"
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=root) for n in (0, 1)]
    threads = [threading.Thread(target=charge_in_turn, args=(path, n)) for n in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(120) for process in processes] == [0, 0]
    np.testing.assert_array_equal(read_ledger(path).cost, [50.0, 50.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"least_steps": 0}, "least_steps must be"),
        ({"least_thin": 1.5}, "least_thin must be"),
        ({"least_batch": -1}, "least_batch must be"),
        ({"most_answers": -1}, "most_answers must be"),
        ({"epsilon": 0.0}, "epsilon must be"),
        ({"delta": 2.0}, "delta must be below 1"),
        ({"norm": None}, "norm is needed with epsilon"),
        ({"ledger": None}, "ledger is needed with epsilon"),
        ({"epsilon": None}, "delta is for counted privacy"),
        ({"adjacency": "swap"}, "adjacency must be one of"),
        ({"slope_noise": 0.0}, "slope_noise must be"),
        ({"curvature_noise": "much"}, "curvature_noise must be"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_name(change, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        counted(tmp_path, **change)


def test_minibatches_that_are_too_small_are_refused_at_the_client(tmp_path):
    """The last one of ten rows by four has two."""
    from stochgrad.interop.flower._owner import Owner

    of = federated.posterior(log_prior, log_likelihood, [rows((10,))[0]], batch_size=4)
    with pytest.raises(ValueError, match="a minibatch has 2 rows where least_batch=3"):
        Owner(of, kernel, jnp.zeros(2), SECRET, flower.PrivacyPolicy(least_batch=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: stochgrad.sghmc(g, 0.02, 5.0), "kernel must be stochgrad.sgld"),
        (lambda g: stochgrad.sgld(g, 1e-3, noise="quantized"), "noise must be 'normal'"),
        (lambda g: stochgrad.sgld(g, 1e-3, temperature=0.0), "temperature must be"),
        (lambda g: stochgrad.sgld(g, lambda t: 1e-3), "step_size must be"),
    ],
)
def test_kernels_whose_steps_cannot_be_counted_are_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        flower.client_app(lambda context: None, make, jnp.zeros(2), privacy=counted(tmp_path))
    with pytest.raises(ValueError, match="secret must not be empty"):
        flower.client_app(
            lambda context: None, kernel, jnp.zeros(2), privacy=counted(tmp_path), secret=b""
        )
    with pytest.raises(TypeError, match="privacy must be a PrivacyPolicy"):
        flower.client_app(lambda context: None, kernel, jnp.zeros(2), privacy=3)


def test_secagg_plus_of_flower_passes_our_messages_by():
    """Its mod masks messages of type train alone, with arrays of its older interface."""
    from flwr.app import Context, Message, RecordDict
    from flwr.client.mod import secaggplus_mod

    x, y = ten_rows()
    app = owner((x, y), logistic_likelihood, jnp.zeros(5), secret=SECRET)
    seen = []
    run(app, jnp.zeros(5), lambda way, message: seen.append((way, message)), num_visits=1)
    requests = [m for way, m in seen if way == "down" and "position" in m.content]
    expand = next(m for m in requests if m.metadata.message_type == "train.expand")
    context = Context(1, 1, {"name": "one"}, RecordDict(), {})
    plain = app(expand, context).content["slope"]
    masked = secaggplus_mod(expand, context, app).content["slope"]
    np.testing.assert_array_equal(plain["0"].numpy(), masked["0"].numpy())
    train = Message(expand.content, 1, "train")
    with pytest.raises(KeyError):
        secaggplus_mod(train, context, app)
