"""What went wrong in a run over a network, as its draws tell it."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from stochgrad.core import Draws
from stochgrad.federated import visit_notes


class FederationWarning(UserWarning):
    """Clients left, failed, or answered what no honest client answers."""


class Faults(NamedTuple):
    """What went wrong, by the names of clients.

    Attributes:
        lost: Visits that failed and were tried again.
        refused: Replies that were not what they should be.
        left: Clients that went away and were waited for.
        second: Clients of whom a second node came.
        gone: Clients that were visited no more, and why.
    """

    lost: dict[str, int]
    refused: dict[str, int]
    left: list[str]
    second: list[str]
    gone: dict[str, str]

    def attributes(self) -> dict[str, Any]:
        """The same for the ``attrs`` of draws, which hold numbers, words and lists of them."""
        words = lambda values: [f"{name}: {x}" for name, x in values.items() if x]
        return {
            "lost_visits": sum(self.lost.values()),
            "lost_visits_of": words(self.lost),
            "refusals_of": words(self.refused),
            "left_and_waited_for": self.left,
            "second_nodes_of": self.second,
            "gone": words(self.gone),
        }


def with_fault_notes(
    draws: Draws, clients: Sequence[str], shares: np.ndarray, faults: Faults, told: Sequence[str]
) -> Draws:
    """The draws with what bears on them in ``notes``, for the verdict, and in one warning.

    Args:
        draws: The draws.
        clients: The clients' names.
        shares: The share of visits of each that was to be.
        faults: What went wrong.
        told: What is known against the draws already.
    """
    notes = list(told)
    for name, why in faults.gone.items():
        notes.append(
            f"{name} was visited no more ({why}): the draws since then are of the posterior with "
            "its surrogate in place of its data, "
            + (
                "a slope without curvature, so that what it informs is as wide as without it."
                if draws.attrs["form"] == "none"
                else "which is right to second order, if what it sent for it was."
            )
        )
    compared = visit_notes(draws, shares, list(clients), random=not faults.gone)
    refused = ", ".join(f"{n} of {name}" for name, n in faults.refused.items() if n)
    harmless = [f"Replies were refused, and left no trace in the draws: {refused}."] * bool(refused)
    second = ", ".join(faults.second)
    harmless += [f"Second nodes were not taken in, of {second}."] * bool(second)
    biased = [*notes, *(x for x in compared.notes if "were never seen" not in x)]
    if biased or harmless:
        warnings.warn(" ".join([*biased, *harmless]), FederationWarning, stacklevel=3)
    attrs = {**draws.attrs, **faults.attributes(), **compared.attrs}
    return replace(draws, attrs=attrs, notes=(*draws.notes, *notes, *compared.notes))
