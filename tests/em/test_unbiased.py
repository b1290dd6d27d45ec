"""Whatever hands out proposals, estimates have the mean that they have with fixed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from stochgrad.em._allocate import whole
from tests.conftest import Z
from tests.em.toys import Toy, small

THETA = jnp.array([0.4, -0.3], jnp.float32)
COUNT = 30_000


class Soft(Toy):
    """Answers that follow from rationales with probabilities."""

    table = np.array([[1.0, 0.1, 0.0, 0.3], [0.05, 0.6, 1.0, 0.0]], np.float32)

    def verify(self, tokens, mask, answers):
        return jnp.asarray(self.table)[answers, tokens[:, 0]]

    def log_likelihood(self, theta):
        each = self.log_probs(theta) + jnp.log(jnp.asarray(self.table))
        return jnp.mean(jax.nn.logsumexp(each, axis=1))

    def posterior(self, theta):
        p = np.exp(np.asarray(self.log_probs(theta))) * self.table
        return p / p.sum(axis=1, keepdims=True)


def naive_counts(key, round, past, tally, mask):
    """As GVM's paper has it: the second round comes on top of the pilot that decided on it."""
    norm = jnp.where(tally.successes > 0, tally.norms / jnp.maximum(tally.successes, 1.0), 1.0)
    share = norm * jnp.sqrt((tally.tries + 1.0) / (tally.successes + 0.5))
    share = jnp.where(tally.tries > 0, share, 1.0)
    missing = jnp.maximum(share / jnp.sum(share) * 4 * jnp.sum(mask) - 2, 0.0)
    return whole(jnp.where(round == 0, mask, missing), 2 * jnp.sum(mask))


NAIVE = em.Allocator(2, 2, naive_counts, directions=4, least=2)
ALLOCATORS = {
    "gvm": em.gvm(8),
    "vade": em.vade(4),
    "reinforce_ada": em.reinforce_ada(2, 3, positive=1, negative=1),
}
ESTIMATORS = {
    "reinforce without baseline": (em.reinforce("none"), "accuracy"),
    "reinforce": (em.reinforce(), "accuracy"),
    "reinforce, optimal": (em.reinforce("optimal", directions=None), "accuracy"),
    "maxk": (em.maxk(2), "best of two"),
    "trice without control variate": (em.trice("none"), "likelihood"),
    "trice, number": (em.trice(0.5), "likelihood"),
    "trice, leave one out": (em.trice("leave_one_out"), "likelihood"),
    "trice": (em.trice(), "likelihood"),
}
SOFT = {name: ESTIMATORS[name] for name in ("trice without control variate", "trice")}


def exact(toy, target):
    functions = {
        "accuracy": toy.accuracy,
        "best of two": lambda theta: jnp.mean(1 - (1 - toy.solved(theta)) ** 2),
        "likelihood": toy.log_likelihood,
    }
    return np.asarray(jax.grad(functions[target])(THETA), np.float64)


def distance(toy, estimator, allocator, target, key, visits=3):
    """Of the mean of the last of some visits from the exact gradient, in standard errors."""
    gradient = em.mcmc_em(
        toy.model(),
        toy.questions(),
        batch_size=len(toy.right),
        estimator=estimator,
        allocator=allocator,
        order="full",
    )
    state = gradient.init(key, THETA)
    log_posterior = jnp.log(jnp.asarray(toy.posterior(THETA)))

    def one(key):
        chain_key, key = jax.random.split(key)
        held = jax.random.categorical(chain_key, log_posterior)[:, None].astype(jnp.int32)
        number = jnp.arange(len(toy.right))
        likelihood = jnp.log(jnp.asarray(toy.verify(held, None, number), jnp.float32))
        memory = state.memory._replace(tokens=held, log_likelihood=likelihood)

        def visit(state, key):
            return gradient.next(key, THETA, state)[1], None

        first, *last = jax.random.split(key, visits)[::-1]
        start = state._replace(memory=memory)
        settled = jax.lax.scan(visit, start, jnp.stack(last))[0] if last else start
        return gradient.next(first, THETA, settled)[0](THETA)[1]

    keys = jax.random.split(key, COUNT)
    found = np.asarray(jax.jit(lambda k: jax.lax.map(one, k, batch_size=1000))(keys), np.float64)
    error = found.std(axis=0) / np.sqrt(COUNT)
    return np.max(np.abs(found.mean(axis=0) - exact(toy, target)) / error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_the_mean_is_exact(name, allocator, key):
    estimator, target = ESTIMATORS[name]
    assert distance(small(2), estimator, ALLOCATORS[allocator], target, key) < Z


@pytest.mark.slow
@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_the_mean_is_exact_where_right_rationales_are_not_alike(name, allocator, key):
    """Chains stay at their posterior although past likelihoods say how many proposals they get."""
    estimator, target = SOFT[name]
    assert distance(Soft(*small(2)), estimator, ALLOCATORS[allocator], target, key) < Z


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce without baseline", "reinforce"])
def test_the_tests_see_a_bias(name, key):
    estimator, target = ESTIMATORS[name]
    assert distance(small(2), estimator, NAIVE, target, key, visits=1) > Z


def test_too_few_certain_proposals_are_refused():
    toy = small()
    for estimator, allocator in (
        (em.reinforce(), em.gvm(4)),
        (em.reinforce(), em.vade(4, floor=0.25)),
        (em.maxk(3), em.vade(4)),
        (em.grpo(), em.reinforce_ada(1, 4)),
    ):
        with pytest.raises(ValueError, match="proposals of each question, got an allocator"):
            em.mcmc_em(
                toy.model(),
                toy.questions(),
                batch_size=3,
                estimator=estimator,
                allocator=allocator,
            )


@pytest.mark.parametrize("allocator", [em.gvm(8), em.vade(5, floor=0.5)], ids=["gvm", "vade"])
def test_each_average_has_as_many_as_it_is_sure_of(allocator):
    """Of any past and pilot, in each fold, as often as one likes; padding gets none."""
    rng, mask = np.random.default_rng(0), jnp.array([1.0, 1.0, 1.0, 0.0])
    cells = 4 * allocator.folds
    for n in range(20):
        tries = jnp.asarray(rng.integers(1, 9, 4), jnp.float32)
        past = em.Tally.none(4)._replace(tries=tries, successes=tries * rng.random(4))
        pilot = em.Tally.none(cells)._replace(
            tries=jnp.full(cells, 2.0),
            successes=jnp.asarray(rng.integers(0, 3, cells), jnp.float32),
            norms=jnp.asarray(rng.exponential(size=cells), jnp.float32),
        )
        rounds = [
            np.asarray(allocator.counts(jax.random.key(n), jnp.int32(r), past, tally, mask))
            for r, tally in enumerate((em.Tally.none(cells), pilot)[: allocator.rounds])
        ]
        for counts in rounds:
            assert counts.sum() == 3 * allocator.per_round
            assert not counts.reshape(-1, 4)[:, 3].any()
        assert rounds[0].reshape(-1, 4)[:, :3].min() >= allocator.least
