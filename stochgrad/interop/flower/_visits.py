"""The visits of chains to clients, each sent as soon as the last one is back."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flwr.app import Message
from jaxtyping import PyTree

from stochgrad.core import Draws, PRNGKey, key_words, tree_bytes
from stochgrad.interop.flower._faults import Faults
from stochgrad.interop.flower._likelihoods import Likelihoods
from stochgrad.interop.flower._network import Network, declined, log
from stochgrad.interop.flower._plausible import Reach
from stochgrad.interop.flower._protocol import OTHER_KERNEL, digest_of
from stochgrad.interop.flower._renewal import Anchors, renew
from stochgrad.interop.flower._wire import (
    Lost,
    Refusal,
    Refused,
    check_reply,
    metadata,
    shape_bytes,
    tree_limit,
    unpack,
)


class Chain(NamedTuple):
    """What the server keeps of a chain.

    Attributes:
        state: Its state after the last visit; None before the first.
        draws: The draws of each visit.
        clients: The client of each visit.
        minibatches: How many each client has given to it.
    """

    state: PyTree
    draws: list
    clients: list[int]
    minibatches: list[int]


class Attempt(NamedTuple):
    """The attempts at a chain's next visit.

    Attributes:
        since: When it was first due, in seconds.
        failures: How many failed until now.
        after: When to try again, in seconds.
        reason: Why the last one failed.
    """

    since: float
    failures: int = 0
    after: float = 0.0
    reason: str = "the client is not there"


class Away(NamedTuple):
    """A chain at a client's node, when to give it up, and the version of what nodes were told."""

    chain: int
    client: int
    node: int
    end: float
    version: int


class Limits(NamedTuple):
    """What is put up with, and what is done when it is not any more.

    Attributes:
        failures: Failures of one visit.
        seconds: Seconds for all attempts at one visit.
        refusals: Replies in a row of one client that are not what they should be.
        absent: ``"stop"``, or ``"surrogate"`` to go on with it in place of the client's data.
    """

    failures: int
    seconds: float
    refusals: int
    absent: str


class Visits:
    """Chains on their way between clients; ``position`` and ``state`` are shapes."""

    def __init__(
        self,
        network: Network,
        settings: dict[str, Any],
        likelihoods: Likelihoods,
        shares: np.ndarray,
        position: PyTree,
        state: PyTree,
        limits: Limits,
        reach: Reach,
        save: Callable[[list[Chain], Anchors | None], None] | None,
        anchors: Anchors | None = None,
    ):
        self.network, self.settings, self.assumed = network, settings, shares
        self.sums = {"origin": likelihoods.reference, "total": likelihoods.total}
        self.scales = likelihoods.scales
        self.gone = network.gone
        self.set_shares()
        draws = settings["steps"] // settings["thin"]
        self.state = state
        self.draws = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((draws, *s.shape), s.dtype), position
        )
        self.limit = tree_limit(self.state, self.draws)
        self.limits, self.reach, self.anchors = limits, reach, anchors
        self.save = None if save is None else lambda chains: save(chains, self.anchors)
        self.away: dict[str, Away] = {}
        self.attempts: dict[int, Attempt] = {}
        self.lost = dict.fromkeys(network.clients, 0)
        self.refused = dict.fromkeys(network.clients, 0)

    def set_shares(self) -> None:
        """Divide visits among the clients that are not gone, and tell nodes of it."""
        there = np.array([c not in self.gone for c in self.network.clients])
        self.shares = np.where(there, self.assumed, 0.0)
        if not self.shares.any():
            raise RuntimeError(f"no client is left: {self.describe_gone()}.")
        self.shares = self.shares / self.shares.sum()
        arrays = [
            x.tobytes() for x in jax.tree.leaves((*self.sums.values(), self.shares, self.scales))
        ]
        self.version = int(digest_of((repr(self.settings), arrays))[:7], 16)
        self.prepared: set[int] = set()

    def describe_gone(self) -> str:
        """Which clients are gone, and why."""
        return "; ".join(f"client {name} ({why})" for name, why in self.gone.items())

    def go_on_without(self, client: int, why: str) -> None:
        """From now on the surrogate of a client stands for its data."""
        name = self.network.clients[client]
        log.warning("client %s is not visited any more: %s", name, why)
        self.gone[name] = why
        self.set_shares()
        for number in [n for n in self.attempts if n not in {a.chain for a in self.away.values()}]:
            self.attempts.pop(number)

    def run(self, chains: list[Chain], key: PRNGKey, num_visits: int) -> list[Chain]:
        """The chains after so many visits of each."""
        chains, network = list(chains), self.network
        refreshed = time.monotonic()
        while True:
            until = num_visits
            if self.anchors is not None:
                until = min(num_visits, self.anchors.visits + self.anchors.period)
            due = [n for n, chain in enumerate(chains) if len(chain.clients) < until]
            self.send(chains, due, key)
            if not self.away and not due:
                if until == num_visits or self.anchors is None:
                    return chains
                self.anchors = renew(network, self.anchors, [c.state.position for c in chains])
                if self.save is not None:
                    self.save(chains)
                continue
            replies = list(network.grid.pull_messages(list(self.away))) if self.away else []
            for reply in replies:
                away = self.away.pop(reply.metadata.reply_to_message_id)
                name = network.clients[away.client]
                if away.version != self.version:
                    self.attempts.pop(away.chain, None)
                    continue
                try:
                    chains[away.chain] = self.after_visit(reply, chains[away.chain], away.client)
                    self.attempts.pop(away.chain, None)
                    self.refused[name] = 0
                except Refusal as reason:
                    self.attempts.pop(away.chain, None)
                    self.decline(chains, away, reason)
                except Lost as reason:
                    self.fail(away, str(reason))
                except Refused as reason:
                    network.refusals[name] += 1
                    self.refused[name] += 1
                    self.fail(away, str(reason))
                    self.quarantine(chains, away, str(reason))
            if replies and self.save is not None:
                self.save(chains)
            now = time.monotonic()
            for message in [i for i, away in self.away.items() if now > away.end]:
                self.fail(self.away.pop(message), "no reply in time")
            complete = not network.missing()
            if now - refreshed > max(5.0 if complete else 0.1, network.poll):
                network.refresh_nodes()
                refreshed = time.monotonic()
            if not replies:
                time.sleep(network.poll)

    def send(self, chains: list[Chain], due: list[int], key: PRNGKey) -> None:
        """Send the chains that are due to their next clients, as far as these are there."""
        out = {away.chain for away in self.away.values()}
        for number in due:
            if number in out:
                continue
            now = time.monotonic()
            client, turn = self.next_client(number, chains[number], key)
            attempt = self.attempts.setdefault(number, Attempt(now))
            seconds = now - attempt.since
            if attempt.failures > self.limits.failures or seconds > self.limits.seconds:
                self.give_up(chains, client, self.why_stop(number, client, seconds))
                continue
            node = self.network.nodes.get(self.network.clients[client])
            if node is None or now < attempt.after:
                continue
            message = self.request(number, chains[number], client, node, turn)
            (sent,) = self.network.grid.push_messages([message])
            end = now + self.network.timeout
            self.away[sent] = Away(number, client, node, end, self.version)

    def decline(self, chains: list[Chain], away: Away, reason: Refusal) -> None:
        """Visit no more whose budget is spent; stop where a policy wants other visits."""
        name = self.network.clients[away.client]
        if "=" in str(reason):
            raise ValueError(declined(name, reason)) from reason
        if name not in self.gone:
            self.give_up(chains, away.client, declined(name, reason))

    def quarantine(self, chains: list[Chain], away: Away, reason: str) -> None:
        """Visit a client no more whose replies are refused again and again."""
        name = self.network.clients[away.client]
        if self.refused[name] > self.limits.refusals and name not in self.gone:
            why = (
                f"{self.refused[name]} replies of client {name} in a row were refused, at last "
                f"because of {reason}"
            )
            self.give_up(chains, away.client, why)

    def give_up(self, chains: list[Chain], client: int, why: str) -> None:
        """Stop, or go on with the client's surrogate in place of its data."""
        if self.limits.absent == "surrogate":
            self.go_on_without(client, why)
            return
        if self.save is not None:
            self.save(chains)
        rest = (
            "There was no checkpoint: with checkpoint= what was drawn would be kept."
            if self.save is None
            else "The checkpoint has all visits until now, and resume=True goes on from it."
        )
        raise RuntimeError(
            f"{why}: the run stops here, as a visit to another client in its place would bias the "
            "draws. on_absent='surrogate' goes on with the surrogate in place of the client's "
            f"data; without the client, it would be another posterior. {rest}"
        )

    def next_client(self, number: int, chain: Chain, key: PRNGKey) -> tuple[int, PRNGKey]:
        """The client of a chain's next visit, by the shares, and the visit's key."""
        for data in (number, len(chain.clients), 0):
            key = jax.random.fold_in(key, data)
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return int(random.choice(len(self.shares), p=self.shares)), key

    def request(self, number: int, chain: Chain, client: int, node: int, key: PRNGKey) -> Message:
        """The message that sends a chain to a client."""
        trees: dict[str, Any] = {"key": np.asarray(key_words(key))}
        first = chain.state is None
        trees |= {"position": self.sums["origin"]} if first else {"state": chain.state}
        trees |= {} if self.anchors is None else self.anchors.of_visit(number, client)
        values: dict[str, Any] = {"chain": number, "version": self.version}
        values["minibatches"] = chain.minibatches[client]
        if node not in self.prepared:
            trees |= self.sums
            own = {"share": float(self.shares[client]), "scale": float(self.scales[client])}
            values |= {**self.settings, **own}
            self.prepared.add(node)
        return self.network.message(node, "train.visit", trees, values)

    def after_visit(self, reply: Message, chain: Chain, client: int) -> Chain:
        """The chain after a reply, which may be anything.

        Raises:
            Refused: it is no state of a chain.
            ValueError: the client's kernel is another one than the server's.
        """
        try:
            content = check_reply(reply, "train.visit", self.limit)
        except Refused as reason:
            if OTHER_KERNEL in str(reason):
                raise ValueError(
                    f"kernel is another one at client {self.network.clients[client]!r} than at the "
                    "server: give client_app and federate the same."
                ) from reason
            raise
        if self.anchors is not None:
            metadata(content, anchored=bool)
        state = unpack(content, "state", self.state)
        draws = unpack(content, "draws", self.draws)
        minibatches = list(chain.minibatches)
        minibatches[client] = metadata(content, minibatches=int)["minibatches"]
        if not chain.minibatches[client] <= minibatches[client] < 2**32:
            raise Refused("its number of minibatches is none")
        start = self.sums["origin"] if chain.state is None else chain.state.position
        self.reach.check(start, state, draws)
        return Chain(state, [*chain.draws, draws], [*chain.clients, client], minibatches)

    def fail(self, away: Away, reason: str) -> None:
        """Note that a visit failed, and when to try again."""
        name = self.network.clients[away.client]
        log.warning(
            "the visit of chain %d to client %s is tried again: %s", away.chain, name, reason
        )
        self.lost[name] += 1
        self.prepared.discard(away.node)
        self.network.refresh_nodes()
        attempt = self.attempts[away.chain]
        pause = min(self.network.poll * 2**attempt.failures, 60.0)
        after = time.monotonic() + pause
        self.attempts[away.chain] = Attempt(attempt.since, attempt.failures + 1, after, reason)

    def why_stop(self, number: int, client: int, seconds: float) -> str:
        """That a visit has failed too often or for too long."""
        failures, reason = self.attempts[number].failures, self.attempts[number].reason
        return (
            f"the visit of chain {number} to client {self.network.clients[client]} failed "
            f"{failures} times within {seconds:.3g} s, at last because {reason}"
        )

    def faults(self) -> Faults:
        """What went wrong until now."""
        network = self.network
        second = sorted({name for name, _ in network.second_nodes})
        return Faults(self.lost, network.refusals, sorted(network.left), second, self.gone)

    def as_draws(self, chains: list[Chain], num_visits: int, setup_bytes: np.ndarray) -> Draws:
        """The draws of the first visits of all chains."""
        per_visit = self.settings["steps"] // self.settings["thin"]
        size = num_visits * per_visit
        joined = [jax.tree.map(lambda *x: np.concatenate(x)[:size], *c.draws) for c in chains]
        positions = jax.tree.map(lambda *x: np.stack(x), *joined)
        clients = np.array([c.clients[:num_visits] for c in chains], np.int32)
        client = np.repeat(clients, per_visit, axis=1)
        visits = np.broadcast_to(np.repeat(np.arange(1, num_visits + 1), per_visit), client.shape)
        state, draws, sums = (
            sum(shape_bytes(leaf) for leaf in jax.tree.leaves(tree))
            for tree in (self.state, self.draws, self.sums)
        )
        stats = {
            "client": client,
            "visits": visits,
            "bytes_up": visits * (state + draws),
            "bytes_down": visits * state,
        }
        more: dict[str, Any] = {}
        if self.anchors is not None:
            one = tree_bytes(self.sums["origin"])
            renewals = (visits - 1) // self.anchors.period
            stats["renewals"] = renewals
            stats["bytes_up"] = stats["bytes_up"] + renewals * len(self.shares) * one
            down = stats["bytes_down"] + renewals * len(self.shares) * one
            # the anchor, the slope of the client and the sum of all slopes
            stats["bytes_down"] = down + visits * 3 * one
            kept = [f"{name}: {n}" for name, n in sorted(self.anchors.kept.items())]
            more = {"surrogate_period": self.anchors.period, "kept_slopes_of": kept}
        attrs = {
            "method": "FSGLD",
            **self.settings,
            **more,
            "setup_bytes_up": int(setup_bytes[0]),
            "setup_bytes_down": int(setup_bytes[1]) + len(self.shares) * sums,
        }
        bad = np.full(len(chains), -1, np.int32)
        return Draws(positions, stats, np.ones(client.shape, bool), bad, attrs=attrs)
