"""Markup to plain text: HTML pages and manual pages of documentation, without what surrounds their prose.

HTML is parsed by BeautifulSoup. Manual pages are roff, which it does not read; the few man macros that hold prose are
read here.
"""

import re
from itertools import groupby

from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag

# What is not prose: the code of a page, its forms, the navigation of Sphinx, DocBook and AsciiDoc, and the mark that
# links to a heading.
_NO_TEXT = {"script", "style", "head", "nav", "svg", "template", "noscript", "button", "footer", "form"}
_NO_TEXT_CLASSES = {"navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "footer", "toctree-wrapper"}
_NO_TEXT_IDS = {"footer", "footer-text", "toc", "indices-and-tables", "contents"}
_BLOCKS = {"p", "div", "section", "article", "li", "dt", "dd", "pre", "blockquote", "table", "ul", "ol", "dl"}
_BLOCKS |= {"h1", "h2", "h3", "h4", "h5", "h6", "caption"}
_LINE_END = "\u2028"  # where a page breaks a line; the line ends of its source are only spaces
_SEPARATORS = {"br": _LINE_END, "tr": _LINE_END, "td": " ", "th": " ", "hr": 2 * _LINE_END}

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
    """Return the prose of an HTML page, paragraphs separated by blank lines: its main part, if the page marks one."""
    soup = BeautifulSoup(page, "html.parser")
    for element in soup.find_all(_is_no_text):
        element.extract()
    main = soup.find(role="main") or soup
    for element in main.find_all(list(_SEPARATORS)):
        element.insert_before(_SEPARATORS[element.name])
    # A paragraph is the strings that follow each other in one block, whatever inline elements they stand in.
    paragraphs = (list(strings) for _, strings in groupby(main.strings, lambda string: id(_block_of(string))))
    return tidy("\n\n".join(filter(None, map(_paragraph_text, paragraphs))))


def man_to_text(page: str) -> str:
    """Return the prose of a manual page in roff (man macros), paragraphs separated by blank lines."""
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
            begun, filled = True, True  # before the first heading there are only definitions
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
    """Return text without trailing spaces, each run of blank lines as one."""
    lines = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


def _is_no_text(element: Tag) -> bool:
    return (
        element.name in _NO_TEXT
        or element.get("id") in _NO_TEXT_IDS
        or not _NO_TEXT_CLASSES.isdisjoint(element.get_attribute_list("class"))
    )


def _block_of(string: NavigableString) -> Tag | None:
    return next((parent for parent in string.parents if parent.name in _BLOCKS), None)


def _paragraph_text(strings: list[NavigableString]) -> str:
    text = "".join(strings)
    block = _block_of(strings[0])
    if block is not None and block.name == "pre":
        return text.replace(_LINE_END, "\n").strip("\n")
    return "\n".join(" ".join(line.split()) for line in text.split(_LINE_END)).strip()


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
