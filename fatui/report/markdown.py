"""A report as Markdown: findings and tables, without charts."""

from fatui.report.document import Block, Chart, Claim, Code, Document, MissingData, Paragraph, Table
from fatui.untrusted_text import markdown, markdown_block, markdown_cell, markdown_code


def to_markdown(document: Document) -> str:
    """Render the document as Markdown that reads well in a terminal too."""
    parts = [f"# {markdown(document.title)}"]
    for each in document.sections:
        parts.append(f"## {markdown(each.title)}")
        bullets: list[str] = []
        for block in each.blocks:
            if isinstance(block, Claim | MissingData):
                bullets.append(f"- {_sentence(block)}")
                continue
            if bullets:
                parts.append("\n".join(bullets))
                bullets = []
            parts += _block(block)
        if bullets:
            parts.append("\n".join(bullets))
    return "\n\n".join(parts) + "\n"


def _sentence(block: Claim | MissingData) -> str:
    if isinstance(block, MissingData):
        return markdown(block.text) + (f" Run {markdown_code(block.command)}" if block.command else "")
    return markdown(block.text)


def _block(block: Block) -> list[str]:
    match block:
        case Paragraph():
            return [markdown(block.text)]
        case Code():
            return [markdown_block(block.text, block.language)]
        case Chart():
            return []
        case Table():
            return [f"**{markdown(block.caption)}**", _table(block)]
        case _:
            raise TypeError(f"no block of a document: {block!r}")


def _table(table: Table) -> str:
    rule = tuple("---:" if table.is_figures(column) else "---" for column in range(len(table.heads)))
    lines = (table.heads, rule, *table.rows)
    return "\n".join(f"| {' | '.join(markdown_cell(text) for text in line)} |" for line in lines)
