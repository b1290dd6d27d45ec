"""What a numpyro model raises, as sentences that say where and what to do."""

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from types import TracebackType

import jax

from stochgrad.core import first_line
from stochgrad.interop.numpyro._arguments import Arguments, names_of
from stochgrad.interop.numpyro._sites import Plate


class UnknownValue(Exception):
    """The model's control flow depends on the value of an array."""


class Misfit(Exception):
    """A value does not go with its distribution."""


@contextmanager
def explained(
    arguments: Arguments, plates: Mapping[str, Plate] = {}, subsampled: Set[int] = frozenset()
) -> Iterator[None]:
    """Within this, what a model raises is said in a sentence.

    Args:
        arguments: The model's arguments.
        plates: Its plates, as far as it ran.
        subsampled: Identities of the arrays that it read with ``numpyro.subsample``.
    """
    try:
        yield
    except Exception as error:
        sentence = _sentence(error, arguments, plates, subsampled)
        if sentence is error:
            raise
        raise sentence from error


def _sentence(
    error: Exception, arguments: Arguments, plates: Mapping[str, Plate], subsampled: Set[int]
) -> Exception:
    if isinstance(error, UnknownValue | jax.errors.ConcretizationTypeError):
        return UnknownValue()
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return ValueError(
            "the model turns a traced value into a numpy array, most likely by indexing a numpy "
            "array of its own with the plate's indices: pass the array as an argument, or wrap it "
            "in jnp.asarray."
        )
    if _raised_here(error.__traceback__) and isinstance(error, TypeError | ValueError):
        return error
    what = first_line(error)
    if type(error).__name__ not in what and not isinstance(error, Misfit):
        what = f"{type(error).__name__}: {what}"
    if "PRNG key" in what:
        what += "; a log density must not draw random numbers"
    shapes = "".join(
        f" The array of shape {leaf.shape} may be {name}."
        for name, leaf in names_of(arguments).values()
        if leaf.shape and str(tuple(leaf.shape)) in str(error)
    )
    hint = _minibatch_hint(str(error), arguments, plates, subsampled) or shapes
    return ValueError(f"the model fails{_place(error.__traceback__)} ({what}).{hint}")


def _minibatch_hint(
    text: str, arguments: Arguments, plates: Mapping[str, Plate], subsampled: Set[int]
) -> str:
    """A hint where a minibatch seems to meet whole data."""
    numbers = {int(number) for number in re.findall(r"\d+", text)}
    for name, plate in plates.items():
        if plate.subsampled and {plate.size, plate.subsample_size} <= numbers:
            unread = [
                f"{what}, shape {leaf.shape}"
                for identity, (what, leaf) in names_of(arguments).items()
                if plate.size in leaf.shape and identity not in subsampled
            ]
            without = f" ({'; '.join(unread)} did not go through it)" if unread else ""
            return (
                f" A minibatch of {plate.subsample_size} rows of the plate {name!r} meets all "
                f"{plate.size}: read everything that has rows with numpyro.subsample{without}, or "
                "index it with the plate's indices."
            )
    return ""


def _place(traceback: TracebackType | None) -> str:
    """At which site a model failed, as far as numpyro's own frames tell."""
    place = ""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_globals.get("__name__") == "numpyro.primitives":
            name, function = frame.f_locals.get("name"), frame.f_code.co_name
            if isinstance(name, str) and function in ("sample", "param", "deterministic"):
                place = f" at the site {name!r}"
            elif isinstance(name, str) and function in ("__init__", "_subsample"):
                place = f" at the plate {name!r}"
            elif function == "subsample":
                place = " at numpyro.subsample"
        traceback = traceback.tb_next
    return place


def _raised_here(traceback: TracebackType | None) -> bool:
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.startswith("stochgrad.")
