"""What is written is whole, or what was there before stays. Folders: test_checkpoint.py."""

import os
from types import SimpleNamespace

import pytest

from minilora import files
from minilora.config import UserError
from minilora.files import replacing, write_file


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"

    def torn(descriptor):
        assert path.read_bytes() == b"two"
        raise OSError("disk full")

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "fsync": torn}))
    line = refusal(write_file, path, b"three")
    assert str(path) in line and "disk full" in line
    assert path.read_bytes() == b"two"
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_bytes(b"thr")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_told(tmp_path):
    write_file(tmp_path / "new" / "folder" / "a.json", b"{}")
    line = refusal(write_file, tmp_path / "new" / "folder" / "a.json" / "b.json", b"{}")
    assert "b.json: cannot be written" in line
