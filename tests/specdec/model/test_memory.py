from __future__ import annotations

import torch

from specdec.model.memory import LargePages


def test_tensors_of_all_kinds_lie_side_by_side_with_their_numbers() -> None:
    pages, generator = LargePages(), torch.Generator().manual_seed(0)
    given = [
        torch.randn(3, 5, generator=generator),
        torch.randint(-128, 127, (7, 9), dtype=torch.int8, generator=generator),
        torch.randn(65, generator=generator).bfloat16(),
        torch.randn(4, 6, generator=generator).T,
        torch.zeros(0, 3),
    ]
    held = [pages.copy(each) for each in given]
    for each, its in zip(given, held, strict=True):
        assert its.dtype == each.dtype and torch.equal(its, each)
        assert its.is_contiguous() and its.data_ptr() % LargePages.ALIGNED == 0


def test_what_does_not_fit_a_chunk_has_one_of_its_own() -> None:
    pages = LargePages()
    small, large = torch.ones(16), torch.arange(LargePages.CHUNK // 4 + 1, dtype=torch.float32)
    held = [pages.copy(each) for each in (small, large, small)]
    assert all(map(torch.equal, held, (small, large, small)))


def test_tensors_outlive_the_pages_object() -> None:
    held = LargePages().copy(torch.arange(1000))
    assert held.sum() == 499_500
