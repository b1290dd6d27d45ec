"""From a file of frames to bands on what molecular dynamics gives: hot copper.

``train.extxyz`` holds 40 frames of 32 atoms with energies, forces and stresses; here they come from
ASE's effective medium theory at 800 K. A network of the embedded-atom form (a pair energy, and an
energy of the density that neighbors make) is drawn from its posterior by eight chains, moved at
800 K, and asked for the radial distribution function and the pressure. Long dynamics in the
reference itself says what is right.

Run ``python examples/from_file.py``; ``--smoke`` is a short version of the same.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from ase.md.langevin import Langevin

import stochgrad
from stochgrad import potentials

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

KELVIN, CUTOFF, WIDTH = 800.0, 5.0, 16
CENTERS = jnp.linspace(1.8, CUTOFF, WIDTH)
EV_PER_A3_IN_GPA = 160.2177


class Effort(NamedTuple):
    """How much is done."""

    frames: int = 40
    reference: int = 1000
    train_steps: int = 3000
    draws: int = 20
    thin: int = 100
    md_frames: int = 100
    replicas: int = 4


SMOKE = Effort(frames=10, reference=8, train_steps=200, draws=4, thin=5, md_frames=4, replicas=2)


def dynamics(frames, seed):
    """Frames of the reference at 800 K, 60 fs apart, with their labels."""
    atoms = bulk("Cu", "fcc", a=3.67, cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = EMT()
    heat = {"temperature_K": KELVIN, "friction": 0.02 / units.fs, "fixcm": False}
    md = Langevin(atoms, 3 * units.fs, **heat, rng=np.random.default_rng(seed))
    md.run(200)
    for _ in range(frames):
        md.run(20)
        atoms.get_stress()
        yield atoms


def energy(params, positions, neighbors, box, species):
    """Pairs, and a network of the density at each atom."""
    r = jnp.linalg.norm(potentials.pair_vectors(positions, neighbors, box), axis=-1)
    end = jnp.where(r < CUTOFF, (1 - (r / CUTOFF) ** 2) ** 2, 0.0)
    radial = jnp.exp(-(((r[:, None] - CENTERS) / 0.3) ** 2)) * end[:, None]
    pairs = jnp.sum(radial @ params["pair"] + 0.05 * end * (2.0 / r) ** 9)
    density = jax.ops.segment_sum(radial, neighbors.receivers, len(positions))
    hidden = jnp.tanh(density @ params["w"] + params["b"])
    return pairs + jnp.sum(hidden @ params["out"])


def init(key):
    """Random weights."""
    pair, w, out = jax.random.normal(key, (3, WIDTH, WIDTH))
    return {"pair": 0.1 * pair[0], "w": 0.1 * w, "b": jnp.zeros(WIDTH), "out": 0.3 * out[0]}


def bands_of(params, data, effort):
    """Intervals of the radial distribution function and of the pressure, and the bins."""
    edge, species = data.box[0], data.species
    rdf = potentials.rdf(edge, r_max=3.6, bins=36)
    shared = {"kT": units.kB * KELVIN, "cutoff": CUTOFF, "box": edge, "species": species}
    run = potentials.simulate(
        jax.random.key(2),
        energy,
        params,
        data.positions[: effort.replicas],
        masses=63.546,
        time_step=3 * units.fs,
        friction=0.02 / units.fs,
        num_frames=effort.md_frames,
        steps_per_frame=20,
        num_warmup=effort.md_frames // 10,
        **shared,
    )
    averages = potentials.average(rdf, run.positions)
    pressure = potentials.pressure(energy, params, run.positions, **shared) * EV_PER_A3_IN_GPA
    length = effort.reference / effort.md_frames  # of the reference run, in those of a replica
    together = partial(potentials.intervals, level=0.9, sound=run.sound, measured=length)
    return together(averages), together(pressure), rdf


def draw(path, found, truth, test):
    """The bands beside the truth, and forces of held-out frames with their spread."""
    bands, pressure, rdf = found
    right, right_pressure = truth
    figure, axes = plt.subplot_mosaic(
        [["g", "pressure", "forces"], ["difference", "pressure", "forces"]],
        figsize=(12, 4.2), width_ratios=[2.2, 1, 1.6], height_ratios=[2, 1], layout="constrained",
    )  # fmt: skip
    left, middle, last = axes["g"], axes["pressure"], axes["forces"]
    r = rdf.at[0]
    left.fill_between(r, bands.low, bands.high, color="C0", alpha=0.35, label="90% band")
    left.plot(r, right, "k--", lw=1.2, label="reference dynamics")
    left.set(ylabel="g(r)", title="Copper at 800 K", ylim=0, xticklabels=[])
    left.legend(frameon=False)
    axes["difference"].fill_between(r, bands.low - right, bands.high - right, alpha=0.35)
    axes["difference"].axhline(0, color="k", ls="--", lw=1.2)
    axes["difference"].set(xlabel="distance, Å", ylabel="band - reference")
    middle.errorbar(
        [0], pressure.mean, [[pressure.mean - pressure.low], [pressure.high - pressure.mean]],
        fmt="o", capsize=6, label="90% interval",
    )  # fmt: skip
    middle.axhline(right_pressure, color="k", ls="--", lw=1.2)
    middle.set(xticks=[], xlim=(-1, 1), ylabel="pressure, GPa", title="Pressure")
    error, spread = test
    last.loglog(spread, error, ".", ms=3, alpha=0.5)
    ends = np.array([spread.min(), spread.max()])
    last.loglog(ends, ends, "k--", lw=1)
    last.xaxis.set_minor_formatter(NullFormatter())
    last.set(xlabel="sd over networks, eV/Å", ylabel="error of their mean", title="Held-out forces")
    figure.savefig(path, dpi=150)


def main():
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short version")
    parser.add_argument("--output", default="from_file.png")
    options = parser.parse_args()
    effort = SMOKE if options.smoke else Effort()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.extxyz"
        for atoms in dynamics(effort.frames, seed=0):
            write(path, atoms, append=True)
        data = potentials.read_extxyz(path, cutoff=CUTOFF)
    print(data)
    train, test = data[: effort.frames // 2], data[effort.frames // 2 :]
    noise = {name: potentials.learned(0.02) for name in ("forces", "energies", "virials")}
    target = potentials.force_matching(
        energy, train, init=init, noise=noise, prior=3.0, batch_size=5
    )
    sampler = partial(stochgrad.psgld, step_size=2e-6, regularizer=0.1, correction=False)
    chains = potentials.networks(
        jax.random.key(1),
        target,
        sampler,
        num_chains=8,
        train_steps=effort.train_steps,
        learning_rate=0.01,
        num_samples=effort.draws,
        thin=effort.thin,
    )
    params = chains.members(1)["params"]
    predicted = potentials.predict(energy, params, test, virial=True)
    error = np.abs(predicted.forces.mean(0) - test.forces).ravel()
    spread = predicted.forces.std(0, ddof=1).ravel()
    virial = np.std(
        potentials.predict(energy, params, test, virial=True).virial.mean(0) - test.virials
    )
    print(f"virials: error {virial:.3f} of {np.std(test.virials):.2f} eV")
    print(f"forces: error {np.sqrt(np.mean(error**2)):.4f}, of {np.std(test.forces):.3f} eV/Å")

    found = bands_of(params, data, effort)
    frames, pressures = [], []
    for atoms in dynamics(effort.reference, seed=1):
        frames.append(atoms.positions.copy())
        stress = atoms.get_stress(include_ideal_gas=False)
        pressures.append(-stress[:3].mean() + 32 * units.kB * KELVIN / atoms.get_volume())
    right = potentials.average(found[2], np.array(frames))
    right_pressure = np.mean(pressures) * EV_PER_A3_IN_GPA
    held = np.mean((found[0].low <= right) & (right <= found[0].high))
    if not options.smoke:
        print(f"bins of g(r) in the band: {held:.2f}; pressure {right_pressure:.2f} GPa in")
        print(f"({found[1].low:.2f}, {found[1].high:.2f})")
    draw(options.output, found, (right, right_pressure), (error, spread))


if __name__ == "__main__":
    main()
