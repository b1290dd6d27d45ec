"""A Flower client: holds the data of one owner, and takes the steps of chains that visit."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from stochgrad.core import (
    Posterior,
    check_callable,
    check_instance,
    check_position,
    describe,
)
from stochgrad.interop.flower._owner import POLICY, Owner
from stochgrad.interop.flower._privacy import (
    Declined,
    PrivacyPolicy,
    check_counted,
)
from stochgrad.interop.flower._protocol import (
    MakeKernel,
    kernel_without_data,
    position_shapes,
)
from stochgrad.interop.flower._wire import DECLINED, pack

log = logging.getLogger("stochgrad.flower.client")


def client_app(
    posterior: Callable[[Context], Posterior],
    kernel: MakeKernel,
    init: Any = None,
    *,
    secret: bytes | None = None,
    privacy: PrivacyPolicy | Callable[[Context], PrivacyPolicy] | None = None,
) -> ClientApp:
    """A Flower ``ClientApp`` for one owner of data.

    What leaves it: the number of its rows; slopes and curvatures of its log likelihood, summed over
    all of its rows; and states of chains. From these a server may learn much about the rows: see
    "What a server can learn" in the documentation. Errors are reported by a fixed word, never by
    their text, which could hold data; the text goes to the client's own log (logger
    ``stochgrad.flower.client``).

    The noise and the order of the minibatches of a visit come from the server's key and a secret
    of the client's, joined by HMAC-SHA256 with the rest of the server's message, so that the server
    cannot compute them. The same request gives the same reply. The last gradient of a state, to
    which no noise was added, stays at the client unless the next step uses it, as those of
    ``"OBABO"`` or ``"BAOAB"`` do.

    Args:
        posterior: ``context -> posterior``, of this client's own data: made with
            ``stochgrad.federated.posterior(log_prior, log_likelihood, [data])`` or
            ``stochgrad.from_numpyro(model, clients=[args])``. ``context.node_config`` says where
            the data are.
        kernel: ``gradient -> kernel``, the same as the server's.
        init: A position of the model's shape, the same as the server's; optional with a numpyro
            model.
        secret: Bytes that the client keeps to itself, 16 or more. By default random, made at a
            node's first message and kept in Flower's ``context.state``, which stays at the node.
            Give your own for draws that can be reproduced, or that do not change when the node
            restarts. ``b""`` does without: draws are then a function of the server's key and the
            data, and a server that knows its key can compute the noise, and from it minibatch
            gradients, to the digit; for tests and trials alone.
        privacy: What the server may ask, and how much it may learn of a row: a
            ``stochgrad.flower.PrivacyPolicy``, or a function ``context -> policy`` where one app
            is for several nodes, each of which needs a ledger of its own. By default all is
            answered, and nothing is counted.

    Raises:
        TypeError: ``posterior`` or ``kernel`` is not a function, ``init`` no position, the secret
            not bytes, ``privacy`` no policy.
        ValueError: the secret is shorter than 16 bytes; ``init`` is not finite; privacy is counted
            and ``kernel`` is not SGLD with normal noise.

    Example:
        >>> import jax.numpy as jnp, stochgrad
        >>> from stochgrad.flower import client_app
        >>> def of_node(context):
        ...     return stochgrad.federated.posterior(
        ...         lambda mean: -0.5 * mean**2,
        ...         lambda mean, x: -0.5 * (x - mean) ** 2,
        ...         [jnp.load(context.node_config["data"])],
        ...         batch_size=10,
        ...     )
        >>> app = client_app(of_node, lambda g: stochgrad.sgld(g, 1e-3), jnp.float32(0.0))
    """
    check_callable("posterior", posterior, "a function context -> posterior")
    check_callable("kernel", kernel, "a function gradient -> kernel")
    if isinstance(kernel, type):
        raise TypeError(f"kernel must be a function gradient -> kernel, got {describe(kernel)}.")
    if init is not None:
        check_position(getattr(init, "position", init))
    if secret is not None:
        check_instance("secret", secret, bytes, "bytes, as secrets.token_bytes(32) makes them")
        if 0 < len(secret) < 16:
            raise ValueError(
                f"secret must have at least 16 bytes, as of secrets.token_bytes(32), or none for "
                f"no secret, got {len(secret)}."
            )
    if isinstance(privacy, type):
        raise TypeError(f"privacy must be {POLICY}, got {describe(privacy)}.")
    if privacy is not None and not callable(privacy):
        check_instance("privacy", privacy, PrivacyPolicy, POLICY)
        if privacy.counts and init is not None:
            shapes = position_shapes(init)
            check_counted(kernel_without_data(kernel, shapes), shapes, secret)
    app = ClientApp()

    contexts: dict[str, Context] = {}

    @lru_cache(maxsize=4)
    def owner(node: str) -> Owner:
        policy = privacy(contexts[node]) if callable(privacy) else privacy
        return Owner(posterior(contexts[node]), kernel, init, secret, policy)

    def answering(act: Callable[[Owner, RecordDict, Context], RecordDict]):
        def handle(message: Message, context: Context) -> Message:
            try:
                node = repr(sorted(context.node_config.items()))
                contexts[node] = context
                content = act(owner(node), message.content, context)
            except Declined as reason:
                log.warning("%s is declined: %s", message.metadata.message_type, reason)
                content = pack({}, {"status": f"{DECLINED}{reason}"})
            except Exception:
                kind = message.metadata.message_type
                log.exception("%s failed; the server receives only this fact", kind)
                content = pack({}, {"status": "failed"})
            return Message(content, reply_to=message)

        return handle

    app.query("hello")(answering(lambda owner, content, context: owner.hello(context)))
    app.train("expand")(answering(lambda owner, content, context: owner.expand(content, context)))
    app.train("prior")(answering(lambda owner, content, context: owner.of_prior(content)))
    app.train("margin")(answering(lambda owner, content, context: owner.margin(content, context)))
    app.train("slopes")(answering(lambda owner, content, context: owner.slopes(content, context)))
    app.train("visit")(answering(lambda owner, content, context: owner.visit(content, context)))
    return app
