"""A Flower client: holds the data of one owner, and takes the steps of chains that visit."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import PyTree

from stochgrad.core import (
    Posterior,
    check_callable,
    check_instance,
    check_position,
    describe,
    hoisted_jit,
)
from stochgrad.federated import (
    Surrogates,
    as_matrices,
    global_first_order,
    global_quadratic,
    likelihood_sum,
    prior_only,
    require_clients,
    set_share,
    with_conducive,
)
from stochgrad.gradients import control_variate, minibatch
from stochgrad.interop.flower._client_look import (
    HashableTree,
    MarginRequest,
    curvatures_at,
    prior_answer,
)
from stochgrad.interop.flower._ledger import Item
from stochgrad.interop.flower._privacy import (
    Declined,
    Guard,
    PrivacyPolicy,
    check_counted,
)
from stochgrad.interop.flower._protocol import (
    OTHER_KERNEL,
    SETTINGS,
    MakeKernel,
    digest_of,
    form_and_rank,
    kernel_settings,
    kernel_without_data,
    position_shapes,
    state_shapes,
    sum_shapes,
    visit_settings,
)
from stochgrad.interop.flower._secret import IMPLEMENTATION, secret_digest, secret_key, secret_of
from stochgrad.interop.flower._steps import (
    uses_last_gradient,
    visit_program,
    without_last_gradient,
)
from stochgrad.interop.flower._wire import DECLINED, METADATA, metadata, pack, unpack

log = logging.getLogger("stochgrad.flower.client")

_POLICY = "a PrivacyPolicy, or a function context -> PrivacyPolicy"


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
        raise TypeError(f"privacy must be {_POLICY}, got {describe(privacy)}.")
    if privacy is not None and not callable(privacy):
        check_instance("privacy", privacy, PrivacyPolicy, _POLICY)
        if privacy.counts and init is not None:
            shapes = position_shapes(init)
            check_counted(kernel_without_data(kernel, shapes), shapes, secret)
    app = ClientApp()

    contexts: dict[str, Context] = {}

    @lru_cache(maxsize=4)
    def owner(node: str) -> "Owner":
        policy = privacy(contexts[node]) if callable(privacy) else privacy
        return Owner(posterior(contexts[node]), kernel, init, secret, policy)

    def answering(act: Callable[["Owner", RecordDict, Context], RecordDict]):
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
    app.train("visit")(answering(lambda owner, content, context: owner.visit(content, context)))
    return app


class Owner:
    """One owner's data, and what is compiled for them."""

    def __init__(
        self,
        posterior: Posterior,
        kernel: MakeKernel,
        init: Any,
        secret: bytes | None,
        policy: PrivacyPolicy | None = None,
    ):
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
        example = kernel_without_data(kernel, self.position)
        self.kernel = digest_of(kernel_settings(example))
        self.uses_last_gradient = uses_last_gradient(example, self.position)
        self.state = state_shapes(example, self.position)
        self.guard = None
        if policy is not None:
            check_instance("privacy", policy, PrivacyPolicy, _POLICY)
            self.guard = Guard(policy, posterior, example, self.position, secret)
        score = likelihood_sum(posterior, jax.value_and_grad(posterior.log_density))
        self.score = hoisted_jit(lambda position: score(jnp.int32(0), position))
        self.prior = hoisted_jit(prior_only(posterior, jax.value_and_grad(posterior.log_density)))
        self.programs = lru_cache(maxsize=4)(self._program)
        self.curvatures = lru_cache(maxsize=1)(partial(curvatures_at, posterior, self._own))

    def hello(self, context: Context) -> RecordDict:
        name = str(context.node_config.get("name", context.node_config.get("partition-id", "")))
        told: dict[str, Any] = {"status": "done", "name": name, "rows": self.size}
        if self.guard is not None and self.guard.policy.counts:
            told["private"] = True
        return pack({}, told)

    def expand(self, content: RecordDict, context: Context) -> RecordDict:
        """Value and slope of the log likelihood at a position, and its curvature in some form."""
        request = metadata(content, form=str, curvature=str, prior=bool)
        form, curvature = request["form"], request["curvature"]
        position = unpack(content, "position", self.position)
        if self.guard is not None:
            self.guard.check_form(form, curvature)
            names = self.answer_names(context, position, form, curvature)
            self.guard.charge(context, self.guard.answer_items(names, form))
        position = jax.tree.map(jnp.asarray, position)
        told: dict[str, Any] = {"status": "done"}
        if self.guard is not None and self.guard.policy.counts:
            value, trees = (
                np.float32(0),
                self.private_answer(self.secret_at(context), position, form),
            )
            told["clipped"] = trees.pop("clipped")
            told["clipped_noise"] = float(self.guard.policy.slope_noise)
        else:
            value, slope = self.score(position)
            trees = {"slope": slope}
            if form != "none":
                trees["precision"] = self._own(position, form, curvature).precision
        if request["prior"]:
            at = self.prior(position)
            value, trees["slope"] = jax.tree.map(jnp.add, (value, trees["slope"]), at)
        return pack(trees, {**told, "value": float(value)})

    def of_prior(self, content: RecordDict) -> RecordDict:
        """The prior's curvature at a position."""
        self._check_look()
        return prior_answer(self.posterior, content, self.position)

    def margin(self, content: RecordDict, context: Context) -> RecordDict:
        """How visits are drawn back, with so much of the curvature of all surrogates."""
        self._check_look()
        asked = MarginRequest(content, self.position)
        if self.guard is not None:
            numbers, arrays = (
                tuple(asked.request.values()),
                (asked.origin, asked.points, asked.total),
            )
            told = secret_digest(self.secret_at(context), "margin", numbers, arrays)
            self.guard.charge(context, [Item("answer" + told.hex()[:32], 0.0)])
        form, curvature = asked.request["form"], asked.request["curvature"]
        at = HashableTree((asked.origin, asked.points))
        return asked.answer(*self.curvatures(form, curvature, at))

    def _check_look(self) -> None:
        if self.guard is not None and self.guard.policy.counts:
            raise Declined("surrogate='global_first_order'")

    def secret_at(self, context: Context) -> bytes:
        """The client's secret: given, or kept in its ledger or in Flower's state of the node."""
        if self.secret is not None:
            return self.secret
        ledger = None if self.guard is None else self.guard.ledger
        return secret_of(context) if ledger is None else ledger.secret

    def answer_names(
        self, context: Context, position: PyTree, form: str, curvature: str
    ) -> dict[str, str]:
        """Digests of a slope and a curvature at a position."""
        assert self.guard is not None
        secret, mark = self.secret_at(context), self.guard.mark
        kinds = {"slope": mark, "precision": (*mark, form, curvature)}
        return {
            part: "answer" + secret_digest(secret, part, kind, position).hex()[:32]
            for part, kind in kinds.items()
        }

    def private_answer(self, secret: bytes, position: PyTree, form: str) -> dict[str, Any]:
        """Slope and curvature under the client's noise, the same whenever a position is asked."""
        assert self.guard is not None
        mark = self.guard.mark
        kinds = {"slope": mark, "clipped": mark, "precision": (*mark, form)}
        key_of = lambda part: secret_key(secret, f"noise of {part}", kinds[part], position)
        return self.guard.answer(position, form, key_of)

    def _own(self, position: PyTree, form: str, curvature: str, secret: bytes = b"") -> Surrogates:
        if self.guard is not None and self.guard.policy.counts:
            told = self.private_answer(secret, position, form)
            slope = jax.tree.map(lambda x: x[None], told["slope"])
            return Surrogates(position, slope, told.get("precision"))
        if form == "none":
            return global_first_order(self.posterior, position)
        kind, rank = form_and_rank(form)
        return global_quadratic(self.posterior, position, form=kind, curvature=curvature, rank=rank)

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
        settings = visit_settings(prepared)
        form, curvature, share, scale, steps, thin, centered, strength, seed = settings
        if self.guard is not None:
            self.guard.check_visit(steps, thin, centered)
            self.guard.check_form(form, curvature)
        origin = unpack(context.state, "origin", position)
        total = unpack(context.state, "total", sum_shapes(position, form))
        words = unpack(content, "key", jax.ShapeDtypeStruct((2,), np.uint32))
        first = "position" in content
        name, like = ("position", position) if first else ("state", self.state)
        start = unpack(content, name, like)
        chain = request["chain"]
        secret = self.secret_at(context)
        before = np.array([request["minibatches"]], np.uint32)
        key = jax.random.wrap_key_data(jnp.asarray(words), impl=IMPLEMENTATION)
        order = jax.random.fold_in(jax.random.key(seed, impl=IMPLEMENTATION), chain)
        arrays = (words, start, origin, total, before)
        told = zip(SETTINGS, settings, strict=True)
        numbers = (*(x for of, x in told if of != "scale" or scale != 1), chain, name)
        if secret:
            numbers += () if self.guard is None else self.guard.mark
            key = secret_key(secret, "visit", numbers, arrays)
            order = secret_key(secret, "minibatches", (seed, chain), ())
        if self.guard is not None:
            items = []
            if self.guard.policy.counts:
                told = "visit" + secret_digest(secret, "visit", numbers, arrays).hex()[:32]
                items.append(self.guard.visit_item(told, order, int(before[0]), steps, share))
            if strength != 0:
                names = self.answer_names(context, origin, form, curvature)
                items += self.guard.answer_items(names, form)
            self.guard.charge(context, items)
        run = self.programs(settings, HashableTree(origin), HashableTree(total), secret)
        start = jax.tree.map(jnp.asarray, start)
        state, draws, after = run(first, key, order, start, before)
        if not self.uses_last_gradient:
            state = without_last_gradient(state)
        minibatches = int(np.asarray(after)[0])
        reply = {"status": "done", "minibatches": minibatches}
        return pack({"state": state, "draws": draws}, reply)

    def _program(
        self, settings: tuple, origin: HashableTree, total: HashableTree, secret: bytes
    ) -> Callable:
        form, curvature, share, scale, steps, thin, centered, strength, _ = settings
        at, sums = jax.tree.map(jnp.asarray, (origin.tree, total.tree))
        target = set_share(self.posterior, share)
        counts = self.guard is not None and self.guard.policy.counts
        if counts and strength == 0:
            none = jax.tree.map(lambda x: jnp.zeros_like(x)[None], sums)
            own = Surrogates(at, none["slope"], none["precision"])
        else:
            own = self._own(at, form, curvature, secret)
            own = own._replace(precision=as_matrices(own.precision)).scaled([scale])
        own_and_others = jax.tree.map(
            lambda mine, total: jnp.concatenate([mine, total[None] - mine]),
            {"slope": own.slope, "precision": own.precision},
            sums,
        )
        surrogates = Surrogates(at, **own_and_others)
        plain = self.guard.gradient if self.guard is not None and counts else minibatch
        gradient = control_variate(target, at) if centered else plain(target)
        gradient = with_conducive(gradient, surrogates, np.array([share, 1.0]), strength)
        return visit_program(self.make_kernel(gradient), target, steps, thin)
