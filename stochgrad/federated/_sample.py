"""Sampling from the posterior of data that stay with their owners, in one call."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad import sgmcmc
from stochgrad.core import (
    Draws,
    Gradient,
    Kernel,
    Order,
    Position,
    Posterior,
    PRNGKey,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_key,
    check_number,
    first_line,
    tree_bytes,
)
from stochgrad.core import sample as run
from stochgrad.federated._arguments import (
    RIVALS,
    as_position,
    check_method,
    check_options,
    check_period,
    check_surrogate_choice,
    make_surrogates,
    make_target,
    start_position,
)
from stochgrad.federated._between_clients import with_visit_notes
from stochgrad.federated._checks import as_reference
from stochgrad.federated._client_sums import for_each_client, likelihood_sum
from stochgrad.federated._clients import require_clients
from stochgrad.federated._conducive import conducive
from stochgrad.federated._conducive_svrg import check_equal_visits, conducive_svrg
from stochgrad.federated._costs import CLIENT_DATA, carried_bytes, look_bytes, with_communication
from stochgrad.federated._fald import fald, fald_costs
from stochgrad.federated._gaussians import Surrogates
from stochgrad.federated._precautions import check_on_unsafe, enforce_stability
from stochgrad.federated._qlsd import qlsd, qlsd_costs
from stochgrad.federated._reference import Reference, find_reference
from stochgrad.federated._schedule import Selection, visiting
from stochgrad.federated._surrogates import global_first_order
from stochgrad.federated._trajectory import check_trajectory, first_run, round_bytes
from stochgrad.federated._visits import with_visits
from stochgrad.gradients import as_gradient
from stochgrad.gradients import control_variate as control_variate_gradient

METHODS = ("FSGLD", "DSGLD", *RIVALS)


def sample(
    key: PRNGKey,
    clients: Posterior | Sequence[Any],
    *,
    prior: Callable[[Position], Any] | None = None,
    likelihood: Callable[[Position, Any], Any] | None = None,
    batch_size: int | None = None,
    order: Order | None = None,
    method: str = "FSGLD",
    surrogate: str | Surrogates | Callable[..., Surrogates] = "auto",
    surrogate_period: int | None = None,
    strength: float = 1.0,
    local_steps: int | Sequence[int] = 1,
    probabilities: Sequence[float] | None = None,
    selection: Selection = "random",
    step_size: float | None = None,
    kernel: Callable[[Gradient], Kernel] | None = None,
    control_variate: bool = True,
    reference: Position | Reference | str | None = None,
    init: Position | None = None,
    on_unsafe: str = "warn",
    **options: Any,
) -> Draws:
    r"""Sample a posterior whose data several clients own, visiting one after the other.

    A reference near the mode is found in rounds over all clients, each client's likelihood is
    approximated there, and chains then go from client to client, staying for ``local_steps`` steps:

    $$\hat g(\theta) = \nabla\log p(\theta) + \frac{1}{f_s}\widehat{\nabla\log p}(x_s\mid\theta) +
      \sum_t\nabla\log q_t(\theta) - \frac{1}{f_s}\nabla\log q_s(\theta).$$

    Everything is simulated in one process and one compiled program, many chains at once;
    ``stochgrad.flower`` does the same over a network.

    Args:
        key: A typed PRNG key.
        clients: The data of each client, as in ``stochgrad.federated.posterior``; or a posterior
            of such data, as ``stochgrad.from_numpyro(model, clients=[...])`` makes it.
        prior: ``position -> scalar``, the log density of the prior.
        likelihood: ``(position, batch) -> (rows,)``, the log likelihood of each row.
        batch_size: Rows of a minibatch.
        order: As in ``stochgrad.federated.posterior``.
        method: ``"FSGLD"``; ``"DSGLD"``, the same without conducive gradients; or a rival that all
            clients take part in at each step: ``"FALD"``, ``"VR-FALD*"`` (averages every
            ``local_steps`` steps; ``stochgrad.federated.fald``) and ``"QLSD++"``
            (``stochgrad.federated.qlsd``).
        surrogate: How likelihoods are approximated: ``"auto"``, of first order where standard
            deviations come out right by the law of Langevin dynamics between the clients, and with
            the clients' curvature where they would not; ``"global_first_order"``,
            ``"global_quadratic"``, ``"global_diagonal"``, ``"exact"``, ``"laplace_local"``,
            ``"sampled"``; surrogates; or a function ``(posterior, reference) -> surrogates``, as
            ``functools.partial(stochgrad.federated.global_quadratic, form="low_rank", rank=5)``.
        surrogate_period: Visits after which slopes are taken anew, where each chain is
            (``stochgrad.federated.conducive_svrg``); curvature stays. A renewal is a round over all
            clients for each chain. By default never: slopes are those at the reference.
        strength: $\alpha$ of ``stochgrad.federated.conducive``.
        local_steps: Steps of a visit, as in ``stochgrad.federated.visiting``.
        probabilities: Likewise.
        selection: Likewise.
        step_size: h of Langevin dynamics. For other dynamics give the kernel.
        kernel: ``gradient -> kernel``, as ``lambda g: stochgrad.sghmc(g, 0.1, friction=2.0)``. The
            momentum travels with the chain.
        control_variate: Whether clients center their minibatch gradients at the reference, which
            costs them a second gradient and nothing in communication.
        reference: A position near the mode; found by default, from ``init``. Or ``"trajectory"``:
            the mean of a first run of ``num_warmup`` draws of each chain from the mode, without
            their first half, for posteriors whose draws are far from it; the chains go on from
            where it ended, unless there is an ``init``. A resumed run makes the first one anew.
        init: Where to start: a position, or one for each chain. By default the reference.
        on_unsafe: What to do where long visits to a client would be unstable
            (``stochgrad.federated.stability``), as a surrogate's curvature can make them, or a
            likelihood that is not log-concave; or where standard deviations would be off by more
            than a tenth: ``"warn"``, ``"cap"`` (shrink a surrogate's curvature, and warn),
            ``"raise"`` or ``"ignore"``.
        **options: ``num_samples``, ``num_warmup``, ``thin``, ``num_chains`` and all others of
            ``stochgrad.sample``. A checkpoint or a store is refused where kernel, settings or any
            client's log likelihood are others.

    Returns:
        Draws, whose ``stats`` have the ``client`` visited, the number of ``visits`` and the
        ``bytes_up`` and ``bytes_down`` of each chain until then (with ``surrogate_period`` the
        ``renewals``, too), and whose ``attrs`` have those of the preparations, a first run
        included, ``setup_bytes_up`` and ``setup_bytes_down``, the ``surrogate`` that was
        chosen and the ``realized_shares`` of the draws. Where draws at one client are others than
        elsewhere, or a client was never seen, ``verdict`` says so, and a ``StabilityWarning``.

    Raises:
        TypeError: the key is not a typed PRNG key; the posterior's data are not federated; an
            argument is of another kind than said.
        ValueError: an argument is missing, out of range or unknown; a client has no data, or data
            of another structure; probabilities do not sum to one; a surrogate is unsafe and
            ``on_unsafe="raise"``.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> draws = stochgrad.federated.sample(
        ...     jax.random.key(0),
        ...     [jnp.zeros(30), jnp.ones(70)],
        ...     prior=lambda mean: -0.5 * mean**2,
        ...     likelihood=lambda mean, x: -0.5 * (x - mean) ** 2,
        ...     batch_size=10,
        ...     local_steps=50,
        ...     step_size=0.002,
        ...     init=jnp.float32(0.0),
        ...     num_samples=100,
        ...     thin=50,
        ... )
        >>> draws.stats["visits"].shape
        (1, 100)
    """
    check_key(key)
    check_on_unsafe(on_unsafe)
    check_choice("method", method, METHODS)
    check_choice("selection", selection, ("random", "permuted"))
    if (step_size is None) == (kernel is None):
        raise ValueError("give either step_size, for Langevin dynamics, or a kernel.")
    if step_size is not None:
        step_size = check_number("step_size", step_size)
    else:
        check_callable("kernel", kernel, "a function gradient -> kernel")
    strength = check_number("strength", strength, zero=True)
    control_variate = check_flag("control_variate", control_variate)
    check_surrogate_choice(surrogate)
    check_options(options)
    check_method(method, surrogate, strength, probabilities, selection, kernel, local_steps)
    num_chains = check_count("num_chains", options.get("num_chains", 1))
    surrogate_period = check_period(surrogate_period, method, surrogate)
    first_draws = 0
    if isinstance(reference, str):
        check_choice("reference", reference, ("trajectory",))
        first_draws, reference = check_trajectory(options, method), None
    target = make_target(clients, prior, likelihood, batch_size, order)
    setup_key, key = jax.random.split(key)
    position = start_position(target, init, reference, num_chains, setup_key)
    if reference is not None:
        at = as_reference(target, reference)
        reference = reference if isinstance(reference, Reference) else at
    setup = np.zeros(2, np.int64)

    if method in RIVALS:
        assert step_size is not None
        if reference is None and init is None:
            reference = find_reference(target, position)
        if isinstance(reference, Reference):
            setup += (reference.bytes_up, reference.bytes_down)
        position = position if reference is None else as_position(reference)
        made, costs = _rival(method, target, step_size, local_steps, position)
        made = _identified(made, target, position, options)
        draws = run(key, made, init=position if init is None else init, **options)
        return with_communication(draws, costs, 0, setup)

    target = visiting(
        target, local_steps=local_steps, probabilities=probabilities, selection=selection
    )
    federation = require_clients(target)
    if surrogate_period is not None:
        check_equal_visits(federation)
    make_kernel = kernel or (lambda gradient: sgmcmc.sgld(gradient, step_size or 0.0))
    if method == "FSGLD" or control_variate:
        if reference is None:
            reference = find_reference(target, position)
        if isinstance(reference, Reference):
            setup += (reference.bytes_up, reference.bytes_down)
        position = as_position(reference)
    if first_draws:
        first = global_first_order(target, position)
        gradient = conducive(_centered(target, position, control_variate), first, strength=strength)
        made = with_visits(_made(make_kernel, gradient))
        found = first_run(
            jax.random.fold_in(setup_key, 1),
            made,
            position if init is None else init,
            first_draws,
            carried_bytes(made, position),
            options,
        )
        # slopes at the mode and their sum, the first run, and the mean to all
        each = round_bytes(position, federation.count)
        setup += found.bytes + np.array([each, 2 * each])
        position, init = found.mean, found.last if init is None else init
    client_gradient: Posterior | Gradient = target
    if surrogate_period is None:
        client_gradient = _centered(target, position, control_variate)
    gradient = client_gradient
    name = surrogate if isinstance(surrogate, str) else "given"
    if method == "FSGLD":
        surrogates, chosen = enforce_stability(
            target,
            make_surrogates(surrogate, setup_key, target, position),
            on_unsafe,
            _made(make_kernel, client_gradient),
            choose=name == "auto",
            period=surrogate_period,
        )
        if name == "auto":
            name = chosen
            setup[0] += look_bytes(target, position, chosen)
        # each client sends its own, and is sent the sum
        sent = federation.count * surrogates.bytes_each
        setup += (sent, sent)
        if surrogate_period is None:
            gradient = conducive(client_gradient, surrogates, strength=strength)
        else:
            gradient = conducive_svrg(
                target,
                surrogates,
                period=surrogate_period,
                strength=strength,
                control_variate=control_variate,
            )
    made = _made(make_kernel, gradient)
    carried = carried_bytes(made, position)
    settings = (
        ("surrogate", name),
        ("strength", strength),
        ("local_steps", federation.steps.tolist()),
        ("shares", federation.shares.round(6).tolist()),
        ("control_variate", control_variate),
    )
    if surrogate_period is not None:
        settings = (*settings, ("surrogate_period", surrogate_period))
    if first_draws:
        settings = (*settings, ("reference", "trajectory"))
    made = made._replace(
        method=f"{method}, {made.method}",
        settings=made.settings + settings[0 if method == "FSGLD" else 2 :],
    )
    made = _identified(with_visits(made), target, position, options)
    draws = run(key, made, init=position if init is None else init, **options)
    costs = {"visits": (carried, carried)}
    if surrogate_period is not None:
        renewals = (np.maximum(draws.stats["visits"], 1) - 1) // surrogate_period
        draws = replace(draws, stats={**draws.stats, "renewals": renewals})
        each = round_bytes(position, federation.count)
        # a visit is sent the anchor and the sum of slopes as well
        costs = {"visits": (carried, carried + 2 * tree_bytes(position)), "renewals": (each, each)}
    draws = with_communication(draws, costs, tree_bytes(position), setup)
    return _compared(draws, target)


def _centered(target: Posterior, position: Position, centered: bool) -> Posterior | Gradient:
    """The posterior, or its gradient centered at a position."""
    return control_variate_gradient(target, position) if centered else target


def _compared(draws: Draws, target: Posterior) -> Draws:
    """The draws, with notes and a warning where they depend on the client that is visited."""
    clients = require_clients(target)
    random = clients.probabilities is not None and np.ptp(clients.steps) == 0
    names = [f"client {s}" for s in range(clients.count)]
    return with_visit_notes(draws, clients.shares, names, random=random, stacklevel=4)


def _made(kernel: Callable[[Gradient], Kernel], gradient: Posterior | Gradient) -> Kernel:
    try:
        made = kernel(as_gradient(gradient))
    except Exception as error:
        raise ValueError(f"kernel fails on a gradient: {first_line(error)}.") from error
    return check_instance(
        "kernel",
        made,
        Kernel,
        "a function from a gradient to a kernel, as lambda gradient: stochgrad.sgld(gradient, "
        "1e-3); what it returned must be a Kernel",
    )


def _identified(
    kernel: Kernel, target: Posterior, position: Position, options: dict[str, Any]
) -> Kernel:
    """The kernel of a run that is written to disk, which a client's data are told by as well.

    A digest is of the client's log likelihood and its gradient, on all of its rows, at two points.
    """
    if options.get("checkpoint") is None and options.get("store") is None:
        return kernel
    score = likelihood_sum(target, jax.value_and_grad(target.log_density))
    moved = jax.tree.map(lambda x: x + jnp.ones_like(x), position)
    both = for_each_client(target, lambda s: (score(s, position), score(s, moved)))
    leaves = [np.asarray(x) for x in jax.tree.leaves(both)]
    digests = [
        (
            f"{CLIENT_DATA} {s}",
            hashlib.sha256(b"".join(x[s].tobytes() for x in leaves)).hexdigest()[:16],
        )
        for s in range(require_clients(target).count)
    ]
    return kernel._replace(settings=(*kernel.settings, *digests))


def _rival(method, target, step_size, local_steps, position) -> tuple[Kernel, dict]:
    """A kernel that all clients take part in, and its costs by what it counts."""
    if method == "QLSD++":
        made = qlsd(target, step_size)
        return made, qlsd_costs(target, position, dict(made.settings)["levels"])
    reduced = method == "VR-FALD*"
    made = fald(target, step_size, local_steps=local_steps, variance_reduced=reduced)
    return made, fald_costs(target, position)
