"""What a client lets a server ask, and what it lets it learn."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Context
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from stochgrad.core import (
    Gradient,
    Kernel,
    Posterior,
    check_count,
    check_file_path,
    check_number,
    describe,
    hoisted_jit,
)
from stochgrad.federated import (
    Adjacency,
    Diagonal,
    Full,
    block_visits,
    check_adjacency,
    check_delta,
    client_sums,
    clipped_minibatch,
    epsilon_of,
    langevin_cost,
    likelihood_sum,
    most_cost,
    noisy_fisher,
    noisy_slope,
    require_clients,
)
from stochgrad.interop.flower._ledger import (
    Item,
    Ledger,
    charge_in_state,
    read_ledger,
)

log = logging.getLogger("stochgrad.flower.client")

_MOST_NUMBERS = 1000


@dataclass(frozen=True)
class PrivacyPolicy:
    r"""What a client lets a server ask, and how much it lets it learn of a row.

    Without ``epsilon`` there are limits only: too short visits, too frequent draws, too small
    minibatches and too many slopes and curvatures are refused. With it privacy is counted: the
    gradient of each row is clipped to ``norm``, slopes and curvatures get noise, visits count as
    the Gaussian mechanisms that they are, and what would lead beyond ``epsilon`` is refused. No
    refusal depends on the data.

    Counted are steps of SGLD with normal noise, whose draws have no noise on top: they are draws of
    the posterior of clipped rows. Other kernels are refused: with a momentum, or a gradient that
    travels, some of what a client sends has no noise.

    Args:
        least_steps: The fewest steps of a visit.
        least_thin: The fewest steps between two positions that are sent.
        least_batch: The fewest rows of a minibatch, the last one included.
        most_answers: How many slopes and curvatures are sent, each at a position and counting once.
        epsilon: $\varepsilon$ of the whole ledger.
        delta: $\delta$, far below one over the number of rows.
        norm: C, to which the gradient of each row is clipped.
        slope_noise: Standard deviation of a slope's noise over the most that one row changes it,
            and of the number of rows that were clipped for it, which is sent with it.
        curvature_noise: Likewise of a curvature.
        adjacency: As in ``stochgrad.federated.privacy_of_steps``.
        ledger: A file of this client, in which spent budget and the secret outlast processes and
            runs. Needed with ``epsilon``; without, answers are counted anew with each run.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range; ``delta``, ``norm`` or ``ledger`` is missing.
        OSError: the ledger's directory is not there.
        ModuleNotFoundError: privacy is counted, and ``dp-accounting`` is not installed.

    Example:
        >>> from stochgrad.flower import PrivacyPolicy
        >>> PrivacyPolicy(least_steps=100, least_thin=100, most_answers=20).counts
        False
    """

    least_steps: int = 1
    least_thin: int = 1
    least_batch: int = 1
    most_answers: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    norm: float | None = None
    slope_noise: float = 10.0
    curvature_noise: float = 10.0
    adjacency: Adjacency = "replace"
    ledger: str | PathLike | None = None

    def __post_init__(self):
        for name in ("least_steps", "least_thin", "least_batch"):
            check_count(name, getattr(self, name))
        if self.most_answers is not None:
            check_count("most_answers", self.most_answers, least=0)
        check_number("slope_noise", self.slope_noise)
        check_number("curvature_noise", self.curvature_noise)
        check_adjacency(self.adjacency)
        if self.ledger is not None:
            check_file_path("ledger", self.ledger)
        if self.epsilon is None:
            for name in ("delta", "norm"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for counted privacy: give epsilon as well.")
            return
        check_number("epsilon", self.epsilon)
        for name in ("delta", "norm", "ledger"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is needed with epsilon.")
        check_number("norm", self.norm)
        most_cost(self.epsilon, check_delta(self.delta))

    @property
    def counts(self) -> bool:
        """Whether privacy is counted."""
        return self.epsilon is not None


def privacy_spent(ledger: str | PathLike, delta: float) -> float:
    r"""The $\varepsilon$ that a client's ledger says is spent, at a $\delta$.

    Args:
        ledger: The file.
        delta: $\delta$.

    Raises:
        ValueError: the file is missing or none; ``delta`` is no probability.
        ModuleNotFoundError: ``dp-accounting`` is not installed.
    """
    delta = check_delta(delta)
    return epsilon_of(float(read_ledger(check_file_path("ledger", ledger)).cost.max()), delta)


class Declined(Exception):
    """A request that a client's policy does not allow, in words that do not depend on its data."""


class Guard:
    """A policy, of one client's data and kernel."""

    def __init__(
        self, policy: PrivacyPolicy, posterior: Posterior, kernel: Kernel, position: PyTree, secret
    ):
        self.policy, self.posterior, self.position = policy, posterior, position
        batches, clients = posterior.batches, require_clients(posterior)
        rows = int(clients.sizes.sum())
        least = min(batches.batch_size, rows - (int(clients.blocks[0]) - 1) * batches.batch_size)
        if least < policy.least_batch:
            raise ValueError(
                f"a minibatch has {least} rows where least_batch={policy.least_batch}: take a "
                "batch_size that divides the number of rows, or order='full'."
            )
        self.mark: tuple = ()
        self.ledger = None
        if policy.ledger is not None:
            path = check_file_path("ledger", policy.ledger)
            self.ledger = Ledger(path, rows, batches.batch_size, secret)
        if policy.counts:
            check_counted(kernel, position, secret)
            assert policy.norm is not None
            self.norm = float(policy.norm)
            self.most = most_cost(policy.epsilon or 0.0, policy.delta or 0.0)
            settings = dict(kernel.settings)
            self.step_size = float(settings["step_size"])
            self.temperature = float(settings["temperature"])
            law = (policy.norm, policy.slope_noise, policy.curvature_noise, policy.adjacency)
            self.mark = (kernel.settings, law, batches.batch_size, data_digest(posterior, position))
            self.sums = client_sums(posterior, self.norm, False)
            self.sums_and_fisher = client_sums(posterior, self.norm, True)

    def check_visit(self, steps: int, thin: int, centered: bool) -> None:
        """Raise ``Declined`` unless visits of such settings are allowed."""
        policy = self.policy
        if steps < policy.least_steps:
            raise Declined(f"local_steps >= {policy.least_steps}")
        if thin < policy.least_thin:
            raise Declined(f"thin >= {policy.least_thin}")
        if policy.counts and centered:
            raise Declined("control_variate=False")

    def check_form(self, form: str, curvature: str) -> None:
        """Raise ``Declined`` unless such a curvature is sent."""
        if self.policy.counts and form != "none" and curvature != "fisher":
            raise Declined("curvature='fisher'")

    def answer_items(self, names: dict[str, str], form: str) -> list[Item]:
        """What a slope, and a curvature of a form, cost; ``names`` are of ``answer_names``."""
        policy = self.policy
        if not policy.counts:
            parts = ["slope"] if form == "none" else ["slope", "precision"]
            return [Item(names[part], 0.0) for part in parts]
        # a slope comes with the number of rows that were clipped for it, under as much noise
        items = [Item(names["slope"], 2 / policy.slope_noise**2)]
        if form != "none":
            items.append(Item(names["precision"], 1 / policy.curvature_noise**2))
        return items

    def visit_item(self, name: str, order: jax.Array, before: int, steps: int, share: float):
        """What a visit costs."""
        if not self.policy.counts:
            return Item(name, 0.0)
        blocks = int(require_clients(self.posterior).blocks[0])
        weight = np.float64(blocks) / share
        cost = langevin_cost(
            self.step_size, weight, self.norm, self.policy.adjacency, self.temperature
        )
        if not cost * steps / blocks <= self.most:
            raise Declined("its budget is spent")
        return Item(name, cost * block_visits(self.posterior, order, before, steps))

    def charge(self, context: Context, items: Sequence[Item]) -> None:
        """Enter items before they are told, or raise ``Declined``."""
        most_answers = self.policy.most_answers
        if self.ledger is None:
            refusal = charge_in_state(context, items, most_answers)
        else:
            most = self.most if self.policy.counts else 0.0
            refusal = self.ledger.charge(items, most, most_answers)
        if refusal:
            raise Declined(refusal)

    def gradient(self, target: Posterior) -> Gradient:
        """The minibatch gradient of clipped rows."""
        return clipped_minibatch(target, self.norm)

    def answer(self, position: PyTree, form: str, key_of: Any) -> dict[str, Any]:
        """Slope, number of clipped rows, and curvature, each with the noise of its own key."""
        _, unravel = ravel_pytree(position)
        slope, _, clipped = self.sums(position)
        rows = int(require_clients(self.posterior).sizes.sum())
        log.info("%d of %d rows are clipped at a position asked for", int(clipped), rows)
        policy, by = self.policy, self.policy.adjacency
        count = float(clipped) + policy.slope_noise * float(jax.random.normal(key_of("clipped")))
        slope = noisy_slope(key_of("slope"), slope, self.norm, policy.slope_noise, by)
        told = {"slope": unravel(slope), "clipped": count}
        if form == "none":
            return told
        _, fisher, _ = self.sums_and_fisher(position)
        key, noise = key_of("precision"), policy.curvature_noise
        noisy = noisy_fisher(key, fisher, self.norm, noise, form, by)[None]
        precision = Full(noisy) if form == "full" else Diagonal(jax.vmap(unravel)(noisy))
        return {**told, "precision": precision}


def data_digest(posterior: Posterior, position: PyTree) -> str:
    """A digest of a client's rows: one noise under two data would tell how they differ.

    Of a numpyro model, whose rows are out of sight, of its log density and gradient.
    """
    told = posterior.batches.full
    if not hasattr(told, "data"):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), position)
        score = jax.value_and_grad(posterior.log_density)
        told = hoisted_jit(lambda at: likelihood_sum(posterior, score)(jnp.int32(0), at))(zeros)
    digest = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(told)):
        digest.update(repr((leaf.dtype.str, leaf.shape)).encode() + leaf.tobytes())
    return digest.hexdigest()


def check_counted(kernel: Kernel, position: PyTree, secret: bytes | None) -> None:
    """Raise a ValueError unless privacy of a kernel's steps can be counted."""
    settings = dict(kernel.settings)
    if kernel.method != "SGLD":
        raise ValueError(
            f"kernel must be stochgrad.sgld where privacy is counted, got {kernel.method}: with a "
            "momentum some of what a client sends has no noise."
        )
    for name in ("step_size", "temperature"):
        value = settings[name]
        if not isinstance(value, float) or not value > 0:
            raise ValueError(
                f"{name} must be a positive number where privacy is counted, got {describe(value)}."
            )
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(position))
    noise = settings["noise"]
    if noise != "normal" and not (noise == "auto" and size <= _MOST_NUMBERS):
        raise ValueError(
            f"noise must be 'normal' where privacy is counted, got {describe(noise)}: others have "
            "finitely many values."
        )
    if any(x.dtype not in (jnp.float32, jnp.float64) for x in jax.tree.leaves(position)):
        raise ValueError("init must be in single or double precision where privacy is counted.")
    if secret == b"":
        raise ValueError("secret must not be empty where privacy is counted: its noise is known.")
