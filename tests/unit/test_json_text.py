"""JSON that others may have written or damaged: one error, however it is wrong."""

import pytest

from raptr_ds.json_text import parse_json


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null]}', b'{"a": [1, 2.5, null]}'])
def test_text_and_bytes_are_read(text):
    assert parse_json(text) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000])
def test_what_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
