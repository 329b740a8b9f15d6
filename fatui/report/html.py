"""A report as one HTML page, without scripts or external resources; wide tables scroll by themselves."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from fatui.report.document import Block, Chart, Claim, Code, Document, MissingData, Paragraph, Section, Table
from fatui.untrusted_text import html

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
    return PAGE.format(
        title=html(document.title),
        style=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        contents="\n".join(
            f'<li><a href="#part-{number}">{html(each.title)}</a></li>' for number, each in enumerate(document.sections)
        ),
        sections="\n".join(_section(each, number) for number, each in enumerate(document.sections)),
    )


def _section(part: Section, number: int) -> str:
    lines = [f'<section aria-labelledby="part-{number}">', f'<h2 id="part-{number}">{html(part.title)}</h2>']
    for is_bullet, found in groupby(part.blocks, lambda block: isinstance(block, Claim | MissingData)):
        blocks = list(found)
        lines += [_bullets(blocks)] if is_bullet else [_block(block) for block in blocks]
    return "\n".join([*lines, "</section>"])


def _bullets(blocks: Sequence[Block]) -> str:
    return "\n".join(['<ul class="findings">', *(_bullet(block) for block in blocks), "</ul>"])


def _bullet(block: Block) -> str:
    match block:
        case Claim():
            return f"<li>{html(block.text)}</li>"
        case MissingData():
            how = f" Run <code>{html(block.command)}</code>" if block.command else ""
            return f'<li class="missing">{html(block.text)}{how}</li>'
        case _:
            raise TypeError(f"no bullet: {block!r}")


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return f"<p>{html(block.text)}</p>"
        case Code():
            return f"<pre><code>{html(block.text)}</code></pre>"
        case Chart():
            caption = html(block.title)
            drawing = block.svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
            return f"<figure>\n<figcaption>{caption}</figcaption>\n{drawing}\n</figure>"
        case Table():
            return _table(block)
        case _:
            raise TypeError(f"no block of a document: {block!r}")


def _table(table: Table) -> str:
    caption = html(table.caption)
    heads = "".join(_cell(text, column, table, "th") for column, text in enumerate(table.heads))
    body = "\n".join(
        f"<tr>{''.join(_cell(text, column, table, 'td') for column, text in enumerate(row))}</tr>" for row in table.rows
    )
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{caption}"><table>\n<caption>{caption}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(text: str, column: int, table: Table, tag: str) -> str:
    kind = "figure" if table.is_figures(column) else "words"
    scope = ' scope="col"' if tag == "th" else ""
    return f'<{tag}{scope} class="{kind}">{html(text)}</{tag}>'
