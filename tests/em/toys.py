"""Models whose rationales can be counted."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad import em


class Toy(NamedTuple):
    """Log-linear rationales: features (questions, rationales, d), and which are right."""

    features: np.ndarray
    right: np.ndarray

    def log_probs(self, theta):
        return jax.nn.log_softmax(jnp.asarray(self.features) @ theta)

    def log_likelihood(self, theta):
        """Mean log probability of a right answer."""
        return jnp.mean(jax.nn.logsumexp(self.log_probs(theta), axis=1, where=self.right))

    def accuracy(self, theta):
        return jnp.mean(self.solved(theta))

    def solved(self, theta):
        """Probability of a right answer, question by question."""
        return jnp.sum(jnp.exp(self.log_probs(theta)), axis=1, where=self.right)

    def posterior(self, theta):
        p = np.exp(np.asarray(self.log_probs(theta))) * self.right
        return p / p.sum(axis=1, keepdims=True)

    def questions(self, hints=None):
        number = jnp.arange(len(self.right), dtype=jnp.int32)
        return em.Questions(number, number, hints)

    def policy(self, temperature=1.0):
        """Draws by chance; where the position has a plan, the tokens that stand in it."""

        def table(params):
            return self.log_probs(params["theta"] if isinstance(params, dict) else params)

        def log_prob(params, prompts, tokens, mask):
            rows = jax.nn.log_softmax(table(params)[prompts] / temperature)
            return jnp.take_along_axis(rows, tokens, axis=1)[:, 0]

        def sample(params, key, prompts):
            if isinstance(params, dict):
                z = params["plan"].astype(jnp.int32)
            else:
                z = jax.random.categorical(key, table(params)[prompts] / temperature)
            mask = jnp.ones((z.shape[0], 1), bool)
            tokens = z[:, None].astype(jnp.int32)
            return em.Rationales(tokens, log_prob(params, prompts, tokens, mask), mask)

        def greedy(params, prompts):
            tokens = jnp.argmax(table(params)[prompts], axis=1)[:, None].astype(jnp.int32)
            mask = jnp.ones(tokens.shape, bool)
            return em.Rationales(tokens, log_prob(params, prompts, tokens, mask), mask)

        return em.Policy(sample, log_prob, greedy)

    def verify(self, tokens, mask, answers):
        return jnp.asarray(self.right)[answers, tokens[:, 0]]

    def model(self):
        return em.verified(self.policy(), self.verify)


def small(questions=3):
    """Up to three questions of four rationales, two parameters."""
    rng = np.random.default_rng(3)
    right = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    return Toy(rng.normal(size=(3, 4, 2)).astype(np.float32)[:questions], right[:questions])


def large(questions=64, rationales=24, d=20, share=0.25, seed=0):
    """Many questions, some of them hard."""
    rng = np.random.default_rng(seed)
    right = rng.random((questions, rationales)) < share
    right[:, 0] = True
    features = rng.normal(size=(questions, rationales, d)).astype(np.float32) / np.sqrt(d)
    return Toy(features, right)


def every_visit(toy, estimator, theta, per_question=1, allocator=None, solved=None, history=None):
    """The estimate at every outcome of a visit of all questions, with the outcome's probability.

    Chains are at the posterior, those that are not ``solved`` at a wrong rationale, with a
    ``history``. Returns probabilities and estimates.
    """
    count, choices = toy.right.shape
    p = np.exp(np.asarray(toy.log_probs(theta), np.float64))
    plans = np.array(list(itertools.product(range(choices), repeat=count * per_question)))
    owner = np.repeat(np.arange(count), per_question)
    chance = np.prod(p[owner, plans], axis=1)
    if estimator.chains:
        solved = np.ones(count, bool) if solved is None else np.asarray(solved)
        choices_of = [
            np.flatnonzero(row) if known else np.flatnonzero(~row)[:1]
            for row, known in zip(toy.right, solved, strict=True)
        ]
        held = np.array(list(itertools.product(*choices_of)))
        each = np.where(solved[None, :], toy.posterior(theta)[np.arange(count), held], 1.0)
        at_posterior = np.prod(each, axis=1)
    else:
        held, at_posterior = np.zeros((1, count), int), np.ones(1)
    gradient = em.mcmc_em(
        toy.model(),
        toy.questions(),
        batch_size=count,
        estimator=estimator,
        allocator=allocator or em.uniform(per_question),
        order="full",
    )
    key = jax.random.key(0)
    start = {"theta": theta, "plan": jnp.zeros(plans.shape[1])}
    state = gradient.init(key, start)

    def one(plan, held):
        position = {"theta": theta, "plan": plan}
        likelihood = jnp.where(toy.verify(held[:, None], None, jnp.arange(count)), 0.0, -jnp.inf)
        memory = state.memory._replace(
            tokens=held[:, None].astype(jnp.int32),
            log_likelihood=likelihood,
            history=state.memory.history if history is None else history,
        )
        score, _ = gradient.next(key, position, state._replace(memory=memory))
        return score(position)[1]["theta"]

    run = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    found = run(jnp.asarray(plans, jnp.float32), jnp.asarray(held, jnp.int32))
    chances = chance[:, None] * at_posterior
    return chances.reshape(-1), np.asarray(found, np.float64).reshape(-1, theta.shape[0])


def moments(chances, estimates):
    """Mean, and trace of the covariance."""
    mean = chances @ estimates
    return mean, float(chances @ np.sum((estimates - mean) ** 2, axis=1))
