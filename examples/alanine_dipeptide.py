"""Credible intervals of alanine dipeptide's free energy, from networks fitted to forces.

    python examples/alanine_dipeptide.py                # three seeds, two sizes of data
    python examples/alanine_dipeptide.py --smoke        # under a minute

Ten heavy atoms of alanine dipeptide in implicit solvent; forces of an all-atom force field on them,
noisy since many atomistic states have one coarse-grained image. A small network on top of a
classical prior energy is fitted to 500 or 5,000 frames by a Deep Ensemble, by 8 chains of pSGLD, by
one chain eight times as long, and by 8 chains and one chain of a cold posterior, T = 0.1. Molecular
dynamics under 8 networks of each gives the Ramachandran free energy with 95% bands, which are held
against 200 ns of the all-atom reference. The figures are printed and drawn.

After Thaler, Doehner & Zavadlav, J. Chem. Theory Comput. 2023, whose claims are checked at the end.
"""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from _alanine import KT, MASSES, PHI, PSI, energy_of, load

import stochgrad
from stochgrad import potentials
from stochgrad.diagnostics import calibration, interval_coverage

NOISE = 200.0  # kJ/mol/nm, the noise of a force as expected
FLOOR = 1e-4  # the least probability of a bin that the dynamics can tell from none
LEVEL = 0.95


class Settings(NamedTuple):
    """How much work is done."""

    frames: tuple[int, ...] = (500, 5000)
    seeds: int = 3
    train_steps: int = 8000
    thin: int = 100
    draws: int = 40
    warmup: int = 10
    md_frames: int = 600
    md_warmup: int = 60
    replicas: int = 16
    blind: bool = True


SMOKE = Settings((200,), 1, 100, 5, 8, 2, 20, 5, 4, blind=False)


class Reference(NamedTuple):
    """The all-atom free energy: log histograms, and which bins are populated."""

    free: np.ndarray
    phi: np.ndarray
    psi: np.ndarray
    populated: np.ndarray
    alpha: float
    alpha_error: float


class Result(NamedTuple):
    """What one method gave."""

    method: str
    frames: int
    seed: int
    nll: float
    rmse: float
    area: float
    rhat: float
    noise: float
    coverage: float
    distance: float
    width: float
    alpha: np.ndarray
    positive: float
    exploded: int
    map: potentials.Intervals
    lines: tuple[potentials.Intervals, potentials.Intervals]


def reference_of(counts) -> Reference:
    """From the histograms of each nanosecond; errors from blocks of ten."""
    p = counts.sum(0) / counts.sum()
    blocks = counts.reshape(-1, 10, *p.shape).sum(1)
    alpha = in_alpha(blocks / blocks.sum((1, 2), keepdims=True))
    return Reference(
        *(potentials.free_energy(q, floor=FLOOR) for q in (p, p.sum(1), p.sum(0))),
        p > 1e-3,
        alpha.mean(),
        alpha.std(ddof=1) / np.sqrt(len(alpha)),
    )


def in_alpha(histogram):
    """Probability of the right-handed helix: phi below 0, psi from -120 to 60 degrees."""
    return histogram[..., :12, 4:16].sum((-2, -1))


def methods(key, train, energy, init, settings: Settings, only=None):
    """Networks of every method, by name, all but one from the same trained starts."""
    keys = jax.random.split(key, 6)
    size, chunk = train.count, 64 if train.count <= 1000 else 128
    posterior = partial(
        potentials.force_matching,
        energy,
        train,
        init=init,
        noise=potentials.learned(np.full(10, NOISE)),
        prior="scaled",
        batch_size=chunk,
    )
    draw = partial(potentials.networks, share_batches=True, learning_rate=3e-3)
    steps = settings.train_steps + (settings.warmup + settings.draws) * settings.thin
    trained = draw(keys[0], posterior(), train_steps=settings.train_steps).trained
    first = jax.tree.map(lambda x: x[:1], trained)

    def chains(key, temperature, num_chains):
        """pSGLD, its preconditioner fixed after half of the warm-up."""
        thin = settings.thin * 8 // num_chains
        # noise of minibatches over injected noise grows as h N^2, and as 1/T
        step = 1e-6 * temperature * min(1.0, (500 / size) ** 1.6)
        adapt = max(settings.warmup * thin // 2, 1)
        return draw(
            key,
            posterior(temperature=temperature),
            partial(stochgrad.psgld, step_size=step, correction=False, adapt_steps=adapt),
            init=trained if num_chains > 1 else first,
            train_steps=0,
            num_warmup=settings.warmup,
            num_samples=settings.draws,
            thin=thin,
            num_chains=num_chains,
        )

    found = {
        "Deep Ensemble": lambda: draw(keys[1], posterior(), train_steps=steps),
        "8 chains": lambda: chains(keys[2], 1.0, 8),
        "1 chain": lambda: chains(keys[3], 1.0, 1),
        "8 chains, cold": lambda: chains(keys[4], 0.1, 8),
        "1 chain, cold": lambda: chains(keys[5], 0.1, 1),
    }
    return {name: run() for name, run in found.items() if only is None or name in only}


def result_of(key, name, networks, data, energy, reference, seed, settings: Settings) -> Result:
    """Held-out forces by up to 64 networks; free energies by molecular dynamics under 8."""
    many = networks.members(64 // networks.trained["noise"]["forces"].shape[0])
    forces = potentials.predict(energy, many["params"], data.test).forces
    sigma = NOISE * np.exp(np.asarray(many["noise"]["forces"]))[:, None, :, None]
    scores = calibration(data.test.forces, forces, sigma)
    rhat = np.nan
    if "8 chains" in name:
        rhat = np.median(potentials.force_rhat(energy, networks.params, data.test[:20]))
    eight = networks.members(8 // networks.trained["noise"]["forces"].shape[0])["params"]
    starts = np.random.default_rng(seed).choice(data.train.count, settings.replicas, replace=False)
    run = potentials.simulate(
        key,
        energy,
        eight,
        data.train.positions[starts],
        masses=MASSES,
        kT=KT,
        time_step=0.003,
        friction=5.0,
        num_frames=settings.md_frames,
        steps_per_frame=100,
        num_warmup=settings.md_warmup,
    )
    histograms = potentials.average(potentials.dihedrals(PHI, PSI), run.positions)
    free = partial(potentials.free_energy, floor=FLOOR)
    bands = partial(potentials.intervals, level=LEVEL, sound=run.sound, transform=free)
    surface, where = bands(histograms), reference.populated
    gap = (surface.mean - reference.free)[where]
    return Result(
        name,
        data.train.count,
        seed,
        scores.nll,
        scores.rmse,
        scores.miscalibration_area,
        rhat,
        np.nan if networks.run is None else np.nanmean(networks.run.stats["noise_ratio"]),
        interval_coverage(reference.free, surface.low, surface.high, where),
        np.sqrt(np.mean(gap**2)),
        np.mean((surface.high - surface.low)[where]),
        in_alpha(histograms).mean(1),
        histograms[:, :, 12:].sum((2, 3)).mean(),
        int((~run.sound).sum()),
        surface,
        (bands(histograms.sum(3)), bands(histograms.sum(2))),
    )


def show_table(results: list[Result], reference: Reference) -> None:
    """Means over seeds, and the coverage of each."""
    fields = ("nll", "rmse", "area", "rhat", "noise", "distance", "width", "positive", "coverage")
    head = ("NLL", "RMSE", "area", "R-hat", "noise", "FES kT", "width", "phi>0")
    print(
        f"\n{'frames':>6}  {'method':20s}"
        + "".join(f"{name:>8}" for name in head)
        + "       P(alpha)  coverage (each seed)"
    )
    for frames, name in dict.fromkeys((r.frames, r.method) for r in results):
        same = [r for r in results if (r.frames, r.method) == (frames, name)]
        *means, coverage = (np.mean([getattr(r, field) for r in same]) for field in fields)
        alpha = np.stack([r.alpha for r in same])
        print(
            f"{frames:6d}  {name:20s}"
            + "".join(f"{value:8.3f}" for value in means)
            + f"  {alpha.mean():5.2f} +- {alpha.std(1, ddof=1).mean():4.2f}"
            + f"  {coverage:.2f} ({', '.join(f'{r.coverage:.2f}' for r in same)})"
        )
    lost = sum(r.exploded for r in results)
    print(
        f"reference: P(alpha) {reference.alpha:.3f} +- {reference.alpha_error:.3f}; "
        f"{reference.populated.sum()} populated bins; {lost} trajectories exploded"
    )


ENOUGH = Settings(seeds=2, train_steps=2000, draws=20, md_frames=200, replicas=8)
"""The least work whose figures are judged."""


def too_few(settings: Settings) -> list[str]:
    """Which numbers are too small for a verdict."""
    counted = {
        "seeds": "seeds",
        "train_steps": "training steps",
        "draws": "draws a chain",
        "md_frames": "frames of dynamics",
        "replicas": "replicas",
    }
    least = {name: getattr(ENOUGH, name) for name in counted}
    return [
        f"{getattr(settings, name)} {what}, of {least[name]} at least"
        for name, what in counted.items()
        if getattr(settings, name) < least[name]
    ]


def claims(results: list[Result], settings: Settings) -> list[str]:
    """What the figures say of the paper's claims, or what there is too little of to judge them."""
    missing = too_few(settings)

    def mean(field, method, frames):
        chosen = [r for r in results if r.method == method and r.frames == frames]
        return np.mean([getattr(r, field) for r in chosen])

    few, many = min(r.frames for r in results), max(r.frames for r in results)
    cover = partial(mean, "coverage")
    lines = []

    def claim(text, holds, figures):
        verdict = "too few to judge" if missing else "holds" if holds else "does not hold"
        lines.append(f"{verdict}: {text} ({figures})")

    if missing:
        lines.append(f"Too few to judge: {'; '.join(missing)}.")
    at = (few, many) if few < many else (few,)
    eight, one = ([cover(m, n) for n in at] for m in ("8 chains", "1 chain"))
    claim(
        "95% bands of 8 chains cover 90% of the populated bins or more",
        min(eight) >= 0.9,
        " and ".join(f"{c:.2f} at {n}" for c, n in zip(eight, at, strict=True)),
    )
    claim(
        "one chain is not enough: it covers less",
        all(b < a - 0.1 for a, b in zip(eight, one, strict=True)),
        " and ".join(f"{c:.2f} at {n}" for c, n in zip(one, at, strict=True)),
    )
    ensemble = [cover("Deep Ensemble", n) for n in at]
    claim(
        "a Deep Ensemble is comparable: within 0.1 of the coverage of 8 chains",
        all(abs(a - b) < 0.1 for a, b in zip(eight, ensemble, strict=True)),
        " and ".join(f"{c:.2f} at {n}" for c, n in zip(ensemble, at, strict=True)),
    )
    warm, cold = mean("distance", "8 chains", few), mean("distance", "8 chains, cold", few)
    claim(
        f"a cold posterior needs fewer data: its surface is nearer at {few} frames",
        cold < warm,
        f"{cold:.2f} against {warm:.2f} kT",
    )
    blind = [r for r in results if r.method == "8 chains, blind"]
    if not blind:
        lines.append("not tried: systematic errors are not covered (no network without dihedrals)")
    else:
        r = blind[0]
        claim(
            "systematic errors are not covered: a network without dihedrals is calibrated on "
            "forces and misses the surface",
            r.area < 0.03 and r.coverage < 0.8,
            f"miscalibration {r.area:.3f}, force RMSE {r.rmse:.0f}, coverage {r.coverage:.2f}",
        )
    return lines


def draw(results: list[Result], reference: Reference, path: Path) -> None:
    """The free energy with bands, and the coverage of every method."""
    frames = max(r.frames for r in results)
    shown = {r.method: r for r in results if r.frames == frames and r.seed == 0}
    figure = plt.figure(figsize=(13, 7.4), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 12)
    degrees = [-180, 180, -180, 180]
    lowest = reference.free.min()

    def surface(place, values, title, **options):
        axes = figure.add_subplot(grid[0, place])
        image = axes.imshow(values.T, origin="lower", extent=degrees, aspect="auto", **options)
        axes.set(
            title=title,
            xlabel=r"$\phi$ (degrees)",
            ylabel=r"$\psi$ (degrees)",
            xticks=[-120, 0, 120],
            yticks=[-120, 0, 120],
        )
        figure.colorbar(image, ax=axes, label=r"$k_BT$")

    ceiling = -np.log(FLOOR) - 0.2  # at the floor nothing was seen
    best = shown["8 chains"].map
    surface(
        slice(0, 4),
        np.where(reference.free < ceiling, reference.free - lowest, np.nan),
        "All-atom reference, 200 ns",
        cmap="viridis",
        vmin=0,
        vmax=7,
    )
    surface(
        slice(4, 8),
        np.where(best.mean < ceiling, best.mean - lowest, np.nan),
        f"Mean of 8 chains, {frames} frames",
        cmap="viridis",
        vmin=0,
        vmax=7,
    )
    half = np.where(reference.populated, (best.high - best.low) / 2, np.nan)
    surface(slice(8, 12), half, "Half width of the 95% band, populated bins", cmap="magma", vmin=0)

    middles = -180 + 15 * (np.arange(24) + 0.5)
    for column, (angle, truth) in enumerate((("phi", reference.phi), ("psi", reference.psi))):
        axes = figure.add_subplot(grid[1, 4 * column : 4 * column + 4])
        for name, color in (("8 chains", "C0"), ("Deep Ensemble", "C2"), ("1 chain", "C1")):
            band = shown[name].lines[column]
            axes.fill_between(middles, band.low, band.high, color=color, alpha=0.3, lw=0)
            axes.plot(middles, band.mean, color=color, lw=1.2, label=name)
        axes.plot(
            middles, np.where(truth < -np.log(FLOOR) - 0.1, truth, np.nan), "k.-", label="reference"
        )
        axes.set(
            xlabel=rf"$\{angle}$ (degrees)",
            ylabel=r"free energy ($k_BT$)",
            title=rf"95% bands along $\{angle}$",
            ylim=(0.5, 10),
        )
        axes.legend(frameon=False, fontsize=8)

    axes = figure.add_subplot(grid[1, 8:])
    names = list(dict.fromkeys(r.method for r in results))
    for shift, (size, color) in enumerate(
        zip(sorted({r.frames for r in results}), ("C4", "C3"), strict=False)
    ):
        for row, name in enumerate(names):
            dots = [r.coverage for r in results if (r.method, r.frames) == (name, size)]
            place = row + 0.2 * (shift - 0.5)
            axes.plot(dots, [place] * len(dots), "o", color=color, alpha=0.5, ms=4)
            if dots:
                label = f"{size} frames" if row == 0 else None
                axes.plot(np.mean(dots), place, "|", color=color, ms=16, mew=3, label=label)
    axes.axvline(LEVEL, color="k", lw=0.8, ls="--")
    axes.set(
        yticks=range(len(names)),
        yticklabels=names,
        xlim=(0, 1.02),
        xlabel="share of populated bins in the 95% band",
        title="Coverage, each seed",
    )
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="center left")
    figure.savefig(path)


def main() -> None:
    """All seeds and sizes of data; the table, the claims, the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("alanine_dipeptide.png"))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--smoke", action="store_true", help="a run of less than a minute")
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)  # chains and networks are spread over both cores
    warnings.simplefilter("ignore", stochgrad.GradientNoiseWarning)  # the table says what mixed
    settings = SMOKE if asked.smoke else Settings()
    settings = settings._replace(seeds=asked.seeds or settings.seeds)
    begun = time.perf_counter()
    results = []
    reference = reference_of(load(1).counts)
    for seed in range(settings.seeds):
        for frames in settings.frames:
            data = load(frames, seed * frames if frames <= 1000 else 0)
            key = jax.random.fold_in(jax.random.key(seed), frames)
            energy, init = energy_of(data.train)
            found = {"": (energy, methods(key, data.train, energy, init, settings))}
            if settings.blind and seed == 0 and frames == max(settings.frames):
                blind, start = energy_of(data.train, turns=False)
                only = methods(key, data.train, blind, start, settings, only=("8 chains",))
                found[", blind"] = blind, only
            for suffix, (energy, networks) in found.items():
                for name, each in networks.items():
                    results.append(
                        result_of(key, name + suffix, each, data, energy, reference, seed, settings)
                    )
            print(
                f"seed {seed}, {frames} frames: {time.perf_counter() - begun:.0f} s so far",
                flush=True,
            )
    show_table(results, reference)
    print()
    for line in claims(results, settings):
        print(line)
    draw(results, reference, asked.output)
    print(f"\n{asked.output}, {time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
