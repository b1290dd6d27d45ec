"""What every kernel must do, whatever its dynamics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stochgrad
from tests.helpers import gaussian_rows

pytestmark = pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")

KERNELS = {
    "sgld": lambda target: stochgrad.sgld(target, 0.01),
    "sgld discrete": lambda target: stochgrad.sgld(target, 0.01, noise="discrete"),
    "sgld schedule": lambda target: stochgrad.sgld(target, optax.linear_schedule(0.02, 0.01, 20)),
    "sghmc": lambda target: stochgrad.sghmc(target, 0.05, 2.0),
    "sghmc EM": lambda target: stochgrad.sghmc(target, 0.02, 5.0, integrator="EM"),
    "sghmc cold": lambda target: stochgrad.sghmc(
        target, 0.05, 2.0, mass=2.0, noise_estimate=0.1, temperature=0.5
    ),
    "sghmc BAOAB": lambda target: stochgrad.sghmc(target, 0.05, 2.0, integrator="BAOAB"),
    "sghmc UBU": lambda target: stochgrad.sghmc(
        target, 0.05, 2.0, integrator="UBU", noise_estimate="online"
    ),
    "sghmc MT3": lambda target: stochgrad.sghmc(
        target, optax.linear_schedule(0.05, 0.02, 20), 2.0, integrator="MT3"
    ),
    "sghmc dense": lambda target: stochgrad.sghmc(
        target, 0.05, 2.0, mass=np.eye(6) + 0.3, integrator="SSI"
    ),
    "psgld": lambda target: stochgrad.psgld(target, 0.01, regularizer=0.1),
    "sgnht": lambda target: stochgrad.sgnht(target, 0.05, 1.0),
    "sgnht each": lambda target: stochgrad.sgnht(
        target, optax.linear_schedule(0.05, 0.02, 20), 1.0, per_coordinate=True, mass=2.0
    ),
    "cyclical": lambda target: stochgrad.cyclical(
        partial(stochgrad.sghmc, friction=2.0, integrator="OBABO"),
        target,
        0.05,
        steps_per_cycle=8,
        exploration=0.5,
    ),
    "replica exchange": lambda target: stochgrad.replica_exchange(
        partial(stochgrad.sghmc, friction=2.0, integrator="BAOAB"),
        target,
        0.05,
        temperatures=(1.0, 2.0, 4.0),
        swap_every=3,
        energy_batches=2,
    ),
    "ascend": lambda target: stochgrad.ascend(target, optax.adam(0.01)),
}
GRADIENTS = {
    "minibatch": lambda target: target,
    "control variate": lambda target: stochgrad.control_variate(
        target, {"a": jnp.zeros(3), "b": (jnp.zeros((2, 1)), jnp.zeros(()))}
    ),
}


def tree_target(**options):
    x = jnp.asarray(gaussian_rows(23, 6)[0], float)

    def flat(p):
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(p)])

    return stochgrad.posterior(
        lambda p: -0.5 * jnp.sum(flat(p) ** 2),
        lambda p, batch: -0.5 * jnp.sum((batch - flat(p)[None]) ** 2, axis=1),
        x,
        **{"batch_size": 5, **options},
    )


def position(dtype=jnp.float32):
    return {"a": jnp.ones(3, dtype), "b": (jnp.zeros((2, 1), dtype), jnp.array(0.5, dtype))}


BASIC = ("sgld", "sghmc", "ascend")
"""Kernels that go through every test; the others, slow, through those that take ``any_make``."""


def kernel_fixture(names):
    params = [pytest.param(name, marks=() if name in BASIC else pytest.mark.slow) for name in names]

    @pytest.fixture(params=params)
    def fixture(request):
        if request.param in (
            "sgld schedule",
            "ascend",
            "sghmc MT3",
            "sgnht each",
        ):  # optax promotes
            with jax.numpy_dtype_promotion("standard"):
                yield KERNELS[request.param]
        else:
            yield KERNELS[request.param]

    return fixture


EACH = (*BASIC, "sghmc MT3", "psgld", "sgnht each", "cyclical", "replica exchange")
"""One kernel of each factory, and of those with several scores a step."""

make = kernel_fixture(BASIC)
each_make = kernel_fixture(EACH)
any_make = kernel_fixture(KERNELS)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_structure_and_types_come_out_as_they_went_in(any_make):
    """Under a check that no key is used twice."""
    kernel = any_make(tree_target())
    with jax.debug_key_reuse(True):
        state = jax.jit(kernel.init)(position(), jax.random.key(0))
        step = jax.jit(kernel.step)
        after, info = step(jax.random.key(1), state)
        step(jax.random.key(2), after)
    describe = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert describe(after) == describe(state)
    assert all(jnp.shape(x) == () for x in info)


def test_jit_equals_eager(make, key):
    kernel = make(tree_target())
    state = kernel.init(position(), key)
    eager, compiled = kernel.step(key, state)[0], jax.jit(kernel.step)(key, state)[0]
    assert_trees_close(eager.position, compiled.position, rtol=1e-5, atol=1e-6)


def test_a_control_variate_fits_every_kernel(make, key):
    kernel = make(GRADIENTS["control variate"](tree_target()))
    with jax.debug_key_reuse(True):
        state = jax.jit(kernel.init)(position(), jax.random.key(0))
        after, _ = jax.jit(kernel.step)(jax.random.key(1), state)
    describe = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert describe(after) == describe(state)


def test_double_precision_is_kept(each_make):
    with jax.enable_x64(True):
        kernel = each_make(tree_target())
        state = kernel.init(position(jnp.float64), jax.random.key(0))
        after, _ = jax.eval_shape(kernel.step, jax.random.key(1), state)
        assert {x.dtype for x in jax.tree.leaves(after.position)} == {jnp.dtype("float64")}


@pytest.mark.parametrize("order", ["reshuffled", "full"])
def test_chains_together_equal_chains_alone(make, order, key):
    kernel = make(tree_target(order=order, batch_size=None if order == "full" else 5))
    start = jax.jit(jax.vmap(kernel.init, in_axes=(None, 0)))
    together = start(position(), jax.random.split(key, 3))
    together, _ = jax.jit(jax.vmap(kernel.step))(jax.random.split(key, 3), together)
    one = jax.jit(lambda k: kernel.step(k, kernel.init(position(), k))[0])
    for chain, k in enumerate(jax.random.split(key, 3)):
        alone = one(k)
        assert_trees_close(
            jax.tree.map(lambda x, c=chain: x[c], together.position), alone.position, rtol=1e-5,
            atol=1e-6,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("num_chains", "share"), [(1, False), (3, True), pytest.param(3, False, marks=pytest.mark.slow)]
)
def test_chunks_do_not_change_a_draw(make, num_chains, share, key):
    kernel = make(tree_target())
    run = lambda **options: stochgrad.sample(
        key,
        kernel,
        init=position(),
        num_samples=17,
        num_warmup=3,
        thin=2,
        num_chains=num_chains,
        share_batches=share,
        **options,
    )
    whole, pieces = run(progress=False), run(chunk_size=4, progress=True)
    assert_trees_equal(whole.positions, pieces.positions)
    assert_trees_equal(whole.stats, pieces.stats)


def test_a_second_run_compiles_nothing(make, key, caplog):
    kernel = make(tree_target())
    run = lambda k: stochgrad.sample(k, kernel, init=position(), num_samples=5, num_chains=2)
    run(key)
    with jax.log_compiles():
        run(jax.random.key(1))
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


def test_the_callers_arrays_survive(make, key):
    start = position()
    stochgrad.sample(key, make(tree_target()), init=start, num_samples=3)
    assert_trees_equal(start, position())
    start = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    stochgrad.sample(key, make(tree_target()), init=start, num_samples=3, num_chains=2)
    assert float(start["a"].sum()) == 6.0


def test_no_tracer_leaks(make):
    with jax.checking_leaks():
        kernel = make(tree_target())
        state = jax.jit(kernel.init)(position(), jax.random.key(0))
        jax.jit(kernel.step)(jax.random.key(1), state)


@pytest.mark.slow
def test_gradients_with_a_memory_fit_every_kernel(each_make, key, request):
    """With two chains, chunked and whole to the bit; kernels take turns at the combinations."""
    turn = list(KERNELS).index(request.node.callspec.params["each_make"])
    factory, order = [("svrg", "symmetric"), ("saga", "iid"), ("saga", "reshuffled")][turn % 3]
    kernel = each_make(getattr(stochgrad, factory)(tree_target(order=order)))
    run = lambda **options: stochgrad.sample(
        key,
        kernel,
        init=position(),
        num_samples=9,
        num_warmup=1,
        num_chains=2,
        share_batches=factory == "svrg",
        **options,
    )
    whole, pieces = run(), run(chunk_size=4)
    assert_trees_equal(whole.positions, pieces.positions)
    assert_trees_equal(whole.stats, pieces.stats)
    assert whole.finite.all()
    describe = lambda tree, skip: [(x.shape[skip:], x.dtype) for x in jax.tree.leaves(tree)]
    assert describe(whole.positions, 2) == describe(position(), 0)
