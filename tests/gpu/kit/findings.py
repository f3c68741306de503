"""Findings: what a check or a measurement came to, as lines that a summary collects and as JSON."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_LONGEST = 220  # characters of an error in a line


class Findings:
    """Writes findings as they come: OK or BAD for a check, INFO for a figure; num_bad of them were bad.

    file: gets one JSON object a finding; None for none. write: takes a line.
    """

    def __init__(self, file: Path | None, write: Callable[[str], object] | None = None) -> None:
        self._file, self._write = file, write or _print
        self.num_bad = 0

    @classmethod
    def of_environment(cls, write: Callable[[str], object] | None = None) -> "Findings":
        """Return findings whose JSON goes where the environment variable KIT_RESULTS says."""
        file = os.environ.get("KIT_RESULTS")
        return cls(Path(file) if file else None, write)

    def check(self, is_good: bool, name: str, text: str = "", **values: object) -> None:
        """Write down that something is as it should be, or is not; values go into the JSON only."""
        self.num_bad += not is_good
        self._note("OK" if is_good else "BAD", name, text, values)

    def figure(self, name: str, text: str, **values: object) -> None:
        """Write down a measured figure, or why there is none; values go into the JSON only."""
        self._note("INFO", name, text, values)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Let a part of a script fail alone: what it raises becomes a bad finding, and the script goes on."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # whatever it is: the other parts are worth having
            traceback.print_exc()
            self.check(False, name, f"{type(error).__name__}: {one_line(str(error))}")
        finally:
            print(f"  [{name}: {time.perf_counter() - start:.1f} s]", flush=True)

    def leave(self) -> NoReturn:
        """End the process, with 1 if anything was bad, without waiting for threads of libraries."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if self.num_bad else 0)

    def _note(self, word: str, name: str, text: str, values: dict[str, object]) -> None:
        self._write(f"{word} {name}: {text}" if text else f"{word} {name}")
        if self._file is not None:
            entry = {"finding": word, "name": name, "text": text, **values}
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry, default=str) + "\n")


def one_line(text: str) -> str:
    """Return a text without line breaks, cut to what fits into a summary's line."""
    return " ".join(text.split())[:_LONGEST]


def _print(line: str) -> None:
    print(line, flush=True)
