"""What the repository never does, wherever its input comes from: unpickle, evaluate text, or hand text to a shell."""

import ast
from collections.abc import Iterator

import pytest

from tests.unit.test_architecture import imported_modules, source_files

_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
_BUILTINS = {"eval", "exec"}
_CALLS = {"torch.load", "torch.hub.load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
_TRUE_ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code"}
_SHELLS = {"sh", "bash", "/bin/sh", "/bin/bash"}


def hidden_code(tree: ast.AST) -> Iterator[str]:
    """Yield what in a file runs code that is not the repository's."""
    yield from (f"import {module}" for module in imported_modules(tree) if module.split(".")[0] in _MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple):
            first, *second = [getattr(item, "value", None) for item in node.elts[:2]] or [None]
            if first in _SHELLS and second == ["-c"]:
                yield ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in _CALLS or (isinstance(node.func, ast.Name) and called in _BUILTINS):
            yield called
        for argument in node.keywords:
            is_false = isinstance(argument.value, ast.Constant) and not argument.value.value
            if argument.arg in _TRUE_ARGUMENTS and not is_false:
                yield f"{called}({argument.arg})"


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    found = {path.name: list(hidden_code(ast.parse(path.read_text()))) for path in source_files("raptr_ds", "tools")}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "def f():\n    import dill", "import yaml"),
        *("torch.load(path, weights_only=True)", "eval(text)", "exec(text)", "os.system(text)", "os.popen(text)"),
        *("subprocess.run(text, shell=True)", "run(text, shell=flag)", "np.load(path, allow_pickle=True)"),
        *("subprocess.run(['bash', '-c', text])", "load(x, trust_remote_code=True)"),
    ],
)
def test_the_check_finds_it(code: str) -> None:
    assert list(hidden_code(ast.parse(code)))


def test_the_check_leaves_others() -> None:
    code = "model.eval()\nre.compile(x)\nnp.load(p, allow_pickle=False)\nrun(['git', '-C', p])\nrun([python, '-c', x])"
    assert list(hidden_code(ast.parse(code))) == []
