"""The parts of a written report, and the report as Markdown and as one HTML page."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from msgspec import Struct

from fatui.untrusted_text import html, markdown, markdown_block, markdown_cell, markdown_code


class Paragraph(Struct, frozen=True):
    """A text that makes no claim about measurements."""

    text: str


class Claim(Struct, frozen=True):
    """A claim supported by measurements, with its figures."""

    text: str


class MissingData(Struct, frozen=True):
    """A statement that cannot be made for lack of data, and the command that would measure it."""

    text: str
    command: str | None = None


class Table(Struct, frozen=True):
    """Rows of text; the first column names the row, others hold figures unless listed in `words`."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[str] = frozenset()
    """Headings of the columns that hold words, left-aligned."""

    def is_figures(self, column: int) -> bool:
        """Whether a column holds figures, right-aligned."""
        return column > 0 and self.heads[column] not in self.words


class Chart(Struct, frozen=True):
    """A chart as SVG, with its title."""

    title: str
    svg: str
    text: str = ""
    """The chart as lines of text, for Markdown; empty if it has none there."""


class Card(Struct, frozen=True):
    """A verdict: one line, why, and what it rests on."""

    head: str
    points: tuple[str, ...]
    grounds: tuple[str, ...]
    cautious: bool = False
    """Whether the grounds ask for caution."""


class Code(Struct, frozen=True):
    """A command or snippet to copy."""

    text: str
    language: str


Block = Paragraph | Claim | MissingData | Table | Chart | Card | Code


class Section(Struct, frozen=True):
    """A heading and its blocks."""

    title: str
    blocks: tuple[Block, ...]


class Document(Struct, frozen=True):
    """The whole report."""

    title: str
    sections: tuple[Section, ...]


def section(title: str, *parts: Block | Sequence[Block]) -> Section:
    """Build a section of single blocks and sequences of blocks, in order."""
    blocks: list[Block] = []
    for part in parts:
        blocks += part if isinstance(part, Sequence) else [part]
    return Section(title, tuple(blocks))


def joined(words: Sequence[str]) -> str:
    """Join words as in a sentence: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def counted(number: int, word: str) -> str:
    """Format a number with its noun: "1 case", "6 cases"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def to_markdown(document: Document) -> str:
    """Render the document as Markdown that reads well in a terminal too."""
    parts = [f"# {markdown(document.title)}"]
    for each in document.sections:
        parts.append(f"## {markdown(each.title)}")
        bullets: list[str] = []
        for block in each.blocks:
            if isinstance(block, Claim | MissingData):
                bullets.append(f"- {_markdown_sentence(block)}")
                continue
            if bullets:
                parts.append("\n".join(bullets))
                bullets = []
            parts += _markdown_block(block)
        if bullets:
            parts.append("\n".join(bullets))
    return "\n\n".join(parts) + "\n"


def _markdown_sentence(block: Claim | MissingData) -> str:
    if isinstance(block, MissingData):
        return markdown(block.text) + (f" Run {markdown_code(block.command)}" if block.command else "")
    return markdown(block.text)


def _markdown_block(block: Block) -> list[str]:
    match block:
        case Paragraph():
            return [markdown(block.text)]
        case Code():
            return [markdown_block(block.text, block.language)]
        case Chart():
            return [f"**{markdown(block.title)}**", markdown_block(block.text, "text")] if block.text else []
        case Card():
            points = "\n".join(f"- {markdown(point)}" for point in block.points)
            return [
                part for part in (f"**{markdown(block.head)}**", points, markdown(" · ".join(block.grounds))) if part
            ]
        case Table():
            return [f"**{markdown(block.caption)}**", _markdown_table(block)]
        case _:
            raise TypeError(f"no block of a document: {block!r}")


def _markdown_table(table: Table) -> str:
    rule = tuple("---:" if table.is_figures(column) else "---" for column in range(len(table.heads)))
    lines = (table.heads, rule, *table.rows)
    return "\n".join(f"| {' | '.join(markdown_cell(text) for text in line)} |" for line in lines)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{first}
<nav aria-label="Contents"><ul>
{contents}
</ul></nav>
{sections}
</main>
</body>
</html>
"""


def to_html(document: Document) -> str:
    """Render the document as an HTML page."""
    sections = [_html_section(each, number) for number, each in enumerate(document.sections)]
    return PAGE.format(
        title=html(document.title),
        style=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        contents="\n".join(
            f'<li><a href="#part-{number}">{html(each.title)}</a></li>' for number, each in enumerate(document.sections)
        ),
        first="\n".join(sections[:1]),
        sections="\n".join(sections[1:]),
    )


def _html_section(part: Section, number: int) -> str:
    lines = [f'<section aria-labelledby="part-{number}">', f'<h2 id="part-{number}">{html(part.title)}</h2>']
    for is_bullet, found in groupby(part.blocks, lambda block: isinstance(block, Claim | MissingData)):
        blocks = list(found)
        lines += [_html_bullets(blocks)] if is_bullet else [_html_block(block) for block in blocks]
    return "\n".join([*lines, "</section>"])


def _html_bullets(blocks: Sequence[Block]) -> str:
    return "\n".join(['<ul class="findings">', *(_html_bullet(block) for block in blocks), "</ul>"])


def _html_bullet(block: Block) -> str:
    match block:
        case Claim():
            return f"<li>{html(block.text)}</li>"
        case MissingData():
            how = f" Run <code>{html(block.command)}</code>" if block.command else ""
            return f'<li class="missing">{html(block.text)}{how}</li>'
        case _:
            raise TypeError(f"no bullet: {block!r}")


def _html_block(block: Block) -> str:
    match block:
        case Paragraph():
            return f"<p>{html(block.text)}</p>"
        case Code():
            return f"<pre><code>{html(block.text)}</code></pre>"
        case Chart():
            caption = html(block.title)
            drawing = block.svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
            return f"<figure>\n<figcaption>{caption}</figcaption>\n{drawing}\n</figure>"
        case Card():
            points = "".join(f"<li>{html(point)}</li>" for point in block.points)
            caution = " cautious" if block.cautious else ""
            grounds = html(" · ".join(block.grounds))
            return (
                f'<div class="card"><p class="head">{html(block.head)}</p>\n<ul>{points}</ul>\n'
                f'<p class="grounds{caution}">{grounds}</p></div>'
            )
        case Table():
            return _html_table(block)
        case _:
            raise TypeError(f"no block of a document: {block!r}")


def _html_table(table: Table) -> str:
    caption = html(table.caption)
    heads = "".join(_html_cell(text, column, table, "th") for column, text in enumerate(table.heads))
    body = "\n".join(
        f"<tr>{''.join(_html_cell(text, column, table, 'td') for column, text in enumerate(row))}</tr>"
        for row in table.rows
    )
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{caption}"><table>\n<caption>{caption}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_cell(text: str, column: int, table: Table, tag: str) -> str:
    kind = "figure" if table.is_figures(column) else "words"
    scope = ' scope="col"' if tag == "th" else ""
    return f'<{tag}{scope} class="{kind}">{html(text)}</{tag}>'
