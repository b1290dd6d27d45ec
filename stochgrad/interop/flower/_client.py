"""A Flower client: holds the data of one owner, and takes the steps of chains that visit."""

import hmac
import logging
import secrets
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import PyTree

from stochgrad.core import (
    Kernel,
    Posterior,
    Shared,
    check_callable,
    check_instance,
    check_position,
    describe,
    hoisted_jit,
)
from stochgrad.federated import (
    Surrogates,
    current_visit,
    global_first_order,
    global_quadratic,
    likelihood_sum,
    prior_only,
    require_clients,
    set_share,
    with_conducive,
)
from stochgrad.gradients import control_variate, minibatch
from stochgrad.interop.flower._protocol import (
    OTHER_KERNEL,
    SETTINGS,
    MakeKernel,
    digest_of,
    kernel_settings,
    kernel_without_data,
    position_shapes,
    state_shapes,
    sum_shapes,
    without_gradient_state,
)
from stochgrad.interop.flower._wire import METADATA, metadata, pack, unpack

log = logging.getLogger("stochgrad.flower.client")


def client_app(
    posterior: Callable[[Context], Posterior],
    kernel: MakeKernel,
    init: Any = None,
    *,
    secret: bytes | None = None,
) -> ClientApp:
    """A Flower ``ClientApp`` for one owner of data.

    What leaves it: the number of its rows; slopes and curvatures of its log likelihood, summed over
    all of its rows; and states of chains. From these a server may learn much about the rows: see
    "What a server can learn" in the documentation. Errors are reported by a fixed word, never by
    their text, which could hold data; the text goes to the client's own log (logger
    ``stochgrad.flower.client``).

    The noise and the order of the minibatches of a visit come from the server's key and a secret
    of the client's, joined by HMAC-SHA256 with the rest of the server's message, so that the server
    cannot compute them. The same request gives the same reply.

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

    Raises:
        TypeError: ``posterior`` or ``kernel`` is not a function, ``init`` no position, the secret
            not bytes.
        ValueError: the secret is shorter than 16 bytes; ``init`` is not finite.

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
    app = ClientApp()

    contexts: dict[str, Context] = {}

    @lru_cache(maxsize=4)
    def owner(node: str) -> "Owner":
        return Owner(posterior(contexts[node]), kernel, init, secret)

    def answering(act: Callable[["Owner", RecordDict, Context], RecordDict]):
        def handle(message: Message, context: Context) -> Message:
            try:
                node = repr(sorted(context.node_config.items()))
                contexts[node] = context
                content = act(owner(node), message.content, context)
            except Exception:
                kind = message.metadata.message_type
                log.exception("%s failed; the server receives only this fact", kind)
                content = pack({}, {"status": "failed"})
            return Message(content, reply_to=message)

        return handle

    app.query("hello")(answering(lambda owner, content, context: owner.hello(context)))
    app.train("expand")(answering(lambda owner, content, context: owner.expand(content)))
    app.train("visit")(answering(lambda owner, content, context: owner.visit(content, context)))
    return app


class Owner:
    """One owner's data, and what is compiled for them."""

    def __init__(self, posterior: Posterior, kernel: MakeKernel, init: Any, secret: bytes | None):
        check_instance("posterior", posterior, Posterior, "a function that returns a Posterior")
        if require_clients(posterior).count != 1:
            raise ValueError(
                "posterior must return one of this client's own data, a list of one client, got "
                f"{require_clients(posterior).count}."
            )
        self.posterior = posterior
        self.position = position_shapes(init, posterior)
        self.size = int(require_clients(posterior).sizes.sum())
        self.make_kernel, self.secret = kernel, secret
        self.kernel = digest_of(kernel_settings(kernel_without_data(kernel, self.position)))
        score = likelihood_sum(posterior, jax.value_and_grad(posterior.log_density))
        self.score = hoisted_jit(lambda position: score(jnp.int32(0), position))
        self.prior = hoisted_jit(prior_only(posterior, jax.value_and_grad(posterior.log_density)))
        self.programs = lru_cache(maxsize=4)(self._program)

    def hello(self, context: Context) -> RecordDict:
        name = str(context.node_config.get("name", context.node_config.get("partition-id", "")))
        return pack({}, {"status": "done", "name": name, "rows": self.size})

    def expand(self, content: RecordDict) -> RecordDict:
        """Value and slope of the log likelihood at a position, and its curvature in some form."""
        request = metadata(content, form=str, curvature=str, prior=bool)
        position = unpack(content, "position", self.position)
        position = jax.tree.map(jnp.asarray, position)
        value, slope = self.score(position)
        if request["prior"]:
            value, slope = jax.tree.map(jnp.add, (value, slope), self.prior(position))
        trees = {"slope": slope}
        if request["form"] != "none":
            trees["precision"] = self._own(
                position, request["form"], request["curvature"]
            ).precision
        return pack(trees, {"status": "done", "value": float(value)})

    def _own(self, position: PyTree, form: str, curvature: str) -> Surrogates:
        if form == "none":
            return global_first_order(self.posterior, position)
        return global_quadratic(self.posterior, position, form=form, curvature=curvature)

    def visit(self, content: RecordDict, context: Context) -> RecordDict:
        """Take the steps of a chain, and send back where it is."""
        request = metadata(content, chain=int, version=int, minibatches=int)
        position = self.position
        if "total" in content:
            context.state["prepared"] = content[METADATA]
            context.state["origin"], context.state["total"] = content["origin"], content["total"]
        prepared = context.state.get("prepared")
        if not isinstance(prepared, ConfigRecord) or prepared["version"] != request["version"]:
            return pack({}, {"status": "unprepared"})
        if prepared["kernel"] != self.kernel:
            return pack({}, {"status": OTHER_KERNEL})
        settings = tuple(prepared[name] for name in SETTINGS)
        origin = unpack(context.state, "origin", position)
        total = unpack(context.state, "total", sum_shapes(position, str(prepared["form"])))
        state_like, run = self.programs(settings, _hashable(origin), _hashable(total))
        words = unpack(content, "key", _KEY)
        first = "position" in content
        name, like = ("position", position) if first else ("state", state_like)
        start = unpack(content, name, like)
        chain, seed = request["chain"], int(str(prepared["seed"]))
        secret = secret_of(context) if self.secret is None else self.secret
        before = np.array([request["minibatches"]], np.uint32)
        key = jax.random.wrap_key_data(jnp.asarray(words), impl=_IMPLEMENTATION)
        order = jax.random.fold_in(jax.random.key(seed, impl=_IMPLEMENTATION), chain)
        if secret:
            arrays = (words, start, origin, total, before)
            key = secret_key(secret, "visit", (*settings, chain, name), arrays)
            order = secret_key(secret, "minibatches", (seed, chain), ())
        start = jax.tree.map(jnp.asarray, start)
        state, draws, after = run(first, key, order, start, before)
        minibatches = int(np.asarray(after)[0])
        reply = {"status": "done", "minibatches": minibatches}
        return pack({"state": state, "draws": draws}, reply)

    def _program(self, settings: tuple, origin: "_hashable", total: "_hashable"):
        form, curvature, share, steps, thin, centered, strength, _ = settings
        origin, total = jax.tree.map(jnp.asarray, (origin.tree, total.tree))
        target = set_share(self.posterior, share)
        own = self._own(origin, form, curvature)
        own_and_others = jax.tree.map(
            lambda mine, total: jnp.concatenate([mine, total[None] - mine]),
            {"slope": own.slope, "precision": own.precision},
            total,
        )
        surrogates = Surrogates(origin, **own_and_others)
        gradient = control_variate(target, origin) if centered else minibatch(target)
        gradient = with_conducive(gradient, surrogates, np.array([share, 1.0]), strength)
        kernel = self.make_kernel(gradient)
        return state_shapes(kernel, origin), visit_program(kernel, target, steps, thin)


_KEY = jax.ShapeDtypeStruct((2,), np.uint32)
_IMPLEMENTATION = "threefry2x32"


def secret_of(context: Context) -> bytes:
    """The node's own secret: made at its first message, kept in its state, never sent."""
    record = context.state.get("secret")
    if not isinstance(record, ConfigRecord):
        record = context.state["secret"] = ConfigRecord({"secret": secrets.token_bytes(32)})
    return bytes(record["secret"])  # pyright: ignore[reportArgumentType]


def secret_key(secret: bytes, purpose: str, numbers: tuple, arrays: PyTree) -> jax.Array:
    """A key from HMAC-SHA256 of all that a request holds, under the client's secret."""
    digest = hmac.new(secret, repr((purpose, *numbers)).encode(), "sha256")
    for array in map(np.asarray, jax.tree.leaves(arrays)):
        digest.update(repr((array.dtype.str, array.shape)).encode() + array.tobytes())
    words = np.frombuffer(digest.digest()[:8], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=_IMPLEMENTATION)


def visit_program(kernel: Kernel, target: Posterior, steps: int, thin: int) -> Callable:
    """``(first, key, order, start, minibatches) -> (state, draws, minibatches)`` of a visit."""

    @hoisted_jit
    def init(key, position):
        return without_gradient_state(kernel.init(position, jax.random.fold_in(key, 2**31)))

    @hoisted_jit
    def advance(key, order, state, minibatches):
        stream = target.batches.init(order)
        stream = Shared(stream.value._replace(handed_out=minibatches), optional=True)
        state = state._replace(gradient_state=stream)

        def draw(state, number):
            keys = jax.random.split(jax.random.fold_in(key, number), thin)
            state, _ = jax.lax.scan(lambda s, k: (kernel.step(k, s)[0], None), state, keys)
            return state, state.position

        state, draws = jax.lax.scan(draw, state, jnp.arange(steps // thin))
        return without_gradient_state(state), draws, current_visit(state).handed_out

    def run(first: bool, key, order, start, minibatches):
        return advance(key, order, init(key, start) if first else start, minibatches)

    return run


class _hashable:
    """A tree of arrays that is equal to another by its values."""

    def __init__(self, tree: PyTree):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self._key = (structure, tuple((x.shape, str(x.dtype), x.tobytes()) for x in leaves))

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, _hashable) and self._key == other._key
