"""Sphinx's configuration: `sphinx-build -W docs build/site`."""

import sys
from pathlib import Path

import jbn

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_sphinx")]

project = "jbn"
author = "The developers of jbn"
release = version = jbn.__version__
html_theme = "sphinx_book_theme"
html_title = "jbn"
html_static_path = ["_sphinx/static"]
html_css_files = ["width.css"]
html_theme_options = {"navbar_persistent": [], "show_toc_level": 2}
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "docstrings",
    "keys",
    "references",
]

# Notebooks are shown as they were run last; the tests run them.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "literal"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Attributes", "params_style")]  # as of arguments: without types

# Without the internet, the few names that these pages use.
URLS = {
    "flax": "https://flax.readthedocs.io/en/latest/",
    "jax": "https://docs.jax.dev/en/latest/",
    "numpy": "https://numpy.org/doc/stable/",
    "optax": "https://optax.readthedocs.io/en/latest/",
}
intersphinx_mapping = {name: (url, (None, f"_sphinx/inventories/{name}.inv")) for name, url in URLS.items()}
intersphinx_timeout = 5
