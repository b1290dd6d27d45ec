"""Splitting schemes, written as words over the flows A, B, O and U."""

from functools import lru_cache
from itertools import count
from typing import Any

from stochgrad.core import describe
from stochgrad.integrators._flows import drift, drift_and_friction, friction_and_noise, kick
from stochgrad.integrators._protocol import Coefficients, Integrator, Stage

_MEANING = {
    "A": "drift, which moves the positions",
    "B": "kick, which follows the gradient",
    "O": "friction and noise",
    "U": "drift, friction and noise at once",
}


def check_word(word: str) -> None:
    """Raise a ValueError that names the letters at fault unless ``word`` is a splitting."""
    if not isinstance(word, str):
        raise TypeError(f"a splitting is a word over A, B, O and U, got {describe(word)}.")
    strange = sorted(set(word) - set(_MEANING))
    if strange or not word:
        raise ValueError(
            f"a splitting is a word over A, B, O and U, got {word!r}"
            + (f" with {', '.join(map(repr, strange))}." if strange else ".")
        )
    if "B" not in word:
        raise ValueError(f"the splitting {word!r} has no B ({_MEANING['B']}).")
    if not set(word) & {"A", "U"}:
        raise ValueError(f"the splitting {word!r} has no A or U ({_MEANING['A']}).")
    if not set(word) & {"O", "U"}:
        raise ValueError(f"the splitting {word!r} has no O or U ({_MEANING['O']}).")
    if "U" in word and word.count("A") != word.count("O"):
        raise ValueError(
            f"the splitting {word!r} mixes U ({_MEANING['U']}) with {word.count('A')} A and "
            f"{word.count('O')} O: drift and friction must advance by the same time."
        )


def splitting(word: str) -> Integrator:
    """The scheme that a word stands for: its flows from left to right.

    A letter that occurs n times advances by h/n at each place; U counts as an A and an O. The
    gradient is evaluated once for each position that the word kicks at: flows B with no A or U
    between them share one, across the end of the step as well, so that BAOAB takes a single
    gradient a step, and its first half kick uses the minibatch that the last step ended with.

    Raises:
        TypeError: it is no word.
        ValueError: the word has other letters, no drift, no kick or no friction.
    """
    check_word(word)
    return _splitting(word)


@lru_cache(maxsize=64)
def _splitting(word: str) -> Integrator:
    share = {
        "A": word.count("A") + word.count("U"),
        "B": word.count("B"),
        "O": word.count("O") + word.count("U"),
    }
    moves = [i for i, letter in enumerate(word) if letter in "AU"]
    keeps = word.index("B") < moves[0] and word.rindex("B") > moves[-1]

    def step(position, momentum, gradient, score, noise, c: Coefficients) -> Stage:
        h, number = c.step_size, count()
        moved = not keeps
        value: Any = None
        for letter in word:
            if letter == "A":
                position, moved = drift(h / share["A"], position, momentum, c), True
            elif letter == "B":
                if moved:
                    value, gradient = score(position)
                    moved = False
                momentum = kick(h / share["B"], momentum, gradient)
            elif letter == "O":
                momentum = friction_and_noise(h / share["O"], momentum, noise(next(number)), c)
            else:
                xi = noise(next(number)), noise(next(number))
                time = h / share["A"]
                position, momentum = drift_and_friction(time, position, momentum, xi, c)
                moved = True
        return Stage(position, momentum, value, gradient)

    return Integrator(step, keeps, symmetric=word == word[::-1])
