"""The nodes of the clients, as Flower lists them, and messages to them."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from jaxtyping import PyTree

from stochgrad.interop.flower._protocol import answer_shapes
from stochgrad.interop.flower._wire import (
    Lost,
    Refusal,
    Refused,
    check_reply,
    metadata,
    pack,
    tree_limit,
    unpack,
)

log = logging.getLogger("stochgrad.flower")


class PolicyError(ValueError):
    """A client's privacy policy does not allow what a run needs."""


class Network:
    """The clients of a run, the nodes that hold their data, and messages to these.

    Attributes:
        nodes: The node of each client that is connected.
        rows: The number of rows of each client.
        refusals: How many replies of each client were not what they should be.
        left: Clients that went away while the run was on.
        gone: Clients that are not waited for any more, and why.
        private: Clients that count privacy.
        clipped: How many rows of these are clipped where they were asked last, and the standard
            deviation of the noise on it.
        second_nodes: Nodes that were not taken in, as another had their client's name.
        sent: Bytes of arrays that clients sent and were sent in answers to questions.
    """

    def __init__(self, grid: Grid, clients: list[str], timeout: float, poll: float):
        self.grid, self.clients = grid, clients
        self.timeout, self.poll = timeout, poll
        self.nodes: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self._greeted: set[int] = set()
        self.refusals = dict.fromkeys(clients, 0)
        self.left: set[str] = set()
        self.gone: dict[str, str] = {}
        self.private: set[str] = set()
        self.clipped: dict[str, tuple[float, float]] = {}
        self.second_nodes: set[tuple[str, int]] = set()
        self.sent = np.zeros(2, np.int64)

    def refresh_nodes(self, *, starting: bool = False) -> None:
        """Ask nodes that were not there before for their names; forget those that are gone.

        A node that reports the name of a client that another node holds is not taken in, as long
        as the other is there.

        Raises:
            ValueError: two nodes report one name while a run is ``starting``; or a client came
                back with another number of rows.
        """
        present = set(self.grid.get_node_ids())
        nodes = {name: node for name, node in self.nodes.items() if node in present}
        new = sorted(present - self._greeted)
        self._greeted = present
        requests = {self.message(node, "query.hello", {}, {}): node for node in new}
        for request, reply in self.exchange(list(requests)):
            node = requests[request]
            try:
                values = metadata(check_reply(reply, "query.hello", 0), name=str, rows=int)
                if values["name"] not in self.clients or values["rows"] < 1:
                    raise Refused("a client of this name is not expected")
            except Refused as reason:
                if isinstance(reason, Lost):
                    self._greeted.discard(node)  # it is asked again
                log.warning("node %s is not taken in: %s", node, reason)
                continue
            name, rows = values["name"], values["rows"]
            if name in nodes:
                self._greeted.discard(node)  # until the other is gone
                self._refuse_second(name, nodes[name], node, starting)
                continue
            if self.rows.setdefault(name, rows) != rows:
                raise ValueError(
                    f"client {name!r} had {self.rows[name]} rows and is now there with {rows}: a "
                    "run is of the same data from its beginning to its end."
                )
            nodes[name] = node
            if values.get("private") is True:
                self.private.add(name)
        for name in self.nodes.keys() - nodes.keys():
            log.warning("client %s is gone; its visits wait for it", name)
            self.left.add(name)
        self.nodes = nodes

    def _refuse_second(self, name: str, first: int, second: int, starting: bool) -> None:
        message = (
            f"nodes {first} and {second} both report the client name {name!r}: give each node a "
            "name of its own in its configuration"
        )
        if starting:
            raise ValueError(f"{message}.")
        if (name, second) not in self.second_nodes:
            log.warning(
                "%s; node %s is not taken in while node %s is there", message, second, first
            )
            self.second_nodes.add((name, second))

    def missing(self) -> list[str]:
        """Clients that are waited for."""
        return [c for c in self.clients if c not in self.nodes and c not in self.gone]

    def exact(self) -> list[str]:
        """Clients whose answers have no noise."""
        return [c for c in self.clients if c not in self.private]

    def barrier(self, *, starting: bool = False) -> None:
        """Wait until every client is there."""
        end = time.monotonic() + self.timeout
        while True:
            self.refresh_nodes(starting=starting)
            missing = self.missing()
            if not missing:
                return
            if time.monotonic() > end:
                raise TimeoutError(f"clients {missing} are not there after {self.timeout:g} s.")
            time.sleep(self.poll)

    def message(self, node: int, action: str, trees: dict, settings: dict) -> Message:
        """A message for a node."""
        return Message(
            pack(trees, settings), node, action, ttl=2 * self.timeout, group_id="stochgrad"
        )

    def exchange(self, requests: list[Message]) -> list[tuple[Message, Message | None]]:
        """Send messages, and wait for the reply to each, or None."""
        ids = list(self.grid.push_messages(requests))
        replies: dict[str, Message] = {}
        end = time.monotonic() + self.timeout
        while len(replies) < len(ids):
            for reply in self.grid.pull_messages([i for i in ids if i not in replies]):
                replies[reply.metadata.reply_to_message_id] = reply
            if len(replies) < len(ids):
                if time.monotonic() > end:
                    break
                time.sleep(self.poll)
        return [(request, replies.get(i)) for request, i in zip(requests, ids, strict=True)]

    def ask(
        self,
        position: PyTree,
        like: PyTree,
        form: str,
        curvature: str,
        prior_of: str = "",
        of: list[str] | None = None,
    ) -> dict[str, tuple[float, PyTree]]:
        """The log likelihood at a position of all clients that are not gone, asked up to thrice."""
        shapes = answer_shapes(like, form)

        def request(name):
            settings = {"form": form, "curvature": curvature, "prior": name == prior_of}
            return {"position": position}, settings

        def read(name, reply):
            content = check_reply(reply, "train.expand", tree_limit(shapes))
            value = metadata(content, value=float)["value"]
            if not np.isfinite(value):
                raise Refused(f"its log likelihood is {value}")
            tree = {"slope": unpack(content, "slope", shapes["slope"]), "precision": None}
            if form != "none":
                whole = unpack(content, "precision", shapes["precision"])
                tree["precision"] = jax.tree.map(lambda x: x[0], whole)
            if name in self.private:
                both = metadata(content, clipped=float, clipped_noise=float)
                self.clipped[name] = (both["clipped"], both["clipped_noise"])
            return value, tree

        asked = [c for c in (self.clients if of is None else of) if c not in self.gone]
        return self.gather(asked, "train.expand", request, read)

    def gather(
        self,
        asked: Sequence[str],
        action: str,
        request: Callable[[str], tuple[dict, dict]],
        read: Callable[[str, Message | None], Any],
    ) -> dict[str, Any]:
        """The answer of each client to a question, which is asked up to thrice.

        Args:
            asked: The clients.
            action: The type of the message.
            request: ``name -> (trees, settings)`` of the message.
            read: ``(name, reply) -> answer``, or raises ``Refused``.

        Raises:
            PolicyError: a client declines.
            TimeoutError: one does not answer.
        """
        answers: dict[str, Any] = {}
        for _ in range(3):
            waited_for = [c for c in asked if c not in answers]
            answers |= self.ask_once(waited_for, action, request, read)
            if len(answers) == len(asked):
                return {name: answers[name] for name in asked}
            self.refresh_nodes()
            self.barrier()
        missing = [c for c in asked if c not in answers]
        raise TimeoutError(
            f"clients {missing} did not send their log likelihoods; the log says why, and their "
            "own logs in more words."
        )

    def ask_once(
        self,
        asked: Sequence[str],
        action: str,
        request: Callable[[str], tuple[dict, dict]],
        read: Callable[[str, Message | None], Any],
    ) -> dict[str, Any]:
        """The answers to a question of those clients that answer it; arguments of ``gather``."""
        answers: dict[str, Any] = {}
        requests, down = {}, {}
        for name in asked:
            trees, settings = request(name)
            requests[self.message(self.nodes[name], action, trees, settings)] = name
            down[name] = _array_bytes(trees)
        for message, reply in self.exchange(list(requests)):
            name = requests[message]
            try:
                answers[name] = read(name, reply)
                self.sent += (_array_bytes(answers[name]), down[name])
            except Refusal as reason:
                raise PolicyError(declined(name, reason)) from reason
            except Refused as reason:
                log.warning("client %s is asked again: %s", name, reason)
                self.refusals[name] += not isinstance(reason, Lost)
        return answers


def clipped_reason(network: Network) -> str | None:
    """That draws are of the posterior of clipped rows, where that many are certainly clipped."""
    sure = {c: (n, sd) for c, (n, sd) in network.clipped.items() if not n < 3 * sd}
    if not sure:
        return None
    rows = [f"{n:.0f} +- {sd:.0f} of {network.rows[c]:,} of {c}" for c, (n, sd) in sure.items()]
    return (
        f"The gradients of some rows are clipped at the reference ({', '.join(rows)}): draws are "
        "of the posterior of clipped rows, whose mean may be standard deviations off. Take a "
        "larger norm at these clients, or columns within bounds."
    )


def declined(name: str, reason: Refusal) -> str:
    """What a client's policy does not allow, in a sentence."""
    return (
        f"client {name!r} declines by its privacy policy, which wants: {reason}. Ask for that, or "
        "leave it out of clients."
        if "=" in str(reason)
        else f"client {name!r} declines by its privacy policy: {reason}"
    )


def _array_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))
