"""From the `raptr_ds` object to sections, with one message for everything that is wrong with a single key."""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from raptr_ds.config.deepspeed_keys import ELSEWHERE_NAMES, KNOWN
from raptr_ds.config.deepspeed_part import auto_value, unknown_key
from raptr_ds.config.overrides import Place
from raptr_ds.config.path_sections import METHODS, PATH_SECTIONS, AnyPathSection
from raptr_ds.config.sections import BLOCK, INNER, SECTIONS, UNIONS, Section, keys_of
from raptr_ds.errors import nearest

_PATH = TypeAdapter[AnyPathSection](Annotated[AnyPathSection, Field(discriminator="method")])

_ALL_NAMES = [*SECTIONS, *(key for name in SECTIONS for key in keys_of(name))]
_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string; put it in double quotes",
    "string_too_short": "must have at least 1 character",
    "tuple_type": "must be a list",
    "too_short": "must have at least 1 item",
    "dict_type": 'must be a folder, or {"FOLDER": weight, ...}',
    "model_type": "must be an object {key: value}",
}
"""What pydantic's types of error ask for, in the words of a run file."""


def parse_sections(tree: dict[str, Any], place: Place) -> tuple[dict[str, Any], list[str]]:
    """Return the sections by name and one message for each key that is unknown, missing or not what it must be.

    Sections that are wrong are left out of the result; it is complete where there are no messages.
    """
    block = tree.get(BLOCK)
    outside = [name for name in tree if name not in KNOWN and name != BLOCK]
    if block is None and any(name.split(".")[0] == BLOCK or nearest(name, [BLOCK]) for name in outside):
        return {}, []  # what it is written as is an unknown key, and reported
    if not isinstance(block, dict):
        what = "is missing" if block is None else f"={block!r} is not an object"
        return {}, [
            f"{BLOCK} {what}: next to DeepSpeed's keys a run file holds one object {BLOCK} with the sections "
            f"{', '.join(SECTIONS)}. Start from a file in deepspeed_configs/."
        ]
    misplaced = _misplaced([*outside, *(name for name in block if name not in SECTIONS)])
    errors = [unknown_key(f"{BLOCK}.", name, list(SECTIONS), place) for name in block if name not in SECTIONS]
    sections: dict[str, Any] = {}
    for name in SECTIONS:
        content = block.get(name, {})
        if not isinstance(content, dict):
            errors.append(f"{BLOCK}.{name}={content!r}{place(f'{BLOCK}.{name}')} must be an object {{key: value}}.")
            continue
        try:
            sections[name] = _parse_section(name, content)
        except ValidationError as error:
            details = causes(error)
            meant = misplaced | _misplaced(str(d["loc"][-1]) for d in details if d["type"] == "extra_forbidden")
            for detail in details:
                if detail["type"] != "missing" or not meant & {name, str(detail["loc"][-1])}:
                    errors.append(_message(name, detail, place))
    return sections, errors


def causes(error: ValidationError) -> list[ErrorDetails]:
    """Return what is wrong, but for lists that pydantic finds too short because an item of them is wrong."""
    details = error.errors()
    wrong = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in wrong]


def first_cause(error: ValueError) -> tuple[str, str]:
    """Return the key of a section that could not be made, and what its value should be."""
    assert isinstance(error, ValidationError)
    detail = causes(error)[0]
    return str(detail["loc"][0]), detail["msg"].removeprefix("Input ")


def _misplaced(names: Iterable[str]) -> set[str]:
    """Return the sections and keys that unknown names may stand for: none of them is reported as missing too."""
    parts = {part for name in names for part in name.split(".")}
    guesses = {guess for part in parts for guess in difflib.get_close_matches(part, _ALL_NAMES, n=3, cutoff=0.6)}
    foreign = {ELSEWHERE_NAMES[part].rpartition(".")[2] for part in parts if part in ELSEWHERE_NAMES}
    return parts | guesses | foreign


def _parse_section(name: str, content: dict[str, Any]) -> Section:
    if name == "path":
        return _PATH.validate_python({"method": METHODS[0], **content})
    (section,) = SECTIONS[name]
    return section.model_validate(content)


def _message(name: str, detail: ErrorDetails, place: Place) -> str:
    section, model = f"{BLOCK}.{name}", SECTIONS[name][0]
    kind, value, location = detail["type"], detail["input"], [str(part) for part in detail["loc"]]
    if kind == "union_tag_invalid":  # of the methods: other unions go by what kind of value it is
        location, value = ["method"], value["method"]
    elif name == "path":  # pydantic puts the method before the key
        method, *location = location
        model = PATH_SECTIONS[method]
    if location[0] in UNIONS:
        del location[1:2]  # which of its kinds of value this is
    dotted, field = ".".join([section, *location]), location[0]
    if len(location) > 1:
        model = INNER.get(field, model)
    if kind == "extra_forbidden":
        return unknown_key(".".join([section, *location[:-1], ""]), location[-1], list(model.model_fields), place)
    if kind == "missing":
        key = model.model_fields.get(location[-1])
        about = (key and key.description) or ""
        return f"{dotted} is missing. {about.splitlines()[0] if about else 'Set it.'}"
    where = place(dotted) or place(f"{section}.{field}")
    if kind in {"literal_error", "union_tag_invalid"}:
        context = detail.get("ctx", {})
        choices = re.findall("'(.*?)'", context.get("expected") or context["expected_tags"])
        guess = nearest(str(value), choices) or "."
        return f"{dotted}={value!r}{where} must be one of {', '.join(choices)}{guess}{_unquoted(value)}"
    rule = _TYPES.get(kind) or detail["msg"].replace("Input should", "must").replace("should", "must")
    if kind == "tuple_type" and (key := model.model_fields.get(location[-1])) and key.examples:
        rule += f", as {json.dumps(key.examples[0])}"
    if value == "auto":
        return auto_value(dotted, place, rule)
    return f"{dotted}={value!r}{where} {rule}.{_unquoted(value)}"


def _unquoted(value: Any) -> str:
    """Explain the usual slip of HJSON: a string without quotes takes the rest of its line with it."""
    if isinstance(value, str) and (value.endswith(",") or " #" in value or " //" in value):
        return " (In HJSON a string without quotes runs to the end of its line: put it in double quotes.)"
    return ""
