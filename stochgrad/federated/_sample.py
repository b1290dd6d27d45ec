"""Sampling from the posterior of data that stay with their owners, in one call."""

import hashlib
import inspect
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
    check_position,
    describe,
    first_line,
    tree_bytes,
)
from stochgrad.core import sample as run
from stochgrad.federated._checks import as_reference, check_surrogates, misfit
from stochgrad.federated._client_sums import for_each_client, likelihood_sum
from stochgrad.federated._clients import require_clients
from stochgrad.federated._conducive import conducive
from stochgrad.federated._fald import fald, fald_costs
from stochgrad.federated._gaussians import Surrogates
from stochgrad.federated._posterior import posterior
from stochgrad.federated._qlsd import qlsd, qlsd_costs
from stochgrad.federated._reference import Reference, find_reference
from stochgrad.federated._schedule import Selection, visiting
from stochgrad.federated._stability import check_on_unsafe, enforce_stability
from stochgrad.federated._surrogates import (
    exact,
    global_first_order,
    global_quadratic,
    laplace_local,
    sampled,
)
from stochgrad.federated._visits import with_visits
from stochgrad.gradients import as_gradient
from stochgrad.gradients import control_variate as control_variate_gradient
from stochgrad.integrators import integrator_of

SURROGATES: dict[str, Callable[[PRNGKey, Posterior, Any], Surrogates]] = {
    "global_first_order": lambda key, target, at: global_first_order(target, at),
    "global_quadratic": lambda key, target, at: global_quadratic(target, at),
    "global_diagonal": lambda key, target, at: global_quadratic(target, at, form="diagonal"),
    "exact": lambda key, target, at: exact(target, at),
    "laplace_local": lambda key, target, at: laplace_local(target, at),
    "sampled": lambda key, target, at: sampled(target, key, at),
}
RIVALS = ("FALD", "VR-FALD*", "QLSD++")
METHODS = ("FSGLD", "DSGLD", *RIVALS)
_DATA = "data of client"


def sample(
    key: PRNGKey,
    clients: Posterior | Sequence[Any],
    *,
    prior: Callable[[Position], Any] | None = None,
    likelihood: Callable[[Position, Any], Any] | None = None,
    batch_size: int | None = None,
    order: Order | None = None,
    method: str = "FSGLD",
    surrogate: str | Surrogates | Callable[..., Surrogates] = "global_first_order",
    strength: float = 1.0,
    local_steps: int | Sequence[int] = 1,
    probabilities: Sequence[float] | None = None,
    selection: Selection = "random",
    step_size: float | None = None,
    kernel: Callable[[Gradient], Kernel] | None = None,
    control_variate: bool = True,
    reference: Position | Reference | None = None,
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
        surrogate: How likelihoods are approximated: ``"global_first_order"``,
            ``"global_quadratic"``, ``"global_diagonal"``, ``"exact"``, ``"laplace_local"``,
            ``"sampled"``; surrogates; or a function ``(posterior, reference) -> surrogates``, as
            ``functools.partial(stochgrad.federated.global_quadratic, form="low_rank", rank=5)``.
        strength: $\alpha$ of ``stochgrad.federated.conducive``.
        local_steps: Steps of a visit, as in ``stochgrad.federated.visiting``.
        probabilities: Likewise.
        selection: Likewise.
        step_size: h of Langevin dynamics. For other dynamics give the kernel.
        kernel: ``gradient -> kernel``, as ``lambda g: stochgrad.sghmc(g, 0.1, friction=2.0)``. The
            momentum travels with the chain.
        control_variate: Whether clients center their minibatch gradients at the reference, which
            costs them a second gradient and nothing in communication.
        reference: A position near the mode; found by default, from ``init``.
        init: Where to start: a position, or one for each chain. By default the reference.
        on_unsafe: What to do where long visits to a client would be unstable
            (``stochgrad.federated.stability``), as a surrogate's curvature can make them, or a
            likelihood that is not log-concave; or where standard deviations would be off by more
            than a tenth, as those of effects that one client alone informs are with surrogates of
            first order: ``"warn"``, ``"cap"`` (shrink a surrogate's curvature, and warn),
            ``"raise"`` or ``"ignore"``.
        **options: ``num_samples``, ``num_warmup``, ``thin``, ``num_chains`` and all others of
            ``stochgrad.sample``. A checkpoint or a store is refused where kernel, settings or any
            client's log likelihood are others.

    Returns:
        Draws, whose ``stats`` have the ``client`` visited, the number of ``visits`` and the
        ``bytes_up`` and ``bytes_down`` of each chain until then, and whose ``attrs`` have those of
        the preparations, ``setup_bytes_up`` and ``setup_bytes_down``.

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
    _check_surrogate(surrogate)
    _check_options(options)
    _check_method(method, surrogate, strength, probabilities, selection, kernel, local_steps)
    num_chains = check_count("num_chains", options.get("num_chains", 1))
    target = _target(clients, prior, likelihood, batch_size, order)
    setup_key, key = jax.random.split(key)
    position = _start(target, init, reference, num_chains, setup_key)
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
        position = position if reference is None else _as_position(reference)
        made, costs = _rival(method, target, step_size, local_steps, position)
        made = _identified(made, target, position, options)
        draws = run(key, made, init=position if init is None else init, **options)
        return _communication(draws, costs, 0, setup)

    target = visiting(
        target, local_steps=local_steps, probabilities=probabilities, selection=selection
    )
    gradient: Posterior | Gradient = target
    if method == "FSGLD" or control_variate:
        if reference is None:
            reference = find_reference(target, position)
        if isinstance(reference, Reference):
            setup += (reference.bytes_up, reference.bytes_down)
        position = _as_position(reference)
    client_gradient = gradient
    if control_variate:
        client_gradient = control_variate_gradient(target, position)
    make_kernel = kernel or (lambda gradient: sgmcmc.sgld(gradient, step_size or 0.0))
    gradient = client_gradient
    if method == "FSGLD":
        surrogates = _surrogates(surrogate, setup_key, target, position)
        surrogates = enforce_stability(
            target,
            surrogates,
            on_unsafe,
            _made(make_kernel, client_gradient),
            curvature_known=surrogate in ("exact", "global_quadratic")
            if isinstance(surrogate, str)
            else False,
        )
        # each client sends its own, and is sent the sum
        sent = require_clients(target).count * surrogates.bytes_each
        setup += (sent, sent)
        gradient = conducive(client_gradient, surrogates, strength=strength)
    made = _made(make_kernel, gradient)
    carried = _carried_bytes(made, position)
    settings = (
        ("surrogate", surrogate if isinstance(surrogate, str) else "given"),
        ("strength", strength),
        ("local_steps", require_clients(target).steps.tolist()),
        ("shares", require_clients(target).shares.round(6).tolist()),
        ("control_variate", control_variate),
    )
    made = made._replace(
        method=f"{method}, {made.method}",
        settings=made.settings + settings[0 if method == "FSGLD" else 2 :],
    )
    made = _identified(with_visits(made), target, position, options)
    draws = run(key, made, init=position if init is None else init, **options)
    costs = {"visits": (carried, carried)}
    return _communication(draws, costs, tree_bytes(position), setup)


def _check_surrogate(surrogate: Any) -> None:
    if isinstance(surrogate, str):
        check_choice("surrogate", surrogate, SURROGATES)
    elif isinstance(surrogate, type) or not (
        isinstance(surrogate, Surrogates) or callable(surrogate)
    ):
        raise TypeError(
            f"surrogate must be one of {list(SURROGATES)}, surrogates or a function (posterior, "
            f"reference) -> surrogates, got {describe(surrogate)}."
        )


def _check_options(options: dict[str, Any]) -> None:
    known = inspect.signature(run).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"{name} is no argument of federated.sample nor of stochgrad.sample.")
    if "num_samples" not in options:
        raise TypeError("num_samples is needed: the draws to keep, per chain.")


def _check_method(
    method: str, surrogate, strength, probabilities, selection, kernel, local_steps
) -> None:
    """Raise a ValueError where something is given that a method would not defer."""
    if method not in RIVALS:
        return
    first_order = isinstance(surrogate, str) and surrogate == "global_first_order"
    if not first_order or strength != 1.0:
        raise ValueError(f"surrogate and strength are for method='FSGLD', not {method!r}.")
    if kernel is not None:
        raise ValueError(f"{method} has a dynamics of its own: give step_size instead of kernel.")
    if probabilities is not None or selection != "random":
        raise ValueError(
            f"all clients take part in each step of {method}: leave probabilities and selection "
            "out."
        )
    if np.ndim(local_steps) > 0:
        raise ValueError(f"{method} takes one number of local_steps for all clients.")
    if check_count("local_steps", local_steps) != 1 and method == "QLSD++":
        raise ValueError("QLSD++ communicates at every step: leave local_steps at 1.")


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
        (f"{_DATA} {s}", hashlib.sha256(b"".join(x[s].tobytes() for x in leaves)).hexdigest()[:16])
        for s in range(require_clients(target).count)
    ]
    return kernel._replace(settings=(*kernel.settings, *digests))


def _target(clients, prior, likelihood, batch_size, order) -> Posterior:
    if isinstance(clients, Posterior):
        given = {"prior": prior, "likelihood": likelihood, "batch_size": batch_size, "order": order}
        needless = [name for name, value in given.items() if value is not None]
        if needless:
            raise ValueError(f"the posterior has its own {', '.join(needless)}: leave it out.")
        require_clients(clients)
        return clients
    if prior is None or likelihood is None:
        raise ValueError(
            "prior and likelihood are needed with the clients' data; for a numpyro model, pass "
            "stochgrad.from_numpyro(model, clients=[...])."
        )
    check_callable("prior", prior, "a function position -> scalar")
    check_callable("likelihood", likelihood, "a function (position, batch) -> (rows,)")
    order = "reshuffled" if order is None else order
    return posterior(prior, likelihood, clients, batch_size=batch_size, order=order)


def _start(target: Posterior, init: Any, reference: Any, num_chains: int, key: PRNGKey) -> Position:
    """A position of the model's shape, to begin the setup at."""
    init = getattr(init, "position", init)
    if init is not None and not callable(init):
        check_position(init)
        several = {jnp.shape(x)[:1] for x in jax.tree.leaves(init)} == {(num_chains,)}
        first = jax.tree.map(lambda x: jnp.asarray(x)[0], init) if several else None
        if several and misfit(target, _as_position(init)) and not misfit(target, first):
            return first
        return as_reference(target, init, "init")
    if reference is not None:
        return as_reference(target, reference)
    if target.initial is None:
        raise ValueError("init is needed: a position to start the search for a reference from.")
    return target.initial(key)


def _as_position(given: Any) -> Position:
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(x)), getattr(given, "position", given)
    )


def _surrogates(surrogate, key, target: Posterior, reference: Position) -> Surrogates:
    if isinstance(surrogate, str):
        return SURROGATES[surrogate](key, target, reference)
    made = surrogate
    if not isinstance(surrogate, Surrogates):
        try:
            made = surrogate(target, reference)
        except Exception as error:
            raise ValueError(f"surrogate fails on the posterior: {first_line(error)}.") from error
    check_surrogates(target, made)
    if jax.tree.map(jnp.shape, made.origin) != jax.tree.map(jnp.shape, reference):
        raise ValueError(
            f"surrogates are of positions of shape {jax.tree.map(jnp.shape, made.origin)}, and the "
            f"model's have {jax.tree.map(jnp.shape, reference)}."
        )
    return made


def _rival(method, target, step_size, local_steps, position) -> tuple[Kernel, dict]:
    """A kernel that all clients take part in, and its costs by what it counts."""
    if method == "QLSD++":
        made = qlsd(target, step_size)
        return made, qlsd_costs(target, position, dict(made.settings)["levels"])
    reduced = method == "VR-FALD*"
    made = fald(target, step_size, local_steps=local_steps, variance_reduced=reduced)
    return made, fald_costs(target, position)


def _carried_bytes(kernel: Kernel, position: Position) -> int:
    """Bytes of what a chain carries from client to client."""
    state = jax.eval_shape(kernel.init, position, jax.random.key(0))
    integrator = dict(kernel.settings).get("integrator")
    keeps = integrator is not None and integrator_of(integrator).keeps_gradient
    return tree_bytes(position) * (1 + hasattr(state, "momentum") + keeps)


def _communication(draws: Draws, costs: dict, draw_bytes: int, setup: np.ndarray) -> Draws:
    """The draws, with what was sent until each of them.

    A draw within a visit is sent as well; one at its end is what the visit sends anyway.
    """
    sent: dict[str, Any] = {"bytes_up": 0, "bytes_down": 0}
    for name, (up, down) in costs.items():
        count = draws.stats[name].astype(np.int64)
        sent["bytes_up"] = sent["bytes_up"] + up * count
        sent["bytes_down"] = sent["bytes_down"] + down * count
    if "left" in draws.stats:
        inside = np.cumsum(draws.stats["left"] > 0, axis=1)
        sent["bytes_up"] = sent["bytes_up"] + draw_bytes * inside
    attrs = {"setup_bytes_up": int(setup[0]), "setup_bytes_down": int(setup[1])}
    known = {name: value for name, value in draws.attrs.items() if not name.startswith(_DATA)}
    return replace(draws, stats={**draws.stats, **sent}, attrs={**known, **attrs})
