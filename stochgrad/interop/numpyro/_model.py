"""A numpyro model as a posterior with minibatches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.sharding import Mesh
from numpyro import handlers
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.transforms import IdentityTransform
from numpyro.infer.util import constrain_fn, unconstrain_fn
from numpyro.infer.util import log_density as numpyro_log_density

from stochgrad.core import (
    Batches,
    Blocks,
    Layout,
    Order,
    Partition,
    Posterior,
    Rows,
    check_batch_size,
    check_callable,
    check_choice,
    check_count,
    check_instance,
    check_no_mesh,
    client_rows,
    describe,
    given_as,
    pooled,
    row_batches,
    streamed_rows,
    visiting,
)
from stochgrad.interop.numpyro._arguments import (
    Arguments,
    as_arguments,
    check_call,
    on_device,
    on_host,
)
from stochgrad.interop.numpyro._handler import LaidOut, Streamed, give_rows
from stochgrad.interop.numpyro._inspect import (
    Model,
    Plate,
    Unknown,
    counts_with_values,
    explained,
    folds_constants,
    inspect_model,
)
from stochgrad.interop.numpyro._rows import check_rows, check_shapes, site_densities

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
    **kwargs: Any,
) -> Posterior:
    r"""A numpyro model with a subsampled plate as a posterior with minibatches.

    The position is a dict of the latent sites in unconstrained space; the log density includes the
    Jacobians of the transforms $\theta = T(z)$ and is unbiased over the minibatches:

    $$\log\hat\pi(z) = \log p(T(z)) + \log\left|\det \partial T / \partial z\right|
      + \frac{N}{B}\sum_{i\in b} \log p(x_i \mid T(z)).$$

    The plate is told its indices at each step and never draws them. Data that the model reads with
    ``numpyro.subsample`` are laid out so that a minibatch is a contiguous slice; a model that
    indexes its data by hand, ``x[idx]``, works as well, at the price of a gather. Several
    subsampled plates, nested or not, have independent streams of minibatches, each unbiased.

    That the log density is a sum over the plate's rows is checked at one position, on two
    minibatches: likelihoods outside of the plate, one number for a whole minibatch inside of it,
    and rows that are paired with each other are refused by site. ``Predictive``,
    ``log_likelihood`` and ArviZ are to be given ``stochgrad.numpyro.all_rows(model)``.

    Starting points are uniform on (-2, 2) in unconstrained space. Deterministic sites are part of
    the results, but for those inside a subsampled plate, which have no full-data value.

    Args:
        model: A numpyro model.
        *args: Its arguments, with the whole data: arrays of numpy or jax, columns of a data frame
            (``Series``). The model sees jax's arrays; where it counts with their values, as in
            ``int(np.max(group)) + 1``, it sees numpy's.
        batch_size: Rows of a minibatch; by default the plate's own ``subsample_size``. For several
            subsampled plates, a dict by plate name.
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
        **kwargs: The model's keyword arguments, with the whole data. Where the model itself has an
            argument called ``batch_size``, ``order``, ``layout``, ``resident_bytes``, ``mesh`` or
            ``clients``, bind it with ``functools.partial`` first.

    Raises:
        TypeError: the model is none, or cannot be called with the arguments; an argument is a data
            frame, or holds text, objects or masked entries.
        ValueError: no plate is subsampled (and ``batch_size`` is not the whole data), or only one
            within numpyro's ``scan``; the log density is no sum over a plate's rows; a latent site
            is discrete, or lies inside a subsampled plate; the model has ``numpyro.param`` sites
            that are not fixed; its course depends on the value of a latent site; the data hold NaN
            or infinity; the batch size does not fit; the model fails.

    Warns:
        UserWarning: observed values lie outside of the support of their distribution; the model
            takes no other number of rows than that of a minibatch.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, stochgrad
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("rows", len(x), subsample_size=10):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=numpyro.subsample(x, 0))
        >>> target = stochgrad.from_numpyro(model, jnp.ones(100))
        >>> target.batches.size, target.batches.batch_size
        (100, 10)
    """
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
    owned: list[int] | None = None
    if clients is not None:
        args, owned = _of_clients(args, clients, layout, mesh)
    check_call(model, args, kwargs)
    streamed = Streamed() if order == "streamed" else None
    found, (args, kwargs) = _inspect(model, as_arguments(args, kwargs, bool(streamed)), streamed)
    sizes = _batch_sizes(found.plates, batch_size, order)
    for name, plate in found.inside.items():
        if plate in sizes:
            raise ValueError(
                f"latent site {name!r} lies inside the subsampled plate {plate!r}: a minibatch "
                "would leave most of it without data. Sum it out, or give the plate no "
                "subsample_size; if it is the data's site, its obs is None: pass the data."
            )
    if not found.shapes:
        raise ValueError("the model has no latent site: there is nothing to sample.")
    check_shapes(found, sizes)

    streams: dict[str, Batches] = {}
    partitions: dict[str, Partition] = {}
    if (streamed is not None or mesh is not None or owned) and len(sizes) != 1:
        raise ValueError(
            "streamed data, a mesh and clients need one subsampled plate, the model has "
            f"{sorted(sizes)}."
        )
    if owned is not None:
        ((name, rows),) = sizes.items()
        size = found.plates[name].size
        if size != sum(owned):
            raise ValueError(
                f"the subsampled plate {name!r} has {size} rows where the clients have "
                f"{sum(owned)} together."
            )
        streams[name], partitions[name] = client_rows(
            owned, None if order == "full" else rows, order
        )
    elif streamed is not None:
        check_no_mesh(mesh)
        ((name, rows),) = sizes.items()
        sources, size = tuple(streamed.sources), found.plates[name].size
        streams[name] = streamed_rows(sources, size, rows, resident_bytes)
    else:
        for name, rows in sizes.items():
            streams[name], partition = row_batches(
                found.plates[name].size, rows, order, layout, mesh
            )
            if partition is not None:
                partitions[name] = partition
    laid_out = LaidOut(partitions) if streamed is None else streamed
    batches = _together(streams)
    if owned is not None:
        ((name, stream),) = streams.items()
        batches = given_as(stream, lambda rows: {name: rows}, {name: stream.full})

    def on_rows(position, batch):
        placed = _Placed(position)
        given = give_rows(handlers.substitute(model, substitute_fn=placed), batch, laid_out)
        joint, trace = numpyro_log_density(given, args, kwargs, {})
        return joint, trace, placed

    def log_density(position, batch):
        joint, _, placed = on_rows(position, batch)
        return joint + placed.log_jacobian

    def by_site(position, batch):
        _, trace, placed = on_rows(position, batch)
        return site_densities(trace, placed.log_jacobians, found.dims)

    def initial(key):
        keys = jax.random.split(key, len(found.shapes))
        return {
            name: jax.random.uniform(k, shape, minval=-_RADIUS, maxval=_RADIUS)
            for k, (name, shape) in zip(keys, found.shapes.items(), strict=True)
        }

    template = {
        name: Rows(None, np.arange(stream.batch_size, dtype=np.int32), np.float32(1))  # pyright: ignore
        for name, stream in streams.items()
    }

    def constrain(position):
        given = give_rows(model, template, streamed)
        values = constrain_fn(given, args, kwargs, position, return_deterministic=True)
        return {name: value for name, value in values.items() if name in found.dims}

    def unconstrain(values):
        latent = {name: values[name] for name in found.shapes}
        return unconstrain_fn(give_rows(model, template, streamed), args, kwargs, latent)

    target = Posterior(log_density, batches, initial, constrain, unconstrain, found.dims)
    if owned is not None:
        target = visiting(target)
    if streamed is None:
        with explained((args, kwargs)):
            _lay_out(log_density, initial, target.batches)
    laid_out.open = False
    sources = () if streamed is None else tuple(streamed.sources)
    with explained((args, kwargs)):
        check_rows(by_site, initial, found, sizes, sources)
    return target


def _of_clients(args: tuple, clients: Any, layout: str, mesh: Any) -> tuple[tuple, list[int]]:
    """The model's arguments with the rows of all clients, and how many each has."""
    if args:
        raise ValueError("give the model's arguments either as they are or by clients, not both.")
    if layout != "blocks" or mesh is not None:
        raise ValueError("clients need layout='blocks' and no mesh.")
    for s, client in enumerate(clients if isinstance(clients, Sequence) else ()):
        if not isinstance(client, list | tuple):
            raise TypeError(
                f"clients must be a list of tuples, each of the model's arguments: client {s} is "
                f"{describe(client)}; with one argument it is (x,)."
            )
    pooled_args, sizes = pooled(clients)
    return pooled_args, sizes


def _batch_sizes(
    plates: Mapping[str, Plate], batch_size: int | Mapping[str, int] | None, order: str
) -> dict[str, int]:
    """How many rows of each subsampled plate a minibatch holds."""
    subsampled = {name: plate for name, plate in plates.items() if plate.subsampled}
    if not subsampled:
        whole = {plate.size for plate in plates.values()}
        if order == "full" or batch_size in whole:
            return {}
        raise ValueError(
            "the model has no subsampled plate: give the plate that holds the data a "
            "subsample_size and read the data with numpyro.subsample, or ask for the whole data "
            "with order='full'."
        )
    if isinstance(batch_size, Mapping):
        unknown = sorted(set(batch_size) - set(subsampled), key=str)
        if unknown:
            raise ValueError(
                f"batch_size names {unknown}, but the model's subsampled plates are "
                f"{sorted(subsampled)}."
            )
        wanted = {name: batch_size.get(name) for name in subsampled}
    elif batch_size is None:
        wanted = dict.fromkeys(subsampled)
    elif len(subsampled) > 1:
        raise ValueError(
            f"the model has the subsampled plates {sorted(subsampled)}: "
            "give batch_size as a dict by plate name."
        )
    else:
        wanted = dict.fromkeys(subsampled, batch_size)
    return {
        name: plate.size
        if order == "full" and wanted[name] is None
        else check_batch_size(
            plate.subsample_size if wanted[name] is None else wanted[name], plate.size, order
        )
        for name, plate in subsampled.items()
    }


def _inspect(
    model: Callable, arguments: Arguments, streamed: Streamed | None
) -> tuple[Model, Arguments]:
    """What the model tells of itself, and its arguments in the form that it can work with.

    That is on the device, unless the model counts with the values of its data, as in
    ``int(group.max()) + 1``: jax knows no values where it compiles, numpy does.
    """
    args, kwargs = on_device(arguments, bool(streamed))
    try:
        if not (folds_constants() and counts_with_values(model, args, kwargs)):
            return inspect_model(model, args, kwargs, streamed), (args, kwargs)
    except Unknown:
        pass
    args, kwargs = on_host(arguments, bool(streamed))
    try:
        return inspect_model(model, args, kwargs, streamed), (args, kwargs)
    except Unknown as error:
        raise ValueError(
            "the model's course depends on the value of a latent site or of a row (a Python if, "
            "while or range over it): stochastic control flow is not supported; use jnp.where. "
            "Counts of the data are taken with numpy: int(np.max(group)) + 1."
        ) from error.__cause__


class _Placed:
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


def _together(streams: Mapping[str, Batches]) -> Batches:
    """Independent streams for several plates as one stream of dicts."""

    def init(key):
        return {
            name: stream.init(jax.random.fold_in(key, i))
            for i, (name, stream) in enumerate(streams.items())
        }

    def next(state):
        following = {name: stream.next(state[name]) for name, stream in streams.items()}
        batch = {name: rows for name, (rows, _) in following.items()}
        return batch, {name: state for name, (_, state) in following.items()}

    full = {name: stream.full for name, stream in streams.items()}
    main = max(streams.values(), key=lambda stream: stream.size, default=None)
    if main is None:
        one = Blocks(1, lambda state: (np.int32(0), state), lambda block: full)
        return Batches(init, next, full, 0, 0, blocks=one)
    together = main._replace(init=init, next=next, full=full, blocks=None)
    if main.stream is not None or main.mesh is not None:
        together = together._replace(full=None)
    if len(streams) > 1 or main.blocks is None:
        return together
    (name,), (count, next_in, at) = streams, main.blocks

    def next_block(state):
        block, following = next_in(state[name])
        return block, {name: following}

    return together._replace(blocks=Blocks(count, next_block, lambda block: {name: at(block)}))


def _lay_out(log_density: Callable, initial: Callable, batches: Batches) -> None:
    """Run the model once without computing anything, which lays out what it subsamples."""

    def once(key):
        batch, _ = batches.next(batches.init(key))
        return log_density(initial(key), batch)

    density = jax.eval_shape(once, jax.random.key(0))
    if density.shape != () or not jnp.issubdtype(density.dtype, jnp.floating):
        raise ValueError(
            f"the model's log density must be a real number, got dtype {density.dtype} and shape "
            f"{density.shape}: its data or its parameters are of another kind."
        )
