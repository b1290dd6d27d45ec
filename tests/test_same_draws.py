"""Draws stay what they were: to the bit where they were recorded, to rounding elsewhere.

``tests/same_draws.json`` holds, for each run, a digest and a few numbers. Digests are compared
where they were made: on the same versions of jax and the same processor. Elsewhere compilers round
differently, and the numbers are compared instead. ``python -m tests.test_same_draws`` records anew;
do so only where a change of draws is meant, and say so in CHANGELOG.md.
"""

import hashlib
import json
import os
import platform
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import stochgrad
from stochgrad import federated
from tests.federated import toys

RECORD = Path(__file__).with_name("same_draws.json")
RNG = np.random.default_rng(7)
X = RNG.normal(size=(103, 3)).astype(np.float32)
Y = (RNG.random(103) < 1 / (1 + np.exp(-X @ [1.0, -2.0, 0.5]))).astype(np.float32)
START = {"w": jnp.zeros(3), "b": jnp.float32(0.1)}
CENTER = {"w": jnp.array([0.8, -1.6, 0.4]), "b": jnp.float32(0.0)}
MASS = {"w": np.array([10.0, 12.0, 9.0]), "b": 15.0}


def log_likelihood(theta, batch):
    x, y = batch
    z = x @ theta["w"] + theta["b"]
    return y * z - jnp.logaddexp(jnp.zeros_like(z), z)


def log_prior(theta):
    return -0.5 * (jnp.sum(theta["w"] ** 2) + theta["b"] ** 2)


def target(**options):
    return stochgrad.posterior(log_prior, log_likelihood, (X, Y), **{"batch_size": 10, **options})


def draws_of(kernel, **options):
    options = {"num_samples": 8, "num_warmup": 2, "thin": 3, "num_chains": 2, **options}
    return stochgrad.sample(
        jax.random.key(11), kernel, **{"init": START, "progress": False, **options}
    )


def run(factory, gradient=lambda t: t, data=(), **options):
    return lambda tmp_path: draws_of(factory(gradient(target(**dict(data)))), **options)


def sghmc(**options):
    return lambda t: stochgrad.sghmc(t, **{"step_size": 0.05, "friction": 2.0, **options})


def stored(dtype):
    def draw(tmp_path):
        store = stochgrad.Store(tmp_path / "store", dtype)
        return draws_of(stochgrad.sgld(target(), 0.005), store=store)

    return draw


def resumed(tmp_path):
    kernel = stochgrad.sgld(target(), 0.005)
    places = {"checkpoint": tmp_path / "state", "every": 0.0, "chunk_size": 2, "resume": True}
    draws_of(kernel, num_samples=4, **places)
    return draws_of(kernel, **places)


def online(summary):
    def draw(tmp_path):
        return draws_of(stochgrad.sgld(target(), 0.005), collect=summary).summary

    return draw


def from_disk(tmp_path):
    for name, array in (("x", X), ("y", Y)):
        np.save(tmp_path / f"{name}.npy", array)
    data = tuple(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy")
    streamed = stochgrad.posterior(
        log_prior, log_likelihood, data, batch_size=10, order="streamed", resident_bytes=2000
    )
    return draws_of(stochgrad.sgld(streamed, 0.005))


def model(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", x.shape[0], subsample_size=10):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ w, scale), obs=yb)


def of_numpyro(**options):
    def draw(tmp_path):
        posterior = stochgrad.from_numpyro(model, X, Y, **options)
        return draws_of(stochgrad.sghmc(posterior, 0.01, 2.0, integrator="BAOAB"), init=None)

    return draw


def numpyro_door(kernel):
    def draw(tmp_path):
        mcmc = numpyro.infer.MCMC(
            kernel(), num_warmup=5, num_samples=10, num_chains=1, progress_bar=False
        )
        mcmc.run(jax.random.key(3), X, Y)
        return mcmc.get_samples()

    return draw


def of_clients(factory, correct=None, visits=(), **options):
    def draw(tmp_path):
        posterior, _, _ = toys.gaussian_mean(**{"batch_size": 4, **options})
        posterior = federated.visiting(posterior, **dict(visits)) if visits else posterior
        gradient = posterior if correct is None else correct(posterior)
        return draws_of(factory(gradient), init=jnp.zeros(2))

    return draw


def conducive(posterior):
    surrogates = federated.global_quadratic(posterior, jnp.ones(2))
    return stochgrad.federated.conducive(posterior, surrogates)


def renewed(posterior):
    surrogates = federated.global_quadratic(posterior, jnp.ones(2))
    return federated.conducive_svrg(posterior, surrogates, period=2)


def searched(tmp_path):
    posterior = target()
    center = stochgrad.find_center(jax.random.key(0), posterior, init=START, num_steps=200)
    mass = stochgrad.find_mass(jax.random.key(1), posterior, center)
    gradient = stochgrad.control_variate(posterior, center)
    report = stochgrad.find_step_size(
        jax.random.key(2), gradient, center, friction=mass, mass=mass, integrator="BAOAB"
    )
    kernel = stochgrad.sghmc(
        gradient, report.step_size, friction=mass, mass=mass, integrator="BAOAB"
    )
    return center.position, mass, report.step_size, draws_of(kernel, init=center)


def independent(tmp_path):
    def weight(x):
        return -0.375 * x**2

    def propose(key):
        x = 2.0 * jax.random.normal(key)
        return x, weight(x)

    return draws_of(stochgrad.independence(propose, weight), init=jnp.float32(0.0))


SGLD = partial(stochgrad.sgld, step_size=0.005)
RUNS = {
    "sgld": run(SGLD),
    "sgld discrete": run(partial(SGLD, noise="discrete")),
    "sgld schedule": run(
        partial(stochgrad.sgld, step_size=optax.linear_schedule(0.01, 0.001, 20), temperature=0.5)
    ),
    "psgld": run(partial(stochgrad.psgld, step_size=0.005, regularizer=0.1)),
    "psgld frozen": run(
        partial(stochgrad.psgld, step_size=0.005, regularizer=0.1, adapt_steps=9, decay=0.9)
    ),
    **{
        f"sghmc {name}": run(sghmc(integrator=name))
        for name in ("SGHMC", "EM", "LEAPFROG", "SSI", "LT", "MT3", "BAOAB", "OBABO", "UBU")
    },
    "sghmc online": run(sghmc(noise_estimate="online", friction=9.0, integrator="BAOAB")),
    "sghmc cold": run(sghmc(mass=2.0, noise_estimate=0.1, temperature=0.5)),
    "sghmc diagonal": run(sghmc(mass=MASS, friction=MASS, integrator="BAOAB")),
    "sghmc dense": run(sghmc(mass=np.eye(4) + 0.3, friction=2.0, integrator="SSI")),
    "sghmc schedule": run(sghmc(step_size=optax.linear_schedule(0.05, 0.01, 20))),
    "sgnht": run(partial(stochgrad.sgnht, step_size=0.05, diffusion=1.0)),
    "sgnht each": run(
        partial(stochgrad.sgnht, step_size=0.05, diffusion=1.0, per_coordinate=True, mass=2.0)
    ),
    "cyclical": run(
        lambda t: stochgrad.cyclical(stochgrad.sgld, t, 0.01, steps_per_cycle=8, exploration=0.5)
    ),
    "replica exchange": run(
        lambda t: stochgrad.replica_exchange(
            stochgrad.sgld, t, 0.005, temperatures=(1.0, 2.0, 4.0), swap_every=3, energy_batches=2
        )
    ),
    "ascend": run(lambda t: stochgrad.ascend(t, optax.adam(0.01))),
    "independence": independent,
    "control variate": run(SGLD, lambda t: stochgrad.control_variate(t, CENTER)),
    "svrg": run(SGLD, partial(stochgrad.svrg, period=7)),
    "saga": run(SGLD, stochgrad.saga),
    **{f"order {order}": run(SGLD, data={"order": order}) for order in ("iid", "symmetric")},
    "order full": run(SGLD, data={"order": "full", "batch_size": None}),
    "layout rows": run(SGLD, data={"layout": "rows"}),
    "one chain": run(SGLD, num_chains=1, thin=1),
    "shared minibatches": run(sghmc(integrator="BAOAB"), share_batches=True, num_chains=3),
    "store": stored(None),
    "store float16": stored("float16"),
    "store bfloat16": stored("bfloat16"),
    "resumed": resumed,
    "moments": online(stochgrad.moments(full=True)),
    "swag": online(stochgrad.swag(3)),
    "streamed": from_disk,
    "numpyro model": of_numpyro(),
    "numpyro model rows": of_numpyro(layout="rows"),
    "numpyro model symmetric": of_numpyro(order="symmetric"),
    "numpyro SGLD": numpyro_door(lambda: stochgrad.numpyro.SGLD(model, step_size=1e-3)),
    "numpyro SGHMC": numpyro_door(
        lambda: stochgrad.numpyro.SGHMC(model, step_size=0.01, friction=2.0)
    ),
    "clients": of_clients(SGLD),
    "clients visited": of_clients(
        SGLD, visits={"local_steps": [1, 4, 2], "selection": "permuted"}, order="symmetric"
    ),
    "clients conducive": of_clients(SGLD, conducive, visits={"local_steps": 5}),
    "clients renewed": of_clients(SGLD, renewed, visits={"local_steps": 3}),
    "clients control variate": of_clients(
        SGLD, lambda p: stochgrad.control_variate(p, jnp.ones(2))
    ),
    "search": searched,
}


def machine():
    """What a digest depends on beside the code."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
    parts = (jax.__version__, jax.lib.__version__, numpyro.__version__, optax.__version__, flags)
    parts = (*parts, platform.machine(), jax.default_backend())
    options = [os.environ.get(name) for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")]
    parts = (*parts, *options) if any(options) else parts
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def summary(result):
    """A digest of all arrays, and the last numbers of each."""
    if isinstance(result, tuple) and any(isinstance(x, stochgrad.Draws) for x in result):
        result = tuple(x.positions if isinstance(x, stochgrad.Draws) else x for x in result)
    tree = (
        (result.positions, result.stats.get("log_density"))
        if isinstance(result, stochgrad.Draws)
        else result
    )
    arrays = [np.asarray(x) for x in jax.tree.leaves(tree)]
    digest = hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()[:16]
    return digest, [float(f"{float(v):.6g}") for x in arrays for v in x.ravel()[-3:]]


def once(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return summary(RUNS[name](tmp_path))


def recorded():
    return json.loads(RECORD.read_text())


WARMED_UP = "numpyro SGHMC"
"""Its warm-up makes a rounding large."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.optimized) if n == WARMED_UP else n for n in RUNS],
)
def test_draws_are_those_that_were_recorded(name, tmp_path):
    record = recorded()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        digest, numbers = once(name, tmp_path)
    np.testing.assert_allclose(numbers, record["numbers"][name], rtol=2e-3, atol=2e-3)
    digests = record["digests"].get(machine())
    if digests is not None and name in digests:  # recorded later, on another machine
        assert digest == digests[name]


def test_every_run_is_recorded():
    assert set(recorded()["numbers"]) == set(RUNS)


if __name__ == "__main__":
    import sys
    import tempfile

    record = recorded() if RECORD.exists() else {"digests": {}, "numbers": {}}
    digests = record["digests"].setdefault(machine(), {})
    for name in sys.argv[1:] or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            digests[name], record["numbers"][name] = once(name, Path(folder))
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
