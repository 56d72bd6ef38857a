"""Names of the API that stand as code, in docstrings and on pages, become links to it."""

import re

from docutils import nodes
from sphinx import addnodes

NAME = re.compile(r"(?:jbn|jax|flax|optax)(?:\.\w+)+")


def link(app, doctree) -> None:
    for literal in list(doctree.findall(nodes.literal)):
        name = NAME.match(literal.astext())
        if name and not isinstance(literal.parent, (nodes.reference, addnodes.pending_xref)):
            reference = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=name[0], refwarn=False)
            literal.replace_self(reference)
            reference += literal


def setup(app) -> dict[str, bool]:
    app.connect("doctree-read", link)
    return {"parallel_read_safe": True}
