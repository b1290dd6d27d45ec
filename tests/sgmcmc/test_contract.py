"""What every kernel and every gradient must do, whatever its dynamics.

To have a new one tested, enter it in ``stochgrad.sgmcmc.KERNELS`` or in
``stochgrad.gradients.GRADIENTS``.
"""

from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stochgrad
from stochgrad.gradients import GRADIENTS
from stochgrad.sgmcmc import KERNELS
from tests.core.test_jit import compilations
from tests.helpers import gaussian_rows

pytestmark = pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning")

VARIANTS = {
    "sgld discrete": partial(stochgrad.sgld, step_size=0.01, noise="discrete"),
    "sgld schedule": partial(stochgrad.sgld, step_size=optax.linear_schedule(0.02, 0.01, 20)),
    "sghmc EM": partial(stochgrad.sghmc, step_size=0.02, friction=5.0, integrator="EM"),
    "sghmc cold": partial(
        stochgrad.sghmc, step_size=0.05, friction=2.0, mass=2.0, noise_estimate=0.1, temperature=0.5
    ),
    "sghmc BAOAB": partial(stochgrad.sghmc, step_size=0.05, friction=2.0, integrator="BAOAB"),
    "sghmc UBU": partial(
        stochgrad.sghmc, step_size=0.05, friction=2.0, integrator="UBU", noise_estimate="online"
    ),
    "sghmc MT3": partial(
        stochgrad.sghmc,
        step_size=optax.linear_schedule(0.05, 0.02, 20),
        friction=2.0,
        integrator="MT3",
    ),
    "sghmc dense": partial(
        stochgrad.sghmc, step_size=0.05, friction=2.0, mass=np.eye(6) + 0.3, integrator="SSI"
    ),
    "sgnht each": partial(
        stochgrad.sgnht,
        step_size=optax.linear_schedule(0.05, 0.02, 20),
        diffusion=1.0,
        per_coordinate=True,
        mass=2.0,
    ),
    "ascend": partial(stochgrad.ascend, optimizer=optax.adam(0.01)),
}
SAMPLERS = {**KERNELS, **VARIANTS}
CENTER = {"a": jnp.zeros(3), "b": (jnp.zeros((2, 1)), jnp.zeros(()))}
QUICK = ("sgld", "sghmc", "ascend", "control variate")
"""What is tested without ``slow``, too."""


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


class Case:
    """A kernel, and what its tests have in common: programs are compiled once for all of them."""

    def __init__(self, name):
        self.name = name

    def kernel(self, dtype=jnp.float32):
        if self.name in GRADIENTS:
            center = jax.tree.map(lambda x: x.astype(dtype), CENTER)
            return stochgrad.sgld(GRADIENTS[self.name](tree_target(), center), 0.01)
        return SAMPLERS[self.name](tree_target())

    @cached_property
    def own(self):
        return self.kernel()

    @cached_property
    def init(self):
        return jax.jit(self.own.init)

    @cached_property
    def step(self):
        return jax.jit(self.own.step)

    def sample(self, key, num_samples=11, **options):
        defaults = {"init": position(), "num_warmup": 3, "thin": 2, "num_chains": 2}
        options = {**defaults, "progress": False, **options}
        return stochgrad.sample(key, self.own, num_samples=num_samples, **options)

    @cached_property
    def whole(self):
        return self.sample(jax.random.key(20260501))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in (*SAMPLERS, *GRADIENTS)
    ],
)
def case(request):
    return Case(request.param)


@pytest.fixture(autouse=True)
def _optax_promotes(case):
    if case.name in ("sgld schedule", "ascend", "sghmc MT3", "sgnht each"):
        with jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def form(tree, skip=0):
    return [(x.shape[skip:], x.dtype) for x in jax.tree.leaves(tree)]


def test_structure_and_types_come_out_as_they_went_in(case):
    """Under a check that no key is used twice."""
    with jax.debug_key_reuse(True):
        state = case.init(position(), jax.random.key(0))
        after, info = case.step(jax.random.key(1), state)
        case.step(jax.random.key(2), after)
    assert form(after) == form(state)
    assert form(after.position) == form(position())
    assert all(jnp.shape(x) == () for x in jax.tree.leaves(info))


def test_jit_equals_eager(case, key):
    state = case.init(position(), key)
    eager, jitted = case.own.step(key, state)[0], case.step(key, state)[0]
    assert_trees_close(eager.position, jitted.position, rtol=1e-5, atol=1e-6)


def test_double_precision_is_kept(case):
    with jax.enable_x64(True):
        kernel, start = case.kernel(jnp.float64), position(jnp.float64)
        state = jax.eval_shape(kernel.init, start, jax.random.key(0))
        after, _ = jax.eval_shape(kernel.step, jax.random.key(1), state)
        assert {x.dtype for x in jax.tree.leaves(after.position)} == {jnp.dtype("float64")}


def test_chains_together_equal_chains_alone(case, key):
    keys = jax.random.split(key, 3)
    together = jax.vmap(case.own.init, in_axes=(None, 0))(position(), keys)
    together = jax.jit(jax.vmap(lambda k, s: case.own.step(k, s)[0]))(keys, together)
    for chain, k in enumerate(keys):
        alone, _ = case.step(k, case.init(position(), k))
        own = jax.tree.map(lambda x, c=chain: x[c], together.position)
        assert_trees_close(own, alone.position, rtol=1e-5, atol=1e-6)


def test_draws_have_the_form_of_the_position(case):
    assert form(case.whole.positions, 2) == form(position())
    assert case.whole.finite.all()
    assert {"log_density", "gradient_norm"} <= set(case.whole.stats)


def test_chunks_do_not_change_a_draw(case, key):
    pieces = case.sample(key, chunk_size=4, progress=True)
    assert_trees_equal(case.whole.positions, pieces.positions)
    assert_trees_equal(case.whole.stats, pieces.stats)


@pytest.mark.parametrize("share", [True, False])
def test_other_numbers_of_chains(case, share, key):
    """Shared minibatches and one chain alone have programs of their own."""
    options = {"num_chains": 2, "share_batches": True} if share else {"num_chains": 1}
    whole, pieces = case.sample(key, **options), case.sample(key, chunk_size=4, **options)
    assert_trees_equal(whole.positions, pieces.positions)
    assert whole.finite.all()


def test_a_resumed_run_is_the_whole_one(case, key, tmp_path):
    places = {"checkpoint": tmp_path, "every": 0.0, "resume": True}
    case.sample(key, num_samples=4, **places)
    assert_trees_equal(case.whole.positions, case.sample(key, **places).positions)


def test_a_second_run_and_a_kernel_made_again_compile_nothing(case, key):
    case.whole  # noqa: B018
    again = Case(case.name)
    again.own  # noqa: B018
    with compilations() as names:
        case.sample(jax.random.key(1))
        repeated = again.sample(key)
    assert names == []
    assert_trees_equal(case.whole.positions, repeated.positions)


def test_the_callers_arrays_survive(case, key):
    start = position()
    case.sample(key, init=start)
    assert_trees_equal(start, position())
    start = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    case.sample(key, init=start)
    assert float(start["a"].sum()) == 6.0


def test_no_tracer_leaks(case):
    with jax.checking_leaks():
        kernel = case.kernel()
        state = jax.eval_shape(kernel.init, position(), jax.random.key(0))
        jax.eval_shape(kernel.step, jax.random.key(1), state)


def test_a_kernel_starts_where_its_gradient_does(case):
    if case.name in GRADIENTS:
        gradient = GRADIENTS[case.name](tree_target(), CENTER)
        assert gradient.posterior is not None
        return
    inner = stochgrad.gradients.minibatch(tree_target())
    kernel = SAMPLERS[case.name](inner._replace(initial=lambda key: position()))
    assert_trees_equal(kernel.initial(jax.random.key(0)), position())
    assert kernel.posterior is inner.posterior


def test_every_gradient_in_every_order(case):
    """By shapes: whatever the gradient remembers, it comes out as it went in."""
    for order in ("reshuffled", "symmetric", "iid"):
        for name, gradient in GRADIENTS.items():
            if case.name in GRADIENTS and case.name != name:
                continue
            factory = SAMPLERS.get(case.name, KERNELS["sgld"])
            kernel = factory(gradient(tree_target(order=order), CENTER))
            state = jax.eval_shape(kernel.init, position(), jax.random.key(0))
            after, _ = jax.eval_shape(kernel.step, jax.random.key(1), state)
            assert form(after) == form(state), (order, name)
