"""Files are whole or as they were."""

import os

import pytest

from fasterai.core.writing import replacing, writable


def test_a_file_is_replaced_when_all_is_written(tmp_path):
    file = tmp_path / "a.json"
    for text in ("first", "second"):
        with replacing(str(file)) as part:
            part.write_text(text)
            assert part.parent == tmp_path and (text == "first") != file.exists()
        assert file.read_text() == text and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error):
    file = tmp_path / "a"
    file.write_text("mine")
    with pytest.raises(error), replacing(file) as part:
        part.write_text("half")
        raise error
    with pytest.raises(FileNotFoundError), replacing(file):
        pass  # nothing was written
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_two_that_write_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as one:
        one.write_text("one")
        with replacing(tmp_path / "a") as two:
            two.write_text("two")
        assert (tmp_path / "a").read_text() == "two"
    assert (tmp_path / "a").read_text() == "one"


def test_what_is_no_file_is_not_replaced(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    link.symlink_to("file")
    assert writable(link) == file.resolve()  # also before it is there
    with replacing(writable(link)) as part:
        part.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"
    with replacing(link) as part:
        part.write_text("newer")
    assert link.is_symlink() and file.read_text() == "newer"
    link.unlink()
    link.symlink_to("link")  # to itself
    with pytest.raises(OSError), replacing(writable(link)) as part:
        part.write_text("x")
        raise FileNotFoundError
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="pipe is no file"):
        writable(pipe)
    with pytest.raises(IsADirectoryError):
        writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        writable(tmp_path / "absent" / "a")
