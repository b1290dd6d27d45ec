"""Whether a model's log density is a sum over the rows of its subsampled plates."""

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from numpyro.distributions import MaskedDistribution
from numpyro.distributions.constraints import Constraint, dependent

from stochgrad.core import Rows, Source, first_line, hoisted_jit
from stochgrad.interop.numpyro._inspect import Summary
from stochgrad.interop.numpyro._sites import Site, own_distribution

_SAME = 2.0**-12
"""Share of the terms by which sums of the same terms may differ: by rounding they do not."""
_OTHER = 2.0**-5
"""Share of the terms by which sums in another order may differ: mistakes are of the order of 1."""
_NOISE = 2.0**8
"""Multiples of what a position moved by its own rounding error changes."""
_TRIES = 4
_SEED = 20260501


class Density(NamedTuple):
    """The log density of one site.

    Attributes:
        value: The sum of its terms.
        size: The sum of their absolute values.
        supported: Whether its distribution is one over what it observes.
    """

    value: Float[Array, ""]
    size: Float[Array, ""]
    supported: Any = True


def site_densities(
    trace: Mapping[str, Any], others: Mapping[str, Any], reported: Container[str]
) -> dict[str, Density]:
    """The log density of each sample site of a model's trace, with another term for some.

    Of deterministic sites that are reported it is the sum of their values.
    """
    densities = {}
    for name, site in trace.items():
        if site["type"] == "deterministic" and name in reported:
            value = jnp.asarray(site["value"]).astype(float)
            densities[name] = Density(jnp.sum(value), jnp.sum(jnp.abs(value)))
        if site["type"] == "sample":
            terms = scaled_log_density(site)
            other = jnp.asarray(others.get(name, 0.0), terms.dtype)
            densities[name] = Density(
                jnp.sum(terms) + other, jnp.sum(jnp.abs(terms)) + abs(other), is_supported(site)
            )
    return densities


def scaled_log_density(site: Any) -> Array:
    """The log densities of a traced site, entry by entry, scaled as it is."""
    terms = own_log_density(site)
    return terms if site["scale"] is None else site["scale"] * terms


def own_log_density(site: Any) -> Array:
    """The log densities of a traced site, entry by entry, without its scale."""
    extra = (site["intermediates"],) if site["intermediates"] else ()
    return jnp.asarray(site["fn"].log_prob(site["value"], *extra))


def is_supported(site: Any) -> Any:
    """Whether observed values lie in the support, where that is the same for all parameters."""
    support: Any = getattr(type(own_distribution(site["fn"])), "support", None)
    fixed = isinstance(support, Constraint) and not isinstance(support, type(dependent))
    if isinstance(site["fn"], MaskedDistribution) or not (site["is_observed"] and fixed):
        return True
    inside: Any = support(site["value"])
    return jnp.all(inside)


def warn_of_support(name: str, stacklevel: int) -> None:
    """Say that a site observes what its distribution is not over."""
    warnings.warn(
        f"site {name!r} observes values outside of the support of its distribution, where the "
        "density means nothing.",
        stacklevel=stacklevel,
    )


def check_rows(
    by_site: Callable[[PyTree, Mapping[str, Rows]], dict[str, Density]],
    initial: Callable[[Key[Array, ""]], PyTree],
    model: Summary,
    batch_sizes: Mapping[str, int],
    sources: Sequence[Source] = (),
) -> None:
    r"""Raise unless the log density is affine in the rows' weights, as an unbiased estimate needs.

    At one position, rows of weight zero must change nothing, and so a minibatch of B rows must have
    the density of the same rows among 2B of which the others have weight zero. Sites that the plate
    does not scale, that pair rows with each other or that are summed before they are scaled fail.

    Args:
        by_site: ``(position, rows) -> {site: Density}``.
        initial: ``key -> position``, places where the density may be looked at.
        model: What is known of the model.
        batch_sizes: Rows of a minibatch, by plate.
        sources: What is streamed, if anything is.

    Raises:
        ValueError: naming the site.
    """
    batch_sizes = {n: rows for n, rows in batch_sizes.items() if rows < model.plates[n].size}
    if not batch_sizes:
        return
    rows = {
        name: _Choice.of(model.plates[name].size, count, sources)
        for name, count in batch_sizes.items()
    }
    weighted = {name: choice.half().among(False) for name, choice in rows.items()}
    names = _dependent(by_site, initial, weighted)

    def densities(position, rows):
        return {name: value for name, value in by_site(position, rows).items() if name in names}

    few, many, compare = hoisted_jit(densities), hoisted_jit(densities), True
    position: Any = None
    alone: dict[str, Any] = {}
    for key in jax.random.split(jax.random.key(_SEED), _TRIES):
        position = initial(key)
        alone = few(position, {name: choice.alone() for name, choice in rows.items()})
        if all(np.isfinite(density.value) for density in alone.values()):
            break
    try:
        among = many(position, {name: choice.among(False) for name, choice in rows.items()})
    except Exception as error:
        sizes = {name: len(choice.index) for name, choice in rows.items()}
        warnings.warn(
            f"the model takes minibatches of {dict(batch_sizes)} rows and fails on {sizes} "
            f"({first_line(error)}): something in it has a fixed number of rows. What does not "
            "follow the plate's rows is wrong, and methods that need all rows at once will fail: "
            "take the number of rows from the data that numpyro.subsample gives.",
            stacklevel=3,
        )
        rows = {name: choice.half() for name, choice in rows.items()}
        many, compare = hoisted_jit(densities), False
        among = many(position, {name: choice.among(False) for name, choice in rows.items()})
    others = many(position, {name: choice.among(True) for name, choice in rows.items()})
    moved = many(
        jax.tree.map(lambda x: x * (1 + 2 * jnp.finfo(x.dtype).eps), position),
        {name: choice.among(False) for name, choice in rows.items()},
    )
    for name, density in alone.items():
        if not np.asarray(density.supported):
            warn_of_support(name, stacklevel=4)
    for name, density in among.items():
        value, size = np.asarray(density.value), np.asarray(density.size)
        eps = float(jnp.finfo(value.dtype).eps)
        if _differ(value, others[name].value, _SAME * size):
            raise ValueError(_sentence(name, model.sites.get(name), batch_sizes, mixed=True))
        if name not in model.sites:
            continue
        noise = np.abs(value - np.asarray(moved[name].value))
        if compare and _differ(value, alone[name].value, _OTHER * size + _NOISE * noise + eps):
            raise ValueError(_sentence(name, model.sites[name], batch_sizes, mixed=False))


def _dependent(by_site: Callable, initial: Callable, rows: Mapping[str, Rows]) -> set[str]:
    """The sites whose density can depend on the rows: the priors need not be compiled."""
    position = jax.eval_shape(initial, jax.random.key(_SEED))
    closed, shapes = jax.make_jaxpr(by_site, return_shape=True)(position, rows)
    jaxpr: Any = closed.jaxpr
    reached = set(jaxpr.invars[len(jax.tree.leaves(position)) :])
    for equation in jaxpr.eqns:
        if any(x in reached for x in equation.invars if not hasattr(x, "val")):
            reached.update(equation.outvars)
    flags = [not hasattr(x, "val") and x in reached for x in jaxpr.outvars]
    sites = jax.tree.unflatten(jax.tree.structure(shapes), flags)
    return {name for name, density in sites.items() if density.value or density.size}


def check_shapes(model: Summary, batch_sizes: Iterable[str]) -> None:
    """Raise unless every site in a plate has the plate's rows along its dimension, and no other."""
    for name in batch_sizes:
        if not any(name in site.plates for site in model.sites.values()):
            outside = [
                f"{n!r}, shape {site.shape}"
                for n, site in model.sites.items()
                if site.kind != "latent"
            ]
            raise ValueError(
                f"no sample site lies in the subsampled plate {name!r}, so that its rows have no "
                "part in the density"
                + (f" (outside of it: {'; '.join(outside)})" if outside else "")
                + ": put the observed sites, and factors with one value per row, inside the block "
                f"of `with numpyro.plate({name!r}, ...)`."
            )
    for name, site in model.sites.items():
        if site.kind != "latent":
            _check_site(name, site, model)


def _check_site(name: str, site: Site, model: Summary) -> None:
    for plate, dim in site.plates.items():
        if plate not in model.plates:
            continue
        size, count = model.plates[plate]
        length = _length(site.shape, dim)
        if length != count:
            raise ValueError(
                f"site {name!r} has {length} rows, shape {site.shape}, in the plate {plate!r}, "
                f"whose minibatch has {count}: read everything that has rows with "
                "numpyro.subsample, or index it with the plate's indices."
            )
        if site.kind == "factor":
            continue
        lengths = {_length(site.own_shape, dim), _length(site.value_shape, dim)}
        if lengths == {1} and 1 < count < size:
            raise ValueError(
                f"site {name!r}, of a distribution of shape {site.own_shape} and a value of shape "
                f"{site.value_shape}, has no rows along dimension {dim}, the one of the plate "
                f"{plate!r}, which would count it {size} times: bring the rows of the data to that "
                "dimension (a column x of shape (N, 1) is x[:, 0]) and read them with "
                "numpyro.subsample."
            )
        for other in range(-len(site.shape), 0):
            lengths = {_length(site.fn_shape, other), _length(site.value_shape, other)}
            if other not in site.plates.values() and lengths == {1, size} and size > 1:
                raise ValueError(
                    f"site {name!r} has shape {site.shape}: data and distribution are broadcast "
                    f"against each other along dimension {other}, which no plate declares and "
                    f"which is as long as all of the plate {plate!r}, {size}, so that each row "
                    "meets every other. Bring both to one value per row (a column x of shape "
                    "(N, 1) is x[:, 0]), or declare that dimension with a plate of its own."
                )


def _length(shape: tuple[int, ...], dim: int) -> int:
    return shape[dim] if len(shape) >= -dim else 1


class _Choice(NamedTuple):
    """Rows of one plate: the first ``count`` of them count, the others are to fill up.

    Attributes:
        index: Numbers of the rows.
        count: How many count.
        weight: What each of those counts for.
        blocks: The rows of the streamed arrays, and their axes.
    """

    index: np.ndarray
    count: int
    weight: float
    blocks: tuple[tuple[np.ndarray, int], ...] = ()

    @classmethod
    def of(cls, size: int, count: int, sources: Sequence[Source]) -> "_Choice":
        total = min(2 * count, size)
        if not sources:
            index = np.random.default_rng(0).choice(size, total, replace=False)
            return cls(index.astype(np.int32), count, size / count)
        types = [jax.dtypes.canonicalize_dtype(s.array.dtype) for s in sources]
        blocks = tuple(
            (s.read(0, total, dtype), s.axis) for s, dtype in zip(sources, types, strict=True)
        )
        return cls(np.arange(total, dtype=np.int32), count, size / count, blocks)

    def half(self) -> "_Choice":
        """As many rows as count, the first half of which count."""
        rows = np.arange(self.count)
        blocks = tuple((np.take(b, rows, axis), axis) for b, axis in self.blocks)
        return self._replace(count=self.count // 2, index=self.index[rows], blocks=blocks)

    def alone(self) -> Rows:
        """Those that count, weighted by the plate itself."""
        return self._rows(np.arange(self.count), np.float32(1))

    def among(self, repeated: bool) -> Rows:
        """Those that count, among others of weight zero, or among themselves again."""
        place = np.arange(len(self.index))
        weight = np.where(place < self.count, self.weight, 0).astype(np.float32)
        return self._rows(place % max(self.count, 1) if repeated else place, weight)

    def _rows(self, place: np.ndarray, weight: Any) -> Rows:
        if not self.blocks:
            return Rows(None, self.index[place], weight)  # pyright: ignore
        resident = tuple(np.take(block, place, axis) for block, axis in self.blocks)
        return Rows(np.int32(0), self.index[place], weight, resident)  # pyright: ignore


def _differ(value: Any, other: Any, tolerance: Any) -> bool:
    """Whether two numbers differ; where one is not finite, nothing is known."""
    value, other = np.asarray(value), np.asarray(other)
    return bool(np.isfinite(value) & np.isfinite(other) & (np.abs(value - other) > tolerance))


def _sentence(name: str, site: Site | None, batch_sizes: Mapping[str, int], mixed: bool) -> str:
    """What is wrong with a site, and what to do."""
    plates = ", ".join(repr(plate) for plate in batch_sizes)
    if site is None:
        return (
            f"deterministic site {name!r} depends on the rows of the minibatch but lies outside of "
            f"the subsampled plate {plates}, so that it would be reported for a few rows as if for "
            "all: compute it from all of the data, or move it into the plate's block."
        )
    what = f"{'factor' if site.kind == 'factor' else 'site'} {name!r}, shape {site.shape},"
    inside = {plate: dim for plate, dim in site.plates.items() if plate in batch_sizes}
    if not inside:
        if site.kind == "latent":
            return (
                f"the prior of latent site {name!r} depends on the rows of the minibatch (plate "
                f"{plates}): a prior can depend on all of the data only."
            )
        per_row = "one value per row, without jnp.sum," if site.kind == "factor" else "it"
        return (
            f"{what} depends on the rows of the minibatch but lies outside of the subsampled plate "
            f"{plates}, which scales what is inside to all rows: move {per_row} into the block of "
            "`with numpyro.plate(...)`."
        )
    rows = ", ".join(
        f"{batch_sizes[p]} along dimension {dim} of {p!r}" for p, dim in inside.items()
    )
    if site.kind == "factor" and not any(
        _length(site.own_shape, dim) == batch_sizes[plate] for plate, dim in inside.items()
    ):
        return (
            f"{what} has one value for the whole minibatch inside a subsampled plate, which counts "
            f"it once for each row ({rows}): give numpyro.factor one value per row, without "
            "jnp.sum."
        )
    extra = [
        i - len(site.shape)
        for i in range(site.scanned, len(site.shape))
        if i - len(site.shape) not in site.plates.values() and site.shape[i] > 1
    ]
    if mixed and extra:
        return (
            f"{what} pairs the rows of the minibatch with each other: the plate has {rows}, and "
            f"dimension {extra[-1]} belongs to no plate. Bring data and distribution to one shape "
            "per row: a column x of shape (N, 1) is x[:, 0], and the rows of data lie along the "
            "plate's dimension."
        )
    if mixed:
        return (
            f"{what} depends on which other rows are in the minibatch ({rows}): the log density "
            "must be a sum over rows, each with a term of its own. What rows share (a mean, a "
            "norm) is to be computed from all of the data, before it is subsampled."
        )
    return (
        f"{what} is no sum over rows that the plate scales to all of them ({rows}): leave out "
        "factors such as N / B, which the plate applies itself, and means over the rows."
    )
