"""Small flows, and the score behind one by brute force."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
from flowjax import bijections as bij
from flowjax import flows
from flowjax.distributions import Normal, StandardNormal, Transformed

from stochgrad.flows import Continuous

DIM = 4
BASE = StandardNormal((DIM,))


def log_density(x):
    """What flows are held against: neither normal nor centered."""
    return -0.5 * jnp.sum((x - 0.3) ** 2) - 0.1 * jnp.sum(x**4)


def spline():
    return bij.RationalQuadraticSpline(knots=4, interval=4)


class Bend(bij.AbstractBijection):
    """x + a tanh(x), without an inverse in closed form."""

    a: jax.Array
    shape: tuple = ()
    cond_shape: None = None

    def transform_and_log_det(self, x, condition=None):
        a = jax.nn.softplus(self.a)
        return x + a * jnp.tanh(x), jnp.log1p(a * (1 - jnp.tanh(x) ** 2))

    def inverse_and_log_det(self, y, condition=None):
        raise NotImplementedError


class Field(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, x, t):
        return self.net(jnp.append(x, t.astype(x.dtype)))


def containers(key):
    """One of each container of flowjax, most of them inside out as well."""
    keys = jax.random.split(key, 4)
    half = bij.Coupling(
        keys[0], transformer=bij.Affine(), untransformed_dim=1, dim=2, nn_width=5, nn_depth=1,
        nn_activation=jnp.tanh,
    )  # fmt: skip
    scale = bij.Scale(jnp.array([0.5, 2.0]))
    return bij.Chain(
        [
            bij.Concatenate([half, scale]),
            bij.Permute(jnp.array([2, 0, 3, 1])),
            bij.Reshape(bij.Stack([half, bij.Invert(half)]), (DIM,)),
            bij.Invert(bij.Chain([bij.Concatenate([scale, half]), bij.Flip((DIM,))])),
            bij.Indexed(half, jnp.array([3, 0]), (DIM,)),
            bij.Invert(bij.Sandwich(bij.Scale(jnp.array([1.0, 2.0, 1.5, 1.0])), bij.Tanh((DIM,)))),
            bij.Vmap(bij.LeakyTanh(2.0), axis_size=DIM),
            bij.Planar(keys[1], dim=DIM),
        ]
    )


def make(name):
    """A flow by name, its weights moved away from where they start."""
    key = jax.random.key(7)
    smooth = {"base_dist": BASE, "nn_activation": jnp.tanh, "nn_width": 8, "flow_layers": 3}
    made = {
        "affine coupling": lambda: flows.coupling_flow(key, invert=False, **smooth),
        "inverted coupling": lambda: flows.coupling_flow(key, invert=True, **smooth),
        "spline coupling": lambda: flows.coupling_flow(
            key, transformer=spline(), invert=False, **smooth
        ),
        "implicit coupling": lambda: flows.coupling_flow(
            key, transformer=Bend(jnp.array(0.5)), invert=False, **smooth
        ),
        "autoregressive": lambda: flows.masked_autoregressive_flow(key, invert=False, **smooth),
        "inverted autoregressive": lambda: flows.masked_autoregressive_flow(
            key, invert=True, **smooth
        ),
        "block autoregressive": lambda: flows.block_neural_autoregressive_flow(
            key, base_dist=BASE, invert=False, nn_block_dim=3
        ),
        "triangular spline": lambda: flows.triangular_spline_flow(
            key, base_dist=BASE, invert=False, flow_layers=2, knots=3
        ),
        "continuous": lambda: Transformed(
            BASE,
            Continuous(
                Field(eqx.nn.MLP(DIM + 1, DIM, 8, 1, jnp.tanh, key=key)),
                shape=(DIM,),
                num_steps=20,
            ),
        ),
        "conditional": lambda: Transformed(
            BASE,
            bij.EmbedCondition(
                flows.coupling_flow(key, invert=False, cond_dim=2, **smooth).bijection,
                eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=key),
                (3,),
            ),
        ),
        "containers": lambda: Transformed(
            Normal(jnp.zeros(DIM), jnp.full(DIM, 0.5)), containers(key)
        ),
        "base": lambda: BASE,
    }[name]()  # fmt: skip
    arrays, rest = eqx.partition(
        made, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable)
    )
    random = np.random.default_rng(7)  # numpy's, which compiles nothing for each shape
    moved = jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(x.dtype), arrays)
    return eqx.combine(moved, rest)


def draws(flow, key, count):
    """Draws by the flow's own forward map, with the keys that the library takes."""
    flow = paramax.unwrap(flow)

    def one(key):
        return flow.bijection.transform(flow.base_dist._sample(key, None), None)

    return jax.vmap(one)(jax.random.split(key, count))


def scores_by_force(flow, key, count, condition=None):
    """Draws as the library makes them, their log densities and scores."""
    keys = jax.random.split(key, count)
    return jax.vmap(lambda key: score_by_force(flow, key, condition))(keys)


def score_by_force(flow, key, condition=None):
    r"""One draw, and its score from $J^\top s = \nabla_z\log q(T(z))$ with the whole Jacobian."""
    flow = paramax.unwrap(flow)
    flow = flow.merge_transforms() if hasattr(flow, "merge_transforms") else flow
    z = flow.base_dist._sample(key, condition)  # as the library draws

    def log_density(z):
        x, log_det = flow.bijection.transform_and_log_det(z, condition)
        return flow.base_dist._log_prob(z, condition) - log_det

    jacobian = jax.jacrev(lambda z: flow.bijection.transform(z, condition))(z)
    x = flow.bijection.transform(z, condition)
    return x, log_density(z), jnp.linalg.solve(jacobian.T, jax.grad(log_density)(z))
