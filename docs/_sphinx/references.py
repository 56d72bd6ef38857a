"""Names of the API become links to it, and links to a README outside of docs/ those to its page."""

import re

from docutils import nodes
from sphinx import addnodes

NAME = re.compile(r"(?:jbn|jax|flax|numpy|optax)(?:\.\w+)+")

PAGES = {
    "../../benchmarks/README.md": "../theory/all_benchmarks.md",
    "../../examples/README.md": "../usage/recipes.md",
}


def link_pages(app, docname, source: list[str]) -> None:
    for readme, page in PAGES.items():
        source[0] = source[0].replace(f"]({readme}", f"]({page}")


def link_names(app, doctree) -> None:
    for literal in list(doctree.findall(nodes.literal)):
        name = NAME.match(literal.astext())
        if name and not isinstance(literal.parent, (nodes.reference, addnodes.pending_xref)):
            target = {"refdomain": "py", "reftype": "obj", "reftarget": name[0]}
            reference = addnodes.pending_xref("", refwarn=False, **target)
            literal.replace_self(reference)
            reference += literal


def setup(app) -> dict[str, bool]:
    app.connect("source-read", link_pages)
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True}
