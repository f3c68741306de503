"""The fences of the codebase that import-linter's contracts (pyproject.toml) do not express."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "raptr_ds"
MAX_LINES = 400

# Who may import a library, by folder or file of raptr_ds. Tools and tests may import what they like, but for DeepSpeed
# and megatron-core: tools are thin command lines over the library.
IMPORTERS = {
    "deepspeed": {"engine", "bench"},
    "megatron": {"parallel", "bench"},
    "transformers": {"hf", "finetuning"},
    "accelerate": {"finetuning"},
    "sklearn": {"finetuning"},
    "mpi4py": {"parallel/launch.py"},
    "datasets": {"prepare", "finetuning", "evaluation"},
    "sentencepiece": {"data", "prepare", "bench", "hf", "sentencepiece_model.py"},
    "pyarrow": {"prepare", "evaluation"},
    "lm_eval": {"evaluation"},
    "tensorboard": {"runtime"},
    "matplotlib": {"bench", "depth", "lab", "plots"},
    "safetensors": {"checkpoint", "hf"},
    "scipy": {"lab", "finetuning", "planner"},
    "hjson": {"config"},
    "pydantic": {"config", "lab"},
}
ENVIRONMENT_READER = "parallel/launch.py"
BANNED_NAMES = {"utils", "helpers", "common", "misc"}


def source_files(*folders: str) -> list[Path]:
    """Return the Python files of the repository's folders; an empty set would check nothing, so it is an error."""
    files = sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))
    assert files, folders
    return files


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the absolute modules that a file imports, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def reads_environment(tree: ast.AST) -> bool:
    """Tell whether a file reads or writes environment variables."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            return True
    return False


def violations(library: str, allowed: set[str]) -> list[str]:
    """Return the files of the package that import `library` from outside of `allowed`."""
    found = []
    for path in source_files("raptr_ds"):
        inside = path.relative_to(PACKAGE).as_posix()
        if inside in allowed or inside.split("/")[0] in allowed:
            continue
        if library in {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}:
            found.append(inside)
    return found


@pytest.mark.parametrize("library", IMPORTERS)
def test_libraries_are_imported_in_their_place_only(library: str) -> None:
    assert violations(library, IMPORTERS[library]) == []


def test_tools_do_not_reach_past_the_library() -> None:
    for path in source_files("tools"):
        roots = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
        assert not roots & {"deepspeed", "megatron"}, path


def test_relative_imports_hide_nothing_from_these_tests() -> None:
    for path in source_files("raptr_ds"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any(node.level for node in nodes), path


def test_one_file_reads_the_environment() -> None:
    readers = [path for path in source_files("raptr_ds") if reads_environment(ast.parse(path.read_text()))]
    assert [path.relative_to(PACKAGE).as_posix() for path in readers] == [ENVIRONMENT_READER]


def test_randomness_has_one_source() -> None:
    """numpy's and Python's global generators would make results depend on who drew before."""
    for path in source_files("raptr_ds"):
        tree = ast.parse(path.read_text())
        assert "random" not in set(imported_modules(tree)), f"{path} imports random; raptr_ds.rng gives streams"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("np.random."):
                assert node.attr in {"Generator", "SeedSequence", "Philox", "default_rng"}, (path, ast.unparse(node))


def test_files_stay_one_idea() -> None:
    long = {
        path.relative_to(REPOSITORY).as_posix(): lines
        for path in source_files("raptr_ds", "tools", "tests")
        if (lines := path.read_text().count("\n")) > MAX_LINES
    }
    assert long == {}


def test_file_names_say_the_thing() -> None:
    assert [path for path in source_files("raptr_ds", "tools") if path.stem in BANNED_NAMES] == []


def test_the_checks_find_what_they_look_for() -> None:
    hidden = ast.parse("def f():\n    from megatron.core import x\n    import os\n    return os.environ['A']\n")
    assert "megatron.core" in set(imported_modules(hidden))
    assert reads_environment(hidden)
    assert reads_environment(ast.parse("from os import getenv"))
    assert not reads_environment(ast.parse("import os\nos.cpu_count()"))
