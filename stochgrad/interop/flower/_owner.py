"""One owner's data, and the answers to what a server asks of them."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict
from jaxtyping import PyTree

from stochgrad.core import (
    Posterior,
    check_instance,
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
)
from stochgrad.gradients import minibatch
from stochgrad.interop.flower._client_anchor import (
    anchor_of,
    check_not_counted,
    gradient_of_visit,
    positions_of,
)
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
from stochgrad.interop.flower._wire import METADATA, metadata, pack, unpack

POLICY = "a PrivacyPolicy, or a function context -> PrivacyPolicy"


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
            check_instance("privacy", policy, PrivacyPolicy, POLICY)
            self.guard = Guard(policy, posterior, example, self.position, secret)
        self.counts = self.guard is not None and self.guard.policy.counts
        score = likelihood_sum(posterior, jax.value_and_grad(posterior.log_density))
        self.score = hoisted_jit(lambda position: score(jnp.int32(0), position))
        self.prior = hoisted_jit(prior_only(posterior, jax.value_and_grad(posterior.log_density)))
        self.programs = lru_cache(maxsize=4)(self._program)
        self.curvatures = lru_cache(maxsize=1)(partial(curvatures_at, posterior, self._own))

    def hello(self, context: Context) -> RecordDict:
        name = str(context.node_config.get("name", context.node_config.get("partition-id", "")))
        told: dict[str, Any] = {"status": "done", "name": name, "rows": self.size}
        if self.counts:
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
            self.guard.charge(context, [Item(asked.name(self.secret_at(context)), 0.0)])
        form, curvature = asked.request["form"], asked.request["curvature"]
        at = HashableTree((asked.origin, asked.points))
        return asked.answer(*self.curvatures(form, curvature, at))

    def slopes(self, content: RecordDict, context: Context) -> RecordDict:
        """Slopes of the log likelihood at the positions of chains."""
        check_not_counted(self.counts)
        positions = positions_of(content, self.position)
        if self.guard is not None:
            names = [self.answer_names(context, x, "none", "hessian") for x in positions]
            items = [item for n in names for item in self.guard.answer_items(n, "none")]
            self.guard.charge(context, items)
        told = [self.score(jax.tree.map(jnp.asarray, x))[1] for x in positions]
        slopes = jax.tree.map(lambda *x: np.stack(x), *told)
        return pack({"slopes": slopes}, {"status": "done"})

    def _check_look(self) -> None:
        if self.counts:
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
        anchor = anchor_of(content, position)
        arrays = (words, start, origin, total, before, *(anchor or ()))
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
            if anchor is not None:
                check_not_counted(self.counts)
                names = self.answer_names(context, anchor.anchor, "none", curvature)
                items += self.guard.answer_items(names, "none")
            self.guard.charge(context, items)
        run = self.programs(
            settings, HashableTree(origin), HashableTree(total), secret, anchor is not None
        )
        start = jax.tree.map(jnp.asarray, start)
        parameters = () if anchor is None else anchor.parameters(share)
        state, draws, after = run(first, key, order, start, before, *parameters)
        if not self.uses_last_gradient:
            state = without_last_gradient(state)
        minibatches = int(np.asarray(after)[0])
        reply = {"status": "done", "minibatches": minibatches}
        reply |= {} if anchor is None else {"anchored": True}
        return pack({"state": state, "draws": draws}, reply)

    def _program(
        self,
        settings: tuple,
        origin: HashableTree,
        total: HashableTree,
        secret: bytes,
        anchored: bool,
    ) -> Callable:
        form, curvature, share, scale, steps, thin, centered, strength, _ = settings
        at, sums = jax.tree.map(jnp.asarray, (origin.tree, total.tree))
        target = set_share(self.posterior, share)
        if self.counts and strength == 0:
            none = jax.tree.map(lambda x: jnp.zeros_like(x)[None], sums)
            own = Surrogates(at, none["slope"], none["precision"])
        else:
            own = self._own(at, form, curvature, secret)
            own = own._replace(precision=as_matrices(own.precision)).scaled([scale])
        plain = self.guard.gradient if self.guard is not None and self.counts else minibatch
        gradient, bind = gradient_of_visit(
            target, own, sums, share, strength, centered, plain, anchored
        )
        return visit_program(self.make_kernel(gradient), target, steps, thin, bind)
