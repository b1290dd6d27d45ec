"""The whole of MCMC-EM: chains, learning, resuming, bad input."""

import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stochgrad
from stochgrad import em
from tests.conftest import Z
from tests.em.toys import large, small


def gradient(toy, batch_size=3, **settings):
    return em.mcmc_em(toy.model(), toy.questions(), batch_size=batch_size, **settings)


def test_a_chain_forgets_its_start_as_often_as_it_is_solved(key):
    """From a right but fixed latent, total variation after t visits is (1 - p)^t of the first."""
    toy, theta, runs = small(1), jnp.array([0.4, -0.3]), 20_000
    target = gradient(toy, 1, order="full")
    state = target.init(key, theta)
    held = state.memory._replace(tokens=jnp.zeros((1, 1), jnp.int32), log_likelihood=jnp.zeros(1))
    p, posterior = float(toy.accuracy(theta)), toy.posterior(theta)[0]

    def walk(key):
        def visit(state, key):
            state = target.next(key, theta, state)[1]
            return state, state.memory.tokens[0, 0]

        return jax.lax.scan(visit, state._replace(memory=held), jax.random.split(key, 4))[1]

    at = np.asarray(jax.jit(jax.vmap(walk))(jax.random.split(key, runs)))
    for t in range(4):
        still = (at[:, t] == 0).mean()
        expected = posterior[0] + (1 - p) ** (t + 1) * (1 - posterior[0])
        assert abs(still - expected) < Z * np.sqrt(expected * (1 - expected) / runs)


def test_a_guides_weight_keeps_the_posterior(key):
    """Proposals at another temperature, with the ratio of weights: the law does not move."""
    toy, theta, runs = small(1), jnp.array([0.4, -0.3]), 20_000
    hot = em.Guide(toy.policy(temperature=3.0))
    target = em.mcmc_em(
        toy.model(),
        toy.questions(hints=jnp.arange(1, dtype=jnp.int32)),
        batch_size=1,
        estimator=em.trice("none"),
        proposal=hot,
        order="full",
    )
    state, posterior = target.init(key, theta), toy.posterior(theta)[0]

    def visit(key):
        start, key = jax.random.split(key)
        tokens = jax.random.categorical(start, jnp.log(posterior))[None, None].astype(jnp.int32)
        held = state.memory._replace(tokens=tokens, log_likelihood=jnp.zeros(1))
        return target.next(key, theta, state._replace(memory=held))[1].memory.tokens[0, 0]

    at = np.asarray(jax.jit(jax.vmap(visit))(jax.random.split(key, runs)))
    for z, expected in enumerate(posterior):
        error = np.sqrt(expected * (1 - expected) / runs)
        assert abs((at == z).mean() - expected) <= Z * error


def test_training_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    toy = small()
    kernel = stochgrad.ascend(gradient(toy, 2), optax.adam(0.1))
    other = stochgrad.ascend(gradient(small(2), 2), optax.adam(0.1))

    def run(count, kernel=kernel, **settings):
        return stochgrad.sample(
            jax.random.key(0),
            kernel,
            init=jnp.zeros(2),
            num_samples=count,
            collect=lambda state: (state.position, state.gradient_state),
            progress=False,
            **settings,
        )

    with jax.numpy_dtype_promotion("standard"):  # optax
        whole = run(30)
        run(10, checkpoint=tmp_path)
        again = run(30, checkpoint=tmp_path, resume=True)
        with pytest.raises(ValueError, match="was written by a different run"):
            run(40, other, checkpoint=tmp_path, resume=True)
    for a, b in zip(
        jax.tree.leaves(whole.positions), jax.tree.leaves(again.positions), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_never_solved_is_named_and_does_not_harm():
    toy = small()
    right = toy.right.copy()
    right[1] = False
    toy = toy._replace(right=right)
    target = gradient(toy)
    state = target.init(jax.random.key(0), jnp.zeros(2))
    for n in range(12):
        score, state = target.next(jax.random.key(n), jnp.zeros(2), state)
        assert np.isfinite(np.asarray(score(jnp.zeros(2))[1])).all()
    assert em.unsolved(state).tolist() == [1]
    assert float(state.stats.solved) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "allocator",
    [em.gvm(8), em.reinforce_ada(2, 3), em.vade(4), em.uniform(4)],
    ids=["gvm", "reinforce_ada", "vade", "uniform"],
)
def test_allocators_hand_out_what_there_is(allocator):
    toy = small()
    target = gradient(toy, estimator=em.reinforce(), allocator=allocator)
    state = target.init(jax.random.key(0), jnp.zeros(2))
    score, state = target.next(jax.random.key(1), jnp.zeros(2), state)
    assert np.isfinite(np.asarray(score(jnp.zeros(2))[1])).all()
    most = allocator.per_round * allocator.rounds * 3
    drawn = float(state.stats.proposals)
    assert drawn == most if allocator.enough is None else 6 <= drawn <= most


def test_bad_input_gets_one_sentence():
    toy = small()
    for settings, words in (
        ({"estimator": em.reinforce()}, "at least 2 proposals"),
        ({"proposal": em.Guide(toy.policy())}, "hints"),
        ({"batch_size": 4}, "number of rows"),
        ({"batch_size": 0}, "from 1"),
        ({"pieces": 0}, "pieces"),
    ):
        with pytest.raises(ValueError, match=words):
            gradient(toy, **settings)
    with pytest.raises(TypeError, match="LatentModel"):
        em.mcmc_em(toy.policy(), toy.questions(), batch_size=1)
    with pytest.raises(ValueError, match="at least one row"):
        em.mcmc_em(toy.model(), em.Questions(jnp.zeros((0, 2)), jnp.zeros(0)), batch_size=1)
    number = em.verified(toy.policy(), lambda tokens, mask, answers: answers)
    target = em.mcmc_em(number, toy.questions(), batch_size=1)
    with pytest.raises(ValueError, match="bools"):
        target.next(jax.random.key(0), jnp.zeros(2), target.init(jax.random.key(0), jnp.zeros(2)))


def test_a_learned_guide_comes_to_the_posterior():
    """Joint stochastic approximation: model and guide learn together, from the same chains."""
    toy = small(1)

    def log_prob(phi, prompts, tokens, mask):
        return jax.nn.log_softmax(phi)[tokens[:, 0]]

    def sample(phi, key, prompts):
        z = jax.random.categorical(key, phi, shape=prompts.shape)[:, None].astype(jnp.int32)
        mask = jnp.ones(z.shape, bool)
        return em.Rationales(z, log_prob(phi, prompts, z, mask), mask)

    target = em.mcmc_em(
        toy.model(),
        toy.questions(hints=jnp.arange(1, dtype=jnp.int32)),
        batch_size=1,
        estimator=em.trice("none"),
        proposal=em.Guide(em.Policy(sample, log_prob), learned=True),
        order="full",
    )
    # the model's parameters stand still, so that its posterior is known
    still = optax.multi_transform(
        {"model": optax.set_to_zero(), "guide": optax.sgd(0.05)}, ("model", "guide")
    )
    theta = jnp.array([0.4, -0.3])
    with jax.numpy_dtype_promotion("standard"):  # optax
        path = stochgrad.sample(
            jax.random.key(0),
            stochgrad.ascend(target, still),
            init=(theta, jnp.zeros(4)),
            num_warmup=1000,
            num_samples=4000,
            progress=False,
        )
    learned = np.asarray(jax.nn.softmax(path.positions[1], axis=-1)).mean(axis=(0, 1))
    assert learned[~toy.right[0]].max() < 0.02
    assert learned == pytest.approx(toy.posterior(theta)[0], abs=0.05)


def test_a_gradient_in_pieces_is_the_gradient():
    """Also where the pieces do not come out even."""
    toy, theta = small(), jnp.array([0.4, -0.3])
    found = []
    for pieces in (1, 4):
        target = gradient(toy, pieces=pieces)
        state = target.init(jax.random.key(0), theta)
        for n in range(3):
            score, state = target.next(jax.random.key(n), theta, state)
        found.append(np.asarray(score(theta)[1]))
    assert np.abs(found[0]).max() > 0.01
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_a_memory_on_disk_is_the_memory(tmp_path):
    """Gone on with from a checkpoint as well, and side by side."""
    toy, theta = small(), jnp.array([0.4, -0.3])
    hints = jnp.arange(3, dtype=jnp.int32)
    settings = {"start": em.Guide(toy.policy(temperature=3.0))}

    def run(path, keys):
        target = em.mcmc_em(
            toy.model(), toy.questions(hints), batch_size=2, memory_path=path, **settings
        )

        def steps(state, key):
            def step(state, key):
                score, state = target.next(key, theta, state)
                return state, score(theta)[1]

            return jax.lax.scan(step, state, jax.random.split(key, 12))

        steps = jax.jit(jax.vmap(steps))
        first, slopes = steps(jax.vmap(lambda key: target.init(key, theta))(keys), keys)
        then, more = steps(first, keys)
        again, same = steps(first, keys)  # from the older state: later rows are written anew
        np.testing.assert_array_equal(np.asarray(more), np.asarray(same))
        return np.asarray(slopes), np.asarray(more), then, first, steps

    keys = jax.random.split(jax.random.key(3), 2)
    *device, _, _, _ = run(None, keys)
    *disk, state, first, steps = run(tmp_path, keys)
    for a, b in zip(device, disk, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(device[1]).max() > 0
    assert len(list(tmp_path.iterdir())) == 2
    assert state.memory.tokens.place.shape == (2, 3)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises((ValueError, RuntimeError), match="no longer all in"):
        jax.block_until_ready(steps(first, keys))


def test_each_step_appends_to_a_chains_file_once(tmp_path, monkeypatch):
    """Under the loop's vmap, scan and donation; every draw's places lead to its latents."""
    toy, appends, os_open = large(9, 6, 2), Counter(), os.open

    def count(path, flags, *rest, **settings):
        if flags & os.O_WRONLY and Path(path).name.startswith("latents-"):
            appends[Path(path).name] += 1
        return os_open(path, flags, *rest, **settings)

    def run(path):
        target = em.mcmc_em(toy.model(), toy.questions(), batch_size=4, memory_path=path)
        with jax.numpy_dtype_promotion("standard"):  # optax
            return stochgrad.sample(
                jax.random.key(0),
                stochgrad.ascend(target, optax.sgd(0.1)),
                init=jnp.zeros(2),
                num_samples=15,
                num_chains=3,
                thin=2,
                collect=lambda state: (state.position, state.gradient_state.memory),
                progress=False,
            ).positions

    position, device = run(None)
    monkeypatch.setattr(os, "open", count)
    same, disk = run(tmp_path)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(position))
    file, place, rows = (np.asarray(leaf) for leaf in disk.tokens)
    names = ["latents-" + "".join(f"{part:08x}" for part in number) for number in file[:, 0]]
    assert appends == dict.fromkeys(names, 1 + 15 * 2)
    for chain, name in enumerate(names):
        record = np.dtype([("tokens", np.int32, (1,)), ("mask", bool, (1,))])
        table = np.fromfile(tmp_path / name, record)
        assert len(table) == rows[chain, -1] > 9
        for draw, places in enumerate(place[chain]):
            filled = places > 0
            latents = np.asarray(device.tokens)[chain, draw]
            np.testing.assert_array_equal(table["tokens"][places[filled]], latents[filled])


def test_a_step_whose_memory_nobody_reads_is_appended_too(tmp_path):
    toy, sizes = small(), []
    target = em.mcmc_em(
        toy.model(),
        toy.questions(jnp.arange(3, dtype=jnp.int32)),
        batch_size=3,
        memory_path=tmp_path,
        start=em.Guide(toy.policy()),
        order="full",
    )

    def slope(key):
        state = target.init(key, jnp.zeros(2))
        return target.next(key, jnp.zeros(2), state)[0](jnp.zeros(2))[1]

    keys = jax.random.split(jax.random.key(1), 4)
    jax.block_until_ready(jax.jit(jax.vmap(slope))(keys))
    jax.effects_barrier()
    appended = sorted(file.stat().st_size for file in tmp_path.iterdir())
    for key in keys:
        memory = target.next(key, jnp.zeros(2), target.init(key, jnp.zeros(2)))[1].memory
        sizes.append(int(memory.tokens.count) * 5)  # bytes of a token and its mask
    assert appended == sorted(sizes)
    assert max(sizes) > (1 + 3) * 5
