"""Policies that cannot draw every latent under all parameters, as those with a nucleus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from tests.em.networks import cache, network
from tests.em.toys import Toy, small

THETA = jnp.array([0.4, -0.3], jnp.float32)


class Nucleus(Toy):
    """Rationales less likely than 0.2 are not drawn."""

    def log_probs(self, theta):
        logits = jax.nn.log_softmax(jnp.asarray(self.features) @ theta)
        return jax.nn.log_softmax(jnp.where(logits < jnp.log(0.2), -jnp.inf, logits))

    def policy(self, temperature=1.0):
        return super().policy(temperature)._replace(full_support=False)


class Careless(Nucleus):
    """Draws from all rationales, and scores by the nucleus."""

    def policy(self, temperature=1.0):
        everything = Toy(*self).policy()
        return super().policy()._replace(sample=everything.sample)


def one_step(toy, held, estimator):
    target = em.mcmc_em(
        toy.model(), toy.questions(), batch_size=3, estimator=estimator, order="full"
    )

    @jax.jit
    def step(key):
        state = target.init(key, THETA)
        number = jnp.arange(3)
        right = jnp.where(toy.verify(held[:, None], None, number), 0.0, -jnp.inf)
        memory = state.memory._replace(tokens=held[:, None], log_likelihood=right)
        score, state = target.next(key, THETA, state._replace(memory=memory))
        return score(THETA)[1], state

    return step


def outside(toy):
    """A right rationale of each question that cannot be drawn, where there is one; and whether."""
    never = np.isneginf(np.asarray(toy.log_probs(THETA)))
    found = toy.right & never
    return np.where(found.any(1), found.argmax(1), (toy.right & ~never).argmax(1)), found.any(1)


@pytest.mark.parametrize("estimator", [em.trice(), em.trice("none")], ids=["auto", "none"])
def test_a_chain_that_can_no_longer_be_drawn_is_no_longer_right(estimator):
    """It has no gradient, and takes part again with its next right proposal."""
    toy = Nucleus(*small())
    held, gone = outside(toy)
    assert 0 < gone.sum() < 3
    step = one_step(toy, jnp.asarray(held, jnp.int32), estimator)
    lost = 0
    for key in jax.random.split(jax.random.key(0), 8):
        slope, state = step(key)
        moved = np.asarray(state.memory.age) == 0
        assert np.isfinite(np.asarray(slope)).all()
        assert em.unsolved(state).tolist() == np.flatnonzero(gone & ~moved).tolist()
        lost += np.sum(gone & ~moved)
    assert lost > 0


def test_a_draw_that_its_policy_scores_as_impossible_counts_as_wrong_and_says_so():
    """So it is at the edge of a nucleus in bfloat16, where decoder and scorer round apart."""
    toy = Careless(*small())
    held = jnp.asarray((toy.right & ~np.isneginf(np.asarray(toy.log_probs(THETA)))).argmax(1))
    step = one_step(toy, held.astype(jnp.int32), em.trice("none"))
    keys = jax.random.split(jax.random.key(0), 8)
    with pytest.warns(em.VerifierWarning, match=r"log_prob is -inf where policy.sample.*float32"):
        found = [step(key) for key in keys]
    for slope, state in found:
        at = np.asarray(state.memory.tokens)[:, 0]
        assert np.isfinite(np.asarray(toy.log_probs(THETA))[np.arange(3), at]).all()
        assert np.isfinite(np.asarray(slope)).all()


def test_a_decoder_says_whether_it_has_a_nucleus():
    for top_p in (0.9, 1.0):
        policy = em.decoder(network, cache, length=3, end=5, top_p=top_p)
        assert policy.full_support == (top_p == 1.0)
