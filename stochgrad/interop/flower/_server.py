"""A Flower server: holds chains and sums over clients, sends chains from client to client."""

import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from jaxtyping import PyTree

from stochgrad.core import (
    CheckpointWarning,
    Draws,
    Gradient,
    Kernel,
    Position,
    PRNGKey,
    check_array,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_key,
    check_number,
    check_path,
    check_position,
    describe,
    first_line,
    key_words,
    load_notes,
    load_tree,
    refuse_other_run,
    save_tree,
)
from stochgrad.federated import maximize_over_clients, warn_of_own_effects
from stochgrad.interop.flower._client import (
    OTHER_KERNEL,
    dataless,
    digest_of,
    kernel_settings,
    position_like,
    state_like,
    total_like,
)
from stochgrad.interop.flower._network import Network, log
from stochgrad.interop.flower._wire import Refused, about, check_reply, tree_limit, unpack

_ROUNDING = 1e-4
"""Of a client's log likelihood and its slope, from which on its data are others."""

FORMS = {"global_first_order": "none", "global_diagonal": "diagonal", "global_quadratic": "full"}


class Chain(NamedTuple):
    """What the server keeps of a chain.

    Attributes:
        state: Its state after the last visit; None before the first.
        draws: The draws of each visit.
        visited: The client of each visit.
        counted: Minibatches that each client has given to it.
    """

    state: PyTree
    draws: list
    visited: list[int]
    counted: list[int]


class Attempt(NamedTuple):
    """The attempts at a chain's next visit.

    Attributes:
        since: When it was first due, in seconds.
        failures: How many failed until now.
        after: When to try again, in seconds.
        reason: Why the last one failed.
    """

    since: float
    failures: int = 0
    after: float = 0.0
    reason: str = "the client is not there"


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
    deadline: float = 3600.0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Draws:
    r"""FSGLD over a network: chains go from client to client, data stay where they are.

    The same algorithm as ``stochgrad.federated.sample``. The server holds no data; what it is sent
    are numbers of rows, slopes (and curvatures) of whole log likelihoods, and states of chains.
    Each chain has one visit under way at any time, so that clients do not idle where there are more
    chains than clients.

    A visit that does not come back in time, or comes back as something else than a state of a
    chain, is logged and tried again from the chain's last state, at the client that was drawn and
    with the same key: a visit to another one in its place would bias the draws. A client whose node
    is gone is waited for, until a node with its name is there again. After ``most_failures``
    failures or ``deadline`` seconds the run stops. The draws do not depend on how often visits
    failed.

    With surrogates of first order, visits that are too long for what some clients alone inform are
    warned of (``stochgrad.federated.StabilityWarning``), from slopes and numbers of rows.

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
        most_failures: How often one visit may fail before the run stops. The pause before each
            attempt is twice that of the last, from ``poll`` to a minute.
        deadline: Seconds for all attempts at one visit, after which the run stops.
        checkpoint: A file for the state of the run, written whole after each visit.
        resume: Whether to go on from it, if it is there. Kernel, settings and clients must be those
            of before: clients are asked for their log likelihood and its slope at the reference,
            which must be the same up to rounding.

    Returns:
        Draws, with the ``client``, the number of ``visits`` and the ``bytes_up`` and ``bytes_down``
        of states and draws in ``stats``, and ``lost_visits`` in ``attrs``.

    Raises:
        TypeError: the key is not a typed PRNG key; an argument is of the wrong kind.
        ValueError: a number is out of range; two nodes report the name of one client; the
            checkpoint is of another run: another kernel, other settings, or clients with other
            data.
        TimeoutError: a client is not there, or does not answer during the preparations.
        RuntimeError: a visit fails again and again, or its client stays away.
        OSError: the checkpoint's directory is not there.
    """
    check_instance("grid", grid, Grid, "Flower's Grid or a stochgrad.flower.LoopbackGrid")
    check_callable("kernel", kernel, "a function gradient -> kernel")
    check_position(getattr(init, "position", init))
    check_key(key)
    clients = _names(clients)
    num_visits = check_count("num_visits", num_visits)
    num_chains = check_count("num_chains", num_chains)
    local_steps, thin = check_count("local_steps", local_steps), check_count("thin", thin)
    if local_steps % thin:
        raise ValueError(f"local_steps must be a multiple of thin, got {local_steps} and {thin}.")
    shares = None if probabilities is None else _probabilities(probabilities, len(clients))
    check_choice("surrogate", surrogate, FORMS)
    check_choice("curvature", curvature, ("hessian", "fisher"))
    strength = check_number("strength", strength, zero=True)
    control_variate = check_flag("control_variate", control_variate)
    max_rounds = check_count("max_rounds", max_rounds)
    timeout, poll = check_number("timeout", timeout), check_number("poll", poll, zero=True)
    most_failures = check_count("most_failures", most_failures, least=0)
    deadline = check_number("deadline", deadline)
    resume = check_flag("resume", resume)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint, the file to resume from.")
    path = None if checkpoint is None else _checkpoint_path(checkpoint)
    init = jax.tree.map(jnp.asarray, getattr(init, "position", init))
    example = dataless(kernel, position_like(None, init))
    kernel_description = kernel_settings(example)
    settings = {
        "form": FORMS[surrogate],
        "curvature": curvature,
        "steps": local_steps,
        "thin": thin,
        "centred": control_variate,
        "strength": strength,
        "seed": int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2**31 - 1)),
        "kernel": digest_of(kernel_description),
    }
    network = Network(grid, clients, timeout, poll)
    run = Run(network, example, init, settings, most_failures, deadline)
    identity = {
        **{name: value for name, value in settings.items() if name != "kernel"},
        **{f"kernel's {name}": value for name, value in kernel_description.items()},
        "kernel's program": program_digest(example, run.position),
        "position": [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(run.position)],
        "clients": clients,
        "num_chains": num_chains,
        "probabilities": None if shares is None else shares.tolist(),
    }
    save = None if path is None else lambda chains: run.save(path, identity, chains)
    chains = [Chain(None, [], [], [0] * len(clients)) for _ in range(num_chains)]
    if path is not None and path.exists():
        notes = _notes(path)
        refuse_other_run(f"checkpoint={str(path)!r}", notes.get("run"), identity, resume)
        network.rows = dict(notes["rows"])
        network.wait_for_all(starting=True)
        chains = run.load(path, notes, num_chains)
        run.check_clients(f"checkpoint={str(path)!r}")
    else:
        network.wait_for_all(starting=True)
        run.prepare(max_rounds)
        if save is not None:
            save(chains)
    rows = np.array([network.rows[c] for c in clients])
    run.set_shares(rows / rows.sum() if shares is None else shares)
    if settings["form"] == "none":
        warn_of_own_effects(clients, run.own_slopes, run.shares, rows, example, local_steps)
    chains = run.visit_all(chains, key, num_visits, save)
    return run.as_draws(chains, num_visits)


def server_app(
    finish: Callable[[Draws, Context], None], make: Callable[[Context], dict[str, Any]]
) -> ServerApp:
    """A Flower ``ServerApp`` that runs ``federate`` and hands the draws on.

    Args:
        finish: ``(draws, context)``, what to do with the draws.
        make: ``context -> arguments`` of ``federate``, all but the grid;
            ``context.run_config`` has what the run was started with.

    Raises:
        TypeError: one is not a function; when the app runs, ``make`` does not return a dict.
    """
    check_callable("finish", finish, "a function (draws, context)")
    check_callable("make", make, "a function context -> arguments of federate")
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            arguments = make(context)
        except Exception as error:
            raise ValueError(f"make fails on the context: {first_line(error)}.") from error
        if not isinstance(arguments, Mapping) or "grid" in arguments:
            raise TypeError(
                "make must return a dict of the arguments of federate, all but the grid, got "
                f"{describe(arguments)}."
            )
        finish(federate(grid, **arguments), context)

    return app


class Run:
    """The server's side of a run: chains, the sums over clients, and who knows of them."""

    def __init__(
        self,
        network: Network,
        kernel: Kernel,
        init: Position,
        settings: dict[str, Any],
        most_failures: int,
        deadline: float,
    ):
        self.network, self.settings = network, settings
        self.most_failures, self.deadline = most_failures, deadline
        self.init = init
        self.shares = np.ones(0)
        self.position = position_like(None, init)
        self.state = state_like(kernel, self.position)
        self.prepared: set[int] = set()
        self.version = 0
        self.origin: PyTree = None
        self.total: PyTree = None
        self.own_values, self.own_slopes = np.ones(0), None
        self.lost, self.setup_bytes = 0, 0

    # preparations

    def prepare(self, max_rounds: int) -> None:
        """Find the reference, and what each client's likelihood is there."""
        count = len(self.network.clients)
        found = maximize_over_clients(self._score, self.init, count, max_rounds, 1e-3)
        self.origin = jax.tree.map(np.asarray, found.position)
        parts = self._ask(self.origin, self.settings["form"])
        own = [tree for _, tree in parts.values()]
        self.total = jax.tree.map(lambda *x: np.sum(x, axis=0), *own)
        self._keep(parts)
        self.setup_bytes = found.bytes_up + sum(x.nbytes for x in jax.tree.leaves(own))

    def _keep(self, parts) -> None:
        self.own_values = np.array([value for value, _ in parts.values()])
        slopes = [tree["slope"] for _, tree in parts.values()]
        self.own_slopes = jax.tree.map(lambda *x: np.stack(x), *slopes)

    def check_clients(self, name: str) -> None:
        """Raise a ValueError unless the clients' log likelihoods are those of the checkpoint."""
        values, slopes = self.own_values, self.own_slopes
        self._keep(self._ask(self.origin, "none"))
        scale = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(slopes))
        for s, client in enumerate(self.network.clients):
            pairs = [(values[s], self.own_values[s], abs(values[s]))]
            leaves = zip(jax.tree.leaves(slopes), jax.tree.leaves(self.own_slopes), strict=True)
            pairs += [(before[s], now[s], scale) for before, now in leaves]
            gap = max(float(np.max(np.abs(a - b))) / max(size, 1.0) for a, b, size in pairs)
            if gap > _ROUNDING:
                raise ValueError(
                    f"{name} holds another run: the data of client {client!r} are others, for its "
                    f"log likelihood at the reference was {values[s]:.8g} and is now "
                    f"{self.own_values[s]:.8g}, and its slope differs by {gap:.2g} of the largest."
                )
            if gap > 0:
                log.warning(
                    "the log likelihood of client %s differs from that of before by %.1g of "
                    "itself: by rounding, or a few rows",
                    client,
                    gap,
                )

    def _score(self, position):
        """Value and gradient of the log density: one round over all clients."""
        parts = self._ask(position, "none", self.network.clients[0])
        value = sum(value for value, _ in parts.values())
        slopes = [tree["slope"] for _, tree in parts.values()]
        return value, jax.tree.map(lambda *x: np.sum(x, axis=0), *slopes)

    def _ask(self, position, form: str, prior_of: str = ""):
        return self.network.ask(position, self.position, form, self.settings["curvature"], prior_of)

    # visits

    def set_shares(self, shares: np.ndarray) -> None:
        """Set the shares of steps, and number what clients are told before their first visit."""
        self.shares = shares
        content = [self.origin, self.total, shares]
        told = repr(self.settings), [x.tobytes() for x in jax.tree.leaves(content)]
        self.version = int(digest_of(told)[:7], 16)

    def drawn(self, number: int, chain: Chain, key: PRNGKey) -> tuple[int, PRNGKey]:
        """The client of a chain's next visit, drawn by the shares, and the visit's key."""
        turn = jax.random.fold_in(jax.random.fold_in(key, number), len(chain.visited))
        turn = jax.random.fold_in(turn, 0)
        random = np.random.default_rng(np.asarray(jax.random.key_data(turn)))
        return int(random.choice(len(self.shares), p=self.shares)), turn

    def request(self, number: int, chain: Chain, client: int, node: int, key: PRNGKey) -> Message:
        """The message that sends a chain to a client."""
        trees: dict[str, Any] = {"key": np.asarray(key_words(key))}
        trees |= {"position": self.origin} if chain.state is None else {"state": chain.state}
        about: dict[str, Any] = {"chain": number, "version": self.version}
        about["counted"] = chain.counted[client]
        if node not in self.prepared:
            trees |= {"origin": self.origin, "total": self.total}
            about |= {**self.settings, "share": float(self.shares[client])}
            self.prepared.add(node)
        return self.network.message(node, "train.visit", trees, about)

    def visit_all(self, chains, key, num_visits, save) -> list[Chain]:
        """Send every chain on its visits, each as soon as it is back from the last."""
        key = jax.random.fold_in(key, 2)
        draws = self.settings["steps"] // self.settings["thin"]
        shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((draws, *s.shape), s.dtype), self.position
        )
        limit = tree_limit(self.state, shapes)
        away: dict[str, tuple[int, int, int, float]] = {}
        attempts: dict[int, Attempt] = {}
        network, looked = self.network, time.monotonic()
        while True:
            out = {number for number, *_ in away.values()}
            for number, chain in enumerate(chains):
                now = time.monotonic()
                if number in out or len(chain.visited) >= num_visits:
                    continue
                client, turn = self.drawn(number, chain, key)
                attempt = attempts.setdefault(number, Attempt(now))
                self.check_patience(number, client, attempt, now, save and (lambda: save(chains)))
                node = network.nodes.get(network.clients[client])
                if node is None or now < attempt.after:
                    continue
                message = self.request(number, chain, client, node, turn)
                (sent,) = network.grid.push_messages([message])
                away[sent] = (number, client, node, now + network.timeout)
            if not away and all(len(c.visited) >= num_visits for c in chains):
                return chains
            back = list(network.grid.pull_messages(list(away))) if away else []
            for reply in back:
                number, client, node, _ = away.pop(reply.metadata.reply_to_message_id)
                try:
                    chains[number] = self.received(reply, chains[number], client, limit, shapes)
                    attempts.pop(number, None)
                except Refused as reason:
                    attempts[number] = self.failed(attempts[number], number, client, node, reason)
            if back and save is not None:
                save(chains)
            now = time.monotonic()
            for sent in [i for i, (*_, end) in away.items() if now > end]:
                number, client, node, _ = away.pop(sent)
                reason = Refused("no reply in time")
                attempts[number] = self.failed(attempts[number], number, client, node, reason)
            complete = len(network.nodes) == len(network.clients)
            if now - looked > max(5.0 if complete else 0.1, network.poll):
                network.look_around()
                looked = time.monotonic()
            if not back:
                time.sleep(network.poll)

    def check_patience(self, number: int, client: int, attempt: Attempt, now: float, save) -> None:
        """Raise a RuntimeError where a visit has failed too often or for too long."""
        seconds = now - attempt.since
        if attempt.failures <= self.most_failures and seconds <= self.deadline:
            return
        if save is not None:
            save()
        rest = (
            "There was no checkpoint: with checkpoint= what was drawn would be kept."
            if save is None
            else "The checkpoint has all visits until now, and resume=True goes on from it."
        )
        raise RuntimeError(
            f"the visit of chain {number} to client {self.network.clients[client]} failed "
            f"{attempt.failures} times within {seconds:.3g} s, at last because {attempt.reason}: "
            "the run stops here, as a visit to another client in its place would bias the draws. "
            f"{rest}"
        )

    def received(self, reply, chain: Chain, client: int, limit: int, shapes) -> Chain:
        """The chain after a reply, which may be anything.

        Raises:
            Refused: it is no state of a chain.
            ValueError: the client's kernel is another one than the server's.
        """
        name = self.network.clients[client]
        try:
            content = check_reply(reply, "train.visit", limit)
        except Refused as reason:
            if OTHER_KERNEL in str(reason):
                raise ValueError(
                    f"kernel is another one at client {name!r} than at the server: give client_app "
                    "and federate the same."
                ) from reason
            raise
        state = unpack(content, "state", self.state)
        draws = unpack(content, "draws", shapes)
        counted = list(chain.counted)
        counted[client] = about(content, counted=int)["counted"]
        if not chain.counted[client] <= counted[client] < 2**32:
            raise Refused("its number of minibatches is none")
        return Chain(state, [*chain.draws, draws], [*chain.visited, client], counted)

    def failed(self, attempt: Attempt, number, client: int, node: int, reason) -> Attempt:
        """The attempts at a visit after one more that failed."""
        name = self.network.clients[client]
        log.warning("the visit of chain %d to client %s is tried again: %s", number, name, reason)
        self.lost += 1
        self.prepared.discard(node)
        self.network.look_around()
        pause = min(self.network.poll * 2**attempt.failures, 60.0)
        after = time.monotonic() + pause
        return Attempt(attempt.since, attempt.failures + 1, after, str(reason))

    # what stays

    def save(self, path: Path, identity: dict, chains: list[Chain]) -> None:
        """Write all that the run needs to go on; a full disk costs a warning, not the run."""
        notes = {
            "run": identity,
            "visited": [c.visited for c in chains],
            "counted": [c.counted for c in chains],
            "rows": self.network.rows,
            "setup": self.setup_bytes,
        }
        try:
            save_tree(path, self.archive(chains), notes)
        except OSError as error:
            warnings.warn(
                f"the checkpoint at {path} could not be written: {error.strerror or error}. The "
                "run goes on; the last checkpoint stays as it is.",
                CheckpointWarning,
                stacklevel=4,
            )

    def archive(self, chains: list[Chain]) -> PyTree:
        """The arrays of a run."""
        join = lambda *parts: np.concatenate(parts)
        return {
            "origin": self.origin,
            "total": self.total,
            "own": (self.own_values, self.own_slopes),
            "chains": [(c.state, jax.tree.map(join, *c.draws)) for c in chains if c.visited],
        }

    def load(self, path: Path, notes: dict, num_chains: int) -> list[Chain]:
        """The chains of a checkpoint."""
        per_visit = self.settings["steps"] // self.settings["thin"]

        def drawn(visits):
            return jax.tree.map(
                lambda s: np.zeros((visits * per_visit, *s.shape), s.dtype), self.position
            )

        visited, count = notes["visited"], len(self.network.clients)
        slopes = jax.tree.map(lambda s: np.zeros((count, *s.shape), s.dtype), self.position)
        like = {
            "origin": self.position,
            "total": total_like(self.position, self.settings["form"]),
            "own": (np.zeros(count), slopes),
            "chains": [(self.state, drawn(len(v))) for v in visited if v],
        }
        tree = load_tree(path, like)
        self.origin, self.total = tree["origin"], tree["total"]
        self.own_values, self.own_slopes = tree["own"]
        self.setup_bytes = notes["setup"]
        saved = iter(tree["chains"])
        chains = []
        for clients, counted in zip(visited[:num_chains], notes["counted"], strict=True):
            state, draws = next(saved) if clients else (None, None)
            chains.append(Chain(state, [draws] if clients else [], clients, counted))
        return chains

    def as_draws(self, chains: list[Chain], num_visits: int) -> Draws:
        """The draws of the first visits of all chains."""
        per_visit = self.settings["steps"] // self.settings["thin"]
        size = num_visits * per_visit
        joined = [jax.tree.map(lambda *x: np.concatenate(x)[:size], *c.draws) for c in chains]
        positions = jax.tree.map(lambda *x: np.stack(x), *joined)
        visited = np.array([c.visited[:num_visits] for c in chains], np.int32)
        client = np.repeat(visited, per_visit, axis=1)
        visits = np.repeat(np.arange(1, num_visits + 1), per_visit)
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


def program_digest(kernel: Kernel, position: PyTree) -> str:
    """A digest of a kernel's step, and of the arrays it holds."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(kernel.init, position, key)
    program = jax.make_jaxpr(kernel.step)(key, state)
    text = re.sub(r"0x[0-9a-f]+|<function [^>]*>", "", str(program.jaxpr))
    return digest_of((text, [np.asarray(c).tobytes() for c in program.consts]))


def _names(clients: Any) -> list[str]:
    if isinstance(clients, str | bytes | Mapping) or not isinstance(clients, Sequence):
        raise TypeError(f"clients must be a list of different names, got {describe(clients)}.")
    names = list(clients)
    if not names or not all(isinstance(c, str) and c for c in names):
        raise ValueError(f"clients must be a list of different names, got {describe(names)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"clients must be different names, got {describe(names)}.")
    return names


def _probabilities(values: Any, count: int) -> np.ndarray:
    p = check_array("probabilities", values).astype(np.float64)
    if p.shape != (count,) or not np.all(p > 0) or not np.isclose(p.sum(), 1, rtol=1e-4):
        raise ValueError(
            f"probabilities must be {count} positive numbers that sum to one, got "
            f"{describe(p.tolist())}."
        )
    return p / p.sum()


def _checkpoint_path(checkpoint: Any) -> Path:
    path = check_path("checkpoint", checkpoint)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: its directory is not there.")
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint={str(path)!r} is a directory: name a file in it.")
    return path


def _notes(path: Path) -> dict[str, Any]:
    try:
        notes = load_notes(path)
    except Exception as error:
        raise ValueError(
            f"checkpoint={str(path)!r} is no file that a run of stochgrad.flower.federate wrote: "
            "name another one, or remove it."
        ) from error
    if not isinstance(notes, dict) or not {"run", "visited", "counted", "rows"} <= set(notes):
        raise ValueError(
            f"checkpoint={str(path)!r} holds something other than a run of "
            "stochgrad.flower.federate: name another file, or remove it."
        )
    return notes
