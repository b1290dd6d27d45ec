"""Estimators of the M-step against full enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from tests.conftest import Z
from tests.em.toys import Toy, every_visit, large, moments, small

THETA = jnp.array([0.4, -0.3], jnp.float32)
PER_QUESTION = 2


def gradient_of(function):
    return np.asarray(jax.grad(function)(THETA))


@pytest.mark.parametrize(
    "estimator",
    [
        em.trice(),
        em.trice("leave_one_out"),
        em.trice("none"),
        em.trice(0.3),
        em.trice("optimal", directions=None),
    ],
    ids=["auto", "leave one out", "none", "number", "optimal"],
)
def test_trice_is_the_gradient_of_the_marginal_likelihood(estimator):
    toy = small()
    mean, _ = moments(*every_visit(toy, estimator, THETA))
    assert mean == pytest.approx(gradient_of(toy.log_likelihood), abs=2e-6)


@pytest.mark.parametrize("solved", [(0, 0, 0), (1, 0, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize(
    "estimator",
    [
        em.trice(),
        em.trice("leave_one_out"),
        em.trice(0.3),
        em.trice("optimal", directions=None),
        em.trice("none"),
    ],
    ids=["auto", "leave one out", "number", "optimal", "none"],
)
def test_first_right_proposals_count_in_full(estimator, solved):
    """A control variate where a chain was never right would scale down what it learns, to zero.

    Questions whose chain was right before have weight 1 / n, the others do if solved by now: the
    mean over all sets of newly solved questions is that of the exact gradients.
    """
    toy, solved = small(), np.array(solved, bool)
    mean, _ = moments(*every_visit(toy, estimator, THETA, solved=solved))
    p = np.asarray(toy.solved(THETA), np.float64)
    slopes = np.asarray(jax.jacobian(lambda t: jnp.log(toy.solved(t)))(THETA), np.float64)
    expected = np.zeros(2)
    for now in np.ndindex(2, 2, 2):
        now = np.array(now, bool)
        if np.any(solved & ~now):
            continue
        chance = np.prod(np.where(solved, 1.0, np.where(now, p, 1 - p)))
        expected += chance * slopes[now].sum(axis=0) / max(now.sum(), 1)
    assert np.abs(expected).max() > 0.1
    assert mean == pytest.approx(expected, abs=2e-6)


def test_learning_starts_with_the_first_right_proposal():
    """From empty chains, the first visit already has a gradient: every default setting."""
    toy = small()
    gradient = em.mcmc_em(toy.model(), toy.questions(), batch_size=3)

    @jax.jit
    def first(key):
        score, state = gradient.next(key, THETA, gradient.init(key, THETA))
        return state.stats.right, score(THETA)[1]

    right, slope = first(jax.random.key(0))
    assert 0 < float(right) < 1
    assert float(jnp.abs(slope).max()) > 0.01


@pytest.mark.parametrize(
    "estimator",
    [
        em.reinforce(),
        em.reinforce("none"),
        em.reinforce("optimal", directions=None),
        em.maxk(1),
    ],
    ids=["leave one out", "none", "optimal", "maxk"],
)
def test_reinforce_is_the_gradient_of_the_accuracy(estimator):
    toy = small()
    mean, _ = moments(*every_visit(toy, estimator, THETA, PER_QUESTION))
    assert mean == pytest.approx(gradient_of(toy.accuracy), abs=2e-6)


def test_maxk_is_the_gradient_of_the_best_of_k():
    toy = small(2)
    mean, _ = moments(*every_visit(toy, em.maxk(2), THETA, 3))
    best = gradient_of(lambda theta: jnp.mean(1.0 - (1.0 - toy.solved(theta)) ** 2))
    assert mean == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize(
    "estimator", [em.star(), em.raft(), em.raft("all"), em.rest_em()], ids=lambda e: e.name
)
def test_one_questions_accepted_proposals_count_as_often_as_it_is_solved(estimator):
    toy = small(1)
    mean, _ = moments(*every_visit(toy, estimator, THETA, 3))
    solved = 1.0 - (1.0 - float(toy.accuracy(THETA))) ** 3
    assert mean == pytest.approx(solved * gradient_of(toy.log_likelihood), abs=2e-6)


def test_star_and_raft_lean_to_what_is_solved_already():
    """Where questions differ in difficulty, their direction is off; TRICE's is not."""
    toy, theta = small(), jnp.array([2.0, -2.0], jnp.float32)
    exact = np.asarray(jax.grad(toy.log_likelihood)(theta))
    cosines = []
    for estimator, number in ((em.star(), 1), (em.raft(), 2), (em.trice(), 1)):
        mean, _ = moments(*every_visit(toy, estimator, theta, number))
        cosines.append(mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact))
    assert max(cosines[:2]) < 0.999
    assert cosines[2] == pytest.approx(1.0, abs=1e-6)


def test_grpo_and_bnpo_against_their_formulas():
    toy = small(2)
    log_probs = jax.jacobian(toy.log_probs)(THETA)
    p = np.exp(np.asarray(toy.log_probs(THETA), np.float64))
    expected = {"grpo": np.zeros(2), "bnpo": np.zeros(2)}
    for z in np.ndindex(4, 4, 4, 4):
        pairs = np.array(z).reshape(2, 2)
        chance = np.prod(p[[0, 0, 1, 1], z])
        r = np.stack([toy.right[m, pairs[m]] for m in range(2)]).astype(float)
        means = r.mean(axis=1)
        m, v = means.mean(), means.var(ddof=1)
        odds = max(m * (1 - m) / v - 1, 0) if v > 0 else 0.0
        a, b = max(1, 1 + odds * m / 3), max(1, 1 + odds * (1 - m) / 3)
        inside = np.clip(means, 1e-6, 1 - 1e-6)
        beta = inside ** (a - 1) * (1 - inside) ** (b - 1)
        if a != 1 or b != 1:
            from scipy.special import beta as normalizer

            beta = beta / normalizer(a, b)
        weights = {
            "grpo": (r - means[:, None]) / (r.std(axis=1, keepdims=True) + 1e-4),
            "bnpo": (r - means[:, None]) / beta[:, None],
        }
        for name, advantage in weights.items():
            for q in range(2):
                for k in range(2):
                    score = np.asarray(log_probs[q, pairs[q, k]])
                    expected[name] += chance * advantage[q, k] * score / 4
    for estimator in (em.grpo(), em.bnpo()):
        mean, _ = moments(*every_visit(toy, estimator, THETA, PER_QUESTION))
        assert mean == pytest.approx(expected[estimator.name], abs=1e-5)


REWARDS = np.array([[-2.0, 0.5, 3.0, 3.0], [-1.0, -4.0, -1.0, -0.2]], np.float32)


class Rewarded(Toy):
    """Rationales with rewards of any size and sign."""

    table = REWARDS

    def verify(self, tokens, mask, answers):
        return jnp.asarray(self.table)[answers, tokens[:, 0]]

    def model(self):
        return em.verified(self.policy(), self.verify)


def test_rewards_of_any_size_and_sign():
    """Not through a logarithm, where all but the positive ones would be NaN or nothing."""
    toy, theta = Rewarded(*small(2)), jnp.array([0.8, -0.3])
    slopes = np.asarray(jax.jacobian(toy.log_probs)(theta), np.float64)
    p = np.exp(np.asarray(toy.log_probs(theta), np.float64))
    mean, best, standard = np.zeros(2), np.zeros(2), np.zeros(2)
    for q in range(2):
        for pair in np.ndindex(4, 4):
            chance = p[q, pair[0]] * p[q, pair[1]]
            r = REWARDS[q, list(pair)].astype(np.float64)
            scores = slopes[q, list(pair)]
            mean += chance * r @ scores / 4
            best += chance * r.max() * scores.sum(axis=0) / 2
            standard += chance * (r - r.mean()) / (r.std() + 1e-4) @ scores / 4
    for estimator, expected in (
        (em.reinforce(), mean),
        (em.maxk(2), best),
        (em.grpo(), standard),
    ):
        found, _ = moments(*every_visit(toy, estimator, theta, PER_QUESTION))
        assert found == pytest.approx(expected, abs=1e-5), estimator.name


def weights_of(estimator, rewards):
    """Weights of the proposals of one question."""
    count = len(rewards)
    ones, one = jnp.ones(count), jnp.ones(1)
    owner = jnp.zeros(count, jnp.int32)
    rewards = jnp.asarray(rewards, jnp.float32)
    minibatch = em.Minibatch(owner, rewards, rewards, ones, one, one, one, owner[:1], lambda: None)
    return np.asarray(estimator.weights(minibatch)[1])


def test_equal_rewards_standardized_are_zero_and_large_ones_do_not_overflow():
    """Rounding of their mean, over the rounding of their deviation, would be a weight of one."""
    for reward in (0.1, 1.0, 1234.567, -3e20):
        assert not np.any(weights_of(em.grpo(), [reward] * 3))
    large = weights_of(em.grpo(1e-6), [-1e30, 0.0, 1e30])
    assert large == pytest.approx(np.array([-1, 0, 1]) * np.sqrt(1.5) / 3, rel=1e-5)


@pytest.mark.parametrize(
    "estimator", [em.trice(), em.star(), em.raft(), em.rest_em(), em.bnpo()], ids=lambda e: e.name
)
def test_what_is_no_likelihood_counts_as_wrong_and_says_so(estimator):
    toy, bounded = Rewarded(*small(2)), Rewarded(*small(2))
    bounded.table = np.where((REWARDS >= 0) & (REWARDS <= 1), REWARDS, 0.0)
    theta = jnp.array([0.8, -0.3])

    def steps(toy):
        target = em.mcmc_em(
            toy.model(),
            toy.questions(),
            batch_size=2,
            estimator=estimator,
            allocator=em.uniform(2),
        )
        state, found = target.init(jax.random.key(0), theta), []
        step = jax.jit(lambda key, state: _slope(target, key, theta, state))
        for key in jax.random.split(jax.random.key(1), 4):
            slope, state = step(key, state)
            found.append(np.asarray(slope))
        return np.array(found), state.memory.successes

    with pytest.warns(em.VerifierWarning, match="from 0 to 1, a likelihood.*count as wrong"):
        found, successes = steps(toy)
    expected, expected_successes = steps(bounded)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(successes, expected_successes)
    assert np.abs(expected).max() > 0


def _slope(target, key, theta, state):
    score, state = target.next(key, theta, state)
    return score(theta)[1], state


def test_a_reward_that_is_no_number_counts_as_nothing_and_says_so():
    toy = Rewarded(*small(2))
    toy.table = np.where(REWARDS < 0, np.nan, REWARDS)
    target = em.mcmc_em(
        toy.model(),
        toy.questions(),
        batch_size=2,
        estimator=em.reinforce("none"),
        allocator=em.uniform(4),
    )
    theta, key = jnp.array([0.8, -0.3]), jax.random.key(0)
    with pytest.warns(em.VerifierWarning, match="nan where a reward is a finite number"):
        slope, _ = jax.jit(lambda key: _slope(target, key, theta, target.init(key, theta)))(key)
    assert np.isfinite(np.asarray(slope)).all()


def test_maxk_weights_with_ties_and_real_rewards():
    """Against the mean over all subsets of k."""
    import itertools

    rewards, owner = (
        jnp.array([0.3, 0.9, 0.3, 0.1, 0.7, 0.2, 0.5]),
        jnp.array([0, 0, 0, 0, 1, 1, 1]),
    )
    ones, two = jnp.ones(7), jnp.ones(2)
    minibatch = em.Minibatch(owner, rewards, rewards, ones, two, two, two, owner[:2], lambda: None)
    _, weights = em.maxk(2).weights(minibatch)
    expected = np.zeros(7)
    for question in (0, 1):
        mine = np.flatnonzero(np.asarray(owner) == question)
        subsets = list(itertools.combinations(mine, 2))
        for subset in subsets:
            for i in subset:
                expected[i] += max(float(rewards[j]) for j in subset) / len(subsets) / 2
    # ties share their weight in any way
    for tied in ([0, 2], [1], [3], [4], [5], [6]):
        assert float(weights[jnp.array(tied)].sum()) == pytest.approx(
            expected[tied].sum(), rel=1e-5
        )


def test_estimators_written_for_version_0_1_find_their_names():
    assert em.Visit is em.Minibatch
    batch = em.Minibatch(*"abcdefghi")
    old = (batch.used, batch.present, batch.before, batch.right, batch.chosen)
    assert old == ("d", "e", "f", "g", "h")


ALL = [
    (em.trice(), 1),
    (em.trice("leave_one_out"), 1),
    (em.trice("optimal", directions=None), 1),
    (em.star(), 2),
    (em.raft(), 2),
    (em.rest_em(1), 2),
    (em.reinforce(), 2),
    (em.reinforce("optimal", directions=None), 2),
    (em.grpo(), 2),
    (em.bnpo(), 2),
    (em.maxk(2), 2),
]


def drawn(toy, estimator, theta, number, key, count, **settings):
    """Estimates of fresh visits, chains at the posterior."""
    gradient = em.mcmc_em(
        toy.model(),
        toy.questions(),
        batch_size=len(toy.right),
        estimator=estimator,
        order="full",
        **{"allocator": em.uniform(number), **settings},
    )
    state = gradient.init(key, theta)
    log_posterior = jnp.log(jnp.asarray(toy.posterior(theta)))

    def one(key):
        chain_key, key = jax.random.split(key)
        held = jax.random.categorical(chain_key, log_posterior)[:, None].astype(jnp.int32)
        memory = state.memory._replace(tokens=held, log_likelihood=jnp.zeros(len(toy.right)))
        return gradient.next(key, theta, state._replace(memory=memory))[0](theta)[1]

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(key, count)), np.float64)


@pytest.mark.parametrize(("estimator", "number"), ALL, ids=lambda e: getattr(e, "name", e))
def test_draws_have_the_mean_and_variance_of_the_enumeration(estimator, number, key):
    toy, count = small(2), 20_000
    found = drawn(toy, estimator, THETA, number, key, count)
    mean, variance = moments(*every_visit(toy, estimator, THETA, number))
    error = found.std(axis=0) / np.sqrt(count)
    assert np.all(abs(found.mean(axis=0) - mean) < Z * error + 1e-6)
    squares = np.sum((found - found.mean(axis=0)) ** 2, axis=1)
    assert abs(squares.mean() - variance) < Z * squares.std() / np.sqrt(count) + 1e-6


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [em.trice("leave_one_out"), em.trice("leave_one_out", subsample=16)],
    ids=["all", "16"],
)
def test_forty_thousand_estimates_of_a_larger_toy(estimator):
    toy = large()
    theta = 0.5 * jax.random.normal(jax.random.key(1), (20,))
    found = drawn(toy, estimator, theta, 1, jax.random.key(2), 40_000)
    off = found.mean(axis=0) - np.asarray(jax.grad(toy.log_likelihood)(theta))
    chi_square = len(found) * off @ np.linalg.solve(np.cov(found.T), off) / len(off)
    assert 0.6 < chi_square < 1.5


def test_the_variance_follows_its_closed_form():
    r"""tr Var = V (1 - 2 beta p) + beta^2 S, for each question."""
    toy = small(1)
    p = float(toy.accuracy(THETA))
    log_probs = jax.jacobian(toy.log_probs)(THETA)[0]
    chance, posterior = np.exp(np.asarray(toy.log_probs(THETA)[0])), toy.posterior(THETA)[0]
    scores = np.asarray(log_probs, np.float64)
    s = chance @ np.sum(scores**2, axis=1)
    mean = posterior @ scores
    v = posterior @ np.sum((scores - mean) ** 2, axis=1)
    for beta in (0.2, 0.7, p * v / s):
        _, variance = moments(*every_visit(toy, em.trice(beta), THETA))
        assert variance == pytest.approx(v * (1 - 2 * beta * p) + beta**2 * s, rel=1e-4)


@pytest.mark.slow
def test_the_variance_vanishes_as_the_model_learns():
    """With the control variate and with the optimal one; without, it stays at the posterior's."""
    toy = large(16, 8, 4)
    rng = np.random.default_rng(0)
    features = np.concatenate([toy.features, toy.right[..., None]], axis=-1).astype(np.float32)
    toy = toy._replace(features=features)
    theta = jnp.asarray(rng.normal(size=5), jnp.float32)
    found = {}
    for push in (0.0, 4.0, 12.0):
        at = theta.at[-1].set(push)
        found[push] = [
            drawn(toy, estimator, at, 1, jax.random.key(3), 1000).var(axis=0).sum()
            for estimator in (
                em.trice("none"),
                em.trice("leave_one_out"),
                em.trice("optimal"),
            )
        ]
    none, loo, optimal = np.array([found[push] for push in (0.0, 4.0, 12.0)]).T
    assert none[2] > 0.5 * none[1]
    assert loo[2] < 0.1 * loo[1] < 0.2 * none[1]
    assert optimal[2] < 0.3 * optimal[1]
    assert optimal[2] < 0.2 * none[2]


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True])
def test_the_optimal_control_variate_does_not_lose(single):
    """Also where one rationale is right, so that the paper's adds variance."""
    toy = large(32, 8, 6, seed=1)
    if single:
        right = np.zeros_like(toy.right)
        right[:, 0] = True
        toy = toy._replace(right=right)
    theta = jax.random.normal(jax.random.key(4), (6,))
    none, loo, optimal = (
        drawn(toy, estimator, theta, 1, jax.random.key(5), 2000).var(axis=0).sum()
        for estimator in (em.trice("none"), em.trice("leave_one_out"), em.trice("optimal"))
    )
    if single:
        assert none < 1e-10 < loo
        assert optimal < 1e-10
    else:
        assert optimal < 1.02 * none


def test_a_subsample_has_the_same_mean():
    """Exact for any weights: systematic resampling in proportion to their sizes."""
    toy = small()
    found = drawn(toy, em.trice(subsample=2), THETA, 1, jax.random.key(6), 20_000)
    error = found.std(axis=0) / np.sqrt(len(found))
    assert np.all(abs(found.mean(axis=0) - gradient_of(toy.log_likelihood)) < Z * error)


@pytest.mark.parametrize("corrected", [True, False])
def test_stopping_when_enough_is_found_is_biased_unless_the_last_round_is_left_out(corrected):
    toy, count = small(2), 20_000
    ada = em.reinforce_ada(2, 3, positive=1, negative=1, corrected=corrected)
    found = drawn(toy, em.reinforce(), THETA, 1, jax.random.key(7), count, allocator=ada)
    off = abs(found.mean(axis=0) - gradient_of(toy.accuracy)) * np.sqrt(count) / found.std(axis=0)
    assert np.all(off < Z) if corrected else np.any(off > Z)
