"""Make `lennard_jones.npz`: a Lennard-Jones liquid of 64 atoms, its forces and its structure.

Langevin dynamics with jax-md (`pip install jax-md`) in reduced units: density 0.77, temperature 1,
steps of 0.004 and friction 1, the potential brought smoothly to zero between 1.7 and 2.1. Sixteen
replicas of 500 units of time each, after 50 of equilibration, with a frame every 0.2.

    python make_lennard_jones.py  # a few minutes

What ships: `positions` and exact `forces` of 400 training and 200 test frames, ten units of time
and more apart where they are of one replica; and of *all* frames the radial distribution function
on 40 shells up to half the box, one for each of twenty blocks of time (`rdf`), so that its
standard errors can be taken.
"""

import argparse
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax_md import energy, simulate, space

ATOMS, DENSITY, KT = 64, 0.77, 1.0
ONSET, CUTOFF = 1.7, 2.1
TIME_STEP, FRICTION, STEPS_PER_FRAME = 0.004, 1.0, 50
REPLICAS, FRAMES, WARMUP, BLOCKS, BINS = 16, 2500, 250, 20, 40
TRAIN, TEST = 400, 200
EDGE = (ATOMS / DENSITY) ** (1 / 3)


def lattice():
    """Atoms on a cubic lattice, from where the liquid melts."""
    sites = np.arange(4) * EDGE / 4
    return np.stack(np.meshgrid(sites, sites, sites), -1).reshape(-1, 3)


@partial(jax.jit, static_argnums=1)
def trajectory(key, frames):
    """Frames of one replica, those of the equilibration first."""
    displacement, shift = space.periodic(EDGE)
    potential = energy.lennard_jones_pair(displacement, r_onset=ONSET, r_cutoff=CUTOFF)
    init, step = simulate.nvt_langevin(potential, shift, TIME_STEP, KT, FRICTION)

    def frame(state, _):
        state = jax.lax.fori_loop(0, STEPS_PER_FRAME, lambda _, state: step(state), state)
        return state, (state.position, state.force)

    return jax.lax.scan(frame, init(key, jnp.asarray(lattice())), length=frames)[1]


@jax.jit
def pairs_in_shells(positions):
    """How many pairs of a frame are in each of the shells up to half the box."""
    one, other = jnp.triu_indices(ATOMS, 1)
    delta = positions[one] - positions[other]
    r = jnp.linalg.norm(delta - EDGE * jnp.round(delta / EDGE), axis=-1)
    return jnp.histogram(r, jnp.linspace(0, EDGE / 2, BINS + 1))[0]


def radial_distribution(positions):
    """Of each block of frames (replicas, frames, atoms, 3): one for an ideal gas."""
    counts = jax.lax.map(jax.vmap(pairs_in_shells), jnp.swapaxes(positions, 0, 1))
    counts = np.asarray(counts, np.float64).reshape(BLOCKS, -1, BINS).mean(1)
    volumes = 4 / 3 * np.pi * np.diff(np.linspace(0, EDGE / 2, BINS + 1) ** 3)
    return counts / (volumes / EDGE**3 * ATOMS * (ATOMS - 1) / 2)


def main(target):
    """Run, check that the structure is known well enough, and write the file."""
    keys = jax.random.split(jax.random.key(11), REPLICAS)
    positions, forces = jax.jit(jax.vmap(lambda key: trajectory(key, WARMUP + FRAMES)))(keys)
    positions, forces = (np.asarray(x, np.float32)[:, WARMUP:] for x in (positions, forces))
    g = radial_distribution(positions)
    error = g.std(0, ddof=1) / np.sqrt(BLOCKS)
    peak = g.mean(0).argmax()
    print(f"peak {g.mean(0)[peak]:.3f}, standard error {error[peak] / g.mean(0)[peak]:.2%}")
    each = -(-(TRAIN + TEST) // REPLICAS)
    chosen = np.round(np.linspace(0, FRAMES - 1, each)).astype(int)
    order = np.random.default_rng(7).permutation(REPLICAS * each)[: TRAIN + TEST]
    positions, forces = (x[:, chosen].reshape(-1, ATOMS, 3)[order] for x in (positions, forces))
    np.savez_compressed(
        target,
        positions=positions[:TRAIN],
        forces=forces[:TRAIN],
        test_positions=positions[TRAIN:],
        test_forces=forces[TRAIN:],
        rdf=g.astype(np.float32),
        edge=EDGE,
        temperature=KT,
        time=REPLICAS * FRAMES * STEPS_PER_FRAME * TIME_STEP,
    )
    print(f"{target}: forces of sd {forces.std():.2f}, {target.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("lennard_jones.npz"),
    )
    main(parser.parse_args().target)
