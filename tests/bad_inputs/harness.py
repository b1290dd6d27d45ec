"""Whether a call with bad input ends in one sentence that names the argument."""

import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import stochgrad

PACKAGE = Path(stochgrad.__file__).parent

REFUSALS = (TypeError, ValueError, OSError, ImportError)


class Box:
    """A thing that is nothing in particular."""


def verdict(
    call: Callable[[], Any],
    *names: str,
    errors: tuple[type[Exception], ...] = REFUSALS,
    quiet: bool = True,
) -> str:
    """``"refused"``, or what is wrong: silence, a foreign error, or words that name no argument.

    Args:
        call: A call with bad input.
        names: What its refusal may name.
        errors: What a refusal may be.
        quiet: Whether it may warn before.
    """
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        try:
            call()
        except errors as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error)
            line = frame.line or ""  # of our own words, or of python's on an unknown argument
            raised = line.startswith("raise") or "unexpected keyword argument" in text
            if PACKAGE not in Path(frame.filename).parents or not raised:
                return f"foreign: {type(error).__name__} {text[:120]!r} ({frame.filename})"
            if not any(name in text for name in names):
                return f"vague: {text[:160]!r} names none of {names}"
            return "vague: several lines" if "\n" in text else "refused"
        except Exception as error:
            return f"foreign: {type(error).__name__} {str(error)[:120]!r}"
    return "silence"


def refuses(call: Callable[[], Any], *names: str, **options: Any) -> None:
    """Fail unless a call is refused; see ``verdict``."""
    result = verdict(call, *names, **options)
    assert result == "refused", result


def crossed(
    function: Callable[..., Any], good: Mapping[str, Any], bad: Mapping[str, list]
) -> list[tuple[str, Callable[[], Any], str]]:
    """One call for each bad value of each argument, the others good: (label, call, argument)."""

    def call(name, value):
        return lambda: function(**{**good, name: value})

    title = getattr(function, "__name__", str(function))
    return [
        (f"{title} {name}={_short(value)}", call(name, value), name)
        for name, values in bad.items()
        for value in values
    ]


def failures(cases: list[tuple[str, Callable[[], Any], str]]) -> list[str]:
    """Every case that is not refused as it should be."""
    found = [(label, verdict(call, name)) for label, call, name in cases]
    return [f"{label}: {result}" for label, result in found if result != "refused"]


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    text = (
        repr(value).replace("\n", " ") if shape in (None, ()) else f"{type(value).__name__}{shape}"
    )
    return text[:48]
