"""Shared minibatches and pooled errors: the table in docs/howto/minibatches.md."""

import warnings

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size

import stochgrad
from stochgrad.diagnostics import mcse

warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)


def main(runs=200):
    x = np.random.default_rng(0).normal(size=(100, 1)).astype(np.float32)
    target = stochgrad.posterior(
        lambda t: -0.5 * (t**2).sum(),
        lambda t, b: -0.5 * ((b - t[None]) ** 2).sum(axis=1),
        x,
        batch_size=5,
        order="iid",
    )
    kernel = stochgrad.sghmc(target, 0.02, 20.0)
    spread = {}
    for share in (False, True):
        means, ours, usual, ratio = [], [], [], []
        for seed in range(runs):
            draws = stochgrad.sample(
                jax.random.key(seed),
                kernel,
                init=lambda key: 0.1 * jax.random.normal(key, (1,)),
                num_samples=300,
                num_warmup=20,
                thin=30,
                num_chains=8,
                share_batches=share,
                progress=False,
            )
            x = draws.positions
            means.append(x.mean())
            ours.append(mcse(draws)[0])
            usual.append(np.sqrt(x.var() / effective_sample_size(x)[0]))
            ratio.append(np.nanmean(draws.stats["noise_ratio"]))
        spread[share] = np.std(means, ddof=1)
        print(
            f"share_batches={share}: noise ratio {np.mean(ratio):.2f}; "
            f"sd of the pooled mean {spread[share]:.5f} "
            f"({spread[share] / spread[False]:.2f} of that with own minibatches); "
            f"usual error / true {np.sqrt(np.mean(np.square(usual))) / spread[share]:.2f}, "
            f"mcse / true {np.sqrt(np.mean(np.square(ours))) / spread[share]:.2f}"
        )


if __name__ == "__main__":
    main()
