"""What is written is whole, or what was there before stays. Folders: test_checkpoint.py."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import LAW
from hypothesis import given, settings, strategies
from safetensors.torch import load_file

from minilora import files
from minilora.config import UserError
from minilora.files import FLOATS, replacing, write_blocks, write_file


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


@settings(LAW, max_examples=30)
@given(shapes=strategies.dictionaries(
           strategies.text(), strategies.lists(strategies.integers(1, 9), min_size=1, max_size=3),
           max_size=4),
       dtype=strategies.sampled_from([*FLOATS.values()]), rows=strategies.integers(1, 5))
def test_blocks_make_the_file_of_whole_tensors(tmp_path_factory, shapes, dtype, rows):
    """However the tensors are cut, safetensors reads them back, aligned, and its own metadata."""
    shapes.pop("__metadata__", None)
    path = tmp_path_factory.getbasetemp() / "blocks.safetensors"
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    write_blocks(path, dtype, shapes, (block for tensor in tensors.values()
                                       for block in tensor.split(rows)))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in tensors.items())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_large_block_is_written_in_pieces(tmp_path):
    tensor = torch.arange(100_000, dtype=torch.float32).view(50, 2000).T  # not contiguous
    write_blocks(tmp_path / "a", tensor.dtype, {"a": tensor.shape}, [tensor])
    assert torch.equal(load_file(tmp_path / "a")["a"], tensor)
