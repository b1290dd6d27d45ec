"""Make `alanine_dipeptide.npz`: alanine dipeptide in implicit solvent, as its heavy atoms.

Molecular dynamics with OpenMM (`pip install "stochgrad[md]"`): Amber ff99SB-ILDN, GBSA-OBC,
300 K, LangevinMiddle at 2 fs and 1/ps, hydrogens of 3 amu, no constraints. Four independent
trajectories of 50 ns from four places of the Ramachandran map, each after 200 ps of equilibration.
Every 0.2 ps the ten heavy atoms' positions and the forces on them are kept, where a heavy atom's
force is its own plus those on the hydrogens bonded to it: the force map of a slicing projection of
an unconstrained system (Noid et al., J. Chem. Phys. 2008).

    python make_alanine_dipeptide.py run 0 --to raw  # trajectories 0 to 3, ten minutes each
    python make_alanine_dipeptide.py pack --of raw   # the small file that ships

What ships: `positions` (nm) and `forces` (kJ/mol/nm) of 5,000 training and 2,000 test frames drawn
at random from the trajectories, and of *all* frames the histogram of (phi, psi) on 24 x 24 bins,
one for every nanosecond (`counts`, so that block errors of any length can be taken).
"""

import argparse
import pathlib

import numpy as np

TEMPERATURE, TIME_STEP, FRAME_EVERY = 300.0, 0.002, 100  # K, ps, steps: a frame each 0.2 ps
NAMES = (
    "ACE CH3",
    "ACE C",
    "ACE O",
    "ALA N",
    "ALA CA",
    "ALA CB",
    "ALA C",
    "ALA O",
    "NME N",
    "NME C",
)
PHI, PSI = (1, 3, 4, 6), (3, 4, 6, 8)
STARTS = ((-80.0, 80.0), (-80.0, -40.0), (-150.0, 150.0), (-65.0, 140.0))  # phi, psi: degrees


def place(a, b, c, distance, angle, dihedral):
    """The point at a distance from c, an angle to b and a dihedral to a (degrees)."""
    angle, dihedral = np.radians(angle), np.radians(dihedral)
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    across = np.cross(normal, along)
    return c + distance * (
        -np.cos(angle) * along
        + np.sin(angle) * (np.cos(dihedral) * across + np.sin(dihedral) * normal)
    )


def heavy_atoms(phi, psi):
    """The ten heavy atoms, in NAMES' order, from standard bond lengths (nm) and angles."""
    ch3, c1 = np.zeros(3), np.array([0.1522, 0.0, 0.0])
    o1 = c1 + 0.1229 * np.array([np.cos(np.radians(59.6)), np.sin(np.radians(59.6)), 0.0])
    n1 = place(o1, ch3, c1, 0.1335, 116.6, 180.0)
    ca = place(ch3, c1, n1, 0.1449, 121.9, 180.0)
    c2 = place(c1, n1, ca, 0.1522, 110.1, phi)
    cb = place(c1, n1, ca, 0.1526, 109.7, phi - 122.0)
    n2 = place(n1, ca, c2, 0.1335, 116.6, psi)
    o2 = place(n1, ca, c2, 0.1229, 120.4, psi + 180.0)
    end = place(ca, c2, n2, 0.1449, 121.9, 180.0)
    return np.stack([ch3, c1, o1, n1, ca, cb, c2, o2, n2, end])


def molecule(phi, psi):
    """OpenMM's topology and positions, hydrogens added, and where the heavy atoms are in it."""
    import openmm.app as app
    from openmm import Vec3, unit

    topology = app.Topology()
    chain, residues, positions = topology.addChain(), {}, []
    for name, at in zip(NAMES, heavy_atoms(phi, psi), strict=True):
        residue, atom = name.split()
        if residue not in residues:
            residues[residue] = topology.addResidue(residue, chain)
        topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residues[residue])
        positions.append(Vec3(*(float(x) for x in at)))
    topology.createStandardBonds()
    field = app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    whole = app.Modeller(topology, positions * unit.nanometer)
    whole.addHydrogens(field)
    system = field.createSystem(
        whole.topology,
        nonbondedMethod=app.NoCutoff,
        constraints=None,
        rigidWater=False,
        hydrogenMass=3 * unit.amu,
    )
    atoms = list(whole.topology.atoms())
    heavy = {f"{a.residue.name} {a.name}": a.index for a in atoms if a.element.symbol != "H"}
    project = np.zeros((len(NAMES), len(atoms)))
    for row, name in enumerate(NAMES):
        project[row, heavy[name]] = 1.0
        for one, other in whole.topology.bonds():
            for site, bonded in ((one, other), (other, one)):
                if site.index == heavy[name] and bonded.element.symbol == "H":
                    project[row, bonded.index] = 1.0
    if not np.array_equal(project.sum(0), np.ones(len(atoms))):
        raise RuntimeError("every atom must belong to exactly one heavy atom")
    return whole, system, [heavy[name] for name in NAMES], project


def dihedral(positions, atoms):
    """A dihedral angle in radians, of frames (..., atoms, 3)."""
    a, b, c, d = (positions[..., i, :] for i in atoms)
    along = c - b
    along = along / np.linalg.norm(along, axis=-1, keepdims=True)
    one, other = np.cross(b - a, c - b), np.cross(c - b, d - c)
    sine = np.sum(np.cross(one, other) * along, -1)
    return np.arctan2(sine, np.sum(one * other, -1))


def run(number, folder, nanoseconds):
    """One trajectory, written as it grows to `raw_NUMBER.npz`."""
    import openmm
    from openmm import app, unit

    whole, system, heavy, project = molecule(*STARTS[number])
    integrator = openmm.LangevinMiddleIntegrator(
        TEMPERATURE * unit.kelvin, 1 / unit.picosecond, TIME_STEP * unit.picoseconds
    )
    integrator.setRandomNumberSeed(1000 + number)
    platform = openmm.Platform.getPlatformByName("Reference")  # the fastest for 22 atoms
    simulation = app.Simulation(whole.topology, system, integrator, platform)
    simulation.context.setPositions(whole.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(TEMPERATURE * unit.kelvin, 2000 + number)
    simulation.step(round(200 / TIME_STEP))
    frames = round(1000 * nanoseconds / (TIME_STEP * FRAME_EVERY))
    positions = np.empty((frames, len(NAMES), 3), np.float32)
    forces = np.empty_like(positions)
    for t in range(frames):
        simulation.step(FRAME_EVERY)
        state = simulation.context.getState(getPositions=True, getForces=True)
        everywhere = state.getPositions(asNumpy=True)._value
        positions[t] = everywhere[heavy] - everywhere[heavy].mean(0)
        forces[t] = project @ state.getForces(asNumpy=True)._value
        if (t + 1) % 5000 == 0 or t + 1 == frames:
            phi, psi = (np.degrees(dihedral(positions[: t + 1], at)) for at in (PHI, PSI))
            alpha = np.mean((phi < 0) & (psi > -120) & (psi < 50))
            print(
                f"trajectory {number}: {(t + 1) / 5000:.0f} ns, alpha {alpha:.3f}, "
                f"phi > 0 {np.mean(phi > 0):.4f}",
                flush=True,
            )
        if (t + 1) % 25000 == 0 or t + 1 == frames:
            np.savez(
                folder / f"raw_{number}.npz", positions=positions[: t + 1], forces=forces[: t + 1]
            )


def pack(folder, target, train=5000, test=2000, bins=24):
    """Random frames and the histograms of all, from the trajectories in a folder."""
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    positions, forces, counts, starts = [], [], [], []
    for path in sorted(folder.glob("raw_*.npz")):
        raw = np.load(path)
        positions.append(raw["positions"])
        forces.append(raw["forces"])
        phi, psi = (dihedral(raw["positions"].astype(np.float64), at) for at in (PHI, PSI))
        for block in range(len(phi) // 5000):
            here = slice(5000 * block, 5000 * (block + 1))
            counts.append(np.histogram2d(phi[here], psi[here], (edges, edges))[0])
            starts.append(len(positions) - 1)
    positions, forces = np.concatenate(positions), np.concatenate(forces)
    chosen = np.random.default_rng(7).permutation(len(positions))[: train + test]
    np.savez_compressed(
        target,
        positions=positions[chosen[:train]],
        forces=forces[chosen[:train]],
        test_positions=positions[chosen[train:]],
        test_forces=forces[chosen[train:]],
        counts=np.asarray(counts, np.uint16),
        trajectory=np.asarray(starts, np.uint8),
        names=np.asarray(NAMES),
        temperature=TEMPERATURE,
    )
    print(
        f"{target}: {len(positions)} frames seen, {len(counts)} ns, "
        f"{target.stat().st_size / 2**20:.2f} MiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("run", help="one trajectory")
    one.add_argument("number", type=int, choices=range(len(STARTS)))
    one.add_argument("--to", type=pathlib.Path, default=pathlib.Path("raw"))
    one.add_argument("--nanoseconds", type=float, default=50.0)
    two = steps.add_parser("pack", help="the file that ships")
    two.add_argument("--of", type=pathlib.Path, default=pathlib.Path("raw"))
    two.add_argument(
        "--target",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("alanine_dipeptide.npz"),
    )
    asked = parser.parse_args()
    if asked.step == "run":
        asked.to.mkdir(parents=True, exist_ok=True)
        run(asked.number, asked.to, asked.nanoseconds)
    else:
        pack(asked.of, asked.target)
