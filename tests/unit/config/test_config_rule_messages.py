"""Every message of raptr_ds/config/rules.py is given in one of the cases of test_config_rules."""

import ast
import re
from pathlib import Path

import pytest

from raptr_ds.config import rules
from raptr_ds.errors import ConfigError
from tests.unit.config.test_config_rules import FLAT


def test_every_message_has_a_case(load):
    """A message is what the module yields, with anything in place of the values in it."""
    given = []
    for _, world_size, broken, *_ in FLAT:
        with pytest.raises(ConfigError) as error:
            load(*broken.split(), world_size=world_size)
        given.append(str(error.value))
    nodes = ast.walk(ast.parse(Path(rules.__file__).read_text(encoding="utf-8")))
    messages = [node.value for node in nodes if isinstance(node, ast.Yield)]
    assert messages
    for message in messages:
        parts = message.values if isinstance(message, ast.JoinedStr) else [message]
        pattern = "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts)
        assert any(re.search(pattern, text) for text in given), pattern
