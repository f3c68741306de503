"""The embedded corpus: the documentation inside the Python packages on this machine, read without importing them."""

import ast
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from raptr_ds.prepare.corpus import Source, digest_of
from raptr_ds.prepare.encoding import worker_pool
from raptr_ds.prepare.readers import ReadingCounts

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Tests, and packages that are not part of the standard library itself.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}
TOPICS = Path("pydoc_data", "topics.py")


@dataclass(frozen=True)
class EmbeddedSource(Source):
    """Docstrings of Python packages, one document per module, and the language reference of pydoc_data.topics.

    scope: `stdlib` is the standard library (about 2 MB), `installed` adds every installed package (some 24 MB with
    torch). Files are parsed, never imported, in the order of their paths.
    """

    scope: Literal["stdlib", "installed"] = "stdlib"
    workers: int = 1

    @property
    def name(self) -> str:
        """What the corpus is called in messages and manifests."""
        return f"embedded:{self.scope}"

    @cached_property
    def files(self) -> list[Path]:
        """The Python files, sorted within their root."""
        library = Path(sysconfig.get_path("stdlib"))
        roots = [library]
        if self.scope == "installed":
            roots += [
                Path(path) for path in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
            ]
        return [path for root in roots for path in _python_files(root)]

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        """Yield each distinct document once and count its copies."""
        seen: set[str] = set()
        for document in self._documents:
            if document in seen:
                counts.skipped["duplicate"] += 1
                continue
            seen.add(document)
            yield document

    def fingerprint(self) -> str:
        """Digest of the interpreter's version and of the files' names and sizes."""
        return digest_of(self.scope, sys.version, [(str(path), path.stat().st_size) for path in self.files])

    @cached_property
    def _documents(self) -> list[str]:
        if self.workers <= 1:
            return [document for path in self.files for document in documents_of_module(path)]
        with worker_pool(self.workers) as pool:
            found = pool.map(documents_of_module, self.files, chunksize=16)
            return [document for documents in found for document in documents]


def _python_files(root: Path) -> list[Path]:
    """Return the Python files under `root`, sorted; links to nothing are none, and LEFT_OUT is not entered."""
    found: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in LEFT_OUT]
        found += [path for file in files if file.endswith(".py") and (path := Path(folder, file)).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def documents_of_module(path: Path) -> list[str]:
    """Return the documents in one Python file: its docstrings as one, or each topic of pydoc_data.topics."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the invalid escapes of other people's string literals
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []  # templates, and files for other versions of Python
    if path.parts[-2:] == TOPICS.parts:
        return _topics(tree)
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    text = "\n\n".join(docstring for docstring in docstrings if docstring)
    text = text.encode(errors="ignore").decode()  # escaped halves of surrogate pairs
    return [text] if text.strip() else []


def _topics(tree: ast.Module) -> list[str]:
    """Return the values of the one dictionary that pydoc_data.topics is."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            values = [ast.literal_eval(value) for value in node.value.values]
            return [inspect.cleandoc(value) for value in values if isinstance(value, str) and value.strip()]
    return []
