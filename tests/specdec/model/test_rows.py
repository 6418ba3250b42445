from __future__ import annotations

import numpy as np
import torch

from specdec.model.rows import PackedRow, cut_rows, packed_rows, upload


def test_packed_rows_lie_end_to_end_behind_what_their_slots_have() -> None:
    assert packed_rows([7, 0, 5], [(2, 3), (0, 1), (1, 4)]) == [
        PackedRow(begin=0, tokens=3, slot=2, start=5),
        PackedRow(begin=3, tokens=1, slot=0, start=7),
        PackedRow(begin=4, tokens=4, slot=1, start=0),
    ]


def test_cut_rows_have_the_same_tokens_in_the_same_places() -> None:
    rows = np.array([PackedRow(0, 9, 2, 5), PackedRow(9, 1, 0, 0), PackedRow(10, 4, 7, 3)])
    cut = cut_rows(rows, 4).tolist()
    assert cut == [[0, 4, 2, 5], [4, 4, 2, 9], [8, 1, 2, 13], [9, 1, 0, 0], [10, 4, 7, 3]]
    ones = cut_rows(rows, 1).tolist()
    assert [begin for begin, *_ in ones] == list(range(14))
    assert ones[5] == [5, 1, 2, 10]


def test_upload_splits_what_one_transfer_carried() -> None:
    parts = upload(torch.device("cpu"), [1, 2], [], range(3))
    assert [part.tolist() for part in parts] == [[1, 2], [], [0, 1, 2]]
    assert all(part.dtype == torch.int64 for part in parts)
