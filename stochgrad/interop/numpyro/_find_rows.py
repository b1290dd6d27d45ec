"""How many rows a numpyro model has, and which of its arguments have them."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import jax
import numpy as np
from numpyro.primitives import Messenger

from stochgrad.core import describe
from stochgrad.interop.numpyro._arguments import Arguments, names_of
from stochgrad.interop.numpyro._inspect import Summary
from stochgrad.interop.numpyro._row_arguments import RowArguments

NUTS = (
    "take all rows instead: numpyro.infer.NUTS, stochgrad.infer(..., method='nuts'), or "
    "order='full'"
)


def check_no_stream(streamed: Any) -> None:
    """Raise where the data of a model without a subsampled plate are streamed."""
    if streamed is not None:
        raise ValueError(
            "order='streamed' needs a plate with a subsample_size that reads its data with "
            "numpyro.subsample: the model has no subsampled plate."
        )


def check_no_rows(names: Any) -> None:
    """Raise where rows are named and no arguments become minibatches."""
    if names is not None:
        raise ValueError(
            "rows names arguments that become minibatches, for a model without a subsampled plate "
            "and with a batch_size below its rows: leave rows out."
        )


def check_subsampled(arguments: Arguments, summary: Summary) -> None:
    """Raise unless a plate is subsampled, where there is no batch size: say what it can be."""
    if any(plate.subsampled for plate in summary.plates.values()):
        return
    start = "the model has no subsampled plate"
    if not any(site.kind != "latent" for site in summary.sites.values()):
        raise ValueError(f"{start} and observes nothing, so that it has no minibatches; {NUTS}.")
    plates, size = row_plates(summary, None, undeclared_sizes(arguments, summary))
    size = size or undeclared_size(arguments, summary, None)
    where = f"plate {plates[0]!r}" if plates else "arguments"
    raise ValueError(
        f"{start}: give batch_size=, how many of the {size} rows of its {where} a minibatch has, "
        "or take the whole data with order='full'."
    )


def row_plates(
    summary: Summary, batch_size: Any, undeclared: set[int], named_size: int = 0
) -> tuple[tuple[str, ...], int]:
    """The plates whose rows are taken, and how many rows they have; none where no plate has them.

    Args:
        summary: The model's summary.
        batch_size: Rows of a minibatch.
        undeclared: Possible numbers of rows that no plate declares.
        named_size: Rows of the arguments that are named, if any are.
    """
    sites = summary.sites.items()
    latent = {plate: name for name, s in sites if s.kind == "latent" for plate in s.plates}
    data = {plate: name for name, s in sites if s.kind != "latent" for plate in s.plates}
    if isinstance(batch_size, Mapping):
        unknown = sorted(set(batch_size) - set(summary.plates), key=str)
        if unknown:
            raise ValueError(
                f"batch_size names {unknown}, but the model's plates are {sorted(summary.plates)}."
            )
        for plate in batch_size:
            if plate in latent:
                raise ValueError(_local(latent[plate], plate, summary.plates[plate].size))
        names = tuple(batch_size)
        if not names:
            raise ValueError(f"batch_size must name a plate, one of {sorted(summary.plates)}.")
        return names, summary.plates[names[0]].size if len(names) == 1 else 0
    sizes = {plate: summary.plates[plate].size for plate in data if plate not in latent}
    if not sizes and data and not undeclared:
        plate = max(data, key=lambda plate: summary.plates[plate].size)
        raise ValueError(_local(latent[plate], plate, summary.plates[plate].size))
    size = named_size or max(sizes.values(), default=0)
    largest = tuple(plate for plate in sizes if sizes[plate] == size)
    if not largest or (not named_size and size < max(undeclared, default=0)):
        return (), 0
    for _, site in sites:
        both = sorted(plate for plate in site.plates if plate in largest)
        if len(both) > 1:
            raise ValueError(
                f"the plates {both} are nested, and both have {size} rows: name the one whose rows "
                f"are to be taken, batch_size={{{both[0]!r}: ...}}."
            )
    return largest, size


def undeclared_size(arguments: Arguments, summary: Summary, named: Mapping[int, str] | None) -> int:
    """How many rows a model has whose observed sites lie in no plate."""
    if named:
        return named_size(arguments, named)
    sizes = undeclared_sizes(arguments, summary)
    if not sizes:
        observed = {name: s for name, s in summary.sites.items() if s.kind != "latent"}
        sites = "; ".join(f"{name!r}, shape {site.shape}" for name, site in observed.items())
        raise ValueError(
            f"the model has no plate of rows, and no observed site ({sites}) has one log density "
            "for each row of an argument: its rows, if it has any, enter together, as one event "
            f"(.to_event), a Gaussian process or a time series, and not one by one; {NUTS}."
        )
    return max(sizes)


def undeclared_sizes(arguments: Arguments, summary: Summary) -> set[int]:
    """Lengths of arguments that observed sites have along dimensions of no plate."""
    lengths = {_rows(leaf) for leaf in jax.tree.leaves(arguments)} - {0, 1}
    return lengths & {
        length
        for site in summary.sites.values()
        for i, length in enumerate(site.shape)
        if site.kind != "latent" and i - len(site.shape) not in site.plates.values()
    }


def named_size(arguments: Arguments, named: Mapping[int, str]) -> int:
    """How many rows the named arguments have."""
    leaves = jax.tree.leaves(arguments)
    return max((_rows(leaves[i]) for i in named), default=0)


def row_arguments(
    arguments: Arguments,
    summary: Summary,
    plates: tuple[str, ...],
    size: int,
    named: Mapping[int, str] | None,
    reason: str,
) -> RowArguments:
    """The arguments with rows: the named ones, or all that have as many as there are rows."""
    leaves = jax.tree.leaves(arguments)
    if named is None:
        places = tuple(i for i, leaf in enumerate(leaves) if _rows(leaf) == size)
    else:
        places = tuple(i for i in named if np.ndim(leaves[i]) > 0)
        for i, name in named.items():
            if _rows(leaves[i]) not in (size, 0):
                raise ValueError(
                    f"rows names {name}, of shape {np.shape(leaves[i])}, where there are {size} "
                    "rows."
                )
    if not places:
        where = f"the plate {plates[0]!r}" if plates else "the model"
        raise ValueError(
            f"{where} has {size} rows, and no argument has as many along its first axis"
            + (f" ({reason})" if reason else "")
            + ": pass the data as arguments, or read them with the plate's indices or "
            "numpyro.subsample."
        )
    name = plates[0] if plates else "rows"
    while not plates and name in summary.plates:
        name += "_"
    return RowArguments(name, size, places, frozenset(plates))


def named_leaves(
    model: Callable, arguments: Arguments, names: str | Sequence[str]
) -> dict[int, str]:
    """Numbers of the arrays in the named arguments, and the arguments' names."""
    wanted = [names] if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"rows must be names of the model's arguments, got {describe(names)}.")
    bound = _numbered(model, arguments)
    unknown = [name for name in wanted if name not in bound]
    if unknown or not wanted:
        raise ValueError(
            f"rows must name arguments of the model, of {sorted(bound)}, got {list(wanted)}."
        )
    return {i: name for name in wanted for i in jax.tree.leaves(bound[name])}


def _numbered(model: Callable, arguments: Arguments) -> dict[str, Any]:
    """The model's arguments by name, each leaf replaced by its number."""
    function: Any = model
    while isinstance(function, Messenger):  # handlers around it take anything
        function = function.fn
    structure = jax.tree.structure(arguments)
    args, kwargs = jax.tree.unflatten(structure, range(structure.num_leaves))
    return signature(function).bind(*args, **kwargs).arguments


def row_names(model: Callable, arguments: Arguments, own: RowArguments) -> str:
    """Names of the arguments that have rows."""
    try:
        bound = _numbered(model, arguments)
    except (TypeError, ValueError):  # a callable that says nothing of its arguments
        names, leaves = names_of(arguments), jax.tree.leaves(arguments)
        return ", ".join(names[id(leaves[i])][0] for i in own.leaves)
    return ", ".join(
        repr(name) for name, part in bound.items() if set(own.leaves) & set(jax.tree.leaves(part))
    )


def _local(site: str, plate: str, size: int) -> str:
    mask = ""
    if site.endswith("_unobserved"):
        mask = (
            " (obs_mask draws what it masks, where numpyro.handlers.mask leaves it out of the sum)"
        )
    return (
        f"latent site {site!r} lies in the plate {plate!r} of the data, one for each of its {size} "
        f"rows: a minibatch would leave most of it without data{mask}; sum it out, or {NUTS}."
    )


def _rows(leaf: Any) -> int:
    shape = getattr(leaf, "shape", ())
    return shape[0] if shape else 0
