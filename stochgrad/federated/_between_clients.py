"""Whether draws are alike at all clients, as those of a chain in equilibrium are."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats as laws

from stochgrad.core import Draws, evenly
from stochgrad.federated._spread import StabilityWarning, coordinate_names

_BLOCKS, _LEAST_BLOCKS, _LEAST_LENGTH = 20, 10, 5
_MOST_COORDINATES, _MOST_DRAWS = 64, 5000
_CHANCE = 1e-4
_VARIANCE, _MEAN = 1.4, 0.25


class Difference(NamedTuple):
    """A coordinate whose draws are others at one client than elsewhere.

    Attributes:
        coordinate: In words.
        client: The number of the client.
        variance: The variance about the mean of all draws, at the client over elsewhere.
        shift: The mean at the client less that elsewhere, in standard deviations.
        z: The larger one of the two in standard errors.
    """

    coordinate: str
    client: int
    variance: float
    shift: float
    z: float


def differences_between_clients(
    values: np.ndarray, client: np.ndarray, names: Sequence[str], count: int
) -> list[Difference]:
    r"""Coordinates whose draws during visits to one client differ from those elsewhere.

    Positions of a chain in equilibrium do not depend on which client it visits. Variances, about
    the mean of all, are compared by their ratio, means by their difference, with standard errors by
    a jackknife over twenty blocks or more of successive draws. What is less than 40% in variance
    and a quarter of a standard deviation in mean, or could come by chance once in ten thousand
    runs, is not told; nor is anything of clients visited fewer than ten times, or of runs whose
    blocks have fewer than five draws.

    Args:
        values: Draws (chains, draws, coordinates).
        client: The client that was visited (chains, draws).
        names: The coordinates in words.
        count: Number of clients.

    Returns:
        The worst client of each coordinate that differs, worst first.
    """
    chains, draws, size = values.shape
    per_chain = -(-_BLOCKS // chains)
    length = draws // per_chain
    if length < _LEAST_LENGTH or not size or count < 2:
        return []
    kept = per_chain * length
    x = values[:, draws - kept :].reshape(chains * per_chain, length, size)
    x = x - x.mean(axis=(0, 1))
    scale = x.std(axis=(0, 1))
    x = x / np.where(scale > 0, scale, 1)
    of = client[:, draws - kept :].reshape(chains * per_chain, length)
    blocks = len(x)
    numbers = np.stack([np.bincount(row, minlength=count) for row in of]).astype(np.float64)
    # blocks of one visit are as dependent as its draws
    starts = np.diff(client[:, draws - kept :], axis=1, prepend=-1) != 0
    visits = np.bincount(client[:, draws - kept :][starts], minlength=count)
    used = np.minimum((numbers > 0).sum(axis=0), visits)
    tested = np.flatnonzero((used >= _LEAST_BLOCKS) & (numbers.sum(axis=0) < numbers.sum()))
    if not tested.size:
        return []
    first, second = np.zeros((2, blocks, tested.size, size))
    for i, s in enumerate(tested):
        here = (of == s)[:, :, None]
        first[:, i] = (x * here).sum(axis=1)
        second[:, i] = (x**2 * here).sum(axis=1)
    # of the clients that are tested, and of all
    here = [numbers[:, tested, None], first, second]
    every = [np.full((blocks, 1), float(length)), x.sum(axis=1), (x**2).sum(axis=1)]
    of_here, of_every = [a.sum(axis=0) for a in here], [a.sum(axis=0) for a in every]
    value = _compare(of_here, of_every)
    less = lambda whole, parts, b: [w - a[b] for w, a in zip(whole, parts, strict=True)]
    without = np.stack(
        [_compare(less(of_here, here, b), less(of_every, every, b)) for b in range(blocks)]
    )
    with np.errstate(all="ignore"):
        error = np.sqrt((blocks - 1) * np.mean((without - without.mean(axis=0)) ** 2, axis=0))
        z = value / error
    least = laws.t.ppf(1 - _CHANCE / (4 * tested.size * size), used[tested] - 1)[:, None]
    enough = np.abs(value) > np.array([np.log(_VARIANCE), _MEAN])[:, None, None]
    certain = np.isfinite(z) & (np.abs(z) > least) & enough & (scale > 0)
    found = []
    strength = np.where(certain, np.abs(z), 0).max(axis=0)
    for i in np.flatnonzero(certain.any(axis=(0, 1))):
        s = int(np.argmax(strength[:, i]))
        ratio, shift = float(np.exp(value[0, s, i])), float(value[1, s, i])
        found.append(Difference(names[int(i)], int(tested[s]), ratio, shift, float(strength[s, i])))
    return sorted(found, key=lambda d: -d.z)


def _compare(here: list[np.ndarray], every: list[np.ndarray]) -> np.ndarray:
    """Log ratio of variances and difference of means of each tested client against elsewhere."""
    with np.errstate(all="ignore"):
        there = [a - b for a, b in zip(every, here, strict=True)]
        ratio = np.log(here[2] / here[0]) - np.log(there[2] / there[0])
        return np.stack([ratio, here[1] / here[0] - there[1] / there[0]])


def describe_differences(found: Sequence[Difference], clients: Sequence[str]) -> str:
    """What it means that draws differ between clients, in words."""
    worst = found[0]
    shifted = abs(worst.shift) > _MEAN
    what = (
        f"lies {worst.shift:+.2g} standard deviations off"
        if shifted
        else f"has {worst.variance:.2g} times the variance"
    )
    more = f", and so do {len(found) - 1} others" if len(found) > 1 else ""
    names = sorted({clients[d.client] for d in found})
    return (
        f"draws depend on the client that is visited: {worst.coordinate} {what} while "
        f"{clients[worst.client]} is visited, against elsewhere ({worst.z:.2g} standard errors)"
        f"{more} (at {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}). Visits are "
        "too long for the surrogates, so that standard deviations are wrong: take fewer "
        "local_steps, a smaller step_size, or surrogates that know the curvature."
    )


def share_reasons(
    client: np.ndarray, visits: np.ndarray, shares: np.ndarray, clients: Sequence[str]
) -> list[str]:
    """Where clients were visited more or less often than by the shares that gradients assume.

    Args:
        client: The client of each draw (chains, draws).
        visits: The number of visits until then.
        shares: Of visits, one for each client.
        clients: Their names.
    """
    steps = np.diff(visits.astype(np.int64), axis=1, prepend=0)
    counts = np.bincount(client[steps > 0], minlength=len(shares))
    total = counts.sum()
    reasons = []
    never = [clients[int(s)] for s in np.flatnonzero(counts == 0)]
    if never and steps[:, 1:].max(initial=0) <= 1:
        reasons.append(
            f"{len(never)} of {len(clients)} clients were never seen in {total} visits "
            f"({', '.join(never[:5])}{' and others' if len(never) > 5 else ''}): the draws know "
            "of their data what the surrogates say. Run longer (num_samples, num_visits), or give "
            "these clients more of the visits (probabilities)."
        )
    z = (counts - total * shares) / np.sqrt(np.maximum(total * shares * (1 - shares), 1e-12))
    law = laws.binom(total, shares)
    chance = 2 * np.minimum(law.cdf(counts), law.sf(counts - 1))
    if chance.min() * len(shares) < _CHANCE:
        s = int(np.argmin(chance))
        reasons.append(
            f"{clients[s]} had {counts[s]} of {total} visits where its share is {shares[s]:.3g} "
            f"({z[s]:+.2g} standard deviations), which gradients assume: the draws are biased."
        )
    return reasons


def coordinates_of(draws: Draws) -> tuple[list[str], np.ndarray]:
    """Names and last draws of at most 64 coordinates, of the chains that stayed finite."""
    healthy = np.asarray(draws.first_bad) < 0
    leaves = jax.tree.leaves(draws.positions)
    if not leaves or not healthy.any():
        return [], np.zeros((0, 0, 0))
    last = [np.asarray(x[:, -_MOST_DRAWS:], np.float64)[healthy] for x in leaves]
    flat = np.concatenate([x.reshape(*x.shape[:2], -1) for x in last], axis=2)
    names = coordinate_names(jax.tree.map(lambda x: np.zeros(x.shape[2:]), draws.positions))
    chosen = evenly(flat.shape[2], _MOST_COORDINATES)
    return [names[int(i)] for i in chosen], flat[:, :, chosen]


class VisitNotes(NamedTuple):
    """What visits say against draws, in sentences, and what is told of them anyway."""

    notes: tuple[str, ...]
    attrs: dict[str, Any]


def visit_notes(
    draws: Draws, shares: np.ndarray, clients: Sequence[str], *, random: bool
) -> VisitNotes:
    """What the visits say against draws.

    Args:
        draws: Draws whose ``stats`` have ``client`` and ``visits``.
        shares: The share of steps of each client.
        clients: Their names.
        random: Whether visits are drawn at random with these shares.
    """
    healthy = np.asarray(draws.first_bad) < 0
    of = np.asarray(draws.stats["client"])
    names, values = coordinates_of(draws)
    notes: list[str] = []
    found = []
    if names:
        of_values = of[healthy][:, -values.shape[1] :]
        found = differences_between_clients(values, of_values, names, len(shares))
    if found:
        notes.append(describe_differences(found, clients))
    if random and of.size:
        notes += share_reasons(of, np.asarray(draws.stats["visits"]), shares, clients)
    realized = np.bincount(of.ravel(), minlength=len(shares)) / max(of.size, 1)
    return VisitNotes(tuple(notes), {"realized_shares": realized.round(6).tolist()})


def with_visit_notes(
    draws: Draws, shares: np.ndarray, clients: Sequence[str], *, random: bool, stacklevel: int = 3
) -> Draws:
    """The draws with what their visits say against them in ``notes``; a bias is warned of."""
    notes, attrs = visit_notes(draws, shares, clients, random=random)
    for note in notes:
        if "were never seen" not in note:
            warnings.warn(note, StabilityWarning, stacklevel=stacklevel)
    return replace(draws, attrs={**draws.attrs, **attrs}, notes=(*draws.notes, *notes))
