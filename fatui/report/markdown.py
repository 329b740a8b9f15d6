"""A report as Markdown: the findings and tables; charts are for the HTML."""

from fatui.report.document import Block, Chart, Code, Document, Finding, Missing, Paragraph, Table


def to_markdown(document: Document) -> str:
    """The document as text that reads in a terminal and on the web."""
    parts = [f"# {_plain(document.title)}"]
    for each in document.sections:
        parts.append(f"## {_plain(each.title)}")
        bullets: list[str] = []
        for block in each.blocks:
            if isinstance(block, Finding | Missing):
                bullets.append(f"- {_sentence(block)}")
                continue
            if bullets:
                parts.append("\n".join(bullets))
                bullets = []
            parts += _block(block)
        if bullets:
            parts.append("\n".join(bullets))
    return "\n\n".join(parts) + "\n"


def _sentence(block: Finding | Missing) -> str:
    if isinstance(block, Missing):
        return _plain(block.text) + (f" Run `{block.command}`" if block.command else "")
    return _plain(block.text)


def _block(block: Block) -> list[str]:
    match block:
        case Paragraph():
            return [_plain(block.text)]
        case Code():
            return [f"```{block.language}\n{block.text}\n```"]
        case Chart():
            return []
        case Table():
            return [f"**{_plain(block.caption)}**", _table(block)]
        case _:
            raise TypeError(f"no block of a document: {block!r}")


def _table(table: Table) -> str:
    rule = tuple("---:" if table.is_figures(column) else "---" for column in range(len(table.heads)))
    lines = (table.heads, rule, *table.rows)
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(_plain(text).replace("|", "\\|").split())


def _plain(text: str) -> str:
    """Text whose characters mean themselves."""
    for sign in ("\\", "`", "*", "_", "<", "[", "#"):
        text = text.replace(sign, f"\\{sign}")
    return text
