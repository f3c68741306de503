"""Markup to plain text: HTML pages and manual pages of documentation, without what surrounds their prose."""

import re
from html.parser import HTMLParser

_NO_TEXT = {"script", "style", "head", "nav", "svg", "template", "noscript", "button", "footer", "form"}
# Navigation of Sphinx, DocBook and AsciiDoc pages, and the mark that links to a heading.
_NO_TEXT_CLASSES = {"navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "footer", "toctree-wrapper"}
_NO_TEXT_IDS = {"footer", "footer-text", "toc", "indices-and-tables", "contents"}
_BLOCKS = {"p", "div", "section", "article", "li", "dt", "dd", "pre", "blockquote", "table", "h1", "h2", "h3", "h4"}
_BLOCKS |= {"h5", "h6", "ul", "ol", "dl", "hr", "caption"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

_ROFF_CHARACTERS = {"aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "'", "cq": "'", "bu": "•", "em": "—", "en": "-"}
_ROFF_CHARACTERS |= {"co": "©", "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "mi": "-", "hy": "-"}
_ROFF_STRINGS = {"--": "-", 'L"': '"', 'R"': '"', "PI": "pi", "lq": "“", "rq": "”"}
_ROFF_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?\d+|\*(?:\((..)|\[([^]]*)\]|(.))|\((..)|\[([^]]*)\]|\"|(.))"
)
_ROFF_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_ROFF_TEXT_MACROS = {"B", "I", "SM", "SB", "BR", "RB", "BI", "IB", "IR", "RI", "TQ"}
_ROFF_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}


def html_to_text(page: str) -> str:
    """Return the prose of an HTML page, paragraphs apart by blank lines: its main part, where the page marks one."""
    reader = _PageText()
    reader.feed(page)
    reader.close()
    return tidy("".join(reader.main or reader.all))


def man_to_text(page: str) -> str:
    """Return the prose of a manual page in roff (man macros), paragraphs apart by blank lines."""
    parts: list[str] = []
    filled, in_definition, begun = True, False, False
    for line in page.splitlines():
        if in_definition:
            in_definition = not line.startswith("..")
            continue
        if line[:1] not in (".", "'"):
            if begun:
                parts += [_roff_text(line), " " if filled and line.strip() else "\n"]
            continue
        name, _, rest = line[1:].strip().partition(" ")
        arguments = [_roff_text(quoted.replace('""', '"') or bare) for quoted, bare in _ROFF_ARGUMENT.findall(rest)]
        if name in ("de", "ig", "am"):
            in_definition = True
        elif name in ("SH", "SS"):
            begun, filled = True, True  # what stands before the first heading defines macros
            parts += ["\n\n", " ".join(arguments), "\n\n"]
        elif name in ("PP", "P", "LP", "TP", "HP", "IP", "Sp", "sp"):
            parts += ["\n\n", *(f"{argument} " for argument in arguments[:1] if name == "IP")]
        elif name in ("nf", "Vb", "EX", "fi", "Ve", "EE"):
            filled = name in ("fi", "Ve", "EE")
            parts.append("\n\n")
        elif name == "br":
            parts.append("\n")
        elif name in _ROFF_TEXT_MACROS and begun:
            parts += [("" if name in _ROFF_ALTERNATING else " ").join(arguments), " " if filled else "\n"]
    return tidy("".join(parts))


def tidy(text: str) -> str:
    """Return text without trailing spaces, and with one blank line where there were several."""
    lines = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


class _PageText(HTMLParser):
    """Collects the text of a page, and beside it that of the element with role="main"."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.all: list[str] = []
        self.main: list[str] = []
        # The element whose inside is dropped or is the main part: its tag, and how many of that tag are open. Counting
        # one tag alone is proof against others that pages leave open.
        self._dropped: tuple[str, int] | None = None
        self._in_main: tuple[str, int] | None = None
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropped:
            self._dropped = _opened(self._dropped, tag)
            return
        values = dict(attrs)
        classes = set((values.get("class") or "").split())
        no_text = tag in _NO_TEXT or classes & _NO_TEXT_CLASSES or values.get("id") in _NO_TEXT_IDS
        if no_text and tag not in _VOID:
            self._dropped = (tag, 1)
            return
        if self._in_main:
            self._in_main = _opened(self._in_main, tag)
        elif values.get("role") == "main":
            self._in_main = (tag, 1)
        self._preformatted += tag == "pre"
        self._put({"br": "\n", "tr": "\n", "td": " ", "th": " "}.get(tag) or ("\n\n" if tag in _BLOCKS else ""))

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            self._dropped = _closed(self._dropped, tag)
            return
        if tag in _BLOCKS:
            self._put("\n\n")
        if tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        if self._in_main:
            self._in_main = _closed(self._in_main, tag)

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._put(data if self._preformatted else re.sub(r"\s+", " ", data))

    def _put(self, text: str) -> None:
        for parts in (self.all, self.main) if self._in_main else (self.all,):
            if text == " " and parts and parts[-1].endswith("\n"):
                continue  # the spaces between tags, which would begin a line
            at_line_start = not parts or parts[-1].endswith("\n")
            if text:
                parts.append(text.lstrip(" ") if at_line_start and not self._preformatted else text)


def _opened(element: tuple[str, int], tag: str) -> tuple[str, int]:
    return (element[0], element[1] + 1) if tag == element[0] else element


def _closed(element: tuple[str, int], tag: str) -> tuple[str, int] | None:
    if tag != element[0]:
        return element
    return (tag, element[1] - 1) if element[1] > 1 else None


def _roff_text(line: str) -> str:
    """Return a line of roff without comments and with its escapes resolved."""
    return _ROFF_ESCAPE.sub(_roff_escape, re.sub(r'\\".*', "", line))


def _roff_escape(match: re.Match[str]) -> str:
    string = match[1] or match[2] or match[3]
    if string:
        return _ROFF_STRINGS.get(string, "")
    character = match[4] or match[5]
    if character:
        return _ROFF_CHARACTERS.get(character, "")
    return {"-": "-", "e": "\\", " ": " ", "~": " ", "'": "'", "`": "`", ".": ".", "\\": "\\"}.get(match[6] or "", "")
