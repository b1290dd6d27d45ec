"""Sphinx configuration: ``sphinx-build -W docs docs/_build``."""

import stochgrad

project = "stochgrad"
release = stochgrad.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]
html_theme = "sphinx_book_theme"
autodoc_typehints = "none"
exclude_patterns = ["_build"]
mathjax3_config = {"tex": {"inlineMath": [["$", "$"]], "displayMath": [["$$", "$$"]]}}
