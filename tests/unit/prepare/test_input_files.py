"""What --input stands for: links, loops, pipes, folders without permission; all is read, counted or refused."""

import gzip
import os
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raptr_ds.errors import DataError
from raptr_ds.prepare.input_files import file_sources, summary
from raptr_ds.prepare.readers import ReadingCounts, ReadingOptions
from raptr_ds.user_paths import PathError


def found(*paths: Path) -> tuple[list[str], dict[str, int]]:
    sources, ignored = file_sources(paths, ReadingOptions())
    return [str(source.path.relative_to(paths[0])) for source in sources], dict(ignored)


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"x") if name.endswith(".gz") else b"x")


def test_folders_are_read_in_order_and_the_rest_is_counted_by_kind(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.md", "a/c.jsonl.gz", "a.txt", "a-b/d.txt")
    write(tmp_path, ".hidden/x.txt", ".y.txt", "image.PNG", "c/image.png", "manifest.json", "more.tar.gz", "Makefile")
    names, ignored = found(tmp_path)
    assert names == ["a/c.jsonl.gz", "a/z.md", "a-b/d.txt", "a.txt", "b.txt"]
    assert ignored == {"hidden": 2, ".png": 2, ".json": 1, ".tar.gz": 1, "without an ending": 1}
    _, counts = file_sources([tmp_path], ReadingOptions())
    assert summary(counts) == "2 hidden, 2 .png, 1 without an ending, 1 .json, 1 .tar.gz"


def test_the_summary_is_short(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", *(f"a.{number}" for number in range(30)))
    _, counts = file_sources([tmp_path], ReadingOptions())
    assert summary(counts).endswith(", 20 of other kinds")
    assert summary(counts).count(",") == 10


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    write(inside, "a.txt")
    write(outside, "b.txt", "deep/c.txt", "d.dat")
    (inside / "linked").symlink_to(outside)
    (inside / "again").symlink_to("linked/deep")
    (inside / "loop").symlink_to(".")
    (outside / "back").symlink_to(inside)
    (inside / "z.txt").symlink_to("a.txt")
    (inside / "hard.txt").hardlink_to(inside / "a.txt")
    (inside / "named.md").symlink_to(outside / "d.dat")
    names, ignored = found(inside)
    assert names == ["a.txt", "again/c.txt", "linked/b.txt", "named.md"]
    # hard.txt, back, deep, loop and z.txt; d.dat itself has another ending
    assert ignored == {"read already under another name": 5, ".dat": 1}
    assert found(inside, inside / "a.txt", inside)[0] == names


ENTRIES = st.lists(
    st.tuples(st.sampled_from(["folder", "link", ".txt", ".png"]), st.integers(0, 99), st.integers(0, 99))
)


@given(entries=ENTRIES)
def test_every_entry_is_read_or_counted_once(entries: list[tuple[str, int, int]]) -> None:
    """Entries in random places, links to random ones: loops end, and each but the folders themselves counts once."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name)]
        all_entries = [Path(name)]
        for number, (kind, place, target) in enumerate(entries):
            path = folders[place % len(folders)] / f"{number}{kind if kind.startswith('.') else ''}"
            if kind == "folder":
                path.mkdir()
                folders.append(path)
            elif kind == "link":
                path.symlink_to(all_entries[target % len(all_entries)])
            else:
                path.write_text("x")
            all_entries.append(path)
        files = {path for path in all_entries if path.suffix == ".txt"}
        if not files:
            with pytest.raises(DataError, match="holds no file"):
                file_sources([name], ReadingOptions())
            return
        sources, ignored = file_sources([name], ReadingOptions())
        assert {source.path.resolve() for source in sources} == {path.resolve() for path in files}
        assert len(sources) == len(files)
        assert len(sources) + ignored.total() == len(entries) - (len(folders) - 1)


def test_the_ending_of_a_link_without_one_is_that_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "latest").symlink_to("rows.jsonl")
    (source,), _ = file_sources([tmp_path / "latest"], ReadingOptions())
    assert list(source.documents(ReadingCounts())) == ["one"]


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / ".#a.txt").symlink_to("user@host")  # as editors lock files
    assert found(tmp_path) == (["a.txt"], {"hidden": 1})
    (tmp_path / "gone").symlink_to("missing/folder")
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError, match=r"gone is a link to missing/folder, where nothing is"):
            file_sources([path], ReadingOptions())
    (tmp_path / "gone").unlink()
    (tmp_path / "below_a_file.txt").symlink_to("a.txt/b")
    with pytest.raises(DataError, match="where nothing is"):
        file_sources([tmp_path], ReadingOptions())
    (tmp_path / "below_a_file.txt").unlink()
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    for path in (tmp_path, tmp_path / "circle.txt"):
        with pytest.raises(PathError, match=r"circle\.txt cannot be used.*circle"):
            file_sources([path], ReadingOptions())


def test_pipes_and_sockets_in_a_folder_are_counted_not_opened(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.jsonl"))
        assert found(tmp_path) == (["a.txt"], {"pipes, sockets or devices": 2})
        for name in ("pipe.txt", "s.jsonl"):
            with pytest.raises(DataError, match=r"a pipe or device.*Write its content to a file"):
                file_sources([tmp_path / name], ReadingOptions())
    for name in ("/dev/null", "-"):
        with pytest.raises(DataError, match="a pipe or device"):
            file_sources([name], ReadingOptions())


def test_folders_that_hold_nothing_to_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file that ends in .*\.zst.*; it holds nothing\."):
        file_sources([tmp_path / "empty"], ReadingOptions())
    write(tmp_path, "other/a.png", "other/.b.txt")
    with pytest.raises(DataError, match=r"it holds 1 hidden, 1 \.png\. Name the files themselves"):
        file_sources([tmp_path / "other"], ReadingOptions())


@pytest.mark.parametrize(
    ("name", "match"),
    [("none", "none does not exist"), ("", "an empty path"), ("a\0b", "NUL byte"), ("a" * 300, "too long")],
)
def test_paths_that_cannot_be(tmp_path: Path, name: str, match: str) -> None:
    with pytest.raises((DataError, PathError), match=match):
        file_sources([tmp_path / name if name else ""], ReadingOptions())


def test_archives_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    with zipfile.ZipFile(tmp_path / "b.txt", "w") as archive:
        archive.writestr("a.txt", "text")
    for path in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(DataError, match=r"b\.txt is a zip archive, not text: unpack it first"):
            file_sources([path], ReadingOptions())


@contextmanager
def as_another_user() -> Iterator[None]:
    """Without the rights of root, who may enter every folder."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0, 0o444, 0o111])
def test_what_this_user_may_not_read_is_refused(mode: int) -> None:
    with tempfile.TemporaryDirectory() as name:  # which others than root may enter, unlike tmp_path
        folder = Path(name)
        folder.chmod(0o755)
        write(folder, "a.txt", "shut/b.txt", "other/c.txt")
        (folder / "other/c.txt").chmod(0)
        (folder / "shut").chmod(mode)
        (folder / "linked").mkdir()
        (folder / "linked/d.txt").symlink_to(folder / "shut/b.txt")
        (folder / "linked/e").symlink_to(folder / "shut")
        for given in (".", "shut", "linked/e"):
            with as_another_user(), pytest.raises(PathError, match=r"(shut|linked)\S* cannot be used: Perm"):
                file_sources([folder / given], ReadingOptions())
        if not mode & 0o111:
            for given in ("shut/b.txt", "linked", "linked/d.txt"):
                with as_another_user(), pytest.raises(PathError, match="cannot be used: Permission denied"):
                    file_sources([folder / given], ReadingOptions())
        for given in ("other", "other/c.txt"):
            with as_another_user(), pytest.raises(DataError, match=r"cannot read .*c\.txt: Permission denied"):
                file_sources([folder / given], ReadingOptions())
        (folder / "shut").chmod(0o755)
