"""The protocols every method is written against: a stochastic gradient, driven by a dynamics."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree, Scalar

Position: TypeAlias = PyTree[Float[Array, "..."]]
"""What is sampled: any pytree of floating-point arrays."""

PRNGKey: TypeAlias = Key[Array, ""]
"""A typed PRNG key, as ``jax.random.key`` makes it."""

Score: TypeAlias = Callable[[Position], tuple[Scalar, Position]]
"""``score(position) -> (value, gradient)``: an estimate of a log density and of its gradient."""


class Blocks(NamedTuple):
    """The minibatches of a stream whose minibatches are always the same few.

    Attributes:
        count: How many there are, K.
        next: ``batch_state -> (block, batch_state)``, the number of the minibatch that comes next.
        at: ``block -> batch``.
    """

    count: int
    next: Callable[[Any], tuple[Any, Any]]
    at: Callable[[Any], Any]


class Anchored(NamedTuple):
    """What a function of a batch is on all data at some point.

    Attributes:
        values: Its value, or one for each owner of data.
        at: ``batch_state -> value``, the one that goes with the minibatch that comes next.
    """

    values: Any
    at: Callable[[Any], Any]


class Batches(NamedTuple):
    """A stream of minibatches in some order.

    A stream draws from a key of its own, kept in its state, and never from a chain's: the n-th
    minibatch is a function of that key and n alone, so that chains may share a stream and a run
    may resume one.

    Attributes:
        init: ``key -> batch_state``.
        next: ``batch_state -> (batch, batch_state)``.
        full: The batch that holds the whole data, each row with weight one.
        size: Number of rows of the data, N.
        batch_size: Rows of one minibatch, B.
        order: Name of the order.
        balanced: Whether the noise of its minibatches cancels over an epoch.
        blocks: Its minibatches by number, or None where they are never the same (layout ``"rows"``,
            several subsampled plates).
        stream: What brings the rows into memory, where not all are there; ``full`` is then None.
        mesh: The devices that the rows of each minibatch are spread over; ``full`` is then None.
        anchored: ``(posterior, function, point) -> Anchored``, where no one place knows the
            function's value on all data; None where ``full_data_mean`` finds it.
        owners: Who owns the rows, where that is more than one; for the floors above.
        take: ``numbers -> batch``, on the host: the rows with these numbers in the data as they
            came, each of weight one.
    """

    init: Callable[[PRNGKey], Any]
    next: Callable[[Any], tuple[Any, Any]]
    full: Any
    size: int
    batch_size: int
    order: str = "full"
    balanced: bool = False
    blocks: Blocks | None = None
    stream: Any = None
    mesh: Mesh | None = None
    anchored: Callable[..., Anchored] | None = None
    owners: Any = None
    take: Callable[[Any], Any] | None = None

    @property
    def epoch(self) -> int:
        """Minibatches in an epoch, rounded up; one where there are no data."""
        return max(-(-self.size // max(self.batch_size, 1)), 1)


class Posterior(NamedTuple):
    """What a numpyro model or a plain density becomes.

    Attributes:
        log_density: ``(position, batch) -> scalar``, the unnormalized log density in unconstrained
            space, unbiased for the full data over the batches.
        batches: The stream of minibatches.
        initial: ``key -> position``, or None where only the user knows one.
        constrain: ``position -> dict`` of named arrays in the model's own space, or None where the
            position is what the user wants to see.
        unconstrain: The way back, for the latent sites among the names; None likewise.
        dims: Names of the dimensions of the arrays that ``constrain`` returns.
        coords: Coordinates along those dimensions.
        observations: ``() -> Observations``, what it says of its data row by row.
        model: What it is the posterior of: the numpyro model on all rows of its data, for numpyro's
            and ArviZ's own functions; the ``stochgrad.potentials.Potential`` of ``force_matching``.
    """

    log_density: Callable[[Position, Any], Scalar]
    batches: Batches
    initial: Callable[[PRNGKey], Position] | None = None
    constrain: Callable[[Position], dict[str, Array]] | None = None
    unconstrain: Callable[[Mapping[str, Array]], Position] | None = None
    dims: Mapping[str, tuple[str, ...]] = {}
    coords: Mapping[str, Any] = {}
    observations: Callable[[], Any] | None = None
    model: Callable[..., Any] | None = None


class Gradient(NamedTuple):
    r"""A stochastic estimate of a gradient, as a pair of pure functions.

    ``next`` draws whatever is random once (a minibatch, say) and returns a function, so that an
    integrator with several stages evaluates one and the same estimate at several positions:

    $$\hat g(\theta) \approx \nabla \log \pi(\theta).$$

    Attributes:
        init: ``(key, position) -> gradient_state``.
        next: ``(key, position, gradient_state) -> (score, gradient_state)``, where
            ``score(position) -> (value, gradient)`` and ``gradient`` has the position's structure
            and points uphill.
        posterior: The posterior whose score it estimates, if there is one; gives starting points,
            names and constraints to the results.
        initial: ``key -> position``, where to start if no posterior says so.
        model: ``position -> model``, what a position stands for: a flow, a network.
    """

    init: Callable[[PRNGKey, Position], Any]
    next: Callable[[PRNGKey, Position, Any], tuple[Score, Any]]
    posterior: Posterior | None = None
    initial: Callable[[PRNGKey], Position] | None = None
    model: Callable[[Position], Any] | None = None


class Kernel(NamedTuple):
    """A Markov kernel: what ``blackjax.base.SamplingAlgorithm`` is, with a note for the results.

    Any object with these ``init`` and ``step`` runs in ``stochgrad.sample``, every blackjax kernel
    among them, and a ``Kernel`` runs wherever blackjax's own algorithms do.

    Attributes:
        init: ``(position, rng_key) -> state``; a state has a field ``position``.
        step: ``(rng_key, state) -> (state, info)``.
        method: Name of the method.
        settings: Its hyper-parameters as ``(name, value)`` pairs.
        posterior: The posterior that it samples, if it knows one; gives starting points, names and
            constraints to the results.
        initial: ``key -> position``, where to start if no posterior says so.
        samples: Whether its states are draws from a law, so that R-hat and effective draws mean
            something; an optimizer's are not.
        gradient: The gradient that drives it, if it has one.
    """

    init: Callable[[Position, PRNGKey], Any]
    step: Callable[[PRNGKey, Any], tuple[Any, Any]]
    method: str = "kernel"
    settings: tuple[tuple[str, Any], ...] = ()
    posterior: Posterior | None = None
    initial: Callable[[PRNGKey], Position] | None = None
    samples: bool = True
    gradient: Gradient | None = None


class Online(NamedTuple):
    """What to learn of a run as it goes, where its draws are not kept.

    Attributes:
        init: ``position -> summary``, a pytree of arrays.
        update: ``(summary, position) -> summary``, once a draw after warm-up.
        done: ``summary -> bool``, whether enough is known. When all chains' summaries say so, the
            run ends with the chunk, so that a summary should not change any more once it is done.
    """

    init: Callable[[Position], Any]
    update: Callable[[Any, Position], Any]
    done: Callable[[Any], Any] | None = None


Target: TypeAlias = Posterior | Gradient
"""What a kernel factory takes: a posterior, which has a default gradient, or a gradient."""
