"""The documentation holds: names, examples, links."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import stochgrad

ROOT = Path(__file__).parents[1]
MODULES = [
    m.name
    for m in pkgutil.walk_packages(stochgrad.__path__, "stochgrad.")
    if "__main__" not in m.name
]


NAMESPACES = [
    *("", ".diagnostics", ".em", ".federated", ".flower", ".flows", ".gradients", ".integrators"),
    *(".kernels", ".llm", ".numpyro", ".potentials", ".sgmcmc"),
]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_in_the_reference_and_completes_under_tab(namespace):
    module = importlib.import_module(f"stochgrad{namespace}")
    pages = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    shown = set(re.findall(r":: (stochgrad[\w.]*)", pages))
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    places = {f"stochgrad{namespace}.{{}}", "stochgrad.{}"}
    missing = {name for name in public if not any(p.format(name) in shown for p in places)}
    assert not missing
    here = {name for name in shown if name.rpartition(".")[0] == module.__name__}
    assert not {name.rpartition(".")[2] for name in here} - public
    assert public <= set(dir(module))
    assert not {name for name in dir(module) if name.startswith("_")} - {"__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_every_link_between_pages_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
@pytest.mark.pages
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        *("start/numpyro", "start/arviz", "start/potentials", "start/federated", "start/flows"),
        *("start/chain_of_thought", "howto/samplers", "howto/scale", "howto/privacy"),
        *("howto/debug", "concepts/orders"),
    ],
)
def test_the_pages_run(page, monkeypatch, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    blocks = [b for b in blocks if "MCMC(" not in b]  # tests/interop/test_numpyro_kernels.py
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        space = {}
        for block in blocks:
            exec(compile(block, page, "exec"), space)
    if page == "start/numpyro":
        assert space["draws"].finite.all()
        assert space["data"].posterior["scale"].min() >= 0
    if page == "start/arviz":
        assert space["draws"].verdict.ok
        assert list(space["elpd"]) == ["schools", "one level"]
    if page == "howto/debug":
        assert all(run.verdict.ok for run in space["runs"])
    if page == "howto/samplers":
        assert 0 < len(space["snapshots"].positions[0]) < 1000
        assert space["center"].distance < 1
    if page == "start/federated":
        truth = space["draws"].positions.mean(axis=(0, 1))
        assert abs(space["again"].positions.mean(axis=(0, 1)) - truth).max() < 0.05
        assert abs(space["over_the_wire"].positions.mean(axis=(0, 1)) - truth).max() < 0.1
        assert (space["report"].margin > 0).all()
    if page == "start/chain_of_thought":
        assert space["stats"].reward[-50:].mean() > 1.5 * space["stats"].reward[:50].mean()
        assert abs(space["fit"].model["mean"] - jax.numpy.array([-1.0, 1.0])).max() < 0.3
    if page == "start/potentials":
        assert space["run"].sound.all()
        assert (space["bands"].epistemic > space["bands"].sampling).any()
    if page == "howto/scale":
        assert space["again"].num_draws == 2000
        spread = space["again"].positions[:].std(axis=(0, 1))
        assert abs(spread / space["expected_sd"] - 1).max() < 0.2
    if page == "concepts/orders":
        assert abs(space["found"].position_order - 2) < 0.1
        assert abs(space["second"].value * 2001 - 1).max() < 0.2
