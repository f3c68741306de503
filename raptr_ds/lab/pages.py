"""Pages: sections of text, tables and pictures, as Markdown and as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from raptr_ds.markdown import markdown_table


@dataclass(frozen=True)
class Block:
    """A piece of a page as lines of Markdown and as HTML. pictures: the PNG of each file report/NAME.png in it."""

    markdown: Sequence[str]
    html: str
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def text(line: str) -> Block:
    """Return a paragraph."""
    return Block([line], f"<p>{escape(line)}</p>")


def code(lines: Sequence[str]) -> Block:
    """Return lines in a fixed-width font."""
    return Block(["```", *lines, "```"], f"<pre>{escape(chr(10).join(lines))}</pre>")


def table(rows: Sequence[Mapping[str, str]], columns: Sequence[str] = ()) -> Block:
    """Return a table of plain text, the first column aligned left, the others right; in HTML it scrolls if too wide.

    rows: at least one, cells by column; a missing one is shown as -. columns: by default those of the first row.
    """
    columns = columns or list(rows[0])
    cells = [[row.get(column, "-") for column in columns] for row in rows]
    titles = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    html = f'<div class="wide"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody>\n</table></div>'
    return Block(markdown_table(columns, cells, "---:"), html)


def picture(name: str, png: bytes | None, caption: str) -> list[Block]:
    """Return a picture with its caption, none without a PNG; the page contains it, Markdown refers to its file."""
    if png is None:
        return []
    source, alt = f"data:image/png;base64,{base64.b64encode(png).decode()}", escape(caption)
    html = f'<figure><img alt="{alt}" src="{source}"><figcaption>{alt}</figcaption></figure>'
    return [Block([f"![{caption}](report/{name}.png)", "", caption], html, {name: png})]


@dataclass(frozen=True)
class Section:
    """A section of a page."""

    title: str
    blocks: Sequence[Block]


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """Return a page as Markdown; its pictures are files in report/ beside it."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*block.markdown, ""]
    return "\n".join(lines)


def to_html(title: str, sections: Sequence[Section]) -> str:
    """Return a self-contained page: styles and pictures are inside it, and it runs no script."""
    body = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        body += [f"<h2>{escape(section.title)}</h2>", *(block.html for block in section.blocks)]
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


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
