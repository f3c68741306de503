"""Pages: sections of text, tables and pictures, as Markdown and as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def markdown(self) -> list[str]:
        """Return its one line."""
        return [self.text]

    def html(self) -> str:
        """Return a paragraph."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Code:
    """Lines in a fixed-width font."""

    lines: Sequence[str]

    def markdown(self) -> list[str]:
        """Return a fenced block."""
        return ["```", *self.lines, "```"]

    def html(self) -> str:
        """Return a preformatted block."""
        return f"<pre>{escape(chr(10).join(self.lines))}</pre>"


@dataclass(frozen=True)
class Table:
    """A table of plain text, the first column aligned left, the others right.

    rows: at least one, cells by column; a missing one is shown as -. columns: by default those of the first row.
    """

    rows: Sequence[Mapping[str, str]]
    columns: Sequence[str] = ()

    @property
    def _lines(self) -> list[list[str]]:
        columns = list(self.columns or self.rows[0])
        return [columns, *([row.get(column, "-") for column in columns] for row in self.rows)]

    def markdown(self) -> list[str]:
        """Return a Markdown table."""
        head, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in self._lines]
        return [head, "|---|" + "---:|" * (len(self._lines[0]) - 1), *rows]

    def html(self) -> str:
        """Return a table that scrolls sideways where it is too wide."""
        head, *rows = self._lines
        columns = "".join(f"<th>{escape(column)}</th>" for column in head)
        body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n<tbody>{body}</tbody>\n</table></div>'


@dataclass(frozen=True)
class Picture:
    """A picture, as the bytes of a PNG."""

    name: str
    png: bytes
    caption: str

    def markdown(self) -> list[str]:
        """Return a reference to the file report/NAME.png, and the caption."""
        return [f"![{self.caption}](report/{self.name}.png)", "", self.caption]

    def html(self) -> str:
        """Return a figure that contains the picture."""
        source = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        caption = escape(self.caption)
        return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


Block = Text | Code | Table | Picture


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
            lines += [*block.markdown(), ""]
    return "\n".join(lines)


def to_html(title: str, sections: Sequence[Section]) -> str:
    """Return a self-contained page: styles and pictures are inside it, and it runs no script."""
    body = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        body += [f"<h2>{escape(section.title)}</h2>", *(block.html() for block in section.blocks)]
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
