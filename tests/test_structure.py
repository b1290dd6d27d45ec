"""The package's folders: what is private in one is not imported from another."""

import ast
from pathlib import Path

import pytest

import stochgrad

PACKAGE = Path(__file__).parents[1] / "stochgrad"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path.read_text()
    for path in PACKAGE.rglob("*.py")
}


def foreign_private_imports(module: str, source: str) -> list[str]:
    """Imports of modules or names with an underscore from outside of the module's folder."""
    folder = module.removesuffix(".__init__").split(".")
    folder = folder if module.endswith(".__init__") else folder[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [
        name
        for name in names
        if (parts := name.split("."))[0] == "stochgrad"
        and any(
            part.startswith("_") and not part.startswith("__") and parts[:i] != folder[:i]
            for i, part in enumerate(parts)
        )
    ]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_folder_imports_what_is_private_in_another(module):
    assert not foreign_private_imports(module, MODULES[module])


@pytest.mark.parametrize(
    "source",
    [
        "from stochgrad.flows._draw import check_flow",
        "from stochgrad.flows import _draw",
        "import stochgrad.flows._draw",
        "from stochgrad.flows import _check",
        "def late():\n    from stochgrad.flows._draw import check_flow",
    ],
)
def test_a_private_import_is_noticed(source):
    assert foreign_private_imports("stochgrad.interop.numpyro._model", source)


def test_a_folder_may_import_its_own_modules():
    source = "from stochgrad.flows._draw import check_flow"
    assert not foreign_private_imports("stochgrad.flows._reverse", source)
    assert not foreign_private_imports("stochgrad.flows.__init__", source)


def test_names_that_come_on_first_use_are_listed_and_there():
    listed = set(dir(stochgrad))
    wanted = {"from_numpyro", "infer", "numpyro", "flows", "potentials", "diagnostics", "llm"}
    assert wanted <= listed
    for name in listed:
        assert getattr(stochgrad, name) is not None or name.startswith("__")
