"""A Flower server: holds chains and sums over clients, sends chains from client to client."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from jaxtyping import PyTree

from stochgrad.core import (
    Draws,
    Gradient,
    Kernel,
    Position,
    PRNGKey,
    check_count,
    check_key,
    check_number,
    load_notes,
    load_tree,
    refuse_other_run,
    save_tree,
)
from stochgrad.federated._reference import climb
from stochgrad.interop._flower_client import position_like, state_like, total_like
from stochgrad.interop._flower_network import Network, log
from stochgrad.interop._flower_wire import Refused, check_reply, tree_limit, unpack

FORMS = {"global_first_order": "none", "global_diagonal": "diagonal", "global_quadratic": "full"}


class Chain(NamedTuple):
    """What the server keeps of a chain.

    Attributes:
        state: Its state after the last visit; None before the first.
        draws: The draws of each visit.
        visited: The client of each visit.
        failures: Visits that did not come back, since the last that did.
    """

    state: PyTree
    draws: list
    visited: list[int]
    failures: int = 0


def federate(
    grid: Grid,
    kernel: Callable[[Gradient], Kernel],
    init: Position,
    key: PRNGKey,
    *,
    clients: Sequence[str],
    num_visits: int,
    num_chains: int,
    local_steps: int,
    thin: int = 1,
    probabilities: Sequence[float] | None = None,
    surrogate: str = "global_first_order",
    curvature: str = "hessian",
    strength: float = 1.0,
    control_variate: bool = True,
    max_rounds: int = 100,
    timeout: float = 600.0,
    poll: float = 0.2,
    most_failures: int = 20,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Draws:
    r"""FSGLD over a network: chains go from client to client, data stay where they are.

    The same algorithm as ``stochgrad.federated.sample``. The server never sees data; it knows
    numbers of rows, slopes (and curvatures) of whole log likelihoods, and states of chains. Each
    chain has one visit under way at any time, so that clients do not idle where there are more
    chains than clients.

    A visit that does not come back in time, or comes back as something else than a state of a
    chain, is logged and drawn again from the chain's last state, at any client. A client whose node
    is gone is left out, its likelihood represented by its surrogate, until a node with its name is
    there again.

    Args:
        grid: What Flower gives the server, or a ``stochgrad.flower.LoopbackGrid``.
        kernel: ``gradient -> kernel``.
        init: Where the search for the reference starts; a position of the model's shape.
        key: A typed PRNG key.
        clients: Names of the clients to wait for: the ``name`` in the configuration of each node.
        num_visits: Visits of each chain.
        num_chains: Chains.
        local_steps: Steps of a visit; many, where a message takes seconds.
        thin: Steps per draw; a divisor of ``local_steps``.
        probabilities: As in ``stochgrad.federated.visiting``, in the order of ``clients``.
        surrogate: ``"global_first_order"``, ``"global_diagonal"`` or ``"global_quadratic"`` (full).
        curvature: ``"hessian"`` or ``"fisher"``, for the last two.
        strength: $\alpha$.
        control_variate: Whether clients centre their minibatch gradients.
        max_rounds: Rounds of the search for a reference.
        timeout: Seconds after which a message is given up.
        poll: Seconds between two looks for replies.
        most_failures: How often in a row the visits of one chain may fail before the run ends.
        checkpoint: A file for the state of the run, written whole after each visit.
        resume: Whether to go on from it, if it is there.

    Returns:
        Draws, with the ``client``, the number of ``visits`` and the ``bytes_up`` and ``bytes_down``
        of states and draws in ``stats``, and ``lost_visits`` in ``attrs``.

    Raises:
        TypeError: the key is not a typed PRNG key.
        ValueError: a number is out of range; the checkpoint is of another run.
        TimeoutError: a client is not there, or does not answer during the preparations.
        RuntimeError: the visits of a chain fail again and again.
    """
    check_key(key)
    for name, value in (("num_visits", num_visits), ("num_chains", num_chains), ("thin", thin)):
        check_count(name, value)
    check_count("local_steps", local_steps)
    check_number("timeout", timeout)
    if local_steps % thin:
        raise ValueError(f"local_steps must be a multiple of thin, got {local_steps} and {thin}.")
    if surrogate not in FORMS:
        raise ValueError(f"surrogate must be one of {list(FORMS)}, got {surrogate!r}.")
    clients = list(clients)
    if not clients or len(set(clients)) < len(clients):
        raise ValueError(f"clients must be different names, got {clients}.")
    init = jax.tree.map(jnp.asarray, getattr(init, "position", init))
    settings = {
        "form": FORMS[surrogate],
        "curvature": curvature,
        "steps": local_steps,
        "thin": thin,
        "centred": control_variate,
        "strength": float(strength),
        "seed": int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2**31 - 1)),
    }
    run = Run(Network(grid, clients, timeout, poll), kernel, init, settings)
    told = {**settings, "clients": clients, "num_chains": num_chains}
    path = None if checkpoint is None else Path(checkpoint)
    save = None if path is None else lambda chains: run.save(path, told, chains)
    chains = [Chain(None, [], []) for _ in range(num_chains)]
    if path is not None and path.exists():
        notes = load_notes(path)
        refuse_other_run(f"checkpoint={str(path)!r}", notes.get("run"), told, resume)
        run.network.wait_for_all()
        chains = run.load(path, notes, num_chains)
    else:
        run.network.wait_for_all()
        run.prepare(max_rounds)
        if save is not None:
            save(chains)
    run.probabilities = _probabilities(probabilities, [run.network.rows[c] for c in clients])
    chains = run.visit_all(chains, key, num_visits, most_failures, save)
    return run.as_draws(chains, thin)


def server_app(
    finish: Callable[[Draws, Context], None], make: Callable[[Context], dict[str, Any]]
) -> ServerApp:
    """A Flower ``ServerApp`` that runs ``federate`` and hands the draws on.

    Args:
        finish: ``(draws, context)``, what to do with the draws.
        make: ``context -> arguments`` of ``federate``, all but the grid;
            ``context.run_config`` has what the run was started with.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        finish(federate(grid, **make(context)), context)

    return app


class Run:
    """The server's side of a run: chains, the sums over clients, and who knows of them."""

    def __init__(self, network: Network, kernel, init: Position, settings: dict[str, Any]):
        self.network, self.settings = network, settings
        self.init = init
        self.probabilities = np.ones(0)
        self.position = position_like(None, init)
        self.state = state_like(kernel(_without_data(self.position)), self.position)
        self.prepared: dict[int, int] = {}
        self.origin = self.total = None
        self.lost, self.setup_bytes = 0, 0

    # preparations

    def prepare(self, max_rounds: int) -> None:
        """Find the reference, and what each client's likelihood is there."""
        count = len(self.network.clients)
        found = climb(self._score, self.init, count, max_rounds, 1e-3)
        self.origin = jax.tree.map(np.asarray, found.position)
        parts = self._ask(self.origin, self.settings["form"])
        own = [tree for _, tree in parts.values()]
        self.total = jax.tree.map(lambda *x: np.sum(x, axis=0), *own)
        self.setup_bytes = found.bytes_up + sum(x.nbytes for x in jax.tree.leaves(own))

    def _score(self, position):
        """Value and gradient of the log density: one round over all clients."""
        parts = self._ask(position, "none", self.network.clients[0])
        value = sum(value for value, _ in parts.values())
        slopes = [tree["slope"] for _, tree in parts.values()]
        return value, jax.tree.map(lambda *x: np.sum(x, axis=0), *slopes)

    def _ask(self, position, form: str, prior_of: str = ""):
        return self.network.ask(position, self.position, form, self.settings["curvature"], prior_of)

    # visits

    def shares(self) -> dict[str, float]:
        """The share of steps of each client that is there."""
        p = {
            name: self.probabilities[s]
            for s, name in enumerate(self.network.clients)
            if name in self.network.nodes
        }
        total = sum(p.values())
        return {name: float(x / total) for name, x in p.items()}

    def request(self, number: int, chain: Chain, key: PRNGKey) -> tuple[Message, str, int]:
        """The message that sends a chain to a client, drawn by the shares."""
        shares = self.shares()
        turn = jax.random.fold_in(jax.random.fold_in(key, number), len(chain.visited))
        turn = jax.random.fold_in(turn, chain.failures)
        names = list(shares)
        draw = np.random.default_rng(np.asarray(jax.random.key_data(turn)))
        name = names[int(draw.choice(len(names), p=[shares[n] for n in names]))]
        node = self.network.nodes[name]
        trees: dict[str, Any] = {"key": np.asarray(jax.random.key_data(turn))}
        trees |= {"position": self.origin} if chain.state is None else {"state": chain.state}
        told: dict[str, Any] = {"chain": number, "version": self.network.version}
        if self.prepared.get(node) != self.network.version:
            trees |= {"origin": self.origin, "total": self.total}
            told |= {**self.settings, "share": shares[name]}
            self.prepared[node] = self.network.version
        return self.network.message(node, "train.visit", trees, told), name, node

    def visit_all(self, chains, key, num_visits, most_failures, save) -> list[Chain]:
        """Send every chain on its visits, each as soon as it is back from the last."""
        key = jax.random.fold_in(key, 2)
        draws = self.settings["steps"] // self.settings["thin"]
        kept = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((draws, *s.shape), s.dtype), self.position
        )
        limit = tree_limit(self.state, kept)
        away: dict[str, tuple[int, str, int, float]] = {}
        looked = time.monotonic()
        while True:
            out = {number for number, *_ in away.values()}
            for number, chain in enumerate(chains):
                if number in out or len(chain.visited) >= num_visits or not self.network.nodes:
                    continue
                if chain.failures > most_failures:
                    kept_until_now = "" if save is None else " The checkpoint has what was drawn."
                    raise RuntimeError(
                        f"{chain.failures} visits of chain {number} failed one after the other: "
                        f"the log says why.{kept_until_now}"
                    )
                message, name, node = self.request(number, chain, key)
                (sent,) = self.network.grid.push_messages([message])
                away[sent] = (number, name, node, time.monotonic() + self.network.timeout)
            if not away and all(len(c.visited) >= num_visits for c in chains):
                return chains
            back = list(self.network.grid.pull_messages(list(away))) if away else []
            for reply in back:
                number, name, node, _ = away.pop(reply.metadata.reply_to_message_id)
                chains[number] = self.received(
                    reply, chains[number], number, name, node, limit, kept
                )
            if back and save is not None:
                save(chains)
            now = time.monotonic()
            for sent in [i for i, (*_, end) in away.items() if now > end]:
                number, name, node, _ = away.pop(sent)
                chains[number] = self.failed(chains[number], number, name, node, "no reply in time")
            if now - looked > max(5.0, self.network.poll) or not self.network.nodes:
                self.network.look_around()
                looked = time.monotonic()
            if not back:
                time.sleep(self.network.poll)

    def received(self, reply, chain, number, name, node, limit, kept) -> Chain:
        """The chain after a reply, which may be anything."""
        try:
            content = check_reply(reply, "train.visit", limit)
            state = unpack(content, "state", self.state)
            draws = unpack(content, "draws", kept)
        except Refused as reason:
            return self.failed(chain, number, name, node, str(reason))
        return Chain(
            state, [*chain.draws, draws], [*chain.visited, self.network.clients.index(name)]
        )

    def failed(self, chain, number, name, node, reason: str) -> Chain:
        """The chain as it was, its visit lost."""
        log.warning("the visit of chain %d to client %s is drawn again: %s", number, name, reason)
        self.lost += 1
        self.prepared.pop(node, None)
        if "unprepared" in reason:
            return chain
        self.network.look_around()
        return chain._replace(failures=chain.failures + 1)

    # what stays

    def save(self, path: Path, told: dict, chains: list[Chain]) -> None:
        """Write all that the run needs to go on."""
        tree = self.archive(chains)
        visited = [c.visited for c in chains]
        notes = {
            "run": told,
            "visited": visited,
            "rows": self.network.rows,
            "setup": self.setup_bytes,
        }
        save_tree(path, tree, notes)

    def archive(self, chains: list[Chain]) -> PyTree:
        """The arrays of a run."""
        join = lambda *parts: np.concatenate(parts)
        return {
            "origin": self.origin,
            "total": self.total,
            "chains": [(c.state, jax.tree.map(join, *c.draws)) for c in chains if c.visited],
        }

    def load(self, path: Path, notes: dict, num_chains: int) -> list[Chain]:
        """The chains of a checkpoint."""
        per_visit = self.settings["steps"] // self.settings["thin"]

        def drawn(visits):
            return jax.tree.map(
                lambda s: np.zeros((visits * per_visit, *s.shape), s.dtype), self.position
            )

        visited = notes["visited"]
        like = {
            "origin": self.position,
            "total": total_like(self.position, self.settings["form"]),
            "chains": [(self.state, drawn(len(v))) for v in visited if v],
        }
        tree = load_tree(path, like)
        self.origin, self.total = tree["origin"], tree["total"]
        self.setup_bytes = notes["setup"]
        saved = iter(tree["chains"])
        return [
            Chain(*(lambda state, draws: (state, [draws]))(*next(saved)), v)
            if v
            else Chain(None, [], [])
            for v in visited[:num_chains]
        ]

    def as_draws(self, chains: list[Chain], thin: int) -> Draws:
        """The draws of all chains."""
        per_visit = self.settings["steps"] // thin
        joined = [jax.tree.map(lambda *x: np.concatenate(x), *c.draws) for c in chains]
        positions = jax.tree.map(lambda *x: np.stack(x), *joined)
        client = np.repeat(np.array([c.visited for c in chains], np.int32), per_visit, axis=1)
        visits = np.repeat(np.arange(1, len(chains[0].visited) + 1), per_visit)
        visits = np.broadcast_to(visits, client.shape)
        state = sum(x.nbytes for x in jax.tree.leaves(chains[0].state))
        draw = sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(self.position))
        stats = {
            "client": client,
            "visits": visits,
            "bytes_up": visits * (state + per_visit * draw),
            "bytes_down": visits * state,
        }
        attrs = {
            "method": "FSGLD",
            **self.settings,
            "lost_visits": self.lost,
            "setup_bytes_up": self.setup_bytes,
        }
        bad = np.full(len(chains), -1, np.int32)
        return Draws(positions, stats, np.ones(client.shape, bool), bad, attrs=attrs)


def _without_data(position: PyTree) -> Gradient:
    """A gradient of nothing, to make a kernel's state from."""

    def next(key, at, state):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), position)
        return (lambda at: (jnp.zeros(()), zeros)), state

    return Gradient(lambda key, at: None, next)


def _probabilities(given: Sequence[float] | None, rows: list[int]) -> np.ndarray:
    if given is None:
        return np.array(rows) / sum(rows)
    p = np.asarray(given, np.float64)
    if p.shape != (len(rows),) or not np.all(p > 0) or not np.isclose(p.sum(), 1, rtol=1e-4):
        raise ValueError(
            f"probabilities must be {len(rows)} positive numbers that sum to one, got {given}."
        )
    return p / p.sum()
