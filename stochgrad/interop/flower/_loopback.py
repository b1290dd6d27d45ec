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

from stochgrad.core import check_callable, check_count, check_instance, describe

_FAULTS = ("error", "drop", "die")


class LoopbackGrid(Grid):
    """A Flower ``Grid`` whose nodes are in this process, for tests and trials.

    Every message is written out and read again, as on the wire.

    Args:
        nodes: For each node's number its app and its configuration.
        fault: ``message -> what goes wrong with it``: ``"error"`` (the client raises), ``"drop"``
            (no reply), ``"die"`` (no reply, and the node is gone), or a function ``reply -> reply``
            that spoils it; None for nothing.
        tap: ``(direction, message)``, sees every message ``"down"`` and ``"up"``.

    Raises:
        TypeError: ``nodes`` is not of such pairs, ``fault`` or ``tap`` not a function.
        ValueError: a node's number is negative; on use, ``fault`` returns something else.
    """

    def __init__(
        self,
        nodes: Mapping[int, tuple[ClientApp, Mapping[str, Any]]],
        *,
        fault: Callable[[Message], Any] = lambda message: None,
        tap: Callable[[str, Message], None] = lambda direction, message: None,
    ):
        check_callable("fault", fault, "a function message -> what goes wrong with it")
        check_callable("tap", tap, "a function (direction, message)")
        wanted = "a dict {number: (client app, configuration)}"
        check_instance("nodes", nodes, Mapping, wanted)
        for pair in nodes.values():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"nodes must be {wanted}, got {describe(pair)} for a node.")
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
        """Add a node, with nothing remembered.

        Raises:
            TypeError: the app is no ``ClientApp``, the configuration no dict of plain values.
            ValueError: the node's number is negative.
        """
        node = check_count("node", node, least=0)
        check_instance("app", app, ClientApp, "a ClientApp, from stochgrad.flower.client_app")
        check_instance("config", config, Mapping, "a dict, as {'name': 'north'}")
        for name, value in config.items():
            if not isinstance(name, str) or not isinstance(value, bool | int | float | str | bytes):
                raise TypeError(
                    "config must be of names and numbers, text, booleans or bytes, got "
                    f"{describe(name)}: {describe(value)}."
                )
        self._apps[node] = app
        self._contexts[node] = Context(1, node, dict(config), RecordDict(), {})

    def leave(self, node: int) -> None:
        """Take a node away.

        Raises:
            ValueError: it is not there.
        """
        if check_count("node", node, least=0) not in self._apps:
            raise ValueError(f"node {node} is not there: the nodes are {sorted(self._apps)}.")
        self._apps.pop(node)

    def set_run(self, run: Any) -> None:
        self._run = check_instance("run", run, Run, "a Run of Flower's")

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
        check_instance("content", content, RecordDict, "a RecordDict of Flower's")
        check_count("dst_node_id", dst_node_id, least=0)
        check_instance("message_type", message_type, str, "text, as 'train.visit'")
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return sorted(self._apps)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages) if isinstance(messages, Iterable) else messages
        check_instance("messages", messages, list, "Flower's messages, one or more in a list")
        for message in messages:
            check_instance("messages", message, Message, "Flower's messages, in a list")
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if isinstance(message_ids, str) or not isinstance(message_ids, Iterable):
            raise TypeError(f"message_ids must be a list of text, got {describe(message_ids)}.")
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
        if not (wrong is None or callable(wrong) or wrong in _FAULTS):
            raise ValueError(
                f"fault must return one of {list(_FAULTS)}, a function reply -> reply or None, got "
                f"{describe(wrong)}."
            )
        if wrong == "die":
            self._apps.pop(node, None)
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
