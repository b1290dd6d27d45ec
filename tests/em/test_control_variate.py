"""The control variate of TRICE: its best coefficient, and what past visits say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from tests.conftest import Z
from tests.em.toys import Toy, every_visit, large, moments, small

THETA = jnp.array([0.4, -0.3], jnp.float32)


def parts(toy, theta):
    """Of each question: p, V, S, and the chance that two right rationales differ."""
    prob = np.exp(np.asarray(toy.log_probs(theta), np.float64))
    slope = np.asarray(jax.jacobian(toy.log_probs)(theta), np.float64)
    posterior, square = toy.posterior(theta), np.sum(slope**2, axis=2)
    mean = np.einsum("qr,qrd->qd", posterior, slope)
    variance = np.sum(posterior * square, axis=1) - np.sum(mean**2, axis=1)
    p = np.sum(prob, axis=1, where=toy.right)
    return p, variance, np.sum(prob * square, axis=1), 1 - np.sum(posterior**2, axis=1)


def by_formula(beta, proposals, p, v, s):
    """Variances of questions: V - 2 beta q V / K + beta^2 S / K, with q = 1 - (1 - p)^K."""
    q = 1 - (1 - p) ** proposals
    return v - 2 * beta * q * v / proposals + beta**2 * s / proposals


class Table(Toy):
    """A parameter for each rationale."""

    def log_probs(self, theta):
        return jax.nn.log_softmax(theta.reshape(self.right.shape))


class Pinned(Toy):
    """A toy whose questions have given chances of a right rationale at theta = 0."""

    def log_probs(self, theta):
        right = self.right
        share = np.where(right, 1 / right.sum(1)[:, None], 1 / (~right).sum(1)[:, None])
        logits = np.log(share * np.where(right, self.p[:, None], 1 - self.p[:, None]))
        logits = jnp.asarray(logits, jnp.float32)
        return jax.nn.log_softmax(logits + jnp.asarray(self.features) @ theta)


def pinned(p, base):
    toy = Pinned(*base)
    toy.p = np.asarray(p)
    return toy, jnp.zeros(base.features.shape[-1])


@pytest.mark.parametrize("proposals", [1, 2, 3])
def test_the_best_coefficient_by_formula(proposals):
    toy = small(1)
    p, v, s, _ = (float(x[0]) for x in parts(toy, THETA))
    best = (1 - (1 - p) ** proposals) * v / s
    found = {}
    for beta in (0.5 * best, best, 1.5 * best, 2 * best):
        _, found[beta] = moments(*every_visit(toy, em.trice(beta), THETA, proposals))
        assert found[beta] == pytest.approx(by_formula(beta, proposals, p, v, s), rel=1e-4)
    assert min(found, key=found.get) == best
    assert found[2 * best] == pytest.approx(v, rel=1e-4)


@pytest.mark.parametrize("proposals", [1, 2])
def test_past_visits_tell_the_best_coefficient(proposals):
    """Exactly where each rationale has a parameter and each wrong one is drawn once."""
    wrong, right = 4000, np.array([0.5, 0.2, 0.1])
    logits = np.log(np.r_[right, np.full(wrong, (1 - right.sum()) / wrong)])
    p, d = right.sum(), 1 - np.sum((right / right.sum()) ** 2)
    chance = np.exp(logits)
    s, v = 1 - np.sum(chance**2), d
    q = 1 - (1 - p) ** proposals
    visits = 1e6
    history = em.History(
        *(jnp.full(1, x, jnp.float32) for x in (visits, visits * q, visits * q * d))
    )
    found = history.coefficient(jnp.full(1, float(proposals)))
    assert float(found[0]) == pytest.approx(q * v / s, rel=1e-3)


def test_of_what_past_visits_count():
    """Of visits that met a right latent, those that moved the chain, and to another latent."""
    toy, theta, visits = small(2), THETA, 400
    target = em.mcmc_em(toy.model(), toy.questions(), batch_size=2, order="full")
    state = target.init(jax.random.key(0), theta)
    assert not np.any(np.asarray(state.memory.history))

    def visit(state, key):
        after = target.next(key, theta, state)[1]
        return after, (state.memory.log_likelihood == 0, after.memory)

    last, (valid, memory) = jax.lax.scan(visit, state, jax.random.split(jax.random.key(1), visits))
    tokens = np.asarray(memory.tokens)[:, :, 0]
    old = np.concatenate([np.zeros((1, 2), int), tokens[:-1]])
    moved, expected = np.asarray(memory.age) == 0, np.zeros((3, 2))
    for t in range(visits):
        flags = np.asarray(valid)[t], moved[t], tokens[t] != old[t]
        expected = 0.95 * expected + np.cumprod(flags, axis=0)
    assert np.array(last.memory.history) == pytest.approx(expected, rel=1e-4)
    assert 0 < expected[2].min() < expected[1].min() < expected[0].min()


HISTORIES = np.array([[19.0, 5.0, 12.0], [11.0, 4.0, 12.0], [5.0, 4.0, 0.0]])


@pytest.mark.parametrize("proposals", [1, 2])
def test_with_any_past_the_mean_is_exact_and_the_variance_that_of_the_coefficients(proposals):
    toy = small(2)
    history = em.History(*jnp.asarray(HISTORIES[:, :2], jnp.float32))
    beta = np.asarray(history.coefficient(jnp.full(2, float(proposals))), np.float64)
    assert beta.min() > 0.1
    mean, variance = moments(*every_visit(toy, em.trice(), THETA, proposals, history=history))
    exact = jax.grad(toy.log_likelihood)(THETA)
    assert mean == pytest.approx(np.asarray(exact), abs=2e-6)
    p, v, s, _ = parts(toy, THETA)
    assert variance == pytest.approx(np.sum(by_formula(beta, proposals, p, v, s)) / 4, rel=1e-4)


def test_without_changes_there_is_no_control_variate():
    """No past, or a past in which one rationale was right time and again: as without."""
    toy = small()
    none = moments(*every_visit(toy, em.trice("none"), THETA))[1]
    for past in ((0.0, 0.0, 0.0), (20.0, 19.0, 0.0)):
        history = em.History(*(jnp.full(3, x) for x in past))
        variance = moments(*every_visit(toy, em.trice(), THETA, history=history))[1]
        assert variance == pytest.approx(none, rel=1e-6)


def settled(p, d, visits, copies, rng):
    """Coefficients of chains at the posterior after some visits."""
    history = np.zeros((3, copies, len(p)))
    for _ in range(visits):
        moved = rng.random((copies, len(p))) < p
        changed = moved & (rng.random((copies, len(p))) < d)
        history = 0.95 * history + np.stack([np.ones_like(moved), moved, changed])
    history = em.History(*jnp.asarray(history, jnp.float32))
    return np.asarray(history.coefficient(jnp.ones((copies, len(p)))), np.float64)


def test_unlike_questions_have_coefficients_of_their_own():
    """The paper's raises the variance at p = 0.01, 0.4, 0.99; their own lower it by a third."""
    toy, theta = pinned([0.01, 0.4, 0.99], large(3, 12, 3))
    p, v, s, d = parts(toy, theta)

    def total(beta):
        return np.sum(by_formula(beta, 1, p, v, s), axis=-1) / 9

    others = (np.sum(p) - p) / 2  # what leave-one-out is on average; its noise comes on top
    own = total(settled(p, d, 100, 4000, np.random.default_rng(0)))
    assert total(np.zeros(3)) == pytest.approx(0.258, abs=1e-3)
    assert total(others) > 0.269
    assert total(p) == pytest.approx(0.171, abs=1e-3)
    assert total(p * v / s) == pytest.approx(0.1706, abs=1e-3)
    error = own.std() / np.sqrt(len(own))
    assert own.mean() + Z * error < 0.18


@pytest.mark.parametrize("rationales", [1, 2, 6], ids=lambda n: f"{n} right")
def test_it_does_not_lose_on_any_question(rationales):
    """Whatever p is: at the start of a chain as later. At a single right rationale it is none."""
    rng = np.random.default_rng(1)
    base = large(7, 12, 40)
    right = np.broadcast_to(np.arange(12) < rationales, (7, 12))
    p = np.array([0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99])
    toy, theta = pinned(p, base._replace(right=right))
    p, v, s, d = parts(toy, theta)
    gain = []
    for visits in (1, 3, 10, 60):
        beta = settled(p, d, visits, 4000, rng)
        gain.append(by_formula(beta, 1, p, v, s).mean(axis=0) / np.where(rationales == 1, 1, v))
    gain = np.array(gain)
    if rationales == 1:
        assert not np.any(gain)
    else:
        assert gain.max() < 1.05
        assert gain[-1].max() < 1.005
        assert gain[-1, -1] < 0.1


@pytest.mark.slow
def test_it_does_not_lose_as_it_runs(key):
    """From empty chains, on a task with one right rationale each and on one with several."""
    for single in (True, False):
        base = large(32, 12, 12, seed=2)
        right = np.arange(12) < (1 if single else 4)
        base = base._replace(right=np.broadcast_to(right, base.right.shape))
        toy, theta = pinned(np.geomspace(0.05, 0.99, 32), base)
        found = {}
        for name in ("none", "auto", "leave_one_out"):
            target = em.mcmc_em(
                toy.model(),
                toy.questions(),
                batch_size=32,
                estimator=em.trice(name),
                order="full",
            )

            @jax.jit
            def run(key, target=target):
                def visit(state, key):
                    score, state = target.next(key, theta, state)
                    return state, score(theta)[1]

                start = target.init(key, theta)
                return jax.lax.scan(visit, start, jax.random.split(key, 100))[1][60:]

            slopes = np.asarray(jax.vmap(run)(jax.random.split(key, 200)), np.float64)
            squares = np.sum((slopes - slopes.mean(axis=0)) ** 2, axis=2).mean(axis=1)
            found[name] = squares.mean(), squares.std() / np.sqrt(len(squares))
        (none, error), (auto, more), (loo, most) = found.values()
        if single:
            assert none == auto < loo
        else:
            assert auto + Z * np.hypot(error, more) < none
            assert auto + Z * np.hypot(more, most) < loo
