"""A file is there whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from utils.files import UNFINISHED, atomic_write


def test_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "a.b.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        assert (partial.parent, partial.suffix) == (tmp_path, ".txt")
        partial.write_text("new")
        assert list(tmp_path.glob(UNFINISHED)) == [partial]
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_failed_write_keeps_the_old_file_and_no_temporary_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a.txt") as partial:
        partial.write_text("x")


def test_long_file_name_is_written(tmp_path):
    path = tmp_path / ("ä" * 125 + ".txt")
    with atomic_write(path) as partial:
        partial.write_text("x")
    assert path.read_text() == "x"


def test_file_permissions_follow_the_umask(tmp_path):
    """Data sets are shared, and so are the caches beside them."""
    plain = tmp_path / "plain"
    plain.write_text("x")
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("x")
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_concurrent_writes_leave_one_complete_file(tmp_path):
    def write(text: str) -> None:
        with atomic_write(tmp_path / "a") as partial:
            partial.write_text(text * 10_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, "abcdefgh" * 20))
    assert len(set((tmp_path / "a").read_text())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
