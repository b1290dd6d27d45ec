"""The page on draws: whole, escaped, self-contained, and honest about what it lacks."""

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import stochgrad
from stochgrad.core import Draws
from stochgrad.diagnostics._report_numbers import (
    Predictions,
    Scalars,
    band,
    compared,
    ecdf_difference,
    pit,
    predictions,
    reliability,
    scalars,
)

N, CHAINS, DRAWS = 400, 2, 200
RNG = np.random.default_rng(5)
X = np.stack([np.ones(N), RNG.normal(size=N)], 1).astype(np.float32)
Y = (X @ [0.5, -1.0] + RNG.normal(size=N)).astype(np.float32)
PARTS = ("summary", "mixing", "prediction", "loo", "settings")
NASTY = "<script>alert('x')</script> $\\frac{"


def log_prior(b):
    return -0.5 * jnp.sum(b**2) / 100


def log_likelihood(b, rows):
    return -0.5 * (rows["y"] - rows["x"] @ b) ** 2 - 0.5 * np.log(2 * np.pi)


def predict(key, b, rows):
    return {"y": rows["x"] @ b + jax.random.normal(key, rows["y"].shape)}


def draws_of(predict=predict, spread=1.0, **changes):
    """Independent draws of the conjugate posterior, as draws of a run."""
    target = stochgrad.posterior(
        log_prior, log_likelihood, {"x": X, "y": Y}, batch_size=40, predict=predict
    )
    covariance = np.linalg.inv(np.eye(2) / 100 + X.T.astype(float) @ X)
    mean = covariance @ (X.T.astype(float) @ Y)
    rng = np.random.default_rng(0)
    positions = rng.multivariate_normal(mean, spread**2 * covariance, (CHAINS, DRAWS))
    draws = Draws(
        positions.astype(np.float32),
        {"log_density": np.zeros((CHAINS, DRAWS))},
        np.ones((CHAINS, DRAWS), bool),
        np.full(CHAINS, -1),
        timings={"total": 1.5, "sample": 1.25},
        attrs={"method": "exact", "step_size": 0.25},
        posterior=target,
    )
    return dataclasses.replace(draws, **changes)


class Page(HTMLParser):
    """The text of each section, and the tags that there are."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags, self.text, self._section = [], {None: ""}, None
        self.links = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.text[self._section] = ""

    def handle_data(self, data):
        self.text[self._section] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        path = draws_of().report(tmp_path_factory.mktemp("page") / "report.html", title=NASTY)
    return Page(path)


def test_every_part_is_there(page):
    assert "These draws can be used" in page.text["verdict"]
    assert set(PARTS) < set(page.text)
    assert "not shown" not in page.source
    assert all(f"x[{i}]" in page.text["summary"] for i in range(2))
    assert "All 2 scalars" in page.text["mixing"]
    assert "400 values of 400 rows" in page.text["prediction"]
    assert "PSIS of 200 of 400 data points, 400 draws" in page.text["loo"]
    assert "0.25" in page.text["settings"]
    assert stochgrad.__version__ in page.text["settings"]
    assert page.tags.count("svg") == 2 * 2 + 2 + 1


def test_the_elpd_is_that_of_loo(page):
    result = stochgrad.diagnostics.loo(draws_of(), rows=200)
    elpd = result.elpd_loo if hasattr(result, "elpd_loo") else result.elpd
    assert f"{elpd:,.1f}".replace("-", "\N{MINUS SIGN}") in page.text["loo"]


def test_the_page_needs_nothing_else(page):
    """No script, no font, nothing from a network; the text of users stays text."""
    assert not {"script", "iframe", "object", "img"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"url\((?!['\"]?#)|@import", page.source)
    assert "<script" not in page.source
    assert NASTY in page.text[None]
    names = re.findall(r'\bid="([^"]+)"', page.source)
    assert len(names) == len(set(names))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page.source)) <= set(names)
    assert "#a000" not in page.source  # every color is the page's


def test_same_key_same_page(tmp_path):
    draws = draws_of()
    paths = [draws.report(tmp_path / f"{i}.html", key=jax.random.key(i // 2)) for i in range(3)]
    texts = [re.sub(r"Written by .*", "", path.read_text()) for path in paths]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.filterwarnings("ignore:minibatch noise")
def test_numpyro_sites_of_all_kinds(tmp_path):
    def model(x, y=None, n=None, z=None):
        b = numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
        c = numpyro.sample("<i>&", dist.Normal(0, 1))
        with numpyro.plate("rows", N, subsample_size=40):
            xs = numpyro.subsample(x, 1)
            ys, ns, zs = (None if v is None else numpyro.subsample(v, 0) for v in (y, n, z))
            numpyro.sample("y", dist.Normal(xs @ b, 1), obs=ys)
            numpyro.sample("n", dist.Poisson(3.0), obs=ns)
            numpyro.sample("z", dist.Bernoulli(logits=0.01 * c - 1), obs=zs)

    n, z = RNG.poisson(3.0, N), RNG.integers(0, 2, N)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        target = stochgrad.from_numpyro(model, jnp.asarray(X), jnp.asarray(Y), n, z)
        kernel = stochgrad.sghmc(target, 1e-2, 5.0)
        start = {"b": jnp.array([0.5, -1.0]), "<i>&": jnp.zeros(())}
        draws = stochgrad.sample(
            jax.random.key(0), kernel, init=start, num_samples=60, num_chains=2, progress=False
        )
        page = Page(draws.report(tmp_path / "report.html"))
    assert "<i>" not in page.source
    assert "<i>&" in page.text["summary"]
    assert "Do not use these draws yet" in page.text["verdict"]
    assert page.text["prediction"].count("replicated (median") == 3
    assert "10 of 10 dots lie outside" in page.text["prediction"]  # z is half ones, not 0.27
    assert page.text["loo"].count("its standard error") == 2
    reason = "not shown: the log likelihood of some row"
    assert page.text["loo"].count(reason) == 1  # n depends on nothing


@pytest.mark.parametrize(
    "changes, missing, said",
    [
        ({"posterior": None}, ("prediction", "loo"), "these draws know no posterior"),
        ({"predict": None}, ("prediction",), "the posterior cannot predict"),
        ({"collected": True}, ("prediction", "loo"), "these draws are not positions"),
        ({"first_bad": np.zeros(2, int)}, PARTS[:4], "no chain is finite to the end"),
        ({"positions": {}}, ("summary", "mixing"), "the run kept no draws"),
        ({"predict": lambda key, b, rows: {"w": rows["y"]}}, (), "predict gives 'w', and the data"),
        ({"attrs": {}, "timings": {}}, ("settings",), "draws.timings is empty"),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, missing, said):
    page = Page(draws_of(**changes).report(tmp_path / "report.html"))
    assert said in page.source.replace("&#39;", "'")
    absent = [part for part in PARTS if "not shown:" in page.text[part]]
    if "positions" not in changes:
        assert absent == [part for part in PARTS if part in missing]
    else:
        assert set(missing) <= set(absent)


def test_draws_without_any(tmp_path):
    page = Page(draws_of()[:0].report(tmp_path / "report.html"))
    assert all("not shown:" in page.text[part] for part in PARTS[:4])


@pytest.mark.filterwarnings("ignore:minibatch noise")
def test_draws_of_a_store(tmp_path):
    pytest.importorskip("zarr")
    target = stochgrad.posterior(log_prior, log_likelihood, {"x": X, "y": Y}, batch_size=40)
    stochgrad.sample(
        jax.random.key(0),
        stochgrad.sgld(target, 1e-3),
        init=jnp.array([0.5, -1.0]),
        num_samples=100,
        num_chains=2,
        store=tmp_path / "draws",
        progress=False,
    )
    draws = stochgrad.open_draws(tmp_path / "draws")
    page = Page(draws.report(tmp_path / "report.html"))
    assert "All 2 scalars" in page.text["mixing"]
    assert "SGLD" in page.text["settings"]
    assert "not shown: these draws are not positions" in page.text["loo"]


def test_a_failing_part_does_not_take_the_page_along(tmp_path):
    def fails(key, b, rows):
        raise RuntimeError("out of <b>luck</b>")

    page = Page(draws_of(predict=fails).report(tmp_path / "report.html"))
    assert "out of <b>luck</b>" in page.text["prediction"]
    assert "PSIS of" in page.text["loo"]


def test_bad_input_gets_one_sentence(tmp_path):
    draws = draws_of()
    with pytest.raises(TypeError, match="path must be a path, got 3"):
        draws.report(3)
    with pytest.raises(FileNotFoundError, match="path must lie in a directory that is there"):
        draws.report(tmp_path / "none" / "report.html")
    with pytest.raises(IsADirectoryError, match="path must name a file"):
        draws.report(tmp_path)
    with pytest.raises(TypeError, match="key"):
        draws.report(tmp_path / "a.html", key=3)
    with pytest.raises(ValueError, match="rows must be an integer"):
        draws.report(tmp_path / "a.html", rows=0)
    with pytest.raises(TypeError, match="title must be text"):
        draws.report(tmp_path / "a.html", title=3)
    with pytest.raises(TypeError, match="draws must be"):
        stochgrad.diagnostics.report({"b": 1}, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, name):
    from stochgrad.diagnostics import _report

    def import_module(module):
        if module == name:
            raise ImportError(module)

    monkeypatch.setattr(_report, "import_module", import_module)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install 'stochgrad\[report\]'"):
        draws_of().report(tmp_path / "report.html")


def test_the_worst_scalars_come_first():
    series = RNG.normal(size=(2, 100, 3))
    few = Scalars(list("abcd"), series, np.array([1, 1.2, np.nan, 1]), np.full(4, 50.0), 4, 100)
    few = few._replace(ess=np.array([400.0, 300, np.nan, 20]))
    assert few.worst(4).tolist() == [3, 1, 0, 2]
    assert few.worst(2).tolist() == [3, 1]


def test_of_many_scalars_256_are_looked_at(tmp_path):
    wide = RNG.normal(size=(2, 50, 30, 20)).astype(np.float32)
    draws = draws_of(positions=wide, posterior=None, first_bad=np.full(2, -1))
    draws = dataclasses.replace(draws, finite=np.ones((2, 50), bool), stats={})
    found = scalars(draws)
    assert (len(found.names), found.total) == (256, 600)
    place = found.names.index("x[29, 19]")
    np.testing.assert_array_equal(found.series[:, :, place], wide[:, :, 29, 19])
    page = Page(draws.report(tmp_path / "report.html"))
    assert "The 12 scalars that mix worst; 244 more were looked at" in page.text["mixing"]
    assert "(of 600 in all)" in page.text["mixing"]


def test_the_band_holds_uniform_numbers_and_not_others():
    rng = np.random.default_rng(11)
    inside = [not ecdf_difference(rng.random(300)).outside.any() for _ in range(400)]
    assert abs(np.mean(inside) - 0.95) < 5.5 * np.sqrt(0.95 * 0.05 / 400) + 0.01
    assert ecdf_difference(rng.random(300) ** 1.5).outside.any()
    np.testing.assert_allclose(band(400)[49] / band(100)[49], 0.5, rtol=0.1)


@pytest.mark.parametrize("law", ["normal", "poisson", "binary"])
def test_ranks_are_uniform_if_and_only_if_predictions_are_right(law):
    rng = np.random.default_rng(12)
    draw = {
        "normal": lambda shape, shift: rng.normal(size=shape) * (1 - shift),
        "poisson": lambda shape, shift: rng.poisson(2.0 - shift, shape),
        "binary": lambda shape, shift: rng.random(shape) < 0.5 + shift / 4,
    }[law]
    for shift in (0.0, 0.5):
        found = Predictions(draw(2000, 0.0) * 1.0, draw((100, 2000), shift) * 1.0, 2000, 0)
        assert found.discrete == (law != "normal")
        assert found.binary == (law == "binary")
        assert ecdf_difference(pit(found, rng)).outside.any() == (shift > 0)


def test_reliability_of_binary_predictions():
    rng = np.random.default_rng(13)
    probability = rng.random(2000)
    ones = (rng.random(2000) < probability) * 1.0
    replicated = (rng.random((100, 2000)) < probability) * 1.0
    right = reliability(Predictions(ones, replicated, 2000, 0))
    np.testing.assert_allclose(right.predicted, right.observed, atol=0.15)
    assert np.sum((right.observed < right.low) | (right.observed > right.high)) <= 4
    sharp = (rng.random((100, 2000)) < (probability > 0.5) * 0.9 + 0.05) * 1.0
    wrong = reliability(Predictions(ones, sharp, 2000, 0))
    assert np.sum((wrong.observed < wrong.low) | (wrong.observed > wrong.high)) >= 6


def test_predictions_are_compared_row_by_row():
    found = predictions(draws_of(), jax.random.key(3), 100, 60)["y"]
    assert found.replicated.shape == (60, 100)
    assert found.rows == 100
    assert np.isin(found.observed, Y.astype(np.float64)).all()
    # noise has variance one, and a row's own mean would be missed by the wrong row's
    error = found.replicated.mean(0) - found.observed
    assert 0.7 < error.std() < 1.3


def test_wide_rows_are_fewer(tmp_path):
    """Covariates do not count; what is predicted does."""
    data = {"x": np.ones((N, 300), np.float32), "y": np.ones((N, 200), np.float32)}
    target = stochgrad.posterior(
        log_prior,
        lambda b, rows: -jnp.mean((rows["y"] - b[0]) ** 2, axis=1),
        data,
        batch_size=40,
        predict=lambda key, b, rows: {"y": b[0] + jax.random.normal(key, rows["y"].shape)},
    )
    found = predictions(draws_of(posterior=target), jax.random.key(0), 2000, 20)["y"]
    assert (found.rows, found.replicated.shape) == (100, (20, 20_000))
    narrow = predictions(draws_of(), jax.random.key(0), 2000, 20)["y"]
    assert narrow.rows == N


def test_draws_that_never_move(tmp_path):
    page = Page(draws_of(positions=np.ones((2, DRAWS, 2), np.float32)).report(tmp_path / "a.html"))
    assert "never moved" in page.text["verdict"]
    assert "All 2 scalars" in page.text["mixing"]


def test_observations_that_are_missing_are_counted():
    observed = np.array([[1.0, np.nan], [3.0, np.inf], [5.0, 6.0]])
    replicated = RNG.normal(size=(2, 4, 3, 2))
    found = compared(observed, replicated, 3)
    assert found.missing == 2
    np.testing.assert_array_equal(found.observed, [1, 3, 5, 6])
    np.testing.assert_array_equal(found.replicated[5], replicated[1, 1].ravel()[[0, 2, 4, 5]])
    assert compared(np.full(3, np.nan), RNG.normal(size=(1, 2, 3)), 3) == (
        "no observed value is finite."
    )
    assert "of the predictions are not finite" in compared(
        np.ones(3), np.full((1, 2, 3), np.nan), 3
    )


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(page, tmp_path, width):
    """A frame around the page says how wide its content is; the picture is not blank."""
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "report.html"
    probe = (
        "<script>onload = () => {document.title = document.documentElement.scrollWidth + '/' +"
        " innerWidth}</script>"
    )
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    options = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--window-size={width},1500", f"--user-data-dir={tmp_path / 'profile'}"]

    def browse(*more):
        return subprocess.run(
            [*options, *more, path.as_uri()], capture_output=True, text=True, timeout=120
        )

    path.write_text(page.source)
    shot = browse(f"--screenshot={tmp_path / 'page.png'}")
    assert "CONSOLE" not in shot.stderr
    pixels = image.imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[1] == width
    assert len(np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 100
    assert 0.005 < np.mean(np.abs(pixels - pixels[0, 0]).max(-1) > 0.3) < 0.5
    path.write_text(policy.sub("", page.source).replace("</body>", probe + "</body>"))
    wide, inner = re.search(r"<title>(\d+)/(\d+)</title>", browse("--dump-dom").stdout).groups()
    assert int(wide) <= int(inner)
