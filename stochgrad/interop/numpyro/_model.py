"""A numpyro model as a posterior with minibatches."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpyro
from jax.sharding import Mesh
from numpyro import handlers
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.transforms import IdentityTransform
from numpyro.infer.util import constrain_fn, unconstrain_fn
from numpyro.infer.util import log_density as numpyro_log_density

from stochgrad.core import (
    Layout,
    Order,
    Posterior,
    check_callable,
    check_choice,
    check_count,
    check_instance,
    describe,
)
from stochgrad.federated import visiting
from stochgrad.interop.numpyro._arguments import Arguments, as_arguments, check_call
from stochgrad.interop.numpyro._epoch_check import Terms, check_epoch, site_terms
from stochgrad.interop.numpyro._explain import explained
from stochgrad.interop.numpyro._find_rows import check_no_rows, check_no_stream, check_subsampled
from stochgrad.interop.numpyro._handler import Streamed, all_rows, give_rows
from stochgrad.interop.numpyro._inspect import Summary, summarize
from stochgrad.interop.numpyro._minibatches import (
    Minibatches,
    batch_sizes,
    from_clients,
    from_memory,
    from_storage,
    pool_clients,
)
from stochgrad.interop.numpyro._observations import observations
from stochgrad.interop.numpyro._plain_rows import PlainRows, plain_rows, takes_plain_rows
from stochgrad.interop.numpyro._row_arguments import give_row_arguments
from stochgrad.interop.numpyro._rows import Density, check_rows, check_shapes, site_densities

_RADIUS = 2.0


def from_numpyro(
    model: Callable,
    *args: Any,
    batch_size: int | Mapping[str, int] | None = None,
    order: Order = "reshuffled",
    layout: Layout = "blocks",
    resident_bytes: int = 2**28,
    mesh: Mesh | None = None,
    clients: Sequence[tuple] | None = None,
    rows: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Posterior:
    r"""A numpyro model as a posterior with minibatches.

    The position is a dict of the latent sites in unconstrained space; the log density includes the
    Jacobians of the transforms $\theta = T(z)$ and is unbiased over the minibatches:

    $$\log\hat\pi(z) = \log p(T(z)) + \log\left|\det \partial T / \partial z\right|
      + \frac{N}{B}\sum_{i\in b} \log p(x_i \mid T(z)).$$

    A model is taken as it is, with ``batch_size``, the rows of a minibatch. Where it reads its data
    with the plate's indices or ``numpyro.subsample``, the plate of the observed sites is handed B
    indices. Where it computes with them outside of the plate, or has no plate, the arguments with
    as many rows along their first axis become minibatches of rows, and the observed sites are
    scaled to all N; ``rows`` names them where others have as many entries. A plate that the model
    subsamples itself has its ``subsample_size`` as the default.

    Data that reach the model unchanged are laid out so that a minibatch is a contiguous slice; a
    model that indexes its data by hand, ``x[idx]``, works as well, at the price of a gather.
    Several subsampled plates, nested or not, have independent streams of minibatches, each
    unbiased.

    That the log density is a sum over the rows is checked at one position, on some minibatches:
    row by row against the model on all rows where the model's own plates are not subsampled.
    Likelihoods outside of a subsampled plate, one number for a whole minibatch inside of it, rows
    that depend on each other, and latent sites with one value for each row are refused by site.
    ``Predictive``, ``log_likelihood`` and ArviZ need the model on all of its rows if it subsamples
    a plate: ``posterior.model``, which is ``stochgrad.numpyro.all_rows(model)``.

    Starting points are uniform on (-2, 2) in unconstrained space. Deterministic sites are part of
    the results, but for those with a value for each row.

    Args:
        model: A numpyro model.
        *args: Its arguments, with the whole data: arrays of numpy or jax, columns of a data frame
            (``Series``). The model sees jax's arrays; where it counts with their values, as in
            ``int(np.max(group)) + 1``, it sees numpy's.
        batch_size: Rows of a minibatch, B; by default the plate's own ``subsample_size``. For
            several plates, or to name the plate, a dict by plate name.
        order: As in ``stochgrad.posterior``.
        layout: As in ``stochgrad.posterior``.
        resident_bytes: As in ``stochgrad.posterior``. With ``order="streamed"`` the arguments that
            the model hands to ``numpyro.subsample`` may be memory-mapped numpy arrays, zarr arrays
            and the like; one plate may be subsampled.
        mesh: As in ``stochgrad.posterior``, for one subsampled plate.
        clients: Instead of ``args``, a list of such arguments, one tuple for each owner of data: a
            minibatch is then of one client, and ``stochgrad.federated`` says who is visited when.
            Arrays have the rows along their first axis, and are of any length; all else is the same
            for all clients. One plate may be subsampled.
        rows: For a model without a subsampled plate, the names of the arguments whose arrays have
            the rows along their first axis; by default all arrays with as many entries as there are
            rows.
        **kwargs: The model's keyword arguments, with the whole data. Where the model itself has an
            argument called ``batch_size``, ``order``, ``layout``, ``resident_bytes``, ``mesh``,
            ``clients`` or ``rows``, bind it with ``functools.partial`` first.

    Raises:
        TypeError: the model is none, or cannot be called with the arguments; an argument is a data
            frame, or holds text, objects or masked entries.
        ValueError: no plate is subsampled, and there is no ``batch_size``; the model has no rows;
            the log density is no sum over them; a latent site is discrete, or has a value for each
            row; the model has ``numpyro.param`` sites that are not fixed; its control flow depends
            on the value of a latent site; the data hold NaN or infinity; the batch size does not
            fit; the model fails.

    Warns:
        UserWarning: observed values lie outside of the support of their distribution; the model
            takes no other number of rows than that of a minibatch.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, stochgrad
        >>> def model(x, y):
        ...     slope = numpyro.sample("slope", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("rows", len(y)):
        ...         numpyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
        >>> target = stochgrad.from_numpyro(model, jnp.arange(100.0), jnp.ones(100), batch_size=10)
        >>> target.batches.size, target.batches.batch_size
        (100, 10)
    """
    _check_options(model, batch_size, order, layout, resident_bytes, mesh)
    client_sizes: list[int] = []
    if clients is not None:
        args, client_sizes = pool_clients(args, clients, layout, mesh)
    check_call(model, args, kwargs)
    streamed = Streamed() if order == "streamed" else None
    arguments = as_arguments(args, kwargs, bool(streamed))
    summary, arguments = summarize(model, arguments, streamed)
    make = partial(
        _with_minibatches,
        model,
        client_sizes=client_sizes,
        order=order,
        layout=layout,
        streamed=streamed,
        resident_bytes=resident_bytes,
        mesh=mesh,
    )
    if takes_plain_rows(arguments, summary, batch_size, order):
        check_no_stream(streamed)
        with explained(arguments):
            plain = plain_rows(model, arguments, summary, batch_size, rows)
        return plain.first_right(
            lambda plain: make(plain.arguments, plain.summary, plain.sizes, plain)
        )
    check_no_rows(rows)
    if order != "full" and batch_size is None:
        check_subsampled(arguments, summary)
    return make(arguments, summary, batch_sizes(summary.plates, batch_size, order), None)


def _with_minibatches(
    model: Callable,
    arguments: Arguments,
    summary: Summary,
    sizes: dict[str, int],
    plain: PlainRows | None,
    *,
    client_sizes: Sequence[int],
    order: Order,
    layout: Layout,
    streamed: Streamed | None,
    resident_bytes: int,
    mesh: Mesh | None,
) -> Posterior:
    """A model's posterior with minibatches of these sizes, its log density checked."""
    plates = summary.plates
    _check_latent_sites(summary, sizes)
    if plain is None or plain.own is None:
        check_shapes(summary, sizes)
    if client_sizes:
        minibatches = from_clients(plates, sizes, client_sizes, order)
    elif streamed is not None:
        minibatches = from_storage(plates, sizes, streamed, resident_bytes, mesh)
    else:
        minibatches = from_memory(plates, sizes, order, layout, mesh)
    target, densities = _posterior(model, arguments, summary, minibatches, plain)
    if client_sizes:
        target = visiting(target)
    if streamed is None:
        with explained(arguments):
            _lay_out(target)
    minibatches.arrays.open = False
    initial: Any = target.initial
    with explained(arguments):
        if plain is None:
            sources = () if streamed is None else tuple(streamed.sources)
            check_rows(densities.by_site, initial, summary, sizes, sources)
        elif sizes:
            check_epoch(
                densities.on_all,
                densities.on_batch,
                initial,
                target.batches,
                summary.sites,
                plain.places,
                plain.rows,
                plain.advice,
            )
    return target


def _check_options(model: Any, batch_size: Any, order: Any, layout: Any, resident_bytes, mesh):
    wanted = "a numpyro model, a function of the data"
    check_callable("model", model, wanted)
    if isinstance(model, type | Distribution):
        raise TypeError(f"model must be {wanted}, got {describe(model)}.")
    check_choice("order", order, get_args(Order))
    check_choice("layout", layout, get_args(Layout))
    check_count("resident_bytes", resident_bytes)
    if mesh is not None:
        check_instance("mesh", mesh, Mesh, "a jax.sharding.Mesh")
    if not (batch_size is None or isinstance(batch_size, Mapping)):
        check_count("batch_size", batch_size)


def _check_latent_sites(summary: Summary, sizes: Mapping[str, int]) -> None:
    for name, plate in summary.inside.items():
        if plate in sizes:
            raise ValueError(
                f"latent site {name!r} lies inside the subsampled plate {plate!r}: a minibatch "
                "would leave most of it without data. Sum it out, or give the plate no "
                "subsample_size; if it is the data's site, its obs is None: pass the data."
            )
    if not summary.shapes:
        raise ValueError("the model has no latent site: there is nothing to sample.")


class _Densities(NamedTuple):
    """A model's density site by site.

    Attributes:
        by_site: ``(position, batch) -> {site: Density}``.
        on_batch: ``(position, batch) -> {site: Terms}``.
        on_all: ``position -> {site: Terms}``, of the model as it is, on all of its data.
    """

    by_site: Callable[[Any, Any], dict[str, Density]]
    on_batch: Callable[[Any, Any], dict[str, Terms]]
    on_all: Callable[[Any], dict[str, Terms]]


def _posterior(
    model: Callable,
    arguments: Arguments,
    summary: Summary,
    minibatches: Minibatches,
    plain: PlainRows | None,
) -> tuple[Posterior, _Densities]:
    """A model's posterior, and its density site by site."""
    args, kwargs = arguments
    batches, template, arrays = minibatches
    streamed = arrays if isinstance(arrays, Streamed) else None
    own = None if plain is None else plain.own

    def run(position, give, arguments):
        change = _ChangeOfVariables(position)
        minibatch = give(handlers.substitute(model, substitute_fn=change))
        joint, trace = numpyro_log_density(minibatch, arguments[0], arguments[1], {})
        return joint, trace, change

    def on_rows(position, batch):
        if own is None:
            return run(position, lambda model: give_rows(model, batch, arrays), arguments)
        give = partial(give_row_arguments, rows=batch[own.name], own=own)
        return run(position, give, own.minibatch(arguments, batch, arrays))

    def log_density(position, batch):
        joint, _, change = on_rows(position, batch)
        return joint + change.log_jacobian

    def by_site(position, batch):
        _, trace, change = on_rows(position, batch)
        return site_densities(trace, change.log_jacobians, summary.dims)

    def on_batch(position, batch):
        return site_terms(on_rows(position, batch)[1])

    def on_all(position):
        return site_terms(run(position, lambda model: model, arguments)[1])

    def initial(key):
        keys = jax.random.split(key, len(summary.shapes))
        return {
            name: jax.random.uniform(k, shape, minval=-_RADIUS, maxval=_RADIUS)
            for k, (name, shape) in zip(keys, summary.shapes.items(), strict=True)
        }

    def reported_model():
        """On all rows where they are in memory: what is computed of them is then right."""
        return model if plain is not None else give_rows(model, template, streamed)

    def constrain(position):
        values = constrain_fn(reported_model(), args, kwargs, position, return_deterministic=True)
        return {name: value for name, value in values.items() if name in summary.dims}

    def unconstrain(values):
        latent = {name: values[name] for name in summary.shapes}
        return unconstrain_fn(reported_model(), args, kwargs, latent)

    # traced once for all that is computed of it; rows are known to numpy while they are traced
    log_density = jax.jit(log_density, inline=True)
    about = partial(
        observations,
        model,
        _ChangeOfVariables,
        arguments,
        frozenset(summary.shapes),
        {name: summary.plates[name].size for name in template},
        batches.take,
        arrays,
        own,
    )
    target = Posterior(
        log_density,
        batches,
        initial,
        constrain,
        unconstrain,
        summary.dims,
        observations=about,
        model=all_rows(model),
    )
    return target, _Densities(by_site, on_batch, on_all)


def _lay_out(target: Posterior) -> None:
    """Run the model once without computing anything, which lays out what it subsamples."""

    def once(key):
        batch, _ = target.batches.next(target.batches.init(key))
        initial: Any = target.initial
        return target.log_density(initial(key), batch)

    density = jax.eval_shape(once, jax.random.key(0))
    if density.shape != () or not jnp.issubdtype(density.dtype, jnp.floating):
        raise ValueError(
            f"the model's log density must be a real number, got dtype {density.dtype} and shape "
            f"{density.shape}: its data or its parameters are of another kind."
        )


class _ChangeOfVariables:
    """Puts unconstrained values into a model's sites, and adds up the Jacobians on the way.

    numpyro's ``potential_energy`` adds them as factors of the model, which the model's own
    ``handlers.scale`` and ``handlers.mask`` then change; a change of variables must not be.
    """

    def __init__(self, position: Mapping[str, jax.Array]):
        self.position = position
        self.log_jacobian: Any = 0.0
        self.log_jacobians: dict[str, Any] = {}

    def __call__(self, site: Any) -> Any:
        name = site["name"]
        if name not in self.position:
            return None
        z = self.position[name]
        transform = biject_to(site["fn"].support)
        index = site["infer"].get("_scan_current_index")
        if index is not None and jnp.ndim(z) > len(transform.inverse_shape(site["fn"].shape())):
            z = z[index]
        value = transform(z)
        if not isinstance(transform, IdentityTransform):
            log_det = jnp.sum(transform.log_abs_det_jacobian(z, value))
            if index is None:
                self.log_jacobian = self.log_jacobian + log_det
                self.log_jacobians[name] = log_det
            else:  # inside a scan only a site of the scan can carry it out
                numpyro.factor(f"_{name}_log_jacobian", log_det)
        return value
