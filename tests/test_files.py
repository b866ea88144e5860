"""Files of tensors: whole or not at all, and what is no ordinary file stays what it is."""

import os
import sys
import threading

import pytest
import torch

from antiphon.files import read_safetensors, write_safetensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_a_pipe_is_written_into_and_not_replaced(tmp_path):
    pipe, copy = tmp_path / "pipe", tmp_path / "copy.safetensors"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: copy.write_bytes(pipe.read_bytes()))
    reader.start()
    write_safetensors(pipe, TENSORS)
    reader.join(10)
    assert pipe.is_fifo()
    assert same(read_safetensors(copy), TENSORS)


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    write_safetensors(target, {"old": torch.ones(1)})
    link.symlink_to(target)
    write_safetensors(link, TENSORS)
    assert link.is_symlink()
    assert same(read_safetensors(target), TENSORS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.safetensors", "target.safetensors"]
