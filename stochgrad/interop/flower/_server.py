"""A Flower server: holds chains and sums over clients, sends chains from client to client."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from jaxtyping import PyTree

from stochgrad._deprecations import key_first
from stochgrad.core import (
    Draws,
    Gradient,
    Kernel,
    Position,
    PRNGKey,
    check_callable,
    check_choice,
    check_count,
    check_file_path,
    check_flag,
    check_instance,
    check_key,
    check_number,
    check_position,
    check_same_run,
    describe,
    first_line,
)
from stochgrad.federated import StabilityWarning, warn_of_own_effects
from stochgrad.interop.flower._arguments import (
    check_private,
    client_names,
    renewal_period,
    visit_probabilities,
)
from stochgrad.interop.flower._checkpoint import (
    load_run,
    load_run_notes,
    save_run,
)
from stochgrad.interop.flower._choice import Choice, measure_and_choose
from stochgrad.interop.flower._faults import with_fault_notes
from stochgrad.interop.flower._likelihoods import (
    measure_again,
    measure_likelihoods,
    warn_of_runaways,
)
from stochgrad.interop.flower._network import Network, clipped_reason
from stochgrad.interop.flower._plausible import (
    check_most_rows,
    check_rows,
    reach_of_visits,
    rows_reason,
)
from stochgrad.interop.flower._protocol import (
    digest_of,
    kernel_settings,
    kernel_without_data,
    position_shapes,
    program_digest,
    state_shapes,
)
from stochgrad.interop.flower._renewal import first_anchors
from stochgrad.interop.flower._visits import Chain, Limits, Visits

FORMS = {
    "auto": "auto",
    "global_first_order": "none",
    "global_diagonal": "diagonal",
    "global_quadratic": "full",
}


@key_first
def federate(
    key: PRNGKey,
    grid: Grid,
    kernel: Callable[[Gradient], Kernel],
    init: Position,
    *,
    clients: Sequence[str],
    num_visits: int,
    num_chains: int,
    local_steps: int,
    thin: int = 1,
    probabilities: Sequence[float] | None = None,
    surrogate: str = "auto",
    surrogate_period: int | None = None,
    curvature: str = "hessian",
    strength: float = 1.0,
    control_variate: bool = True,
    max_rounds: int = 100,
    timeout: float = 600.0,
    poll: float = 0.2,
    most_failures: int = 20,
    deadline: float = 3600.0,
    most_refusals: int = 5,
    most_move: float = 10.0,
    most_rows: int | Mapping[str, int] | None = None,
    on_absent: str = "stop",
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
    failures or ``deadline`` seconds the run stops, or goes on with the client's surrogate in place
    of its data. The draws do not depend on how often visits failed.

    Answers that no honest client gives are refused: slopes that do not go with values of the log
    likelihood, states farther away than a visit leads, more rows than are allowed. A client that
    lies as if it had other data cannot be told from one that has them.

    With ``surrogate="auto"`` visits that are still too long, or run away, are warned of
    (``stochgrad.federated.StabilityWarning``) before the run. With ``"global_first_order"`` those
    that are too long for what some clients alone inform, from slopes and numbers of rows; with
    ``"global_quadratic"``, in up to a hundred dimensions, visits that run away, from the clients'
    Hessians at the reference and at two points far from it.

    Args:
        key: A typed PRNG key.
        grid: What Flower gives the server, or a ``stochgrad.flower.LoopbackGrid``.
        kernel: ``gradient -> kernel``.
        init: Where the search for the reference starts; a position of the model's shape.
        clients: Names of the clients to wait for: the ``name`` in the configuration of each node.
        num_visits: Visits of each chain.
        num_chains: Chains.
        local_steps: Steps of a visit; many, where a message takes seconds.
        thin: Steps per draw; a divisor of ``local_steps``.
        probabilities: As in ``stochgrad.federated.visiting``, in the order of ``clients``.
        surrogate: ``"auto"``, which chooses as ``stochgrad.federated.sample`` does, by curvatures
            that clients tell: of first order where standard deviations come out right, else
            with their Hessians, in full up to 100 dimensions and of low rank up to 500. Of first
            order, unseen, where clients count privacy or are more than a thousand, and with a
            warning where one declines. Or ``"global_first_order"``, ``"global_diagonal"`` or
            ``"global_quadratic"`` (full).
        surrogate_period: Visits of each chain after which all clients are asked for slopes anew,
            where each chain is, as in ``stochgrad.federated.sample``; the curvature stays. Chains
            wait for each other there. A client that is away then keeps its last slope, which is
            said. Not with ``on_absent="surrogate"``, nor where clients count privacy. By default
            slopes are those at the reference.
        curvature: ``"hessian"`` or ``"fisher"``, for the last two.
        strength: $\alpha$.
        control_variate: Whether clients center their minibatch gradients.
        max_rounds: The most rounds of the search for a reference; with 0, ``init`` is the
            reference, as it must be where clients count privacy.
        timeout: Seconds after which a message is given up.
        poll: Seconds between two looks for replies.
        most_failures: How often one visit may fail before the run stops. The pause before each
            attempt is twice that of the last, from ``poll`` to a minute.
        deadline: Seconds for all attempts at one visit, after which the run stops.
        most_refusals: How many replies of one client in a row may be refused, before it is visited
            no more.
        most_move: How far from the reference a visit may end, in standard deviations over
            $\frac32\sqrt d$: of the surrogates where they have curvature, else of the diffusion of
            a visit. Farther replies are refused. Infinite for no bound.
        most_rows: The most rows that a client may declare, one number or one for each by name.
        on_absent: What to do where a client fails for good or is refused too often: ``"stop"``,
            or ``"surrogate"``, which goes on with the client's surrogate in place of its data:
            nearly right with ``"global_quadratic"``, too wide with ``"global_first_order"``.
        checkpoint: A file for the state of the run, written whole after each visit.
        resume: Whether to go on from it, if it is there. Kernel, settings and clients must be those
            of before: clients are asked for their log likelihood and its slope at the reference,
            which must be the same up to rounding.

    Returns:
        Draws, with the ``client``, the number of ``visits`` and the ``bytes_up`` and ``bytes_down``
        of states and draws in ``stats``. ``attrs`` have ``setup_bytes_up`` and
        ``setup_bytes_down`` of the preparations, the kind of ``surrogate`` that was taken and, if
        curvatures were not looked at for it, the ``surrogate_reason``; the ``realized_shares`` of
        visits, and by client how many visits were lost (``lost_visits_of``) and replies refused
        (``refusals_of``),
        who left (``left_and_waited_for``), of whom there were two nodes (``second_nodes_of``) and
        who is ``gone``; who ``count_privacy``, and how many of their rows are clipped at the
        reference, under noise (``clipped_rows_of``). Refusals and what bears on the draws are in
        one warning at the end, the latter in the verdict too.

    Raises:
        TypeError: the key is not a typed PRNG key; an argument is of the wrong kind.
        ValueError: a number is out of range; a client declines what is asked, declares
            more rows than ``most_rows``, or sends slopes that are not those of its log likelihood;
            two nodes report the name of one client; the checkpoint is of another run: another
            kernel, other settings, or clients with other data.
        TimeoutError: a client is not there, or does not answer during the preparations.
        RuntimeError: a visit fails again and again, its client stays away, or its replies are
            refused, and ``on_absent`` is ``"stop"``.
        OSError: the checkpoint's directory is not there.
    """
    check_instance("grid", grid, Grid, "Flower's Grid or a stochgrad.flower.LoopbackGrid")
    check_callable("kernel", kernel, "a function gradient -> kernel")
    check_position(getattr(init, "position", init))
    check_key(key)
    clients = client_names(clients)
    num_visits = check_count("num_visits", num_visits)
    num_chains = check_count("num_chains", num_chains)
    local_steps, thin = check_count("local_steps", local_steps), check_count("thin", thin)
    if local_steps % thin:
        raise ValueError(f"local_steps must be a multiple of thin, got {local_steps} and {thin}.")
    shares = None if probabilities is None else visit_probabilities(probabilities, len(clients))
    check_choice("surrogate", surrogate, FORMS)
    check_choice("curvature", curvature, ("hessian", "fisher"))
    if surrogate == "auto" and curvature != "hessian":
        raise ValueError(
            f"curvature must be 'hessian' with surrogate='auto', got {curvature!r}: give "
            "surrogate='global_quadratic' or 'global_diagonal' with it."
        )
    strength = check_number("strength", strength, zero=True)
    control_variate = check_flag("control_variate", control_variate)
    max_rounds = check_count("max_rounds", max_rounds, least=0)
    timeout, poll = check_number("timeout", timeout), check_number("poll", poll, zero=True)
    most_failures = check_count("most_failures", most_failures, least=0)
    deadline = check_number("deadline", deadline)
    most_refusals = check_count("most_refusals", most_refusals, least=0)
    if most_move != np.inf:
        most_move = check_number("most_move", most_move)
    row_limits = check_most_rows(most_rows, clients)
    check_choice("on_absent", on_absent, ("stop", "surrogate"))
    period = renewal_period(surrogate_period, on_absent)
    resume = check_flag("resume", resume)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint, the file to resume from.")
    path = None if checkpoint is None else check_file_path("checkpoint", checkpoint)
    init = jax.tree.map(jnp.asarray, getattr(init, "position", init))
    position = position_shapes(init)
    example = kernel_without_data(kernel, position)
    state = state_shapes(example, position)
    settings = {
        "form": FORMS[surrogate],
        "curvature": curvature,
        "steps": local_steps,
        "thin": thin,
        "centered": control_variate,
        "strength": strength,
        "seed": int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2**31 - 1)),
        "kernel": digest_of(kernel_settings(example)),
    }
    identity = _identity(settings, example, position, clients, num_chains, shares)
    identity["surrogate_period"], anchors = period, None
    network = Network(grid, clients, timeout, poll)
    choice = Choice("none" if surrogate == "auto" else FORMS[surrogate], surrogate)
    if path is not None and path.exists():
        name, notes = f"checkpoint={str(path)!r}", load_run_notes(path)
        check_same_run(name, notes["run"], identity, resume)
        network.rows, network.gone = dict(notes["rows"]), dict(notes.get("gone", {}))
        choice = Choice(**notes["choice"])
        settings["form"] = choice.form
        network.barrier(starting=True)
        check_private(network.private, settings, max_rounds, period)
        likelihoods, chains, anchors = load_run(
            path, notes, position, state, choice.form, local_steps // thin, period
        )
        likelihoods = measure_again(name, network, position, likelihoods, curvature)
        chosen = _shares(network, shares)
    else:
        network.barrier(starting=True)
        check_rows(network.rows, row_limits)
        settings["form"] = choice.form
        check_private(network.private, settings, max_rounds, period)
        chosen = _shares(network, shares)
        if surrogate == "auto":
            likelihoods, choice = measure_and_choose(
                network, init, position, max_rounds, chosen, example, local_steps
            )
            settings["form"] = choice.form
        else:
            likelihoods = measure_likelihoods(network, init, position, settings, max_rounds)
        chains = [Chain(None, [], [], [0] * len(clients)) for _ in range(num_chains)]
        if period is not None:
            anchors = first_anchors(period, num_chains, likelihoods)
    save = None
    if path is not None:
        save = lambda *run: save_run(path, identity, network, likelihoods, choice, *run)
        if not path.exists():
            save(chains, anchors)
    by_rows, shares = shares is None, chosen
    told = [rows_reason(clients, shares, num_visits * num_chains)] if by_rows else []
    told += [f"Of the surrogates: {choice.reason}"] if choice.declined else []
    for message in choice.warnings:
        warnings.warn(message, StabilityWarning, stacklevel=2)
    if choice.form == "none" and not choice.looked and not network.private:
        slopes = likelihoods.slopes
        rows = np.array([network.rows[c] for c in clients])
        warn_of_own_effects(clients, slopes, shares, rows, example, local_steps)
    sent = likelihoods.setup_bytes - network.sent
    if not network.gone and not network.private and not choice.looked:
        warn_of_runaways(network, position, likelihoods, settings, shares, example)
    sent += network.sent
    limits = Limits(most_failures, deadline, most_refusals, on_absent)
    total, reference = likelihoods.total, likelihoods.reference
    reach = reach_of_visits(
        reference, total["precision"], total["slope"], example, local_steps, most_move
    )
    run = (network, settings, likelihoods, shares, position, state, limits, reach, save, anchors)
    visits = Visits(*run)
    chains = visits.run(chains, jax.random.fold_in(key, 2), num_visits)
    draws = visits.as_draws(chains, num_visits, sent)
    kind = {"surrogate": choice.surrogate}
    kind |= {"surrogate_reason": choice.reason} if choice.reason else {}
    draws = replace(draws, attrs={**draws.attrs, **kind})
    told += [clipped_reason(network), visits.anchors and visits.anchors.reason()]
    told = [reason for reason in told if reason is not None]
    if network.private:
        words = [f"{c}: {n:.0f} +- {sd:.0f}" for c, (n, sd) in sorted(network.clipped.items())]
        private = {"count_privacy": sorted(network.private), "clipped_rows_of": words}
        draws = replace(draws, attrs={**draws.attrs, **private})
    return with_fault_notes(draws, clients, shares, visits.faults(), told)


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
        finish(federate(grid=grid, **arguments), context)

    return app


def _identity(
    settings: dict[str, Any],
    kernel: Kernel,
    position: PyTree,
    clients: list[str],
    num_chains: int,
    probabilities: np.ndarray | None,
) -> dict[str, Any]:
    """All that decides a run's draws, for its checkpoint."""
    return {
        **{name: value for name, value in settings.items() if name != "kernel"},
        **{f"kernel's {name}": value for name, value in kernel_settings(kernel).items()},
        "kernel's program": program_digest(kernel, position),
        "position": [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(position)],
        "clients": clients,
        "num_chains": num_chains,
        "probabilities": None if probabilities is None else probabilities.tolist(),
    }


def _shares(network: Network, probabilities: np.ndarray | None) -> np.ndarray:
    """The clients' shares of visits: as given, or by their rows."""
    rows = np.array([network.rows[c] for c in network.clients])
    return rows / rows.sum() if probabilities is None else probabilities
