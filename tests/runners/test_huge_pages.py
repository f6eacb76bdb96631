import mmap
from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt
from torch import nn

from litgpt.engine.loading import speed_up_decode
from litgpt.runners.huge_pages import SIZE, joined, use_huge_pages, weight_ranges

PAGE = 4096


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that has `address`."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(x, 16) for x in name.split("-"))
            found = start <= address < end
        elif found and name == "AnonHugePages:":
            return int(values[0]) * 1024
    return 0


def can_collapse() -> bool:
    try:
        memory = mmap.mmap(-1, 2 * SIZE)
        memory.write(bytes(2 * SIZE))
        memory.madvise(25)
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except (OSError, ValueError, AttributeError):
        return False


def test_ranges_are_joined_across_gaps_smaller_than_a_huge_page():
    near = [(5 * SIZE, 5 * SIZE + 10), (SIZE + 5, 3 * SIZE), (4 * SIZE - 1, 5 * SIZE)]
    assert joined(near) == [(SIZE, 5 * SIZE + 10)]
    assert joined([(SIZE, 2 * SIZE), (3 * SIZE, 4 * SIZE)]) == [(SIZE, 2 * SIZE), (3 * SIZE, 4 * SIZE)]
    assert joined([(SIZE, 9 * SIZE), (2 * SIZE, 3 * SIZE)]) == [(SIZE, 9 * SIZE)]


def test_ranges_without_a_whole_huge_page_are_left_out():
    assert joined([(0, 0), (SIZE + PAGE, 3 * SIZE - 1)]) == []


def test_packed_weights_are_among_the_ranges():
    model = tiny_gpt().to(torch.bfloat16)
    before = sum(end - start for start, end in weight_ranges(model))
    speed_up_decode(model)
    assert sum(end - start for start, end in weight_ranges(model)) >= before


@pytest.mark.skipif(not can_collapse(), reason="this machine moves no memory to huge pages")
def test_weights_are_moved_and_keep_their_values():
    layer = nn.Linear(2048, 2048)  # 16 MB
    before, address = layer.weight.detach().clone(), layer.weight.data_ptr()
    use_huge_pages(layer)
    assert huge_bytes(address) >= 6 * SIZE
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, before)
