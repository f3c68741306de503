"""Preparing a folder: restart after a kill, reuse, splits, counts, and clear refusals."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raptr_ds.data.indexed import IndexedTokens, open_indexed
from raptr_ds.data.manifest import Manifest
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError, Exit, StorageError
from raptr_ds.prepare import encoding, indexing, working_folder
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.encoding import is_validation
from raptr_ds.prepare.indexing import Preparation, PreparationSettings
from raptr_ds.prepare.readers import ReadingCounts
from raptr_ds.prepare.tokenizer_training import TokenizerSettings
from raptr_ds.user_paths import PathError
from tests.made_up_text import SETTINGS, TextSource, documents_of, made_up_text, text_of
from tests.unprivileged import closed

ROOT = Path(__file__).parents[3]
SMALL = PreparationSettings(TokenizerSettings(num_sentinels=8), validation_fraction=0.1)


def texts_of(split: IndexedTokens, tokenizer: Tokenizer) -> list[str]:
    documents = documents_of(split)
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [text_of(tokenizer, document[:-1]) for document in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


def quiet(line: str) -> None:
    pass


def test_every_document_is_there_once_in_order(
    data_folder: Path, sources: list[FileSource], tokenizer: Tokenizer
) -> None:
    documents = [document for source in sources for document in source.documents(ReadingCounts())]
    train = texts_of(open_indexed(data_folder / "train", 800), tokenizer)
    validation = texts_of(open_indexed(data_folder / "validation", 800), tokenizer)
    held_out = [document for document in documents if is_validation(document.encode(), 0.1)]
    assert validation == held_out
    rest = [document for document in documents if not is_validation(document.encode(), 0.1)]
    assert train == rest
    assert len(documents) == 60


def test_the_manifest_says_what_is_there(data_folder: Path, tokenizer: Tokenizer) -> None:
    manifest = Manifest.load(data_folder)
    for name, counts in manifest.splits.items():
        split = open_indexed(data_folder / name, manifest.vocab_size)
        assert (len(split.lengths), len(split.tokens)) == (counts.documents, counts.tokens)
    assert (manifest.documents, manifest.vocab_size, manifest.dtype) == (60, 800, "uint16")
    assert manifest.tokenizer_digest == tokenizer.digest
    assert sorted(path.name for path in data_folder.iterdir()) == [
        "manifest.json",
        "tokenizer.model",
        "train.bin",
        "train.idx",
        "validation.bin",
        "validation.idx",
    ]


def test_the_split_is_a_fraction_of_the_documents() -> None:
    held_out = sum(is_validation(f"document {number}".encode(), 0.1) for number in range(10_000))
    assert abs(held_out - 1000) < 5 * 30  # five standard deviations


def test_running_again_reuses_and_other_settings_are_refused(data_folder: Path, sources: list[FileSource]) -> None:
    before = (data_folder / "train.bin").stat().st_mtime_ns
    lines: list[str] = []
    Preparation(sources, data_folder, SETTINGS, report=lines.append).run()
    assert lines == [f"{data_folder} is up to date: nothing to do."]
    assert (data_folder / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"already holds data prepared .*--overwrite"):
        Preparation(sources[:5], data_folder, SETTINGS, report=quiet).run()


def test_all_is_on_the_disk_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", record)
    Preparation([TextSource([made_up_text(0, 50)])], tmp_path / "data", SMALL, report=quiet).run()
    files = {path.name: path.stat().st_ino for path in (tmp_path / "data").iterdir()}
    assert set(files.values()) <= set(synced)
    assert synced[-1] == files["manifest.json"]


def test_overwriting(data_folder: Path, sources: list[FileSource], tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(data_folder, output)
    Preparation(sources[:30], output, SMALL, overwrite=True, report=quiet).run()
    assert Manifest.load(output).documents == 30


def test_a_damaged_folder_is_not_reused(data_folder: Path, sources: list[FileSource], tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(data_folder, output)
    os.truncate(output / "train.bin", 100)
    with pytest.raises(DataError, match=r"train\.bin is truncated.*--overwrite"):
        Preparation(sources, output, SETTINGS, report=quiet).run()


@pytest.mark.parametrize("stop_after", [1, 7, 20, 59])
def test_resuming_after_an_interruption_gives_the_same_bytes(
    data_folder: Path, sources: list[FileSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 1)
    monkeypatch.setattr(indexing, "BATCHES_PER_CHECKPOINT", 5)

    def stop(documents: int, text_bytes: int) -> None:
        if documents == stop_after:
            raise KeyboardInterrupt

    output = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        Preparation(sources, output, SETTINGS, report=quiet, progress=stop).run()
    assert not (output / "manifest.json").exists()
    seen: list[int] = []
    lines: list[str] = []
    Preparation(
        sources, output, SETTINGS, report=lines.append, progress=lambda documents, _: seen.append(documents)
    ).run()
    assert seen[0] == (stop_after - 1) // 5 * 5 + 1  # the checkpoint follows the fifth report
    assert any("resuming" in line for line in lines) == (stop_after > 5)
    assert contents(output) == contents(data_folder)


def test_unfinished_work_of_other_settings_is_thrown_away(
    sources: list[FileSource], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BATCHES_PER_CHECKPOINT", 1)
    output, lines = tmp_path / "data", []
    with monkeypatch.context() as patched:
        patched.setattr(working_folder, "write_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Preparation(sources[:9], output, SMALL, report=quiet).run()
    Preparation(sources, output, SETTINGS, report=lines.append).run()
    assert contents(output) == contents(data_folder)
    thrown_away = f"starting again: the unfinished work in {output / '.prepare'}, 9 documents, was for other text or"
    assert lines[0] == f"{thrown_away} other settings."


def test_workers_do_not_change_the_bytes(
    data_folder: Path, sources: list[FileSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(encoding, "SMALL_CHARACTERS", 10000)
    Preparation(sources, tmp_path / "data", SETTINGS, workers=2, report=quiet).run()
    assert contents(tmp_path / "data") == contents(data_folder)


@pytest.mark.parametrize("num_documents", [1, 2, 3])
@pytest.mark.parametrize("num_lines", [1, 30])
def test_even_one_small_document_gives_both_splits(tmp_path: Path, num_documents: int, num_lines: int) -> None:
    texts = [made_up_text(seed, num_lines) for seed in range(num_documents)]
    output = tmp_path / "data"
    manifest = Preparation([TextSource(texts)], output, SMALL, report=quiet).run()
    tokenizer = Tokenizer.load(output / "tokenizer.model")
    splits = [open_indexed(output / name, manifest.vocab_size) for name in ("train", "validation")]
    assert all(split.tokens.read(len(split.tokens) - 1, 1) == tokenizer.eos_id for split in splits)
    total = sum(len(split.tokens) for split in splits)
    assert total == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert len(splits[1].tokens) >= min(total // 10, 16_384)


def test_copies_of_documents_from_the_end_are_held_out_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an interruption behind the move: the journal counts what has been moved since."""
    texts = [made_up_text(number % 90, 1 + number % 3) for number in range(180)]  # every one twice
    texts += [made_up_text(300, 4)]
    settings = replace(SMALL, validation_fraction=1e-9, min_validation_tokens=300)

    def prepare(output: Path) -> dict[str, list[str]]:
        manifest = Preparation([TextSource(texts)], output, settings, report=quiet).run()
        tokenizer = Tokenizer.load(output / "tokenizer.model")
        splits = {name: open_indexed(output / name, manifest.vocab_size) for name in ("train", "validation")}
        assert 300 <= len(splits["validation"].tokens) < 600
        return {name: texts_of(split, tokenizer) for name, split in splits.items()}

    splits = prepare(tmp_path / "whole")
    assert not set(splits["train"]) & set(splits["validation"])
    assert len(splits["validation"]) > 5
    assert sorted(splits["train"] + splits["validation"]) == sorted(texts)
    assert splits["train"] == [text for text in texts if text in splits["train"]]

    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(indexing, "BATCHES_PER_CHECKPOINT", 5)
    with monkeypatch.context() as patch:
        patch.setattr(working_folder, "write_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "resumed")
    prepare(tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_text_of_nothing_but_copies_gives_both_splits(tmp_path: Path) -> None:
    texts = [made_up_text(0, 3)] * 40
    manifest = Preparation([TextSource(texts)], tmp_path / "data", SMALL, report=quiet).run()
    counts = [manifest.splits[name] for name in ("train", "validation")]
    total = sum(count.tokens for count in counts)
    assert total // 10 <= counts[1].tokens < total // 5


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_all_held_out_by_the_hash_still_leaves_training_text(tmp_path: Path) -> None:
    settings = replace(SMALL, validation_fraction=0.999999)
    manifest = Preparation(
        [TextSource([made_up_text(0, 9), made_up_text(1, 9)])], tmp_path / "d", settings, report=quiet
    ).run()
    assert manifest.splits["train"].tokens > manifest.splits["validation"].tokens > 0


def test_refusals_leave_nothing_behind(tmp_path: Path, sources: list[FileSource]) -> None:
    output = tmp_path / "data"
    cases = [
        ([TextSource([])], SMALL, DataError, "no text"),
        (sources, replace(SMALL, tokenizer=TokenizerSettings(90_000)), ConfigError, "too large for this corpus"),
        (sources, replace(SMALL, validation_fraction=1.5), ConfigError, "between 0 and 1"),
        (sources, replace(SMALL, tokenizer_path=str(sources[0].path)), DataError, "not a sentencepiece model"),
    ]
    for texts, settings, kind, match in cases:
        with pytest.raises(kind, match=match):
            Preparation(texts, output, settings, report=quiet).run()
        assert not output.exists()


def test_a_refusal_leaves_a_folder_that_was_there(tmp_path: Path) -> None:
    """It may be a link or a mount, which cannot be removed."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for output in (tmp_path / "link", tmp_path / "there"):
        with pytest.raises(DataError, match="no text"):
            Preparation([TextSource([])], output, SMALL, report=quiet).run()
        assert list(output.iterdir()) == []


def test_an_external_tokenizer_is_kept(data_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = PreparationSettings(tokenizer_path=str(data_folder / "tokenizer.model"))
    manifest = Preparation([TextSource([made_up_text(3, 50)])], tmp_path / "data", settings, report=quiet).run()
    assert manifest.tokenizer_digest == tokenizer.digest


def test_two_at_once_are_refused(tmp_path: Path, sources: list[FileSource]) -> None:
    def again(documents: int, text_bytes: int) -> None:
        with pytest.raises(DataError, match="another process is preparing"):
            Preparation(sources, tmp_path / "data", SMALL, report=quiet).run()

    Preparation(sources[:3], tmp_path / "data", SMALL, report=quiet, progress=again).run()


def test_a_full_disk_is_not_the_users_mistake_and_loses_nothing(
    tmp_path: Path, sources: list[FileSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as from write(): without a file's name

    monkeypatch.setattr(indexing, "BATCHES_PER_CHECKPOINT", 1)
    preparation = Preparation(sources, tmp_path / "data", SMALL, report=quiet)
    with monkeypatch.context() as patched:
        patched.setattr(working_folder, "write_index", full)
        with pytest.raises(StorageError, match=r"No space left on device\. Make room"):
            preparation.run()
    lines: list[str] = []
    manifest = replace(preparation, report=lines.append).run()
    assert lines[0] == f"resuming: {manifest.documents} documents are already encoded."


def test_what_the_disk_of_the_output_does_not_take_ends_without_a_traceback(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 200)
    command = [sys.executable, ROOT / "tools" / "prepare_data.py", "--input", text, "--output", tmp_path / "data"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (Exit.STORAGE, 1), done.stderr
    assert done.stderr.startswith("error: the output cannot be written: No space left on device.")


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "prepare_data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_command_line(tmp_path: Path, text_files: list[Path]) -> None:
    output = tmp_path / "not [red] markup"
    done = run_tool("--input", *text_files[:20], "--output", output, "--workers", 1, "--sentinels", 10)
    assert done.returncode == 0, done.stderr
    assert "20 documents" in done.stdout
    assert shlex.split(done.stdout)[-1] == f"raptr_ds.data.path={output}"
    assert json.loads((output / "manifest.json").read_text())["documents"] == 20
    failed = run_tool("--input", tmp_path / "none", "--output", tmp_path / "other")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == f"error: the input {tmp_path / 'none'} does not exist. Give files or folders to --input.\n"
    assert run_tool("--output", tmp_path / "other").returncode == 2


def test_unwritable_output(tmp_path: Path, sources: list[FileSource]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PathError, match=r"cannot be written: Not a directory\. Choose an --output folder"):
        Preparation(sources, tmp_path / "file", SMALL, report=quiet).run()
    folder = tmp_path / "folder"
    folder.mkdir()
    with closed(folder, 0o500), pytest.raises((DataError, PathError), match="Permission denied"):
        Preparation([TextSource(["some text"])], folder, SMALL, report=quiet).run()


def test_a_killed_command_leaves_no_worker_and_can_be_resumed(tmp_path: Path) -> None:
    text = tmp_path / "large.txt"
    lines = made_up_text(0, 2000)
    text.write_text("\n".join([lines] * 400))
    output = tmp_path / "data"
    options = [
        "--input",
        text,
        "--document",
        "line",
        "--output",
        output,
        "--sentinels",
        8,
        "--tokenizer-sample-bytes",
        10**5,
    ]
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, options), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 40
        children: set[int] = set()
        while len(children) < 2 and time.monotonic() < deadline and process.poll() is None:
            children = {pid for pid in descendants(process.pid) if b"spawn_main" in command_line(pid)}
            time.sleep(0.02)
        assert len(children) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(map(alive, children)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, children))
    finally:
        process.kill()
    assert (output / ".prepare").exists()
    text.write_text(lines)
    done = run_tool(*options, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert not (output / ".prepare").exists()


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid: int) -> bool:
    return bool(command_line(pid))


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in descendants(child)]
