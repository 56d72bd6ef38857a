"""A report as one page of HTML that needs nothing beside it: text and pictures in, text out."""

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Picture(NamedTuple):
    svg: str  # an element, laid into the page as it is
    caption: str


class Table(NamedTuple):
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # the first cell names the row


class Section(NamedTuple):
    title: str
    sentences: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None


CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --soft: #5a626c; --line: #dcdfe3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #121212; --ink: #e3e5e8; --soft: #a2a9b2; --line: #34383e; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; text-size-adjust: 100%; overflow-wrap: anywhere; }
main { max-width: 66rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem); }
h1, h2 { line-height: 1.25; font-weight: 600; text-wrap: balance; }
h1 { margin: 0 0 1rem; font-size: clamp(1.6rem, 1.3rem + 1.5vw, 2.25rem); letter-spacing: -0.01em; }
h2 { margin: 0 0 0.75rem; font-size: 1.3rem; }
p { max-width: 42rem; margin: 0 0 0.6rem; text-wrap: pretty; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 0.2em; }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1.5rem; margin: 1.25rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 0.3rem 0; }
section { margin-top: 3rem; padding-top: 2rem; border-top: 1px solid var(--line); }
.pictures { display: grid; gap: 2rem 2.5rem; margin-top: 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption { margin-top: 0.6rem; color: var(--soft); font-size: 0.9rem; line-height: 1.45; }
.scroll { overflow-x: auto; margin-top: 1rem; background: /* a shadow where the table goes on */
  linear-gradient(to left, var(--paper) 50%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll; }
table { width: max-content; border-collapse: collapse; font-size: 0.9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0 0.5rem 1.1rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: baseline; font-weight: inherit; max-width: 10rem; overflow-wrap: normal; }
thead th { max-width: 6.5rem; color: var(--soft); vertical-align: bottom; white-space: normal;
  overflow-wrap: normal; }
th:first-child { max-width: min(14rem, 45vw); padding-left: 0; text-align: left; white-space: normal; }
footer { margin-top: 4rem; color: var(--soft); font-size: 0.85rem; }
@media print {
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  .pictures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  table { width: auto; }
  th, td { padding-left: 0.75rem; white-space: normal; overflow-wrap: normal; }
}
"""


def render(title: str, intro: str, sections: Sequence[Section], footer: str) -> str:
    """Returns the page: what it is, its sections one below the other, and a footer."""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing is fetched, whatever a picture holds.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title>",
        f"<style>{CSS}</style>",
        "</head>",
        "<body>",
        "<main>",
        "<header>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(intro)}</p>",
        *(_contents(sections) if len(sections) > 2 else ()),
        "</header>",
    ]
    for number, section in enumerate(sections, 1):
        lines += _section(number, section)
    lines += [f"<footer><p>{escape(footer)}</p></footer>", "</main>", "</body>", "</html>", ""]
    return "\n".join(lines).encode(errors="replace").decode()  # names of files may hold what no page can


def _contents(sections: Sequence[Section]) -> list[str]:
    links = [
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections, 1)
    ]
    return ['<nav aria-label="Contents">', "<ul>", *links, "</ul>", "</nav>"]


def _section(number: int, section: Section) -> list[str]:
    heading = f"section-{number}"
    lines = [f'<section aria-labelledby="{heading}">', f'<h2 id="{heading}">{escape(section.title)}</h2>']
    lines += [f"<p>{escape(sentence)}</p>" for sentence in section.sentences]
    if section.pictures:
        lines.append('<div class="pictures">')
        for svg, caption in section.pictures:
            lines += ["<figure>", svg, f"<figcaption>{escape(caption)}</figcaption>", "</figure>"]
        lines.append("</div>")
    if section.table:
        # What scrolls can be reached by keyboard, and has a name.
        lines.append(f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{heading}">')
        lines += [*_table(section.table), "</div>"]
    return [*lines, "</section>"]


def _table(table: Table) -> list[str]:
    header = "".join(f'<th scope="col">{_breakable(cell)}</th>' for cell in table.header)
    lines = ["<table>", f"<thead><tr>{header}</tr></thead>", "<tbody>"]
    for name, *cells in table.rows:
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{_breakable(name)}</th>{row}</tr>')
    return [*lines, "</tbody>", "</table>"]


def _breakable(name: str) -> str:
    """Returns a name like `runs/key=value,key=value`, whose parts may go on separate lines."""
    return re.sub("[/,_]", r"\g<0><wbr>", escape(name))
