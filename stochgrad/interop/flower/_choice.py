"""Surrogates that a server without data chooses, by curvatures that clients tell."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import Kernel, Position, tree_size
from stochgrad.federated import (
    MOST_CLIENTS,
    Curvatures,
    Diagonal,
    Full,
    LowRank,
    Precision,
    Spread,
    Stability,
    Surrogates,
    choose_surrogates,
    describe_spread,
    describe_unstable,
    diagonal_spread,
    few_matrices,
    matrix_spread,
    precision_diagonals,
    rim,
    safe_scale,
    step_time,
    surrogate_matrices,
    too_wide,
)
from stochgrad.interop.flower._likelihoods import (
    Likelihoods,
    expand_at,
    likelihoods_of,
    search_reference,
)
from stochgrad.interop.flower._network import Network, PolicyError, log
from stochgrad.interop.flower._protocol import answer_shapes, flat_shape
from stochgrad.interop.flower._wire import Refused, check_reply, metadata, tree_limit, unpack

_MOST_POINTS_DIMENSIONS = 300
"""Dimensions beyond which visits are looked at in half as many points."""
_FORMS = {"global_first_order": "none", "global_quadratic": "full"}


class Choice(NamedTuple):
    """What surrogates a run has.

    Attributes:
        form: As messages name it.
        surrogate: Of what kind they are, in words.
        looked: Whether the spread of draws was worked out from curvatures.
        warnings: What is wrong with visits of this length.
        reason: Why curvatures were not asked for, or not answered; empty if they were.
        declined: Whether that is because a client declined.
    """

    form: str
    surrogate: str
    looked: bool = False
    warnings: tuple[str, ...] = ()
    reason: str = ""
    declined: bool = False


def measure_and_choose(
    network: Network,
    init: Position,
    like: PyTree,
    max_rounds: int,
    shares: np.ndarray,
    kernel: Kernel,
    steps: int,
) -> tuple[Likelihoods, Choice]:
    """Find the reference, the clients' log likelihoods there, and the surrogates to take.

    The decision is that of ``stochgrad.federated.sample``. What clients answer for it is their
    surrogate, if that has curvature.
    """
    reference, told = search_reference(network, init, like, "hessian", max_rounds)
    reason, refusal = _no_look(network), None
    size, count = tree_size(reference), len(network.clients)
    ask = lambda form, kind: expand_at(network, reference, like, form, kind, told)
    answers = None
    if not reason and count > 1:
        matrices = few_matrices(size, count)
        try:
            answers = ask("full", "hessian") if matrices else ask("diagonal", "fisher")
            look = _Look(network, like, reference, answers, shares, kernel, steps)
            return look.choose(matrices)
        except PolicyError as error:
            refusal = str(error)
            reason = (
                f"curvature, by which surrogate='auto' chooses, was not to be had ({refusal}): "
                "surrogates are of first order, and draws may be too wide in what one client alone "
                "informs. Give surrogate='global_first_order' if that is what you want."
            )
    answers = _without_curvature(answers) if answers else ask("none", "hessian")
    if reason:
        log.info("surrogates are of first order: %s", reason)
    choice = Choice("none", "global_first_order", reason=reason, declined=refusal is not None)
    return likelihoods_of(network, reference, answers), choice


def _no_look(network: Network) -> str:
    """Why curvatures are not asked for; empty if they are."""
    count = len(network.clients)
    if network.private:
        return (
            f"clients {sorted(network.private)} count privacy, and are not asked for the curvature "
            "by which surrogate='auto' chooses"
        )
    if count > MOST_CLIENTS:
        return f"of {count:,} clients curvatures are not asked for, {MOST_CLIENTS:,} are the most"
    return ""


def _without_curvature(answers: dict) -> dict:
    return {name: (value, {**t, "precision": None}) for name, (value, t) in answers.items()}


class _Look:
    """The clients' curvatures at the reference, and what follows from them."""

    def __init__(
        self,
        network: Network,
        like: PyTree,
        reference: Position,
        answers: dict[str, tuple[float, PyTree]],
        shares: np.ndarray,
        kernel: Kernel,
        steps: int,
    ):
        self.network, self.like, self.reference = network, like, reference
        self.answers, self.shares, self.steps = answers, shares, steps
        self.origin = jax.tree.map(jnp.asarray, reference)
        self.time = step_time(kernel)
        count = len(network.clients)
        self.times = None if self.time is None else np.full(count, self.time * steps)
        self.told = self._stacked(answers)
        self.form = "none"
        self.margins: dict[bytes, Stability] = {}

    def choose(self, matrices: bool) -> tuple[Likelihoods, Choice]:
        count = len(self.network.clients)
        prior = self._prior("full" if matrices else "diagonal")
        spread_of = self._by_matrices(prior) if matrices else self._by_diagonals(prior)
        scale = np.ones(count)

        def scale_of(made: Surrogates) -> np.ndarray:
            nonlocal scale
            points = self._points(prior)
            scale = safe_scale(lambda by: self._margins(made, points, by), count, times=self.times)
            return scale

        slopes = [tree["slope"] for _, tree in self.answers.values()]
        first = Surrogates(self.origin, jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *slopes))
        kind, made, spread = choose_surrogates(
            first,
            self.time,
            np.full(count, self.steps),
            matrices,
            lambda form, rank: self._precision(matrices, form, rank),
            spread_of,
            scale_of,
        )
        warnings = self._warnings(made, spread, scale)
        curved = made.precision is not None
        found = likelihoods_of(self.network, self.reference, _without_curvature(self.answers))
        if curved:
            precision = Full(_total(made.precision))
            found = found._replace(total={**found.total, "precision": precision}, scales=scale)
        form = _FORMS.get(kind, kind.replace("low rank", "low_rank"))
        return found, Choice(form, kind, True, tuple(warnings))

    def _warnings(self, made: Surrogates, spread: Spread | None, scale: np.ndarray) -> list[str]:
        names, told = self.network.clients, []
        report = self.margins.get(scale.tobytes())
        if report is not None and self.steps > 1:
            told += [describe_unstable(names, report, self.times)]
        if spread is not None and too_wide(spread):
            known = made.precision is not None
            told += [describe_spread(spread, f"client {names[spread.client]}", curved=known)]
        return [message for message in told if message]

    def _by_matrices(self, prior: np.ndarray) -> Callable[[Surrogates], Spread | None]:
        here = Curvatures(np.asarray(self.told.matrices, np.float64), prior)

        def spread_of(made: Surrogates) -> Spread | None:
            if self.times is None:
                return None
            known = surrogate_matrices(made.precision, len(self.shares), self.origin)
            return matrix_spread(self.origin, here, known, self.shares, self.shares, self.times)

        return spread_of

    def _by_diagonals(self, prior: np.ndarray) -> Callable[[Surrogates], Spread | None]:
        hessians: list[np.ndarray] = []

        def spread_of(made: Surrogates) -> Spread | None:
            if self.times is None:
                return None
            by = self.shares, self.shares, self.times
            if made.precision is None:
                return diagonal_spread(self.origin, _rows(self.told), prior, *by)
            if not hessians:
                hessians.append(_rows(self._ask("diagonal")))
            known = precision_diagonals(made.precision, len(self.shares), self.origin)
            return diagonal_spread(self.origin, hessians[0], prior, *by, known)

        return spread_of

    def _precision(self, matrices: bool, form: str, rank: int) -> Precision:
        self.form = form if matrices else f"{form} {rank}"
        return jax.tree.map(jnp.asarray, self.told if matrices else self._ask(self.form))

    def _ask(self, form: str) -> Any:
        return self._stacked(self.network.ask(self.reference, self.like, form, "hessian"))

    def _stacked(self, answers: dict) -> Any:
        trees = [tree["precision"] for _, tree in answers.values()]
        return jax.tree.map(lambda *x: np.stack(x), *trees)

    def _prior(self, form: str) -> np.ndarray:
        """The prior's curvature, a matrix or a diagonal, which the first client tells."""
        shapes = answer_shapes(self.like, form)["precision"]

        def read(name, reply):
            content = check_reply(reply, "train.prior", tree_limit(shapes))
            return unpack(content, "precision", shapes)

        first = self.network.clients[:1]
        request = lambda name: ({"position": self.reference}, {"form": form})
        (told,) = self.network.gather(first, "train.prior", request, read).values()
        found = told.matrices[0] if form == "full" else _rows(told)[0]
        return np.asarray(found, np.float64)

    def _points(self, prior: np.ndarray) -> np.ndarray:
        flat = np.asarray(ravel_pytree(self.origin)[0], np.float64)
        own = self.told.matrices if isinstance(self.told, Full) else _rows(self.told)
        points = rim(flat, prior + np.asarray(own, np.float64).sum(axis=0))
        few = flat.size > _MOST_POINTS_DIMENSIONS
        return np.asarray(points[::2] if few else points, flat_shape(self.like)[1])

    def _margins(self, made: Surrogates, points: np.ndarray, scale: np.ndarray) -> Stability:
        """What clients say of visits to them with so much of the curvature."""
        total = Full(_total(made.scaled(scale).precision))
        trees = {"position": self.reference, "points": points, "total": total}
        same = {"form": self.form, "curvature": "hessian", "points": len(points)}
        number = {name: n for n, name in enumerate(self.network.clients)}

        def request(name):
            own = {"share": self.shares[number[name]], "scale": scale[number[name]]}
            return trees, {**same, **{key: float(x) for key, x in own.items()}}

        def read(name, reply):
            content = check_reply(reply, "train.margin", 0)
            told = metadata(content, margin=float, far_margin=float, largest=float)
            numbers = np.array([told[key] for key in Stability._fields])
            if not np.isfinite(numbers).all():
                raise Refused("its margins are not finite")
            return numbers

        answers = self.network.gather(self.network.clients, "train.margin", request, read)
        report = Stability(*np.stack(list(answers.values())).T)
        self.margins[scale.tobytes()] = report
        return report


def _rows(precision: Diagonal) -> np.ndarray:
    """Diagonals as (clients, d)."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(precision.values)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def _total(precision: Precision | None) -> Any:
    """The sum over clients as a matrix."""
    if isinstance(precision, LowRank):
        return np.asarray(precision.matrix_of_all())
    assert isinstance(precision, Full)
    return np.sum(np.asarray(precision.matrices), axis=0)
