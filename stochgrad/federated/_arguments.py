"""The arguments of ``stochgrad.federated.sample``: what is refused, and what is made of them."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochgrad.core import (
    Position,
    Posterior,
    PRNGKey,
    check_callable,
    check_choice,
    check_count,
    check_position,
    describe,
    first_line,
)
from stochgrad.core import sample as run
from stochgrad.federated._checks import as_reference, check_surrogates, misfit
from stochgrad.federated._clients import require_clients
from stochgrad.federated._gaussians import Surrogates
from stochgrad.federated._posterior import posterior
from stochgrad.federated._surrogates import (
    exact,
    global_first_order,
    global_quadratic,
    laplace_local,
    sampled,
)

SURROGATES: dict[str, Callable[[PRNGKey, Posterior, Any], Surrogates]] = {
    "auto": lambda key, target, at: global_first_order(target, at),
    "global_first_order": lambda key, target, at: global_first_order(target, at),
    "global_quadratic": lambda key, target, at: global_quadratic(target, at),
    "global_diagonal": lambda key, target, at: global_quadratic(target, at, form="diagonal"),
    "exact": lambda key, target, at: exact(target, at),
    "laplace_local": lambda key, target, at: laplace_local(target, at),
    "sampled": lambda key, target, at: sampled(key, target, at),
}
RIVALS = ("FALD", "VR-FALD*", "QLSD++")


def check_surrogate_choice(surrogate: Any) -> None:
    """Raise unless surrogates are named, given, or made by a function."""
    if isinstance(surrogate, str):
        check_choice("surrogate", surrogate, SURROGATES)
    elif isinstance(surrogate, type) or not (
        isinstance(surrogate, Surrogates) or callable(surrogate)
    ):
        raise TypeError(
            f"surrogate must be one of {list(SURROGATES)}, surrogates or a function (posterior, "
            f"reference) -> surrogates, got {describe(surrogate)}."
        )


def check_options(options: dict[str, Any]) -> None:
    """Raise a TypeError unless all are options of ``stochgrad.sample``, and none is missing."""
    known = inspect.signature(run).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"{name} is no argument of federated.sample nor of stochgrad.sample.")
    if "num_samples" not in options:
        raise TypeError("num_samples is needed: the draws to keep, per chain.")


def check_method(
    method: str, surrogate, strength, probabilities, selection, kernel, local_steps
) -> None:
    """Raise a ValueError where something is given that a method would not heed."""
    if method not in RIVALS:
        return
    default = isinstance(surrogate, str) and surrogate == "auto"
    if not default or strength != 1.0:
        raise ValueError(f"surrogate and strength are for method='FSGLD', not {method!r}.")
    if kernel is not None:
        raise ValueError(f"{method} defines its own dynamics: give step_size instead of kernel.")
    if probabilities is not None or selection != "random":
        raise ValueError(
            f"all clients take part in each step of {method}: leave probabilities and selection "
            "out."
        )
    if np.ndim(local_steps) > 0:
        raise ValueError(f"{method} takes one number of local_steps for all clients.")
    if check_count("local_steps", local_steps) != 1 and method == "QLSD++":
        raise ValueError("QLSD++ communicates at every step: leave local_steps at 1.")


def check_period(period: Any, method: str, surrogate: Any) -> int | None:
    """The visits between two renewals of slopes, or None; an error where there are no renewals."""
    if period is None:
        return None
    if method != "FSGLD":
        raise ValueError(f"surrogate_period is for method='FSGLD', not {method!r}: leave it out.")
    if isinstance(surrogate, str) and surrogate in ("laplace_local", "sampled"):
        raise ValueError(
            f"surrogate_period takes slopes where chains are, and surrogate={surrogate!r} takes "
            "them elsewhere: take 'auto', 'global_first_order' or 'global_quadratic'."
        )
    return check_count("surrogate_period", period)


def make_target(clients, prior, likelihood, batch_size, order) -> Posterior:
    """The posterior that is given, or of the data that are."""
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


def start_position(
    target: Posterior, init: Any, reference: Any, num_chains: int, key: PRNGKey
) -> Position:
    """A position of the model's shape, to begin the setup at."""
    init = getattr(init, "position", init)
    if init is not None and not callable(init):
        check_position(init)
        several = {jnp.shape(x)[:1] for x in jax.tree.leaves(init)} == {(num_chains,)}
        first = jax.tree.map(lambda x: jnp.asarray(x)[0], init) if several else None
        if several and misfit(target, as_position(init)) and not misfit(target, first):
            return first
        return as_reference(target, init, "init")
    if reference is not None:
        return as_reference(target, reference)
    if target.initial is None:
        raise ValueError("init is needed: a position to start the search for a reference from.")
    return target.initial(key)


def as_position(given: Any) -> Position:
    """A position, or what has one, as arrays."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(x)), getattr(given, "position", given)
    )


def make_surrogates(surrogate, key, target: Posterior, reference: Position) -> Surrogates:
    """Surrogates of a name, of a function, or as they are, if they are of these clients."""
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
