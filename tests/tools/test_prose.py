"""README.md and docs/ stay short and readable, and no link in them leads nowhere."""

import re

import pytest
from commands import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
MOST_LINES = 250
MOST_WORDS = 25
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
NO_PROSE = "|", "#", "    ", "<!--", "!["


def prose(text):
    """Markdown -> its paragraphs and list items, without code and tables. Code counts as a word."""
    lines = ["" if line.startswith(NO_PROSE) else line for line in FENCE.sub("", text).splitlines()]
    for block in re.split(r"\n\s*\n|\n(?=- |\d+\. )", "\n".join(lines)):
        block = re.sub(r"`[^`]*`", "code", " ".join(block.split()))
        yield LINK.sub(r"\1", block)


def sentences(text):
    return [s for block in prose(text) for s in re.split(r"(?<=[.!?])\s+", block) if s]


def number_of_words(sentence):
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    """Targets of the page's relative links that name no file, or no heading of a file."""
    broken = []
    for _, target in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        if ":" in path:  # an address
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.is_file() or anchor and anchor not in anchors(file.read_text()):
            broken.append(target)
    return broken


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES)
def test_every_sentence_is_short(page):
    assert [s for s in sentences(PAGES[page]) if number_of_words(s) > MOST_WORDS] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    assert broken_links(page, PAGES[page]) == []


def test_readme_links_to_every_page_of_the_documentation():
    targets = {target for _, target in LINK.findall(PAGES["README.md"])}
    assert set(PAGES) - {"README.md"} <= targets


def test_a_long_sentence_and_a_broken_link_are_noticed():
    long = f"- Short. {'word ' * MOST_WORDS}`code with spaces` [end](README.md).\n"
    assert [s for s in sentences(long) if number_of_words(s) > MOST_WORDS] == [
        "word " * MOST_WORDS + "code end."
    ]
    assert anchors("# A title: `it`, B/16\n") == {"a-title-it-b16"}
    text = "[a](#none) [b](docs/none.md) [c](docs/data.md#none) [d](docs/data.md#the-audit)\n"
    assert broken_links("README.md", text) == ["#none", "docs/none.md", "docs/data.md#none"]
