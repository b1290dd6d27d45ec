"""Who is there, by Flower's account, and messages to them."""

import logging
import time
from typing import Any

import jax
from flwr.app import Message
from flwr.serverapp import Grid
from jaxtyping import PyTree

from stochgrad.interop._flower_client import total_like
from stochgrad.interop._flower_wire import Refused, about, check_reply, pack, tree_limit, unpack

log = logging.getLogger("stochgrad.flower")


class Network:
    """The clients that are wanted, the nodes that hold them, and what they say of their data.

    Attributes:
        nodes: The node of each client that is there.
        rows: The rows of each client that ever was.
        version: Rises whenever a client comes or goes.
    """

    def __init__(self, grid: Grid, clients: list[str], timeout: float, poll: float):
        self.grid, self.clients = grid, clients
        self.timeout, self.poll = timeout, poll
        self.nodes: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.version = 0
        self._asked: set[int] = set()

    def look_around(self) -> None:
        """Ask nodes that were not there before for their names; forget those that are gone."""
        there = set(self.grid.get_node_ids())
        known = {name: node for name, node in self.nodes.items() if node in there}
        self._asked &= there
        new = sorted(there - self._asked)
        self._asked |= there
        requests = {self.message(node, "query.hello", {}, {}): node for node in new}
        for request, reply in self.exchange(list(requests)):
            node = requests[request]
            try:
                if reply is None:
                    raise Refused("no reply")
                told = about(check_reply(reply, "query.hello", 0), name=str, rows=int)
                if told["name"] not in self.clients or told["rows"] < 1:
                    raise Refused("a client of this name is not expected")
            except Refused as reason:
                log.warning("node %s is not taken in: %s", node, reason)
                continue
            known[told["name"]] = node
            self.rows[told["name"]] = told["rows"]
        for name in self.nodes.keys() - known.keys():
            log.warning("client %s is gone; its surrogate stands for its data", name)
        if known.keys() != self.nodes.keys():
            self.version += 1
        self.nodes = known

    def wait_for_all(self) -> None:
        """Wait until every client is there."""
        end = time.monotonic() + self.timeout
        while True:
            self.look_around()
            missing = [c for c in self.clients if c not in self.nodes]
            if not missing:
                return
            if time.monotonic() > end:
                raise TimeoutError(f"clients {missing} are not there after {self.timeout:g} s.")
            time.sleep(self.poll)

    def message(self, node: int, action: str, trees: dict, told: dict) -> Message:
        """A message for a node."""
        return Message(pack(trees, told), node, action, ttl=2 * self.timeout, group_id="stochgrad")

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
        found: dict[str, tuple[float, PyTree]] = {}
        for _ in range(3):
            left = [c for c in self.clients if c not in found]
            requests = {}
            for name in left:
                told: dict[str, Any] = {"form": form, "curvature": curvature}
                told["prior"] = name == prior_of
                node = self.nodes[name]
                requests[self.message(node, "train.expand", {"position": position}, told)] = name
            for request, reply in self.exchange(list(requests)):
                name = requests[request]
                try:
                    if reply is None:
                        raise Refused("no reply")
                    content = check_reply(reply, "train.expand", tree_limit(one))
                    value = about(content, value=float)["value"]
                    tree = {"slope": unpack(content, "slope", one["slope"]), "precision": None}
                    if form != "none":
                        whole = unpack(content, "precision", one["precision"])
                        tree["precision"] = jax.tree.map(lambda x: x[0], whole)
                    found[name] = (value, tree)
                except Refused as reason:
                    log.warning("client %s is asked again: %s", name, reason)
            if len(found) == len(self.clients):
                return {name: found[name] for name in self.clients}
            self.look_around()
            self.wait_for_all()
        missing = [c for c in self.clients if c not in found]
        raise TimeoutError(f"clients {missing} did not tell their log likelihoods.")


def _with_axis(precision: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), precision)
