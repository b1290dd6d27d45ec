"""Decoding in batches with a cache of keys and values: a policy of any network of tokens."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from stochgrad.core import (
    PRNGKey,
    at_least_float32,
    check_array,
    check_callable,
    check_count,
    check_instance,
    check_number,
    describe,
)
from stochgrad.em._model import Policy, Rationales, invoke


class Prompts(NamedTuple):
    """Prompts of unequal length, padded on the left.

    Attributes:
        tokens: Token numbers.
        mask: Which of them are the prompt's.
    """

    tokens: Int[Array, "prompts length"]
    mask: Bool[Array, "prompts length"]


class Inputs(NamedTuple):
    """Tokens for a network with a cache.

    Attributes:
        tokens: Token numbers; their keys and values go to the slots ``offset``, ``offset + 1``, ...
            of the cache.
        positions: Place of each in its sequence, padding not counted.
        mask: Which slots each token attends to: those of its own sequence up to itself.
        offset: Slot of the first token.
    """

    tokens: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]
    mask: Bool[Array, "batch length slots"]
    offset: Int[Array, ""]


Network = Callable[[Any, Inputs, PyTree, int], tuple[Float[Array, "batch keep vocabulary"], PyTree]]
"""``(params, inputs, cache, keep) -> (logits, cache)``, as ``decoder`` wants it."""


_LARGEST = int(np.iinfo(np.int32).max)


def left_padded(
    prompts: Sequence[Sequence[int]], length: int | None = None, pad: int = 0
) -> Prompts:
    """Lists of token numbers as arrays of one length.

    Args:
        prompts: Token numbers of each prompt.
        length: Length of the arrays; by default that of the longest prompt.
        pad: What stands before shorter ones. The network never attends to it.

    Raises:
        TypeError: prompts are no lists of whole numbers.
        ValueError: there are no prompts, one is empty, longer than ``length``, or holds negative
            numbers.

    Example:
        >>> from stochgrad import em
        >>> em.left_padded([[5, 6, 7], [8]]).tokens.tolist()
        [[5, 6, 7], [0, 0, 8]]
    """
    pad = check_count("pad", pad, least=0, most=_LARGEST)
    if isinstance(prompts, str | bytes | dict) or not hasattr(prompts, "__len__"):
        raise TypeError(f"prompts must be lists of token numbers, got {describe(prompts)}.")
    rows = []
    for number, prompt in enumerate(prompts):
        if hasattr(prompt, "__len__") and len(prompt) == 0:
            raise ValueError(
                f"prompts must be non-empty lists of token numbers, but {number} is empty."
            )
        row = check_array(f"prompts[{number}]", prompt, shape=(None,), kind="integer")
        if row.min() < 0 or row.max() > _LARGEST:
            raise ValueError(
                f"prompts[{number}] must hold token numbers from 0 to {_LARGEST}, got "
                f"{row.min()} to {row.max()}."
            )
        rows.append(row)
    if not rows:
        raise ValueError("prompts must be non-empty lists of token numbers, got none at all.")
    sizes = [len(row) for row in rows]
    length = max(sizes) if length is None else check_count("length", length)
    if max(sizes) > length:
        raise ValueError(
            f"prompt {int(np.argmax(sizes))} has {max(sizes)} tokens where length is {length}."
        )
    tokens = np.full((len(sizes), length), pad, np.int32)
    mask = np.zeros((len(sizes), length), bool)
    for number, row in enumerate(rows):
        tokens[number, length - len(row) :] = row
        mask[number, length - len(row) :] = True
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))


def decoder(
    network: Network,
    cache: Callable[[int, int], PyTree],
    *,
    length: int,
    end: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    context: int | None = None,
    pad: int = 0,
) -> Policy:
    r"""A policy that decodes token by token, batched and compiled.

    The network reads the prompts (``Prompts``, padded on the left), decodes with its cache, and
    scores whole rationales in one pass. Decoding stops at the end token or at ``length``; a
    truncated sequence has no end token (``verified(..., end=end)`` counts it as wrong).

    The policy is the distribution that is sampled: with a temperature T and a nucleus of mass
    ``top_p`` [Holtzman et al. 2020],

    $$p(z_t\mid z_{<t}) \propto e^{\ell(z_t)/T}\,\mathbf 1[z_t\in\text{nucleus}],$$

    and ``log_prob`` is the sum of its logarithms, end token included.

    Args:
        network: ``(params, inputs, cache, keep) -> (logits, cache)``: logits of the next token at
            the last ``keep`` of the ``Inputs``, shape (batch, keep, vocabulary), and the cache with
            their keys and values. Frozen weights belong in params: closures are compiled in.
        cache: ``(batch, slots) -> pytree``, an empty one.
        length: The most tokens of a rationale, end token included.
        end: The end token.
        temperature: T.
        top_p: Top-p: cumulative probability of the nucleus.
        context: The most tokens that the network can attend to, prompt and rationale together.
        pad: What stands after the end token.

    Raises:
        ValueError: a setting is out of range; in use, prompts longer than the context, token
            numbers beyond the vocabulary, or logits of another shape.
        TypeError: ``network`` or ``cache`` is no function; in use, prompts are no ``Prompts``.
    """
    check_callable("network", network, "a function (params, inputs, cache, keep)")
    check_callable("cache", cache, "a function (batch, slots)")
    length, end = check_count("length", length), check_count("end", end, least=0)
    pad = check_count("pad", pad, least=0)
    temperature = check_number("temperature", temperature)
    top_p = check_number("top_p", top_p, most=1.0)
    if context is not None:
        context = check_count("context", context)

    def slots_of(prompts: Prompts) -> int:
        check_instance(
            "prompts", prompts, Prompts, "Prompts, as stochgrad.em.left_padded makes them"
        )
        tokens, mask = prompts
        if not all(hasattr(leaf, "dtype") for leaf in prompts) or not (
            jnp.issubdtype(tokens.dtype, jnp.integer)
            and mask.dtype == jnp.bool_
            and tokens.ndim == 2
            and tokens.shape == mask.shape
        ):
            raise TypeError(
                "prompts must be Prompts of integer tokens and a mask of bools, both of shape "
                f"(prompts, length), got tokens: {describe(tokens)}; mask: {describe(mask)}."
            )
        slots = prompts.tokens.shape[1] + length
        if context is not None and slots > context:
            raise ValueError(
                f"prompts of {prompts.tokens.shape[1]} tokens and rationales of {length} do not "
                f"fit a context of {context} tokens."
            )
        return slots

    def inputs_of(prompts: Prompts, tokens, slots: int, offset) -> Inputs:
        """Tokens at ``offset``, seeing the prompt and what was decoded up to themselves."""
        batch, size = tokens.shape
        before = prompts.tokens.shape[1]
        visible = jnp.concatenate(
            [prompts.mask, jnp.ones((batch, slots - before), bool)], axis=1, dtype=bool
        )
        at = offset + jnp.arange(size)
        slot = jnp.arange(slots)
        mask = visible[:, None, :] & (slot[None, :] <= at[:, None])[None]
        mask |= (slot[None, :] == at[:, None])[None]  # padding sees itself: no empty softmax
        places = jnp.cumsum(visible.astype(jnp.int32), axis=1) - 1
        positions = lax.dynamic_slice_in_dim(jnp.maximum(places, 0), offset, size, axis=1)
        return Inputs(tokens, positions, mask, jnp.asarray(offset, jnp.int32))

    def run(params, prompts: Prompts, inputs: Inputs, kv, keep: int):
        """The network, whose logits must be what a decoder can use."""
        result = invoke("network", network, params, inputs, kv, keep)
        if not isinstance(result, tuple) or len(result) != 2 or not hasattr(result[0], "shape"):
            raise TypeError(f"network must return (logits, cache), got {describe(result)}.")
        shape, batch = result[0].shape, inputs.tokens.shape[0]
        if len(shape) != 3 or shape[:2] != (batch, keep):
            raise ValueError(
                f"network must return logits of shape ({batch}, {keep}, vocabulary), for {batch} "
                f"prompts and keep={keep}, got {shape}."
            )
        if not jnp.issubdtype(result[0].dtype, jnp.floating):
            raise TypeError(f"network must return floating logits, got dtype {result[0].dtype}.")
        largest = [("end", end), ("pad", pad)]
        if not isinstance(prompts.tokens, Tracer):
            largest.append(("prompts", int(np.max(np.asarray(prompts.tokens)))))
        for name, token in largest:
            if token >= shape[2]:
                raise ValueError(
                    f"{name} holds token {token} where the network has a vocabulary of {shape[2]}."
                )
        return result

    def log_probs(logits):
        """Log probabilities of what is sampled."""
        logits = logits.astype(at_least_float32(logits.dtype)) / temperature
        if top_p < 1:
            ranked = -jnp.sort(-lax.stop_gradient(logits), axis=-1)
            mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
            size = jnp.sum((mass < top_p).astype(jnp.int32), axis=-1, keepdims=True)
            least = jnp.take_along_axis(ranked, jnp.minimum(size, ranked.shape[-1] - 1), axis=-1)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.nn.log_softmax(logits, axis=-1)

    def decode(params, prompts: Prompts, choose) -> Rationales:
        slots, (batch, before) = slots_of(prompts), prompts.tokens.shape
        inputs = inputs_of(prompts, prompts.tokens, slots, 0)
        logits, kv = run(params, prompts, inputs, invoke("cache", cache, batch, slots), 1)

        def pick(number, logits, alive, tokens, mask, total):
            rows = log_probs(logits[:, 0])
            token = choose(number, rows).astype(jnp.int32)
            log_prob = jnp.take_along_axis(rows, token[:, None], axis=-1)[:, 0]
            token = jnp.where(alive, token, pad)
            tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], number, axis=1)
            mask = lax.dynamic_update_slice_in_dim(mask, alive[:, None], number, axis=1)
            total = total + jnp.where(alive, log_prob, 0.0)
            return alive & (token != end), tokens, mask, total

        def turn(carry):
            number, kv, alive, tokens, mask, total = carry
            last = lax.dynamic_slice_in_dim(tokens, number - 1, 1, axis=1)
            inputs = inputs_of(prompts, last, slots, before + number - 1)
            logits, kv = run(params, prompts, inputs, kv, 1)
            return number + 1, kv, *pick(number, logits, alive, tokens, mask, total)

        tokens = jnp.full((batch, length), pad, jnp.int32)
        total = jnp.zeros(batch, at_least_float32(logits.dtype))
        nothing = jnp.zeros((batch, length), bool)
        start = pick(0, logits, jnp.ones(batch, bool), tokens, nothing, total)
        *_, tokens, mask, total = lax.while_loop(
            lambda carry: (carry[0] < length) & jnp.any(carry[2]), turn, (jnp.int32(1), kv, *start)
        )
        return Rationales(tokens, total, mask)

    def sample(params, key: PRNGKey, prompts: Prompts) -> Rationales:
        def choose(number, rows):
            return jax.random.categorical(jax.random.fold_in(key, number), rows)

        return decode(params, prompts, choose)

    def greedy(params, prompts: Prompts) -> Rationales:
        return decode(params, prompts, lambda number, rows: jnp.argmax(rows, axis=-1))

    def log_prob(params, prompts: Prompts, tokens, mask):
        slots_of(prompts)
        slots = prompts.tokens.shape[1] + tokens.shape[1] - 1
        fed = jnp.concatenate([prompts.tokens, tokens[:, :-1]], axis=1, dtype=jnp.int32)
        inputs = inputs_of(prompts, fed, slots, 0)
        empty = invoke("cache", cache, fed.shape[0], slots)
        logits, _ = run(params, prompts, inputs, empty, tokens.shape[1])
        each = jnp.take_along_axis(log_probs(logits), tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(mask, each, 0.0), axis=1)

    return Policy(sample, log_prob, greedy, full_support=top_p == 1)
