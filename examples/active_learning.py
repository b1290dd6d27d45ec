"""Which configurations to label next: those that networks disagree about.

    python examples/active_learning.py            # about three minutes on two cores
    python examples/active_learning.py --smoke

A network potential of alanine dipeptide has seen 100 frames of the helical basin only. A pool of
frames without forces comes from a helix too, but one in twenty is from the sheets. Each round an
ensemble of eight networks scores the pool by `potentials.novelty`, the 20 strangest frames are
labeled and the ensemble is trained anew; a second learner takes 20 frames at random. Both are
judged by the forces of held-out frames from the sheets.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from _alanine import PHI, PSI, energy_of, load

from stochgrad import potentials
from stochgrad.diagnostics import calibration

NOISE, EACH = 200.0, 20


def trained(key, data, energy, init, steps: int):
    """A Deep Ensemble of eight."""
    target = potentials.force_matching(
        energy,
        data,
        init=init,
        noise=potentials.learned(np.full(10, NOISE)),
        prior="scaled",
        batch_size=min(50, data.count),
    )
    draw = partial(potentials.networks, share_batches=True, learning_rate=3e-3)
    return draw(key, target, train_steps=steps).members()


def rounds_of(strategy, frames, helix, pool, test, rounds: int, steps: int):
    """Negative log likelihoods after each round, and which frames of the pool were chosen."""
    rng = np.random.default_rng(1)
    known, left, history = helix[:100], pool, []
    energy, init = energy_of(frames[known])  # the prior energy's constants, from what is labeled
    for n in range(rounds + 1):
        members = trained(jax.random.key(n), frames[known], energy, init, steps)
        predict = partial(potentials.predict, energy, members["params"])
        sigma = NOISE * np.exp(np.asarray(members["noise"]["forces"]))[:, None, :, None]
        history.append(calibration(test.forces, predict(test).forces, sigma, where=test.mask).nll)
        if strategy == "novelty":
            scale = sigma.mean(0)[..., 0][..., None]
            pool_forces = predict(frames[left]).forces
            scores = potentials.novelty(pool_forces, scale, mask=frames[left].mask)
        else:
            scores = rng.random(len(left))
        if n < rounds:
            chosen = np.argsort(scores)[-EACH:]
            known = np.concatenate([known, left[chosen]])
            left = np.delete(left, chosen)
    return np.array(history), known[100:]


def main() -> None:
    """Both learners, what they chose and what it brought."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("active_learning.png"))
    parser.add_argument("--smoke", action="store_true", help="a run of less than a minute")
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    rounds, steps, size = (1, 50, 200) if asked.smoke else (5, 3000, 1000)
    begun = time.perf_counter()

    data = load()
    frames = data.train
    psi = np.degrees(np.asarray(potentials.dihedral(frames.positions, PSI)))
    phi = np.degrees(np.asarray(potentials.dihedral(frames.positions, PHI)))
    helix, sheets = np.flatnonzero(np.abs(psi + 20) < 60), np.flatnonzero(np.abs(psi) > 100)
    pool = np.concatenate([helix[100 : 100 + 19 * size // 20], sheets[: size // 20]])
    far = np.abs(np.degrees(np.asarray(potentials.dihedral(data.test.positions, PSI)))) > 100
    test = data.test[np.flatnonzero(far)[:500]]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=120, layout="constrained")
    right.plot(phi[pool], psi[pool], ".", color="0.8", ms=3, label="pool")
    for strategy, color, marker in (("random", "C1", "x"), ("novelty", "C0", "o")):
        history, chosen = rounds_of(strategy, frames, helix, pool, test, rounds, steps)
        share = np.isin(chosen, sheets).mean()
        print(f"{strategy}: NLL on sheets {history.round(2).tolist()}, sheets chosen {share:.2f}")
        label = f"by {strategy}" if strategy == "novelty" else "at random"
        left.plot(
            100 + EACH * np.arange(rounds + 1), history, marker + "-", color=color, label=label
        )
        right.plot(phi[chosen], psi[chosen], marker, color=color, ms=4, label=label)
    left.set(
        xlabel="labeled frames",
        ylabel="NLL of forces on held-out sheets",
        title="What was never seen is learned when it is asked for",
    )
    right.set(
        xlabel=r"$\phi$ (degrees)",
        ylabel=r"$\psi$ (degrees)",
        title="What each chose of the pool",
        xlim=(-180, 180),
        ylim=(-180, 180),
    )
    left.legend(frameon=False)
    right.legend(frameon=False, loc="lower right")
    figure.savefig(asked.output)
    print(f"{asked.output}, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
