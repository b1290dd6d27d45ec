"""How far each sampler is from the posterior, at an equal budget of minibatch gradients.

``python benchmarks/family.py`` prints the tables and writes them to ``docs/results/comparison.md``:
logistic regression on the flights of ``examples/flights.py`` against NUTS, and a small neural
network on scikit-learn's digits against full-gradient HMC. ``--smoke`` is a short version that
writes nothing unless ``--output`` is given. References are kept in ``benchmarks/output``.
"""

import argparse
import sys
import time
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

warnings.simplefilter("ignore", FutureWarning)

import blackjax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro.diagnostics import effective_sample_size  # noqa: E402
from numpyro.distributions import biject_to  # noqa: E402
from numpyro.infer import HMC, HMCECS, MCMC, NUTS, init_to_value  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import stochgrad  # noqa: E402
from stochgrad.core import Kernel, Posterior  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import flights  # noqa: E402

warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)
warnings.simplefilter("ignore", stochgrad.DivergenceWarning)
warnings.simplefilter("ignore", UserWarning)

CACHE = Path(__file__).parent / "output"
INTEGRATORS = [
    *("EM", "SGHMC", "LEAPFROG", "SSI", "LT", "OBABO"),
    *("BAOAB", "ABOBA", "OABAO", "UBU", "BUB", "MT3"),
]
ORDERS = ["reshuffled", "iid", "symmetric"]
FULL = {
    "budget": 50_000,  # minibatch gradients a chain, logistic regression
    "rows": 50_000,
    "test": 20_000,
    "reference": (500, 2500),  # warm-up and draws of each of two chains
    "everywhere": ["EM", "SGHMC", "BAOAB", "MT3"],  # integrators under all three orders
    "integrators": INTEGRATORS,
    "ecs_warmup": 300,
    "net_budget": 20_000,
    "net_reference": (150, 300),
    "net_integrators": ["SGHMC", "BAOAB", "UBU", "MT3"],
    "draws": 2200,
    "net_draws": 500,
    "net_orders": ORDERS,
    "rivals": ("sgld", "sghmc", "sgnht"),
    "proxies": (2,),  # orders of HMCECS's Taylor proxy
    "gradients": ("svrg", "saga", "plain"),
    "brief": False,  # leave out all but the main contenders
}
SMOKE = {
    **FULL,
    "budget": 4000,
    "rows": 5000,
    "reference": (100, 100),
    "everywhere": [],
    "integrators": ["BAOAB"],
    "ecs_warmup": 30,
    "net_budget": 1000,
    "net_reference": (10, 10),
    "net_integrators": ["BAOAB"],
    "draws": 220,
    "net_draws": 50,
    "net_orders": ORDERS[:1],
    "rivals": ("sghmc",),
    "gradients": ("plain",),
    "brief": True,
}
CHAINS, NET_CHAINS = 4, 8
ECS_PIECE = 10  # draws of HMCECS between two looks at its budget
DEFAULT = "sghmc BAOAB", "control variate", "reshuffled"
SHARES = {  # the grid of a rival's step sizes, in shares of its stability limit
    "sgld": 1 / (2 * 3.0 ** np.arange(6)),
    "sghmc": 1 / (8 * 2.0 ** np.arange(6)),
    "sgnht": 1 / (8 * 3.0 ** np.arange(6)),
}


class Run(NamedTuple):
    """What a contender drew: unconstrained draws (chain, draw, d), and what they cost."""

    name: str
    gradient: str
    order: str
    draws: np.ndarray
    step_size: float
    per_step: int
    gradients: float
    seconds: float


def note(*words):
    print(f"[{time.perf_counter() - BEGUN:5.0f} s]", *words, file=sys.stderr, flush=True)


BEGUN = time.perf_counter()


# ---------------------------------------------------------------- running


def run(key, kernel, init, budget, per_step, keep, chains):
    """Spend a budget of gradients, the first tenth of the draws on warming up."""
    steps = int(budget // per_step)
    thin = max(1, steps // keep)
    total = steps // thin
    return stochgrad.sample(
        key,
        kernel,
        init=init,
        num_warmup=total // 10,
        num_samples=total - total // 10,
        thin=thin,
        num_chains=chains,
        progress=False,
    )


def spent(draws, per_step):
    """Gradients of a chain, warm-up included."""
    return (draws.attrs["num_warmup"] + draws.num_draws) * draws.attrs["thin"] * per_step


def as_run(label, draws, step_size, per_step, used=None):
    """A finished run of ours; ``used`` picks draws."""
    positions = np.asarray(draws.positions, np.float64)
    positions = positions if used is None else positions[:, used]
    return Run(
        *label, positions, step_size, per_step, spent(draws, per_step), draws.timings["sample"]
    )


class RivalState(NamedTuple):
    position: Any
    inner: Any
    batches: Any


class RivalInfo(NamedTuple):
    step_size: Any


def rival_kernel(algorithm, target):
    """A blackjax sampler as a kernel of the same loop, fed by the same stream of minibatches.

    The step size travels with the position, so that all of a grid run in one program.
    """

    def init(position, key):
        batch_key, key = jax.random.split(key)
        inner = algorithm.init(position["z"], key)
        return RivalState(position, inner, target.batches.init(batch_key))

    def step(key, state):
        h = state.position["h"]
        batch, batches = target.batches.next(state.batches)
        inner = algorithm.step(key, state.inner, batch, h)
        z = getattr(inner, "position", inner)
        return RivalState({"z": z, "h": h}, inner, batches), RivalInfo(h)

    return Kernel(init, step, "blackjax", ())


def rival_runs(key, name, target, gradient_of, init, limit, budget, keep, center=None, shown=None):
    """A blackjax sampler at each step size of the grid: one run for each.

    ``init`` has a leading axis of chains. Its sghmc takes ten steps on a minibatch.
    """
    estimate = jax.grad(target.log_density)
    if center is not None:
        full = jax.jit(estimate)(center, target.batches.full)
        plain = estimate
        estimate = lambda z, batch: jax.tree.map(
            lambda here, there, whole: here - there + whole,
            plain(z, batch),
            plain(center, batch),
            full,
        )
    algorithm = getattr(blackjax, name)(estimate)
    inner = 10 if name == "sghmc" else 1
    each = 1 if center is None else 2
    chains = len(init)
    grid = limit * SHARES[name]
    position = {
        "z": jnp.tile(init, (len(grid), 1)),
        "h": jnp.repeat(jnp.asarray(grid, jnp.float32), chains),
    }
    kernel = rival_kernel(algorithm, target)
    draws = run(key, kernel, position, budget, inner * each, keep, chains * len(grid))
    z = np.asarray(draws.positions["z"], np.float64)
    label = shown or f"blackjax {name}", gradient_of, "iid"
    gradients = spent(draws, inner * each)
    return [
        Run(
            *label,
            z[i * chains : (i + 1) * chains],
            float(h),
            inner * each,
            gradients,
            draws.timings["sample"] / len(grid),
        )
        for i, h in enumerate(grid)
    ]


# ---------------------------------------------------------------- errors


def ess(draws):
    with np.errstate(all="ignore"):
        return np.asarray(effective_sample_size(np.asarray(draws, np.float64)))


def moments(draws):
    """Mean and sd of each parameter, and the squared Monte Carlo errors of mean and log sd."""
    mean, variance = draws.mean(axis=(0, 1)), draws.var(axis=(0, 1))
    square = (draws - mean) ** 2
    of_mean = variance / ess(draws)
    of_sd = square.var(axis=(0, 1)) / ess(square) / (4 * variance**2)
    return mean, np.sqrt(variance), of_mean, of_sd


def errors(draws, reference):
    """Squared errors of means and sds against the reference, and what an unbiased run would show."""
    if draws.shape[1] < 4 or not np.isfinite(draws).all():
        return dict.fromkeys(("sd", "sd_floor", "mean", "mean_floor"), np.inf)
    mean, sd, of_mean, of_sd = moments(draws)
    true_mean, true_sd, true_of_mean, true_of_sd = moments(reference)
    return {
        "sd": np.mean((sd / true_sd - 1) ** 2),
        "sd_floor": np.mean(of_sd + true_of_sd),
        "mean": np.mean(((mean - true_mean) / true_sd) ** 2),
        "mean_floor": np.mean((of_mean + true_of_mean) / true_sd**2),
    }


def calibration_error(p, y, bins=20):
    """Mean gap of predicted and observed share over bins of equal count."""
    parts = np.array_split(np.argsort(p, kind="stable"), bins)
    return sum(len(i) * abs(p[i].mean() - y[i].mean()) for i in parts) / len(p)


# ---------------------------------------------------------------- logistic regression


class Layout(NamedTuple):
    """Where each site of the flights model lies in the vector of all parameters."""

    place: dict[str, slice]
    size: int


def layout(sizes):
    """The model's sites in alphabetical order, as numpyro's own dicts ravel."""
    lengths = {"intercept": 1, "slope": 7}
    for name in flights.GROUPS:
        lengths |= {f"{name}_scale": 1, f"{name}_effect": sizes[name] - 1}
    place, at = {}, 0
    for name in sorted(lengths):
        place[name] = slice(at, at + lengths[name])
        at += lengths[name]
    return Layout(place, at)


def design(rows, sizes, where):
    """A column for each parameter: contrasts of the groups (effects sum to zero), scales none."""
    x = np.zeros((len(rows["late"]), where.size), np.float32)
    x[:, where.place["intercept"]] = 1
    x[:, where.place["slope"]] = rows["x"]
    for name in flights.GROUPS:
        support = dist.ZeroSumNormal(1.0, (sizes[name],)).support
        contrasts = jax.vmap(biject_to(support))(jnp.eye(sizes[name] - 1))
        x[:, where.place[f"{name}_effect"]] = np.asarray(contrasts).T[rows[name]]
    return x


def log_prior(where, z):
    part = {name: z[at] for name, at in where.place.items()}
    value = -jnp.sum(part["intercept"] ** 2) / 8 - jnp.sum(part["slope"] ** 2) / 2
    for name in flights.GROUPS:
        log_scale, effect = part[f"{name}_scale"][0], part[f"{name}_effect"]
        value += (1 - len(effect)) * log_scale - jnp.exp(2 * log_scale) / 2
        value -= jnp.exp(-2 * log_scale) * jnp.sum(effect**2) / 2
    return value


def log_likelihood(z, batch):
    x, late = batch
    logit = x @ z
    return late * logit - jax.nn.softplus(logit)


def design_model(where, x, late, minibatch=None):
    """The same once more in numpyro, for HMCECS: effects by their contrasts."""
    part = {
        "intercept": numpyro.sample("intercept", dist.Normal(0.0, 2.0))[None],
        "slope": numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([7]).to_event(1)),
    }
    for name in flights.GROUPS:
        scale = numpyro.sample(f"{name}_scale", dist.HalfNormal(1.0))
        at = where.place[f"{name}_effect"]
        effect = dist.Normal(0.0, scale).expand([at.stop - at.start]).to_event(1)
        part[f"{name}_effect"] = numpyro.sample(f"{name}_effect", effect)
        part[f"{name}_scale"] = jnp.zeros(1)
    z = jnp.concatenate([part[name] for name in where.place])
    with numpyro.plate("flight", len(late), subsample_size=minibatch):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(late, event_dim=0)
        numpyro.sample("late", dist.Bernoulli(logits=xb @ z), obs=yb)


def by_site(where, z):
    """A vector of parameters as the model's own dict."""
    scalar = lambda name: name == "intercept" or name.endswith("_scale")
    return {name: z[at][0] if scalar(name) else z[at] for name, at in where.place.items()}


def check_same(target, rows, sizes, where):
    """Raise unless the vector form is the model of ``examples/flights.py``."""
    model = stochgrad.from_numpyro(flights.model, rows, sizes, minibatch=500)
    z = 0.2 * np.random.default_rng(0).normal(size=(3, where.size)).astype(np.float32)
    theirs = [model.log_density(by_site(where, v), model.batches.full) for v in z]
    ours = [target.log_density(v, target.batches.full) for v in z]
    np.testing.assert_allclose(np.diff(ours), np.diff(theirs), rtol=1e-3, atol=0.5)


def flights_reference(target, center, sizes):
    """NUTS on all rows, from the cache if it is there."""
    warmup, num_samples = sizes
    path = CACHE / f"flights-{target.batches.size}-{num_samples}.npz"
    if path.exists():
        return np.load(path)["draws"]
    mcmc = MCMC(
        NUTS(potential_fn=lambda z: -target.log_density(z, target.batches.full), dense_mass=True),
        num_warmup=warmup,
        num_samples=num_samples,
        num_chains=2,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(10), init_params=jnp.stack([center, center]))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True), np.float64)
    CACHE.mkdir(exist_ok=True)
    np.savez(path, draws=draws)
    return draws


def hmcecs(key, where, data, center, mass, budget, warmup, degree=2):
    """numpyro's HMCECS, chain by chain; a leapfrog step counts as two minibatch gradients."""
    args = (*data, 500)
    values = {
        name: jnp.exp(v) if name.endswith("_scale") else v
        for name, v in by_site(where, jnp.asarray(center)).items()
    }
    kernel = HMCECS(
        NUTS(
            partial(design_model, where),
            init_strategy=init_to_value(values=values),
            inverse_mass_matrix=jnp.asarray(1 / mass),
        ),
        num_blocks=50,
        proxy=HMCECS.taylor_proxy(values, degree=degree),
    )

    def one(state, _):
        state = kernel.sample(state, args, {})
        z = jnp.concatenate([jnp.ravel(state.z[name]) for name in where.place])
        return state, (z, state.hmc_state.num_steps)

    # as MCMC does it, but compiled once for all chains, in pieces until the budget is spent
    advance = jax.jit(lambda state: jax.lax.scan(one, state, length=ECS_PIECE))
    chains, leaps, seconds = [], [], 0.0
    for chain_key in jax.random.split(key, CHAINS):
        state = kernel.init(chain_key, warmup, None, args, {})
        if not chains:
            jax.block_until_ready(advance(state))  # compile
        draws, steps, took = [], [], []
        while np.sum(steps) < budget / 2:
            begun = time.perf_counter()
            state, (z, count) = jax.block_until_ready(advance(state))
            took.append(time.perf_counter() - begun)
            draws.append(np.asarray(z, np.float64))
            steps.append(np.asarray(count, np.int64))
        chains.append(np.concatenate(draws)[warmup:])
        leaps.append(np.sum(steps))
        seconds += sum(took[warmup // ECS_PIECE :])
        note("HMCECS chain", len(chains[-1]), leaps[-1], f"{sum(took):.1f} s")
    shortest = min(map(len, chains))
    return Run(
        "numpyro HMCECS",
        f"{'first' if degree == 1 else 'second'}-order proxy",
        "iid",
        np.stack([draws[:shortest] for draws in chains]),
        float(state.hmc_state.adapt_state.step_size),
        2,
        2 * float(np.mean(leaps)),
        seconds * shortest / np.mean([len(draws) for draws in chains]),
    )


class Problem(NamedTuple):
    """Logistic regression: posteriors by order, and what all contenders are given."""

    targets: dict[str, Posterior]
    center: jax.Array
    mass: np.ndarray
    reference: np.ndarray
    test: tuple[np.ndarray, np.ndarray]
    where: Layout
    data: tuple[np.ndarray, np.ndarray]
    setup: float  # gradients spent on mass, step size and center's gradient, by chain


def flights_problem(options):
    rows, labels, held_out = flights.load()
    sizes = {name: len(labels[name]) for name in flights.GROUPS}
    pick = np.random.default_rng(0).permutation(np.flatnonzero(~held_out))
    train = {name: v[pick[: options["rows"]]] for name, v in rows.items()}
    rest = pick[options["rows"] :][: options["test"]]
    test = {name: v[rest] for name, v in rows.items()}
    where = layout(sizes)
    x = design(train, sizes, where)
    make = partial(stochgrad.posterior, partial(log_prior, where), log_likelihood)
    targets = {order: make((x, train["late"]), batch_size=500, order=order) for order in ORDERS}
    target = targets["reshuffled"]
    check_same(target, train, sizes, where)
    center = stochgrad.find_center(jax.random.key(0), target, init=jnp.zeros(where.size))
    note(f"center, {center.distance:.2f} posterior sds from the mode")
    mass = stochgrad.find_mass(jax.random.key(1), target, center)
    reference = flights_reference(target, center.position, options["reference"])
    note(f"reference: smallest ESS {ess(reference).min():.0f}")
    epoch = options["rows"] // 500
    return Problem(
        targets,
        jnp.asarray(center.position),
        mass,
        reference,
        (design(test, sizes, where), test["late"]),
        where,
        (x, train["late"]),
        (2 * where.size * epoch + epoch + 2 * 250) / CHAINS,
    )


def our_flights(problem, options):
    """Contenders of this library, one run at a time."""
    center, mass = problem.center, problem.mass
    budget = options["budget"] - problem.setup
    centered = {o: stochgrad.control_variate(t, center) for o, t in problem.targets.items()}
    base = problem.targets["reshuffled"]
    key = jax.random.key(2)

    def step_size(gradient, **settings):
        return stochgrad.find_step_size(key, gradient, center, **settings).step_size

    def go(label, kernel, h, per_step, seed):
        draws = run(
            jax.random.key(seed), kernel, center, budget, per_step, options["draws"], CHAINS
        )
        note(*label, f"h = {h:.3g}, {draws.timings['sample']:.1f} s")
        return as_run(label, draws, h, per_step)

    def langevin(gradient, integrator, label, per_step, seed):
        h = step_size(gradient, friction=mass, mass=mass, integrator=integrator)
        kernel = stochgrad.sghmc(gradient, h, mass, mass=mass, integrator=integrator)
        return go((f"sghmc {integrator}", *label), kernel, h, per_step, seed)

    seed = 100
    for order in ORDERS:
        chosen = options["integrators"] if order == "reshuffled" else options["everywhere"]
        for integrator in chosen:
            per_step = 6 if integrator == "MT3" else 2
            label = "control variate", order
            yield langevin(centered[order], integrator, label, per_step, seed := seed + 1)
    others = {
        "svrg": (stochgrad.svrg(base), 3),
        "saga": (stochgrad.saga(base), 2),
        "plain": (base, 1),
    }
    for name in options["gradients"]:
        gradient, per_step = others[name]
        yield langevin(gradient, "BAOAB", (name, "reshuffled"), per_step, seed := seed + 1)
    if options["brief"]:
        return
    yield langevin(problem.targets["iid"], "BAOAB", ("plain", "iid"), 1, seed := seed + 1)

    gradient, label = centered["reshuffled"], ("control variate", "reshuffled")
    found = stochgrad.find_step_size(key, gradient, center)
    h = found.step_size
    yield go(("sgld", *label), stochgrad.sgld(gradient, h), h, 2, seed + 1)
    # the preconditioner is N over the root of a squared gradient, about the curvature
    h = 0.04 / (base.batches.size * np.sqrt(found.curvature))
    warm = int(budget // 2 // 10)
    kernel = stochgrad.psgld(gradient, h, correction=False, adapt_steps=warm)
    yield go(("psgld", *label), kernel, h, 2, seed + 2)
    h = step_size(gradient, friction=mass, mass=mass, integrator="BAOAB")
    kernel = stochgrad.sgnht(gradient, h, 1.0, mass=mass)
    yield go(("sgnht", *label), kernel, h, 2, seed + 3)


def rival_flights(problem, options):
    """Contenders of other libraries, each at its best step size."""
    target, center = problem.targets["iid"], problem.center
    key = jax.random.key(3)
    limit_of = lambda **settings: stochgrad.find_step_size(key, target, center, **settings).limit
    slow, fast = limit_of(), limit_of(friction=1.0)
    start = jnp.tile(center, (CHAINS, 1))
    go = partial(rival_runs, budget=options["budget"], keep=options["draws"])

    def best(runs):
        bias = [errors(r.draws, problem.reference)["sd"] for r in runs]
        chosen = int(np.argmin(bias))
        note(runs[0].name, runs[0].gradient, f"{chosen} of", *(f"{b:.3g}" for b in bias))
        return runs[chosen]

    for i, (name, limit) in enumerate((("sgld", slow), ("sghmc", fast), ("sgnht", fast))):
        if name in options["rivals"]:
            yield best(go(jax.random.key(300 + i), name, target, "plain", start, limit))
    yield best(
        go(jax.random.key(310), "sghmc", target, "control variate", start, fast, center=center)
    )
    root = np.sqrt(problem.mass)
    scaled = Posterior(lambda w, b: target.log_density(w / root, b), target.batches)
    limit = limit_of(friction=problem.mass, mass=problem.mass)
    runs = go(
        jax.random.key(311),
        "sghmc",
        scaled,
        "control variate",
        start * root,
        limit,
        center=center * root,
        shown="blackjax sghmc, rescaled by our mass",
    )
    yield best([r._replace(draws=r.draws / root) for r in runs])
    for degree in options["proxies"]:
        done = hmcecs(
            jax.random.key(320 + degree),
            problem.where,
            problem.data,
            center,
            problem.mass,
            options["budget"],
            options["ecs_warmup"],
            degree,
        )
        note(done.name, done.draws.shape, f"{done.gradients:.0f} gradients, {done.seconds:.1f} s")
        yield done


def score_flights(run, problem):
    """All figures of a row."""
    finite = np.isfinite(run.draws).all() and run.draws.shape[1] > 3
    each = ess(run.draws) if finite else np.zeros(1)
    x, late = problem.test
    flat = run.draws.reshape(-1, run.draws.shape[-1])
    flat = flat[np.linspace(0, len(flat) - 1, 400).astype(int)].astype(np.float32)
    p = np.mean(1 / (1 + np.exp(-np.clip(x @ flat.T, -30, 30))), axis=1, dtype=np.float64)
    return {
        **errors(run.draws, problem.reference),
        "ess_min": 1000 * each.min() / (CHAINS * run.gradients),
        "ess_median": 1000 * np.median(each) / (CHAINS * run.gradients),
        "rate_min": each.min() / run.seconds,
        "rate_median": np.median(each) / run.seconds,
        "log_likelihood": np.mean(np.where(late > 0, np.log(p), np.log1p(-p))),
        "calibration": calibration_error(p, late),
    }


def flights_table(results):
    lines = [
        "| sampler | gradient | order | gradients a step | step size | sds: squared bias | (floor) "
        "| means: squared bias | (floor) | ESS / 1,000 gradients: min | median "
        "| ESS / second: min | median | test log-likelihood | calibration error |",
        "| --- " * 15 + "|",
    ]
    for run, s in results:
        lines.append(
            f"| {run.name} | {run.gradient} | {run.order} | {run.per_step} | {run.step_size:.2g} "
            f"| {s['sd']:.2g} | {s['sd_floor']:.2g} | {s['mean']:.2g} | {s['mean_floor']:.2g} "
            f"| {s['ess_min']:.2f} | {s['ess_median']:.2f} | {s['rate_min']:.0f} "
            f"| {s['rate_median']:.0f} | {s['log_likelihood']:.5f} | {s['calibration']:.4f} |"
        )
    return lines


def flights_part(options):
    problem = flights_problem(options)
    results = []
    for one in chain(our_flights(problem, options), rival_flights(problem, options)):
        figures = score_flights(one, problem)
        note("   ", ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
        results.append((one, figures))
    truth = ess(problem.reference)
    found = {(r.name, r.gradient, r.order): s for r, s in results}
    ours, chen = found[DEFAULT], found["blackjax sghmc", "plain", "iid"]
    helped = found["blackjax sghmc", "control variate", "iid"]
    scaled = found["blackjax sghmc, rescaled by our mass", "control variate", "iid"]
    ecs = found["numpyro HMCECS", "second-order proxy", "iid"]
    plain = found["sghmc BAOAB", "plain", "reshuffled"]
    at_floor = sum(s["sd"] < 2 * s["sd_floor"] for _, s in results)
    return [
        "## Logistic regression: late flights",
        "",
        f"The model of `examples/flights.py` ({problem.where.size} parameters) on "
        f"{options['rows']:,} of its flights, minibatches of 500, {CHAINS} chains, "
        f"{options['budget']:,} gradients a chain. The model is written as a plain density over its "
        "design matrix, and checked against the numpyro model before anything runs. Reference: "
        f"NUTS with dense mass on all rows, {problem.reference.shape[0]} chains of "
        f"{problem.reference.shape[1]:,} draws, whose smallest effective sample size is "
        f"{truth.min():,.0f} (sds within {100 / np.sqrt(2 * truth.min()):.1f} %). Test figures are "
        f"for {options['test']:,} other flights. All integrators run under reshuffled minibatches; "
        "under the other two orders a few of them stand for all, since with a control variate the "
        "orders differ little here.",
        "",
        *flights_table(results),
        "",
        f"The library's default recommendation is `{DEFAULT[0]}` with a {DEFAULT[1]} and "
        f"{DEFAULT[2]} minibatches, mass from `find_mass`, step size from `find_step_size`.",
        "",
        "**Two ratios.**",
        "",
        f"- Squared bias of sds, best `blackjax.sghmc` over our default: {chen['sd']:.2g} / "
        f"{ours['sd']:.2g} = **{chen['sd'] / ours['sd']:.1f}**. With a control "
        f"variate at the same center it is {helped['sd']:.2g}, {helped['sd'] / ours['sd']:.1f} "
        f"times ours; rescaled by our mass as well, {scaled['sd']:.2g}, "
        f"{scaled['sd'] / ours['sd']:.1f} times. Ours has a floor of {ours['sd_floor']:.2g}.",
        f"- Effective draws a second, our default over HMCECS: "
        f"**{ours['rate_median'] / ecs['rate_median']:.1f}** for the median parameter, "
        f"**{ours['rate_min'] / ecs['rate_min']:.1f}** for the worst.",
        "",
        "What the figures show:",
        "",
        f"- {at_floor} of {len(results)} rows have a bias of sds below twice their Monte Carlo "
        "floor: between those the bias does not choose, and effective draws do.",
        f"- Plain minibatches under the same dynamics, at the step size found for them, have "
        f"{plain['sd'] / ours['sd']:.1f} times the squared bias of sds of our default; for the same "
        f"gradients the control variate gives {ours['ess_median'] / plain['ess_median']:.1f} times "
        "their effective draws (median parameter).",
        f"- Among rivals, the control variate takes `blackjax.sghmc` from {chen['sd']:.2g} to "
        f"{helped['sd']:.2g}, and a common scale for all directions to {scaled['sd']:.2g}.",
        f"- HMCECS is {'at its floor' if ecs['sd'] < 2 * ecs['sd_floor'] else 'off its floor'} "
        f"({ecs['sd']:.2g} against {ecs['sd_floor']:.2g}); it gives {ecs['ess_median']:.1f} "
        f"effective draws for 1,000 gradients, our default {ours['ess_median']:.1f}.",
        f"- Test log-likelihoods lie between {min(s['log_likelihood'] for _, s in results):.5f} and "
        f"{max(s['log_likelihood'] for _, s in results):.5f}, which is all that prediction sees of "
        "the differences above.",
        "",
    ]


# ---------------------------------------------------------------- neural network


def net_layout():
    shapes = {"w1": (64, 10), "b1": (10,), "w2": (10, 10), "b2": (10,)}
    return jax.flatten_util.ravel_pytree({k: jnp.zeros(s) for k, s in shapes.items()})


ZERO_NET, UNRAVEL = net_layout()


def class_logits(z, x):
    p = UNRAVEL(z)
    return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def net_log_likelihood(z, batch):
    x, label = batch
    log_p = jax.nn.log_softmax(class_logits(z, x))
    return jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]


def net_log_prior(z):
    return -jnp.sum(z**2) / 2


class Net(NamedTuple):
    targets: dict[str, Posterior]
    test: tuple[np.ndarray, np.ndarray]
    start: jax.Array
    reference: np.ndarray


def probabilities(draws, x):
    """Class probabilities of the test rows: (chain, draw, row, class)."""
    one = jax.jit(lambda z: jax.lax.map(lambda v: jax.nn.softmax(class_logits(v, x)), z))
    return np.stack([np.asarray(one(jnp.asarray(z, jnp.float32))) for z in draws])


def net_reference(target, sizes, start):
    """Full-gradient HMC, from the cache if it is there."""
    warmup, num_samples = sizes
    path = CACHE / f"digits-{num_samples}.npz"
    if path.exists():
        return np.load(path)["draws"]
    mcmc = MCMC(
        HMC(
            potential_fn=lambda z: -target.log_density(z, target.batches.full),
            trajectory_length=1.5,
            adapt_mass_matrix=False,
        ),
        num_warmup=warmup,
        num_samples=num_samples,
        num_chains=NET_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(11), init_params=start)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True))
    CACHE.mkdir(exist_ok=True)
    np.savez(path, draws=draws)
    return draws


def net_problem(options):
    x, label = load_digits(return_X_y=True)
    x, label = (x / 16).astype(np.float32), label.astype(np.int32)
    pick = np.random.default_rng(0).permutation(len(label))
    train, test = pick[:1437], pick[1437:]
    targets = {
        order: stochgrad.posterior(
            net_log_prior,
            net_log_likelihood,
            (x[train], label[train]),
            batch_size=64,
            order=order,
        )
        for order in ORDERS
    }
    start = 0.3 * jax.random.normal(jax.random.key(12), (NET_CHAINS, len(ZERO_NET)))
    draws = net_reference(targets["iid"], options["net_reference"], start)
    note("reference of the network")
    return Net(targets, (x[test], label[test]), start, probabilities(draws, x[test]))


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def function_errors(p, q):
    """RMS error of mean and sd of class probabilities."""
    of = lambda p: (p.mean(axis=(0, 1)), p.std(axis=(0, 1)))
    (mean, sd), (true_mean, true_sd) = of(p), of(q)
    return rms(mean - true_mean), rms(sd - true_sd)


def score_net(p, net, gradients):
    label = net.test[1]
    mean = p.mean(axis=(0, 1), dtype=np.float64)
    right = np.maximum(p[..., np.arange(len(label)), label], 1e-30)
    series = np.log(right).mean(axis=-1)
    hit = (mean.argmax(axis=-1) == label).astype(float)
    of_mean, of_sd = function_errors(p, net.reference)
    return {
        "mean": of_mean,
        "sd": of_sd,
        "log_likelihood": np.log(mean[np.arange(len(label)), label]).mean(),
        "accuracy": hit.mean(),
        "calibration": calibration_error(mean.max(axis=-1), hit),
        "ess": 1000 * float(ess(series)) / (NET_CHAINS * gradients) if gradients else np.nan,
    }


def our_net(net, options):
    """Contenders of this library on the network."""
    base = net.targets["reshuffled"]
    center = stochgrad.find_center(
        jax.random.key(4), base, init=net.start[0], num_steps=3000, learning_rate=0.02
    )
    key, budget, friction = jax.random.key(5), options["net_budget"], 10.0

    def found(gradient, **settings):
        return stochgrad.find_step_size(key, gradient, center, bias=0.1, **settings)

    def go(label, kernel, h, per_step, seed, sampling=False):
        draws = run(
            jax.random.key(seed),
            kernel,
            net.start,
            budget,
            per_step,
            options["net_draws"],
            NET_CHAINS,
        )
        used = np.asarray(draws.stats["sampling"][0], bool) if sampling else None
        note(*label, f"h = {h:.3g}, {draws.timings['sample']:.1f} s")
        return as_run(label, draws, h, per_step, used)

    def langevin(gradient, integrator, label, per_step, seed):
        h = found(gradient, friction=friction, integrator=integrator).step_size
        kernel = stochgrad.sghmc(gradient, h, friction, integrator=integrator)
        return go((f"sghmc {integrator}", *label), kernel, h, per_step, seed)

    seed = 400
    for order in options["net_orders"]:
        for integrator in options["net_integrators"]:
            per_step = 3 if integrator == "MT3" else 1
            target = net.targets[order]
            yield langevin(target, integrator, ("plain", order), per_step, seed := seed + 1)
    if options["brief"]:
        return
    label = "plain", "reshuffled"
    yield langevin(stochgrad.svrg(base), "BAOAB", ("svrg", "reshuffled"), 3, seed + 1)
    lone = found(base)
    h = lone.step_size
    yield go(("sgld", *label), stochgrad.sgld(base, h), h, 1, seed + 2)
    h = 0.04 / (base.batches.size * np.sqrt(lone.curvature))
    kernel = stochgrad.psgld(base, h, correction=False, adapt_steps=budget // 10)
    yield go(("psgld", *label), kernel, h, 1, seed + 3)
    h = found(base, friction=friction, integrator="BAOAB").step_size
    yield go(("sgnht", *label), stochgrad.sgnht(base, h, friction), h, 1, seed + 4)
    factory = partial(stochgrad.sghmc, friction=friction, integrator="BAOAB")
    kernel = stochgrad.cyclical(
        factory, base, 2 * h, steps_per_cycle=max(budget // 10, 2), exploration=0.5
    )
    yield go(("cyclical sghmc BAOAB", *label), kernel, 2 * h, 1, seed + 5, sampling=True)


def rival_net(net, options):
    """Rivals on the network, each at all step sizes of its grid."""
    target = net.targets["iid"]
    key = jax.random.key(6)
    limit_of = lambda **settings: (
        stochgrad.find_step_size(key, target, 0.0 * net.start[0], **settings).limit
    )
    slow, fast = limit_of(), limit_of(friction=1.0)
    for i, (name, limit) in enumerate((("sgld", slow), ("sghmc", fast), ("sgnht", fast))):
        if name not in options["rivals"]:
            continue
        yield rival_runs(
            jax.random.key(500 + i),
            name,
            target,
            "plain",
            net.start,
            limit,
            options["net_budget"],
            options["net_draws"],
        )


def best_of(runs, net):
    """The run whose mean probabilities are nearest to the reference's."""
    scored = []
    for r in runs:
        if np.isfinite(r.draws).all():
            scored.append((r, score_net(probabilities(r.draws, net.test[0]), net, r.gradients)))
    note(runs[0].name, *(f"{r.step_size:.2g}: {s['mean']:.3g}" for r, s in scored))
    return min(scored, key=lambda both: both[1]["mean"])


def net_part(options):
    net = net_problem(options)
    half = NET_CHAINS // 2
    self_mean, self_sd = function_errors(net.reference[:half], net.reference[half:])
    results = [best_of([r], net) for r in our_net(net, options)]
    results += [best_of(runs, net) for runs in rival_net(net, options)]
    truth = score_net(net.reference, net, 0)
    lines = [
        "## Neural network: digits",
        "",
        f"64 pixels (scaled to one), 10 hidden units (tanh), 10 classes: {len(ZERO_NET)} parameters "
        "with standard normal priors. 1,437 training rows in minibatches of 64, 360 test rows, "
        f"{NET_CHAINS} chains from random starts, {options['net_budget']:,} gradients a chain, unit "
        "mass, friction 10, step sizes by `find_step_size(..., bias=0.1)` near a mode. Errors are in "
        "function space, over test rows and classes, against full-gradient HMC "
        f"({NET_CHAINS} chains of {net.reference.shape[1]} draws). The reference's own row compares "
        "one half of its chains with the other: about that is the floor.",
        "",
        "| sampler | gradient | order | gradients a step | step size | RMS error: mean | sd "
        "| test log-likelihood | accuracy | calibration error | ESS / 1,000 gradients |",
        "| --- " * 11 + "|",
        f"| HMC (reference) | full | | | | {self_mean:.4f} | {self_sd:.4f} "
        f"| {truth['log_likelihood']:.4f} | {truth['accuracy']:.3f} | {truth['calibration']:.4f} | |",
    ]
    for r, s in results:
        lines.append(
            f"| {r.name} | {r.gradient} | {r.order} | {r.per_step} | {r.step_size:.2g} "
            f"| {s['mean']:.4f} | {s['sd']:.4f} | {s['log_likelihood']:.4f} | {s['accuracy']:.3f} "
            f"| {s['calibration']:.4f} | {s['ess']:.2f} |"
        )
    near = sum(s["mean"] < 2 * self_mean for _, s in results)
    best = min(results, key=lambda both: both[1]["mean"])
    worst = max(results, key=lambda both: both[1]["mean"])
    lines += [
        "",
        f"- {near} of {len(results)} rows are within twice the reference's own disagreement. The "
        f"nearest is {best[0].name} ({best[0].gradient}, {best[0].order}), the farthest "
        f"{worst[0].name} ({worst[0].gradient}, {worst[0].order}).",
        "- The posterior has many equivalent modes; a chain sees few of them, and a row says how well "
        f"{NET_CHAINS} chains together predict, not that any of them has converged.",
        "",
    ]
    return lines


# ---------------------------------------------------------------- the page


INTRODUCTION = """# Comparison with other samplers

Made by `python benchmarks/family.py`: how far each sampler is from the true posterior when all may
evaluate the same number of minibatch gradients.

**Budgets.** The budget is per chain and includes warm-up, the first tenth of the draws. A plain
minibatch gradient counts one, a control variate two, SVRG three, SAGA two, and three-stage MT3
three of whatever its gradient costs; each inner step of `blackjax.sghmc` counts, and each leapfrog
step of HMCECS counts two (its proxy's cost is not charged, nor its accept steps). In the logistic
regression the cost of `find_mass`, `find_step_size` and the gradient at the center is charged to
our samplers' budgets, shared by the chains. The center itself (3,000 gradients) is given to all:
every chain starts there.

**Step sizes.** Ours come from `find_step_size` and are used as found. Each blackjax sampler runs at
six step sizes, and the one that turns out nearest to the reference is shown: hindsight that no user
has, in the rival's favor. It runs in the same compiled loop, on the same gradient code and
minibatches, with its own default settings otherwise.

**Floor.** Squared bias of sds is the mean over parameters of (sd / reference sd - 1)², that of means
the mean of ((mean - reference mean) / reference sd)². Even an unbiased sampler shows its own Monte
Carlo error and the reference's there: the floor, estimated from effective sample sizes of draws and
of squared deviations. A figure near its floor says that no bias can be seen. Positions are compared
unconstrained. ESS counts all chains together against all their gradients; seconds are wall time of
sampling after compilation.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--part", choices=("a", "b", "both"), default="both")
    arguments = parser.parse_args()
    options = SMOKE if arguments.smoke else FULL
    output = arguments.output
    if output is None and not arguments.smoke:
        output = ROOT / "docs" / "results" / "comparison.md"
    lines = [INTRODUCTION]
    for part, make in (("a", flights_part), ("b", net_part)):
        if arguments.part not in (part, "both"):
            continue
        lines += make(options)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("\n".join(lines))
    print("\n".join(lines))
    note("done")


if __name__ == "__main__":
    main()
