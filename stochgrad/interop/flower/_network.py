"""Who is there, by Flower's account, and messages to them."""

import logging
import time
from typing import Any

import jax
import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from jaxtyping import PyTree

from stochgrad.interop.flower._client import total_like
from stochgrad.interop.flower._wire import Refused, about, check_reply, pack, tree_limit, unpack

log = logging.getLogger("stochgrad.flower")


class Network:
    """The clients that are wanted, the nodes that hold them, and what they say of their data.

    Attributes:
        nodes: The node of each client that is there.
        rows: The rows of each client.
    """

    def __init__(self, grid: Grid, clients: list[str], timeout: float, poll: float):
        self.grid, self.clients = grid, clients
        self.timeout, self.poll = timeout, poll
        self.nodes: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self._asked: set[int] = set()
        self._refused: set[tuple[str, int]] = set()

    def look_around(self, *, starting: bool = False) -> None:
        """Ask nodes that were not there before for their names; forget those that are gone.

        A node that reports the name of a client that another node holds is not taken in, as long
        as the other is there.

        Raises:
            ValueError: two nodes report one name while a run is ``starting``; or a client came
                back with another number of rows.
        """
        there = set(self.grid.get_node_ids())
        nodes = {name: node for name, node in self.nodes.items() if node in there}
        self._asked &= there
        new = sorted(there - self._asked)
        self._asked |= there
        requests = {self.message(node, "query.hello", {}, {}): node for node in new}
        for request, reply in self.exchange(list(requests)):
            node = requests[request]
            try:
                if reply is None:
                    raise Refused("no reply")
                reported = about(check_reply(reply, "query.hello", 0), name=str, rows=int)
                if reported["name"] not in self.clients or reported["rows"] < 1:
                    raise Refused("a client of this name is not expected")
            except Refused as reason:
                log.warning("node %s is not taken in: %s", node, reason)
                continue
            name, rows = reported["name"], reported["rows"]
            if name in nodes:
                self._asked.discard(node)  # until the other is gone
                self._refuse_second(name, nodes[name], node, starting)
                continue
            if self.rows.setdefault(name, rows) != rows:
                raise ValueError(
                    f"client {name!r} had {self.rows[name]} rows and is now there with {rows}: a "
                    "run is of the same data from its beginning to its end."
                )
            nodes[name] = node
        for name in self.nodes.keys() - nodes.keys():
            log.warning("client %s is gone; its visits wait for it", name)
        self.nodes = nodes

    def _refuse_second(self, name: str, first: int, second: int, starting: bool) -> None:
        message = (
            f"nodes {first} and {second} both report the client name {name!r}: give each node a "
            "name of its own in its configuration"
        )
        if starting:
            raise ValueError(f"{message}.")
        if (name, second) not in self._refused:
            log.warning(
                "%s; node %s is not taken in while node %s is there", message, second, first
            )
            self._refused.add((name, second))

    def wait_for_all(self, *, starting: bool = False) -> None:
        """Wait until every client is there."""
        end = time.monotonic() + self.timeout
        while True:
            self.look_around(starting=starting)
            missing = [c for c in self.clients if c not in self.nodes]
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
        self, position: PyTree, like: PyTree, form: str, curvature: str, prior_of: str = ""
    ) -> dict[str, tuple[float, PyTree]]:
        """Every client's log likelihood at a position; one that fails is asked again."""
        total = total_like(like, form)
        one = {"slope": total["slope"], "precision": _with_axis(total["precision"])}
        answers: dict[str, tuple[float, PyTree]] = {}
        for _ in range(3):
            requests = {}
            for name in [c for c in self.clients if c not in answers]:
                settings: dict[str, Any] = {"form": form, "curvature": curvature}
                settings["prior"] = name == prior_of
                node, trees = self.nodes[name], {"position": position}
                requests[self.message(node, "train.expand", trees, settings)] = name
            for request, reply in self.exchange(list(requests)):
                name = requests[request]
                try:
                    if reply is None:
                        raise Refused("no reply")
                    content = check_reply(reply, "train.expand", tree_limit(one))
                    value = about(content, value=float)["value"]
                    if not np.isfinite(value):
                        raise Refused(f"its log likelihood is {value}")
                    tree = {"slope": unpack(content, "slope", one["slope"]), "precision": None}
                    if form != "none":
                        whole = unpack(content, "precision", one["precision"])
                        tree["precision"] = jax.tree.map(lambda x: x[0], whole)
                    answers[name] = (value, tree)
                except Refused as reason:
                    log.warning("client %s is asked again: %s", name, reason)
            if len(answers) == len(self.clients):
                return {name: answers[name] for name in self.clients}
            self.look_around()
            self.wait_for_all()
        missing = [c for c in self.clients if c not in answers]
        raise TimeoutError(
            f"clients {missing} did not send their log likelihoods; the log says why, and their "
            "own logs in more words."
        )


def _with_axis(precision: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), precision)
