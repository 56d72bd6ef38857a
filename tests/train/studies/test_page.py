import re
from html import escape
from html.parser import HTMLParser

import pytest

from train.studies import charts as pictures
from train.studies.page import CSS, Picture, Section, Table, render

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
ODD = "a <b>&amp; \"q\" 'p' $x_1$ 日本"


class Page(HTMLParser):
    """Checks that every element ends where it should; gathers what elements there are and what they say."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.said = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.said.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.said[self.open[-1]][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def picture(n):
    def describe(axes):
        pictures.line(axes, [0, 1], [0, n], name=ODD, index=n, low=[0, 0], high=[1, n + 1])

    return Picture(pictures.draw(describe, label=f"picture {n}"), f"caption {n}")


@pytest.fixture(scope="module")
def sections():
    table = Table(("Job", "Status", "Steps"), (("batch", "finished", "20,000"), ("a=1,b/c_d", "failed", "7")))
    return [
        Section("First", ("One sentence.", "Another."), (picture(1), picture(2))),
        Section("Second", pictures=(picture(3),)),
        Section("Third", table=table),
    ]


@pytest.fixture(scope="module")
def html(sections):
    return render("Five jobs", "What it is.", sections, "Made today.")


def test_page_has_what_it_was_given_in_order(html):
    said = Page(html).said
    assert said["title"] == said["h1"] == ["Five jobs"]
    assert said["p"] == ["What it is.", "One sentence.", "Another.", "Made today."]
    assert said["h2"] == ["First", "Second", "Third"]
    assert said["figcaption"] == ["caption 1", "caption 2", "caption 3"]
    assert (
        html.index("What it is.")
        < html.index("One sentence.")
        < html.index("caption 1")
        < html.index("batch")
    )


def test_page_says_its_language_and_fits_a_phone(html):
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert html.startswith("<!DOCTYPE html>\n") and page.all("meta")[0] == {"charset": "utf-8"}


def test_page_follows_light_and_dark(html):
    assert "color-scheme: light dark" in html and "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_page_fetches_nothing(html):
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|xmlns", html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object"})
    for _, attributes in page.elements:
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")
    assert "url(" not in CSS
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.all("meta"))


def test_ids_are_unique_and_whatever_is_referred_to_exists(html):
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) | {
        attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes
    }
    assert len(set(ids)) == len(ids) and len(referred) > 9 and referred <= set(ids)


@pytest.mark.parametrize("count, links", [(0, 0), (2, 0), (3, 3), (5, 5)])
def test_more_than_two_sections_have_a_table_of_contents(count, links):
    sections = [Section(f"<{n}>") for n in range(count)]
    page = Page(render("", "", sections, ""))
    assert len(page.all("a")) == links and len(page.all("h2")) == count
    if links:
        assert page.said["a"] == page.said["h2"]
        assert [link["href"][1:] for link in page.all("a")] == [heading["id"] for heading in page.all("h2")]


def test_text_is_shown_as_it_is_written():
    table = Table((ODD, ODD), ((ODD, ODD),))
    html = render(ODD, ODD, [Section(ODD, (ODD,), (Picture("<svg></svg>", ODD),), table)] * 3, ODD)
    said = Page(html).said
    for tag, count in dict(title=1, h1=1, p=5, h2=3, a=3, figcaption=3, td=3).items():
        assert said[tag] == [ODD] * count
    assert said["th"] == [ODD] * 9 and escape(ODD) in html and "<b>" not in html


def test_page_can_be_written_whatever_the_name_of_a_file():
    assert "a?b" in render("a\udc80b", "", [], "")


def test_table_has_named_rows_and_columns(html):
    page = Page(html)
    assert [cell["scope"] for cell in page.all("th")] == ["col"] * 3 + ["row"] * 2
    assert page.said["th"] == ["Job", "Status", "Steps", "batch", "a=1,b/c_d"]
    assert page.said["td"] == ["finished", "20,000", "failed", "7"]


def test_table_scrolls_in_a_box_that_the_keyboard_reaches(html):
    box = next(attributes for attributes in Page(html).all("div") if attributes["class"] == "scroll")
    assert box == {"class": "scroll", "role": "region", "tabindex": "0", "aria-labelledby": "section-3"}
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", CSS)


def test_section_without_pictures_or_table_has_no_box_for_them():
    page = Page(render("", "", [Section("a", ("b",))], ""))
    assert page.all("div") == page.all("figure") == page.all("table") == []


def test_same_input_has_the_same_bytes(sections, html):
    assert render("Five jobs", "What it is.", sections, "Made today.") == html
