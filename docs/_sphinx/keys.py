"""The directive `{keys} Model`: the keys of a class of train.config.schema, as its source describes them."""

import ast
import inspect
import json
import re
from dataclasses import fields, is_dataclass
from typing import Literal, get_args, get_origin

from sphinx.util.docutils import SphinxDirective

from train.config import schema


def descriptions(cls: type) -> dict[str, str]:
    """Collect the string under each field, with values as code."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    pairs = zip(body.body, body.body[1:])
    return {
        field.target.id: re.sub(r'(\w+ = )?"\w+"', r"`\g<0>`", " ".join(text.value.value.split()))
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def choices(annotation) -> str:
    first, annotation = (
        ("Any", get_args(annotation)[0]) if get_origin(annotation) is tuple else ("One", annotation)
    )
    if get_origin(annotation) is not Literal:
        return ""
    return f" {first} of {', '.join(f'`{name}`' for name in get_args(annotation))}."


def toml(value) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


class Keys(SphinxDirective):
    required_arguments = 1

    def run(self):
        cls = getattr(schema, self.arguments[0])
        prefix = "" if cls is schema.Config else cls.__name__.lower() + "."
        text = descriptions(cls)
        rows = ["| key | default | what it is |", "|---|---|---|"]
        for field in fields(cls):
            if not is_dataclass(field.type):
                default = "`runs/` and the file's name" if field.name == "run_dir" else toml(field.default)
                what = text[field.name] + choices(field.type)
                rows.append(f"| `{prefix}{field.name}` | {default} | {what} |")
        return self.parse_text_to_nodes("\n".join(rows))


def setup(app) -> dict[str, bool]:
    app.add_directive("keys", Keys)
    return {"parallel_read_safe": True}
