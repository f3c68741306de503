"""Pages: blocks of text, tables and pictures as Markdown, and as one HTML page that needs nothing else."""

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; cells are plain text. The first column is aligned left, the others right if `numbers`."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    """A picture, as the bytes of a PNG."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines as they are."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A section of the report."""

    title: str
    blocks: tuple[Text | Table | Picture | Code, ...]


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    """Return the report as Markdown; pictures are files in report/ beside it."""
    lines = [f"# {title}", ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        for block in part.blocks:
            lines += [*_MARKDOWN[type(block)](block), ""]
    return "\n".join(lines)


def to_html(title: str, parts: Sequence[Part]) -> str:
    """Return the report as one page that needs nothing else: styles and pictures are in it, and it runs no script."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for part in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        body += [_HTML[type(block)](block) for block in part.blocks]
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))


def _markdown_table(table: Table) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:" if table.numbers else "---"] * (len(table.head) - 1)) + "|"
    return [line(table.head), rule, *map(line, table.rows)]


def _html_table(table: Table) -> str:
    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join(line("td", row) for row in table.rows)
    return f'<div class="wide"><table>\n<thead>{line("th", table.head)}</thead>\n<tbody>{rows}</tbody>\n</table></div>'


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


_MARKDOWN: dict[type, Callable[..., list[str]]] = {
    Text: lambda block: [block.text],
    Table: _markdown_table,
    Picture: lambda block: [f"![{block.caption}](report/{block.name}.png)", "", block.caption],
    Code: lambda block: ["```", *block.lines, "```"],
}
_HTML: dict[type, Callable[..., str]] = {
    Text: lambda block: f"<p>{html.escape(block.text)}</p>",
    Table: _html_table,
    Picture: _html_picture,
    Code: lambda block: f"<pre>{html.escape(chr(10).join(block.lines))}</pre>",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; }
th, td { padding: .35em .8em; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { vertical-align: bottom; font-weight: 600; background: #f6f6f6; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9em; }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: .85em; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
