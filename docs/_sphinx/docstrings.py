"""Docstrings are written to be read in a terminal; here their formulas and tables become Sphinx's."""

import re

from sphinx.util import inspect

FORMULA = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n(?= {4}))+)")
TABLE = re.compile(r"^\|(.+)\|\n\|[-:| ]+\|\n((?:\|.+\|\n)+)", re.M)
# Stars and bars of prose stand for themselves; not those of code, formulas, tables, examples and `*args:`.
SIGN = re.compile(r"`[^`]*`|::\n\n(?: {4}.*\n|\n)+|^\|.*\|$|>>> (?:.+\n)+|^ +\*+\w+:|([*|])", re.M)


def escape(text: str) -> str:
    return SIGN.sub(lambda match: "\\" + match[1] if match[1] else match[0], text)


def list_table(match: re.Match[str]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (match[1], *(line.strip("|") for line in match[2].splitlines())):
        first, *others = (escape(cell.strip()) for cell in row.split(" | "))
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return "\n".join([*lines, ""])


def process(app, what, name, obj, options, lines: list[str]) -> None:
    text = FORMULA.sub(r"::\n\n\1", "\n".join(lines) + "\n")
    lines[:] = TABLE.sub(list_table, escape(text)).splitlines()


def process_signature(app, what, name, obj, options, signature: str | None, result):
    """Leave out what Flax adds to every module, and how Python prints a dtype."""
    if signature == "(*args, **kwargs)":  # of the metaclass of NNX
        of_init = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(of_init, show_annotation=False)
    plain = re.sub(r", parent=<.*>, name=None|<class 'jax.numpy.(\w+)'>", r"\1", signature or "")
    return re.sub(r"<function (\w+)>", r"\1", plain) or None, None


def setup(app) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", process_signature)
    return {"parallel_read_safe": True}
