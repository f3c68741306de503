"""What pictures share: colours and lines that tell names apart, and the files that they can be written to."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backend_bases import FigureCanvasBase

from raptr_ds.errors import ConfigError
from raptr_ds.user_paths import check_output

# Okabe and Ito's palette for colour-blind readers, without its yellow; after these seven, five of another lightness.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
    *("#7F3B08", "#542788", "#8C8C8C", "#B2182B", "#4D9221"),
)
GREY = "#555555"
LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_FORMATS = tuple(
    sorted(set(FigureCanvasBase.get_supported_filetypes()) - {"raw", "rgba", "pgf"})
)  # pictures to look at


class Look(NamedTuple):
    """How pictures draw what has one name."""

    colour: str
    line: str
    marker: str


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    """Return a look for each name: another colour, and where these are used up another line and marker besides."""
    cycles = [divmod(place, len(COLOURS)) for place in range(len(names))]
    looks = [Look(COLOURS[one], LINES[many % len(LINES)], _MARKERS[many % len(_MARKERS)]) for many, one in cycles]
    return dict(zip(names, looks, strict=True))


def literal(name: str) -> str:
    """Return the text with which pictures show a name as it is.

    Matplotlib reads what is between dollars as a formula, and leaves what begins with an underscore out of legends.
    """
    text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")  # bytes that are no UTF-8 have no glyph
    return f" {text}" if text.startswith("_") else text


def check_picture(file: Path | None, option: str, formats: Sequence[str] = _FORMATS) -> None:
    """Check, before any work, that a picture can be written to a file that the user names; None is none.

    Raises: as `check_output`; ConfigError for a name whose ending is not a format's.
    """
    check_output(file, option, "picture.png")
    if file is not None and file.suffix.lower().removeprefix(".") not in formats:
        known = ", ".join(f".{name}" for name in formats)
        raise ConfigError(f"{option} {file}: a picture's file ends in {known}. Write {file.with_suffix('.png')}.")
