"""What dynamics with lists of neighbors costs as the number of atoms grows, beside jax-md's.

``python benchmarks/neighbors.py`` writes benchmarks/results/neighbors.json; a Lennard-Jones liquid
at density 0.77, one network, single precision. Rivals that are not installed are left out.
"""

import json
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad import potentials

CUTOFF, SKIN, DENSITY, STEP = 2.5, 0.4, 0.77, 0.004
RESULTS = Path(__file__).with_name("results") / "neighbors.json"


def liquid(side, replicas=1):
    """Atoms near a lattice, and the edges of their box."""
    edge = side / DENSITY ** (1 / 3)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3) * (edge / side)
    noise = np.random.default_rng(0).normal(size=(replicas, *grid.shape))
    return (grid + 0.03 * noise).astype(np.float32), np.full(3, edge, np.float32)


def pair(strength, square):
    sixth = (1 / square) ** 3
    shift = CUTOFF**-12 - CUTOFF**-6
    return jnp.where(square < CUTOFF**2, 4 * strength * (sixth**2 - sixth - shift), 0)


def by_lists(strength, positions, neighbors, box):
    vectors = potentials.pair_vectors(positions, neighbors, box)
    return 0.5 * jnp.sum(pair(strength, jnp.sum(vectors**2, -1)))


def by_pairs(strength, positions, box):
    return jnp.sum(pair(strength, potentials.distances(positions, box=box) ** 2))


def ours(energy, side, steps, networks=1, replicas=1, **more):
    """Seconds a step and atom of a second run, less those of a run of two steps."""
    at, box = liquid(side, replicas)
    took = []
    for frames in (1, 1 + steps // 10):
        for _ in range(2):
            begin = time.perf_counter()
            run = potentials.simulate(
                jax.random.key(0), energy, jnp.ones(networks), at, masses=1.0, kT=1.0,
                time_step=STEP, friction=1.0, num_frames=frames, steps_per_frame=10, box=box, **more,
            )  # fmt: skip
            seconds = time.perf_counter() - begin
        assert run.sound.all()
        took.append(seconds)
    return (took[1] - took[0]) / (steps // 10 * 10) / (at.shape[1] * networks * replicas)


def jax_mds(side, steps):
    """The same liquid by jax-md's Langevin and its own list, updated at each step."""
    from jax_md import energy, simulate, space

    at, box = liquid(side)
    displacement, shift = space.periodic(box[0])
    neighbor_fn, energy_fn = energy.lennard_jones_neighbor_list(
        displacement, box[0], r_onset=CUTOFF * 0.999, r_cutoff=CUTOFF, dr_threshold=SKIN
    )
    lists = neighbor_fn.allocate(jnp.asarray(at[0]))
    init, apply = simulate.nvt_langevin(energy_fn, shift, STEP, 1.0, gamma=1.0)
    state = init(jax.random.key(0), jnp.asarray(at[0]), neighbor=lists)

    @jax.jit
    def run(state, lists):
        def body(_, both):
            state, lists = both
            lists = lists.update(state.position)
            return apply(state, neighbor=lists), lists

        return jax.lax.fori_loop(0, steps, body, (state, lists))

    for _ in range(2):
        begin = time.perf_counter()
        state, lists = jax.block_until_ready(run(state, lists))
        seconds = time.perf_counter() - begin
    assert not lists.did_buffer_overflow
    return seconds / steps / len(at[0])


def main():
    figures = {}
    works = {
        "lists, 1,000 atoms": lambda: ours(by_lists, 10, 200, cutoff=CUTOFF, skin=SKIN),
        "lists, 4,096 atoms": lambda: ours(by_lists, 16, 100, cutoff=CUTOFF, skin=SKIN),
        "jax-md, 1,000 atoms": lambda: jax_mds(10, 200),
        "jax-md, 4,096 atoms": lambda: jax_mds(16, 100),
        "all pairs, 1,000 atoms": lambda: ours(by_pairs, 10, 50),
        "lists, 1,000 atoms, 8 networks": lambda: ours(
            by_lists, 10, 50, networks=8, cutoff=CUTOFF, skin=SKIN
        ),
    }
    for name, work in works.items():
        try:
            figures[name] = {"us": round(1e6 * work(), 3)}
        except ImportError as error:
            figures[name] = {"left out": str(error)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures[name]["peak MiB so far"] = round(peak)
        print(name, figures[name], flush=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
