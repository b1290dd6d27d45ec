"""Sphinx configuration: ``sphinx-build -W docs docs/_build``."""

import re
import textwrap

import stochgrad

project = "stochgrad"
release = stochgrad.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
html_theme = "sphinx_book_theme"
autodoc_typehints = "none"
exclude_patterns = ["_build"]


def _display(match):
    body = textwrap.indent(textwrap.dedent(match[2]).strip(), match[1] + "    ")
    return f"\n{match[1]}.. math::\n\n{body}\n"


def dollars_to_math(app, what, name, obj, options, lines):
    """Docstrings write mathematics between dollars, as the pages do."""
    text = "\n".join(lines)
    text = re.sub(r"^( *)\$\$(.+?)\$\$", _display, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$([^$]+?)\$", r":math:`\1`", text)
    lines[:] = text.split("\n")


def setup(app):
    """Run after napoleon, which has the default priority."""
    app.connect("autodoc-process-docstring", dollars_to_math, priority=900)
