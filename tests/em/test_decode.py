"""Decoding with a cache: what is sampled is what is scored, whatever the padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import em
from tests.conftest import Z
from tests.em.networks import cache, network, parameters

VOCABULARY, END = 6, 5
PROMPTS = [[1, 2, 3, 4], [2], [0, 3]]


@pytest.fixture(scope="module")
def params():
    return parameters(jax.random.key(7), VOCABULARY, 0.3)


def decoder(length=6, **settings):
    return em.decoder(network, cache, length=length, end=END, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 1.5, "top_p": 0.6}],
    ids=str,
)
def test_what_is_sampled_is_what_is_scored(params, settings):
    policy = decoder(**settings)
    prompts = em.left_padded(PROMPTS * 20)
    drawn = jax.jit(policy.sample)(params, jax.random.key(0), prompts)
    scored = jax.jit(policy.log_prob)(params, prompts, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.log_prob, scored, atol=1e-5)
    assert np.isfinite(scored).all()
    tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.mask)
    ended = np.cumsum(tokens == END, axis=1) - (tokens == END) > 0
    np.testing.assert_array_equal(mask, ~ended)
    assert (tokens[~mask] == 0).all()
    assert mask.sum(axis=1).min() < 6  # some ended early
    chosen = policy.greedy(params, prompts)
    np.testing.assert_allclose(
        chosen.log_prob, policy.log_prob(params, prompts, *chosen[::2]), atol=1e-5
    )


def test_padding_does_not_matter(params):
    policy = decoder()
    tokens = jnp.array([[1, 4, 2, 5, 0, 0]])
    mask = jnp.array([[True] * 4 + [False] * 2])
    alone = policy.log_prob(params, em.left_padded([[2]]), tokens, mask)
    padded = policy.log_prob(params, em.left_padded([[2]], length=9), tokens, mask)
    np.testing.assert_allclose(alone, padded, atol=1e-5)
    assert float(policy.log_prob(params, em.left_padded([[3]]), tokens, mask)[0]) != alone[0]


def test_all_rationales_together_have_probability_one(params):
    """Those that end within three tokens, and those that are cut off there."""
    policy = decoder(length=3)
    rows = {
        tuple(row[: row.index(END) + 1] if END in row else row)
        for row in itertools.product(range(VOCABULARY), repeat=3)
    }
    tokens = np.zeros((len(rows), 3), np.int32)
    mask = np.zeros((len(rows), 3), bool)
    for n, row in enumerate(sorted(rows)):
        tokens[n, : len(row)], mask[n, : len(row)] = row, True
    prompts = em.left_padded([[1, 2]] * len(rows))
    p = np.exp(policy.log_prob(params, prompts, jnp.asarray(tokens), jnp.asarray(mask)))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    draws = 6000
    drawn = policy.sample(params, jax.random.key(2), em.left_padded([[1, 2]] * draws))
    for n in np.argsort(p)[-8:]:
        same = (np.asarray(drawn.tokens) == tokens[n]).all(axis=1).mean()
        assert abs(same - p[n]) < Z * np.sqrt(p[n] * (1 - p[n]) / draws)


def test_a_nucleus_is_the_fewest_tokens_with_its_mass():
    def given(params, inputs, cache, keep):
        return jnp.broadcast_to(params, (*inputs.tokens[:, -keep:].shape, 4)), cache

    share = np.array([0.4, 0.3, 0.2, 0.1])
    policy = em.decoder(given, lambda batch, slots: None, length=1, end=3, top_p=0.65)
    prompts = em.left_padded([[0]] * 4)
    every = jnp.arange(4)[:, None]
    log_p = policy.log_prob(jnp.log(share), prompts, every, jnp.ones((4, 1), bool))
    np.testing.assert_allclose(np.exp(log_p), [4 / 7, 3 / 7, 0, 0], atol=1e-6)


def test_bad_input_gets_one_sentence(params):
    with pytest.raises(ValueError, match="do not fit a context of 8"):
        decoder(context=8).sample(params, jax.random.key(0), em.left_padded(PROMPTS))
    with pytest.raises(ValueError, match="prompt 0 has 4 tokens where length is 3"):
        em.left_padded(PROMPTS, length=3)
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="non-empty"):
            em.left_padded(bad)
    with pytest.raises(TypeError, match="left_padded"):
        decoder().sample(params, jax.random.key(0), jnp.zeros((2, 2), jnp.int32))
    for settings, words in (
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"length": 0}, "length"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder(**settings)
