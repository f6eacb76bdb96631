"""Tensors in huge pages."""

import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt

from litgpt import pages
from litgpt.kvcache import CacheSpec

LARGE = (3, 700, 1024)


def mapped_bytes() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [LARGE, (2, 3), (0, 5), ()])
def test_tensors_are_zeros_that_can_be_written_to(shape, dtype):
    x, other = (pages.zeros(shape, dtype) for _ in range(2))
    assert (x.shape, x.dtype, x.device.type, x.is_contiguous()) == (shape, dtype, "cpu", True)
    assert not x.any()
    x += 1
    assert x.sum(dtype=torch.int64) == x.numel()
    assert not other.any()


def test_the_device_and_the_dtype_are_the_default_ones_or_those_asked_for():
    assert pages.zeros(LARGE).dtype == torch.get_default_dtype()
    assert pages.zeros(LARGE, device=torch.device("meta")).device.type == "meta"
    with torch.device("meta"):
        assert pages.zeros(LARGE).device.type == "meta"
        assert pages.zeros(LARGE, device=torch.device("cpu")).device.type == "cpu"


def test_without_huge_pages_or_room_for_them_tensors_are_torchs(monkeypatch):
    def no_memory(*args, **kwargs):
        raise OSError("no memory")

    monkeypatch.setattr(pages, "are_huge_pages_allowed", lambda: False)
    assert not pages.zeros(LARGE).any()
    monkeypatch.setattr(pages, "are_huge_pages_allowed", lambda: True)
    monkeypatch.setattr(pages.mmap, "mmap", no_memory)
    assert not pages.zeros(LARGE).any()


@pytest.mark.skipif(not pages.are_huge_pages_allowed(), reason="this system has no huge pages")
def test_memory_is_returned_with_the_tensor():
    size = 2**30  # of which nothing is written to
    before = mapped_bytes()
    x = pages.zeros((size,), torch.int8)
    view = x[5:7]
    del x
    assert mapped_bytes() - before >= size
    view += 1
    del view
    assert mapped_bytes() - before < size / 2


@pytest.mark.skipif(not pages.are_huge_pages_allowed(), reason="this system has no huge pages")
@pytest.mark.parametrize("name", ["dense", "dense-int8", "dense-kivi"])
def test_caches_and_their_copies_ask_for_huge_pages(name, monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "_map", lambda size, map=pages._map: asked.append(size) or map(size))
    model = tiny_gpt()
    cache = CacheSpec.parse(name, 8192).create_layer(model.config, 4, 0, 8192)
    found = cache.size_estimate()[0] // 8
    assert sum(asked) > 0.8 * found
    cache.empty_copy()
    assert sum(asked) > 1.6 * found
