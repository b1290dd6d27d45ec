"""Flower's messages without a network: clients are called in this process."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LoopbackGrid(Grid):
    """A Flower ``Grid`` whose nodes are in this process, for tests and trials.

    Every message is written out and read again, as on the wire.

    Args:
        nodes: For each node's number its app and its configuration.
        fault: ``message -> what goes wrong with it``: ``"error"`` (the client raises), ``"drop"``
            (no reply), ``"die"`` (no reply, and the node is gone), or a function ``reply -> reply``
            that spoils it; None for nothing.
        tap: ``(direction, message)``, sees every message ``"down"`` and ``"up"``.
    """

    def __init__(
        self,
        nodes: Mapping[int, tuple[ClientApp, Mapping[str, Any]]],
        *,
        fault: Callable[[Message], Any] = lambda message: None,
        tap: Callable[[str, Message], None] = lambda direction, message: None,
    ):
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
        self._apps: dict[int, ClientApp] = {}
        self._contexts: dict[int, Context] = {}
        self._fault, self._tap = fault, tap
        self._numbers = itertools.count()
        self._replies: dict[str, Message] = {}
        for node, (app, config) in nodes.items():
            self.join(node, app, config)

    def join(self, node: int, app: ClientApp, config: Mapping[str, Any]) -> None:
        """Add a node, with nothing remembered."""
        self._apps[node] = app
        self._contexts[node] = Context(1, node, dict(config), RecordDict(), {})

    def leave(self, node: int) -> None:
        """Take a node away."""
        self._apps.pop(node, None)

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return sorted(self._apps)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        identity = f"message-{next(self._numbers)}"
        message.metadata.__dict__["_message_id"] = identity
        request = _through_wire(message)
        self._tap("down", request)
        node, wrong = request.metadata.dst_node_id, self._fault(request)
        if wrong == "die":
            self.leave(node)
        if node not in self._apps or wrong in ("die", "drop"):
            return identity
        try:
            if wrong == "error":
                raise RuntimeError("a fault")
            reply: Any = self._apps[node](request, self._contexts[node])
            if callable(wrong):
                reply = wrong(reply)
        except Exception as error:
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code, str(type(error))), reply_to=request)
        reply.metadata.__dict__["_message_id"] = f"reply-{next(self._numbers)}"
        self._replies[identity] = _through_wire(reply)
        self._tap("up", self._replies[identity])
        return identity


def _through_wire(message: Message) -> Message:
    return message_from_proto(Proto.FromString(message_to_proto(message).SerializeToString()))
