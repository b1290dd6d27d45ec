"""A Flower client: holds the data of one owner, and takes the steps of chains that visit."""

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
    Gradient,
    Kernel,
    Posterior,
    Shared,
    clients_of,
    compiled,
    likelihood_sum,
    of_prior,
    visit_in,
    with_share,
)
from stochgrad.federated import global_first_order, global_quadratic
from stochgrad.gradients import (
    Diagonal,
    Full,
    Surrogates,
    control_variate,
    minibatch,
)
from stochgrad.gradients._conducive import with_conducive
from stochgrad.interop._flower_wire import ABOUT, about, pack, unpack

MakeKernel = Callable[[Gradient], Kernel]


def client_app(
    posterior: Callable[[Context], Posterior], kernel: MakeKernel, init: Any = None
) -> ClientApp:
    """A Flower ``ClientApp`` for one owner of data.

    What leaves it: the number of its rows; slopes and curvatures of its log likelihood, summed over
    all of its rows; and states of chains. Errors are told by a fixed word, never by their text,
    which could hold data.

    Args:
        posterior: ``context -> posterior``, of this client's own data: made with
            ``stochgrad.federated.posterior(log_prior, log_likelihood, [data])`` or
            ``stochgrad.from_numpyro(model, clients=[args])``. ``context.node_config`` says where
            the data are.
        kernel: ``gradient -> kernel``, the same as the server's.
        init: A position of the model's shape, the same as the server's; a numpyro model knows.

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
    app = ClientApp()

    @lru_cache(maxsize=4)
    def owner(path: str) -> "Owner":
        return Owner(posterior(seen[path]), kernel, init)

    seen: dict[str, Context] = {}

    def answering(act: Callable[["Owner", RecordDict, Context], RecordDict]):
        def handle(message: Message, context: Context) -> Message:
            try:
                where = repr(sorted(context.node_config.items()))
                seen[where] = context
                content = act(owner(where), message.content, context)
            except Exception:
                content = pack({}, {"status": "failed"})
            return Message(content, reply_to=message)

        return handle

    app.query("hello")(answering(lambda owner, content, context: owner.hello(context)))
    app.train("expand")(answering(lambda owner, content, context: owner.expand(content)))
    app.train("visit")(answering(lambda owner, content, context: owner.visit(content, context)))
    return app


class Owner:
    """One owner's data, and what is compiled for them."""

    def __init__(self, posterior: Posterior, kernel: MakeKernel, init: Any):
        self.posterior = posterior
        self.position = position_like(posterior, init)
        self.size = int(clients_of(posterior).sizes.sum())
        self.make_kernel = kernel
        score = likelihood_sum(posterior, jax.value_and_grad(posterior.log_density))
        self.score = compiled(lambda position: score(jnp.int32(0), position))
        self.prior = compiled(of_prior(posterior, jax.value_and_grad(posterior.log_density)))
        self.programs = lru_cache(maxsize=4)(self._program)

    def hello(self, context: Context) -> RecordDict:
        name = str(context.node_config.get("name", context.node_config.get("partition-id", "")))
        return pack({}, {"status": "done", "name": name, "rows": self.size})

    def expand(self, content: RecordDict) -> RecordDict:
        """Value and slope of the log likelihood at a position, and its curvature in some form."""
        asked = about(content, form=str, curvature=str, prior=bool)
        position = unpack(content, "position", self.position)
        position = jax.tree.map(jnp.asarray, position)
        value, slope = self.score(position)
        if asked["prior"]:
            value, slope = jax.tree.map(jnp.add, (value, slope), self.prior(position))
        trees = {"slope": slope}
        if asked["form"] != "none":
            trees["precision"] = self._own(position, asked["form"], asked["curvature"]).precision
        return pack(trees, {"status": "done", "value": float(value)})

    def _own(self, position: PyTree, form: str, curvature: str) -> Surrogates:
        if form == "none":
            return global_first_order(self.posterior, position)
        return global_quadratic(self.posterior, position, form=form, curvature=curvature)

    def visit(self, content: RecordDict, context: Context) -> RecordDict:
        """Take the steps of a chain, and send back where it is."""
        told = about(content, chain=int, version=int)
        position = self.position
        if "total" in content:
            context.state["prepared"] = content[ABOUT]
            context.state["origin"], context.state["total"] = content["origin"], content["total"]
        prepared = context.state.get("prepared")
        if not isinstance(prepared, ConfigRecord) or prepared["version"] != told["version"]:
            return pack({}, {"status": "unprepared"})
        settings = tuple(prepared[name] for name in SETTINGS)
        origin = unpack(context.state, "origin", position)
        total = unpack(context.state, "total", total_like(position, str(prepared["form"])))
        program = self.programs(settings, _hashable(origin), _hashable(total))
        counted = context.state.get("counted")
        counted = dict(counted) if isinstance(counted, ConfigRecord) else {}
        chain = str(told["chain"])
        before = np.array([counted.get(chain, 0)], np.uint32)
        key = jax.random.wrap_key_data(jnp.asarray(unpack(content, "key", _KEY)))
        given = {"position": position} if "position" in content else {"state": program.state}
        ((name, like),) = given.items()
        start = jax.tree.map(jnp.asarray, unpack(content, name, like))
        state, draws, after = program.run(name == "position", key, told["chain"], start, before)
        context.state["counted"] = ConfigRecord({**counted, chain: int(np.asarray(after)[0])})
        return pack({"state": state, "draws": draws}, {"status": "done"})

    def _program(self, settings: tuple, origin: "_hashable", total: "_hashable") -> "Program":
        form, curvature, share, steps, thin, centred, strength, seed = settings
        origin, total = jax.tree.map(jnp.asarray, (origin.tree, total.tree))
        target = with_share(self.posterior, share)
        own = self._own(origin, form, curvature)
        # two surrogates: this client's own, and that of all others together
        both = jax.tree.map(
            lambda mine, all_: jnp.concatenate([mine, all_[None] - mine]),
            {"slope": own.slope, "precision": own.precision},
            total,
        )
        surrogates = Surrogates(origin, both["slope"], both["precision"])
        gradient = control_variate(target, origin) if centred else minibatch(target)
        gradient = with_conducive(gradient, surrogates, np.array([share, 1.0]), strength)
        return Program(self.make_kernel(gradient), gradient, target, origin, steps, thin, seed)


SETTINGS = ("form", "curvature", "share", "steps", "thin", "centred", "strength", "seed")
"""What a client is told before the first visit, with the sums over all clients."""

_KEY = jax.ShapeDtypeStruct((2,), np.uint32)


class Program:
    """The steps of a visit, compiled."""

    def __init__(self, kernel, gradient, target, origin, steps, thin, seed):
        self._kernel, self._target = kernel, target
        self._steps, self._thin, self._seed = steps, thin, seed
        self.state = state_like(kernel, origin)
        self._begin = compiled(self._first)
        self._walk = compiled(self._steps_of)

    def run(self, first: bool, key, chain, start, counted):
        """State and draws after a visit, and the minibatches given to this chain until then."""
        words = jax.random.fold_in(jax.random.key(self._seed), chain)
        state = self._begin(key, start) if first else start
        return self._walk(key, words, state, counted)

    def _first(self, key, position):
        state = self._kernel.init(position, jax.random.fold_in(key, 2**31))
        return _without_gradient_state(state)

    def _steps_of(self, key, words, state, counted):
        stream = self._target.batches.init(words)
        stream = Shared(stream.value._replace(handed_out=counted), optional=True)
        state = state._replace(gradient_state=stream)

        def draw(state, number):
            keys = jax.random.split(jax.random.fold_in(key, number), self._thin)
            state, _ = jax.lax.scan(lambda s, k: (self._kernel.step(k, s)[0], None), state, keys)
            return state, state.position

        numbers = jnp.arange(self._steps // self._thin)
        state, draws = jax.lax.scan(draw, state, numbers)
        return _without_gradient_state(state), draws, visit_in(state).handed_out


def position_like(posterior: Posterior | None, init: Any) -> PyTree:
    """Shapes of a position, from one or from a posterior that knows where to start."""
    if init is None:
        if posterior is None or posterior.initial is None:
            raise ValueError("init is needed: a position of the model's shape.")
        init = posterior.initial(jax.random.key(0))
    init = jax.tree.map(jnp.asarray, getattr(init, "position", init))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init)


def state_like(kernel: Kernel, position: PyTree) -> PyTree:
    """Shapes of the part of a kernel's state that travels."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _without_gradient_state(jax.eval_shape(kernel.init, position, key))


def total_like(position: PyTree, form: str) -> Any:
    """Shapes of the sums over all clients."""
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(position))
    matrix: Any = jax.ShapeDtypeStruct((size, size), np.float32)
    precision = {
        "none": None,
        "diagonal": Diagonal(position),
        "full": Full(matrix),
    }
    return {"slope": position, "precision": precision[form]}


def _without_gradient_state(state):
    return state._replace(gradient_state=None)


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
