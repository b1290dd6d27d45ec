"""The noise is jax's own, or has the moments that it claims."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from stochgrad.core import hashed, noise_law, noise_like
from stochgrad.core._noise import discrete, fold_in, key_words, normal, quantized, threefry
from tests.conftest import Z


@pytest.mark.parametrize("size", [1, 2, 7, 5000])
@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_normal_is_jax_random_normal_to_the_bit(size, seed):
    key = jax.random.fold_in(jax.random.key(seed), 3)
    np.testing.assert_array_equal(
        jax.jit(normal, static_argnums=1)(key, size), jax.random.normal(key, (size,))
    )


def test_normal_in_double_precision_is_jax_random_normal_to_the_bit():
    with jax.enable_x64(True):
        key = jax.random.key(11)
        ours = normal(key, 1000, jnp.float64)
        assert ours.dtype == jnp.float64
        np.testing.assert_array_equal(ours, jax.random.normal(key, (1000,), jnp.float64))


def test_threefry_known_answers():
    """Known-answer vectors of the Random123 distribution for threefry2x32, 20 rounds."""
    ones = jnp.uint32(0xFFFFFFFF)
    for key, counter, expected in [
        ([0, 0], [0, 0], [0x6B200159, 0x99BA4EFE]),
        ([ones, ones], [ones, ones], [0x1CB996FC, 0xBB002BE7]),
        ([0x13198A2E, 0x03707344], [0x243F6A88, 0x85A308D3], [0xC4923A9C, 0x483DF7A0]),
    ]:
        out = threefry(jnp.array(key, jnp.uint32), *jnp.array(counter, jnp.uint32))
        assert [int(x) for x in out] == expected


def test_other_key_implementations_work():
    key = jax.random.key(0, impl="rbg")
    assert key_words(key).shape == (2,)
    np.testing.assert_array_equal(normal(key, 9), jax.random.normal(key, (9,)))
    assert np.std(discrete(key, 1000)) > 0.5


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_numbered_key_is_that_of_fold_in_and_of_split(impl):
    key = jax.random.key(5, impl=impl)
    words = jax.random.key_data
    for number in (0, 1, 2**31 - 1):
        np.testing.assert_array_equal(
            words(fold_in(key, np.int32(number))), words(jax.random.fold_in(key, number))
        )
    for n, split in enumerate(jax.random.split(key, 3)):
        np.testing.assert_array_equal(words(fold_in(key, np.int32(n))), words(split))


def test_discrete_has_five_moments_of_a_normal_exactly():
    values, counts = np.unique(np.asarray(discrete(jax.random.key(0), 100_000)), return_counts=True)
    assert len(values) == 4
    probability = np.array([1, 7, 7, 1]) / 16
    moments = [np.sum(probability * values.astype(np.float64) ** m) for m in range(1, 6)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3, 0], atol=1e-6)
    assert np.all(np.abs(counts / 1e5 - probability) < Z * np.sqrt(probability / 1e5))


@pytest.mark.parametrize("generate", [discrete, quantized])
def test_numbers_of_one_draw_and_of_two_keys_are_uncorrelated(generate):
    n = 200_000
    draws = [np.asarray(generate(jax.random.key(s), n), np.float64) for s in (0, 1, 2)]
    for lag in (1, 2, 3, 4, 8, 16, 64, 100):
        assert abs(np.mean(draws[0][lag:] * draws[0][:-lag])) < Z / np.sqrt(n - lag)
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.mean(a * b)) < Z / np.sqrt(n)
    over_keys = jax.vmap(lambda k: generate(k, 3))(jax.random.split(jax.random.key(5), n))
    over_keys = np.asarray(over_keys, np.float64)
    assert np.all(np.abs(over_keys.mean(axis=0)) < Z / np.sqrt(n))
    assert abs(np.mean(over_keys[1:, 0] * over_keys[:-1, 0])) < Z / np.sqrt(n)


def test_quantized_has_eleven_moments_of_a_normal():
    values, probabilities = noise_law("quantized")
    assert len(values) == 1021
    assert abs(probabilities.sum() - 1) < 1e-12
    np.testing.assert_allclose(values, -values[::-1], atol=1e-12)  # odd moments vanish
    moments = [probabilities @ values**m for m in range(2, 11, 2)]
    np.testing.assert_allclose(moments, [1, 3, 15, 105, 945], rtol=2e-7)


def test_quantized_is_near_a_normal():
    values, probabilities = noise_law("quantized")
    middle = np.cumsum(probabilities) - probabilities / 2
    assert np.max(np.abs(middle - stats.norm.cdf(values))) < 3.1e-4
    density = probabilities[1:-1] / ((values[2:] - values[:-2]) / 2)
    inside = np.abs(values[1:-1]) < 3
    ratio = density[inside] / stats.norm.pdf(values[1:-1][inside])
    assert np.all(np.abs(ratio - 1) < 0.024)
    assert 5.26 < values[-1] < 5.27
    for place in (3.0, 4.0, 4.5):
        tail = probabilities[values > place].sum() / stats.norm.sf(place)
        assert abs(tail - 1) < 0.1


@pytest.mark.parametrize("kind", ["quantized", "discrete"])
def test_draws_have_the_law_that_is_told(kind):
    """A chi-squared test over all values that are expected ten times, and over both tails."""
    n = 2_000_000
    values, probabilities = noise_law(kind)
    with jax.enable_x64(True):
        drawn = np.asarray(noise_like(kind)(jax.random.key(4), jnp.zeros(n, jnp.float64)))
    places = np.searchsorted((values[1:] + values[:-1]) / 2, drawn)
    np.testing.assert_allclose(values[places], drawn, atol=1e-12)
    often = probabilities * n >= 10
    counts, expected = np.bincount(places, minlength=len(values)), probabilities * n
    kept, wanted = np.append(counts[often], n), np.append(expected[often], n)
    kept[-1] -= counts[often].sum()
    wanted[-1] -= expected[often].sum()
    keep = wanted > 1e-6
    squares = np.sum((kept[keep] - wanted[keep]) ** 2 / wanted[keep])
    assert stats.chi2.sf(squares, keep.sum() - 1) > 1e-5


def test_neighboring_keys_and_counters_share_nothing():
    """Bits of words under keys, and of numbers, that differ in one bit."""
    n = 100_000
    low = jnp.arange(n, dtype=jnp.uint32)
    keys = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(low), low], axis=1))
    words = np.asarray(jax.vmap(lambda key: hashed(key, 4))(keys))
    along = np.asarray(hashed(jax.random.key(1), 4 * n)).reshape(4, n).T
    for x in (words, along):
        for other in (x[1:], np.roll(x, 1, axis=1)[:-1]):
            flips = (x[:-1] ^ other)[..., None] >> np.arange(32, dtype=np.uint32) & 1
            share = flips.mean(axis=0, dtype=np.float64)
            assert np.max(np.abs(share - 0.5)) < Z * 0.5 / np.sqrt(n - 1)


def test_long_positions_get_quantized_noise_by_default(key):
    for size, kind in ((1000, "normal"), (1001, "quantized")):
        like = {"a": jnp.zeros(size - 10), "b": jnp.zeros(10)}
        expected = noise_like(kind)(key, like)
        jax.tree.map(np.testing.assert_array_equal, noise_like("auto")(key, like), expected)


def test_other_widths_and_key_implementations_are_quantized_too():
    key = jax.random.key(0, impl="rbg")
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        x = noise_like("quantized")(key, jnp.zeros(10_000, dtype))
        assert x.dtype == dtype
        assert abs(np.std(np.asarray(x, np.float64)) - 1) < Z / np.sqrt(20_000)


@pytest.mark.parametrize("kind", ["normal", "quantized", "discrete"])
def test_draws_of_one_key_are_independent(kind):
    """Products and products of squares: two draws of one hash must not share its bits."""
    n = 100_000
    draw = noise_like(kind)
    key, like = jax.random.key(3), jnp.zeros(n)
    draws = [np.asarray(draw(key, like, i), np.float64) for i in range(10)]
    for x in draws:
        assert abs(np.mean(x)) < Z / np.sqrt(n)
        assert abs(np.mean(x**2 - 1)) < Z * np.sqrt(2 / n)
        assert abs(np.mean(x**4) - 3) < Z * np.sqrt(np.var(x**4) / n)
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.mean(a * b)) < Z / np.sqrt(n)
        assert abs(np.mean((a**2 - 1) * (b**2 - 1))) < Z * 2 / np.sqrt(n)
    np.testing.assert_array_equal(draws[0], draw(key, like))


@pytest.mark.parametrize("kind", ["normal", "quantized", "discrete"])
def test_noise_like_fills_every_leaf_from_one_draw(kind):
    tree = {"a": jnp.zeros((3, 4)), "b": (jnp.zeros(()), jnp.zeros(5, jnp.bfloat16))}
    noise = noise_like(kind)(jax.random.key(0), tree)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), noise) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree
    )
    assert len(np.unique(noise["a"])) > 2
    if kind == "normal":
        np.testing.assert_array_equal(
            noise["a"].ravel(), jax.random.normal(jax.random.key(0), (18,))[:12]
        )


def test_an_unknown_noise_is_refused():
    with pytest.raises(
        ValueError, match=r"noise must be one of \['auto', 'normal', 'quantized', 'discrete'\]"
    ):
        noise_like("uniform")
