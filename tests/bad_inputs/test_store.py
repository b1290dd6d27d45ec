"""What stores, checkpoints, sources and results are given by mistake: one sentence each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from tests.bad_inputs import harness
from tests.core import worker

refuses = partial(harness.refuses, errors=(TypeError, ValueError, OSError, IndexError), quiet=False)

NO_PATHS = [3, b"bytes", "", 1.5, True, ["a"], {"a": 1}, np.zeros(3), "nul\0", object(), dict]


def check(cases):
    failures = []
    for label, call, argument in cases:
        try:
            refuses(call, argument)
        except BaseException as error:
            failures.append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
    assert not failures, "\n".join(failures)


@pytest.fixture(scope="module")
def draws():
    return worker.run(30, 2)


def test_where_a_run_goes(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.npz").write_text("{")
    run = lambda **options: lambda: worker.run(5, 2, **options)
    a, inner = tmp_path / "a", tmp_path / "a" / "b"
    cases = [
        *((f"store={x!r}", run(store=x), "store") for x in NO_PATHS),
        *((f"checkpoint={x!r}", run(checkpoint=x), "checkpoint") for x in NO_PATHS),
        *(
            (f"every={x!r}", run(checkpoint=a, every=x), "every")
            for x in (-1, "1", True, None, np.nan, np.inf, [1.0], 1j)
        ),
        *(
            (f"resume={x!r}", run(checkpoint=a, resume=x), "resume")
            for x in (1, 0, "yes", None, np.ones(1, bool))
        ),
        ("resume alone", run(resume=True), "resume"),
        ("store class", run(store=stochgrad.Store), "store"),
        ("store is a file", run(store=file), "store"),
        ("store in a file", run(store=file / "inside"), "store"),
        ("store of something else", run(store=tmp_path / "full"), "store"),
        ("store broken", run(store=tmp_path / "broken"), "store"),
        ("checkpoint is a file", run(checkpoint=file), "checkpoint"),
        ("checkpoint in a file", run(checkpoint=file / "inside"), "checkpoint"),
        ("checkpoint broken", run(checkpoint=tmp_path / "state"), "checkpoint"),
        ("one for both", run(store=a, checkpoint=a), "checkpoint"),
        ("one for both, in words", run(store=a, checkpoint=f"{inner}/.."), "checkpoint"),
        ("store within", run(store=inner, checkpoint=a), "store"),
        ("checkpoint within", run(store=stochgrad.Store(a), checkpoint=inner), "store"),
    ]
    check(cases)
    assert not a.exists()


def test_the_store_itself(tmp_path):
    dtypes = ["float8", 16, np.float16, "f2", True, ["float16"], b"float16", "float32"]
    check(
        [
            *((f"path={x!r}", lambda x=x: stochgrad.Store(x), "path") for x in (None, *NO_PATHS)),
            *(
                (f"dtype={x!r}", lambda x=x: stochgrad.Store(tmp_path / "d", x), "dtype")
                for x in dtypes
            ),
        ]
    )


def test_results(draws):
    no_index = [
        "3", None, (0, 1), 1.5, True, {}, slice("a", None), slice(None, None, 0), ..., [0.5], [[1]],
        np.zeros((2, 30), bool), [True], 30, -31, [1, 30], draws, int,
    ]  # fmt: skip
    trees = [draws.to_datatree, draws.to_arviz]
    dims = [
        3, "x", ["axis"], {"x": "axis"}, {"x": 3}, {"x": None}, {"x": [3]}, {"x": [""]},
        {"x": ["a/b"]}, {"x": ["draw"]}, {"x": ["x"]}, {"x": ["a", "b"]}, {"y": ["axis"]},
        {3: ["axis"]}, {"": ["axis"]},
    ]  # fmt: skip
    coords = [
        3, "x_dim_0", ["axis"], {"x_dim_0": 3}, {"x_dim_0": "abc"}, {"x_dim_0": None},
        {"x_dim_0": ["a"]}, {"x_dim_0": np.zeros((3, 1))}, {"x_dim_0": {"a": 1}}, {"y": [1, 2, 3]},
        {3: [1, 2, 3]}, {"chain": [0]}, {"draw": range(29)}, {"x_dim_0": [[1], [2, 3], [4]]},
    ]  # fmt: skip
    check(
        [
            *((f"draws[{x!r}]", lambda x=x: draws[x], "draws") for x in no_index),
            *((f"dims={x!r}", lambda x=x, f=f: f(dims=x), "dims") for f in trees for x in dims),
            *(
                (f"coords={x!r}", lambda x=x, f=f: f(coords=x), "coords")
                for f in trees
                for x in coords
            ),
        ]
    )


def test_sources_of_streamed_data():
    x = np.zeros((40, 3), np.float32)

    class Bare:
        shape, dtype = (40, 3), np.dtype("f4")

    class Source(Bare):
        def __init__(self, rows):
            self.rows = rows

        def __getitem__(self, index):
            if isinstance(self.rows, Exception):
                raise self.rows
            return self.rows

    class NoType:
        shape = (40, 3)

    target = lambda data, **options: lambda: stochgrad.posterior(
        lambda m: -jnp.sum(m**2), lambda m, x: -jnp.sum((x - m) ** 2, -1), data, batch_size=10,
        order="streamed", **options,
    )  # fmt: skip
    sources = [
        x.astype(object), x.astype(str), x.astype("datetime64[s]"), np.ma.masked_equal(x, 0),
        np.zeros((), np.float32), np.zeros((0, 3), np.float32), NoType(), Bare(), Source("rows"),
        Source(x), Source(x[0]), Source(x[:1, :2]), Source(OSError(5, "Input/output error")),
        Source(RuntimeError("gone\nfor good")), Source(None), None, 3.0, "x.npy", {}, [],
        [1.0, 2.0], {"a": x, "b": x[:30]},
    ]  # fmt: skip
    check(
        [
            *((f"data {i}", target(data), "data") for i, data in enumerate(sources)),
            *(
                (f"resident_bytes={n!r}", target(x, resident_bytes=n), "resident_bytes")
                for n in (0, -1, 1.5, "many", None, True, 10)
            ),
        ]
    )


def test_columns_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, text = tmp_path / "x.parquet", tmp_path / "text"
    text.write_text("not Parquet")
    parquet.write_table(pyarrow.table({"x": np.arange(4.0), "s": list("abcd")}), path)
    rows = stochgrad.ParquetColumns(path, "x")
    columns = [None, 3, [], ["x", "x"], "y", ["x", "y"], [3], "s", {"x": 1}, b"x", ["x", None]]
    dtypes = [None, "float", str, object, "datetime64[s]", 3, "no type", complex, []]
    check(
        [
            *(
                (f"path={x!r}", lambda x=x: stochgrad.ParquetColumns(x, "x"), "path")
                for x in (None, *NO_PATHS, tmp_path, tmp_path / "none", text)
            ),
            *(
                (f"columns={x!r}", lambda x=x: stochgrad.ParquetColumns(path, x), "column")
                for x in columns
            ),
            *(
                (f"dtype={x!r}", lambda x=x: stochgrad.ParquetColumns(path, "x", x), "dtype")
                for x in dtypes
                if x != "float"
            ),
            *(
                (f"rows[{x!r}]", lambda x=x: rows[x], "ParquetColumns")
                for x in (3, "x", None, slice(None, None, 2), [1, 2], ..., np.ones(4, bool), ())
            ),
        ]
    )


def test_what_people_do_use_is_taken(draws, tmp_path):
    """Checks must not refuse what is right: text and pathlib paths, lists, arrays, ranges."""
    worker.run(5, 2, store=str(tmp_path / "a"), checkpoint=str(tmp_path / "b"), every=1)
    worker.run(5, 2, store=stochgrad.Store(str(tmp_path / "c"), dtype=None), every=np.float32(1))
    for labels in (list("abc"), np.arange(3), range(3), ("a", "b", "c"), jnp.arange(3)):
        tree = draws.to_datatree(dims={"x": ("axis",)}, coords={"axis": labels})
        assert tree["posterior"]["x"].dims == ("chain", "draw", "axis")
    draws.to_datatree(coords={"chain": ["first", "second"], "draw": range(30)}, dims={})
    assert jax.tree.map(jnp.shape, draws[2].positions) == (2, 1, 3)
