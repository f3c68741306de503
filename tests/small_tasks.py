"""Task files with a few documents each, and a small model to evaluate on them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer
from tests.exported_runs import model_of, run_folder
from tests.made_up_text import TextSource, made_up_text

LONGEST = 96


def words(seed: int) -> list[str]:
    """Return words of a made-up language."""
    return made_up_text(seed, 4).replace("\n", " ").split()


def _boolq(number: int) -> dict[str, Any]:
    text = words(number)
    # Some are too long for the model, as are real ones.
    passage = " ".join(text[: 4 + 12 * (number % 3)])
    return {"question": " ".join(text[40:44]), "passage": passage, "idx": number, "label": number % 2}


def _cb(number: int) -> dict[str, Any]:
    text = words(100 + number)
    return {"premise": " ".join(text[:9]), "hypothesis": " ".join(text[9:12]), "idx": number, "label": number % 3}


def _nq_open(number: int) -> dict[str, Any]:
    text = words(200 + number)
    return {"question": " ".join(text[:6]), "answer": [" ".join(text[6:8]), text[9]]}


def _winogrande(number: int) -> dict[str, Any]:
    text = words(300 + number)
    sentence = " ".join([*text[:5], "_", *text[5:8]])
    return {"sentence": sentence, "option1": text[9], "option2": text[10], "answer": str(1 + number % 2)}


def _webqs(number: int) -> dict[str, Any]:
    text = words(400 + number)
    return {"question": " ".join(text[:5]), "answers": sorted(text[6:9])}


MADE = {
    "boolq": (_boolq, {"train": 6, "validation": 9}),
    "cb": (_cb, {"validation": 7}),
    "nq_open": (_nq_open, {"validation": 6}),
    "winogrande": (_winogrande, {"validation": 4}),
    "webqs": (_webqs, {"train": 4, "test": 5}),
}


def write_task_files(folder: Path) -> Path:
    """Write FOLDER/TASK/SPLIT.parquet, and return the folder. Training documents are others than those asked."""
    for task, (make, splits) in MADE.items():
        place = folder / task
        place.mkdir(parents=True)
        for split, count in splits.items():
            first = 50 if split == "train" else 0
            rows = [make(first + number) for number in range(count)]
            pq.write_table(pa.Table.from_pylist(rows), place / f"{split}.parquet")
    return folder


def write_run(folder: Path, groups: ProcessGroups, **changes: Any) -> Path:
    """Write a run of a small UL2 model whose likelihoods depend on all that it sees, and return its folder."""
    text = "\n".join(made_up_text(seed, 40) for seed in range(8))
    settings = TokenizerSettings(vocab_size=400, num_sentinels=8, model_type="bpe")
    tokenizer = train_tokenizer([TextSource([text])], settings)
    model = model_of("ul2", tokenizer.vocab_size, **{"seq_length": LONGEST, "init_method_std": 0.3, **changes})
    run_folder(folder / "run", groups, model, tokenizer)
    return folder / "run"
