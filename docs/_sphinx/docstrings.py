"""Docstrings are written to be read in a terminal; here their formulas and tables become Sphinx's."""

import re
from inspect import getsource

from sphinx.util import inspect

FORMULA = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n(?= {4}))+)")
TABLE = re.compile(r"^\|(.+)\|\n\|[-:| ]+\|\n((?:\|.+\|\n)+)", re.M)
# Stars and bars of prose stand for themselves; not those of code, formulas, tables, examples and `*args:`.
SIGN = re.compile(r"`[^`]*`|::(?: text)?\n\n(?: {4}.*\n|\n)+|^\|.*\|$|>>> (?:.+\n)+|^ +\*+\w+:|([*|])", re.M)
# A field of a class, with the comment behind it or above.
FIELD = re.compile(r"^(?: {4}# (.*)\n)? {4}(\w+): .*?(?:  # (?!pyright)(.*))?$", re.M)
SECTION = re.compile(r"^(?:Args|Attributes):$", re.M)
# Napoleon takes what is before the first colon of these for a type; a colon at their beginning says none.
TYPE = re.compile(r"^Returns:\n +", re.M)
PAGE = re.compile(r"docs/([\w/]+)\.md")


def escape(text: str) -> str:
    return SIGN.sub(lambda match: "\\" + match[1] if match[1] else match[0], text)


def list_table(match: re.Match[str]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (match[1], *(line.strip("|") for line in match[2].splitlines())):
        first, *others = (escape(cell.strip()) for cell in row.split(" | "))
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return "\n".join([*lines, ""])


def literal(match: re.Match[str]) -> str:
    """Show a formula as code, but as text where a prime would begin a string."""
    return f".. code-block:: text\n\n{match[1]}" if "'" in match[1] else f"::\n\n{match[1]}"


def fields_section(cls: type) -> str:
    """Describe the fields of a class by the comments of its source."""
    names = getattr(cls, "__match_args__", ())
    found = {name: above or behind for above, name, behind in FIELD.findall(getsource(cls)) if name in names}
    lines = [f"  {name}: {comment}" for name, comment in found.items()]
    return "\n".join(["", "Attributes:", *lines, ""]) if found else ""


def process(app, what, name, obj, options, lines: list[str]) -> None:
    text = FORMULA.sub(literal, "\n".join(lines) + "\n")
    text = PAGE.sub(r":doc:`/\1`", TYPE.sub(r"\g<0>: ", text))
    if what == "class" and not SECTION.search(text):
        text += fields_section(obj)
    if what == "property":
        text = ": " + text
    lines[:] = TABLE.sub(list_table, escape(text)).splitlines()


def process_signature(app, what, name, obj, options, signature: str | None, result):
    """Leave out what Flax adds to every module, and how Python prints a dtype."""
    if signature == "(*args, **kwargs)":  # of the metaclass of NNX
        of_init = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(of_init, show_annotation=False)
    plain = re.sub(r", parent=<.*>, name=None|<class 'jax.numpy.(\w+)'>", r"\1", signature or "")
    return re.sub(r"<function (\w+)>", r"\1", plain) or None, None


def skip_field(app, what, name, obj, skip: bool, options) -> bool | None:
    return True if type(obj).__name__ == "_tuplegetter" else None  # `fields_section` has it


def setup(app) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_field)
    return {"parallel_read_safe": True}
