"""Memory given back: resident size falls, and what was forgotten is zero."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from rl_lora.samplers.cpu_memory import forget, trim

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise and malloc_trim are Linux")


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_forgotten_pages_are_given_back_and_read_as_zero() -> None:
    tensor = torch.ones(64 * 2**20, dtype=torch.uint8)
    before = resident()
    given = forget([tensor, tensor[5:], tensor.view(-1, 4)])  # one storage, counted once
    assert tensor.numel() - 2 * 4096 <= given <= tensor.numel()
    assert before - resident() > 0.9 * given
    assert int(tensor.sum()) <= 2 * 4096  # pages at the ends that other storages share
    tensor.fill_(3)
    assert int(tensor.sum(dtype=torch.int64)) == 3 * tensor.numel()


def test_less_than_a_page_is_left_alone() -> None:
    tensor = torch.ones(8)
    assert forget([tensor]) == 0
    assert tensor.tolist() == [1.0] * 8


def test_trim_gives_the_heap_back() -> None:
    kept = [torch.ones(2**18, dtype=torch.uint8) for _ in range(400)]  # below malloc's mmap size
    walls = kept[::100]
    before = resident()
    del kept
    trim()
    assert before - resident() > 50 * 2**20
    assert all(int(wall[0]) == 1 for wall in walls)
