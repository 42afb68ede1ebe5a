"""Validation of reset marks and packed sequences."""

import pytest
import torch

from fastmem.ops._sequence import check_cu_seqlens, check_reset

CPU = torch.device("cpu")


def test_reset_accepts_bool_of_the_right_shape():
    check_reset(torch.zeros(2, 5, dtype=torch.bool), 2, 5, CPU)
    check_reset(torch.zeros(0, 0, dtype=torch.bool), 0, 0, CPU)


@pytest.mark.parametrize(
    ("reset", "error", "match"),
    [
        ([[True]], TypeError, "reset: expected a tensor, got list"),
        (torch.zeros(2, 5), TypeError, r"reset: expected torch\.bool.*got torch\.float32"),
        (torch.zeros(2, 5, dtype=torch.uint8), TypeError, r"reset: expected torch\.bool.*got torch\.uint8"),
        (torch.zeros(5, 2, dtype=torch.bool), ValueError, r"reset: expected \(B, L\) = \(2, 5\), got \(5, 2\)"),
        (torch.zeros(5, dtype=torch.bool), ValueError, r"reset: .*got \(5,\)"),
        (torch.zeros(2, 5, dtype=torch.bool, device="meta"), ValueError, "reset: expected device cpu, got meta"),
    ],
)
def test_reset_refuses(reset, error, match):
    with pytest.raises(error, match=match):
        check_reset(reset, 2, 5, CPU)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("numbers", [[0, 5], [0, 2, 5], [0, 0, 2, 2, 5, 5]])
def test_cu_seqlens_counts_its_sequences(numbers, dtype):
    assert check_cu_seqlens(torch.tensor(numbers, dtype=dtype), 1, 5, CPU) == len(numbers) - 1


def test_no_sequences_fill_no_steps():
    assert check_cu_seqlens(torch.tensor([0]), 1, 0, CPU) == 0


@pytest.mark.parametrize(
    ("cu_seqlens", "B", "error", "match"),
    [
        ([0, 5], 1, TypeError, "cu_seqlens: expected a tensor, got list"),
        (torch.tensor([0.0, 5.0]), 1, TypeError, r"cu_seqlens: expected torch\.int32 or .*got torch\.float32"),
        (torch.tensor([0, 5], dtype=torch.int16), 1, TypeError, r"cu_seqlens: .*got torch\.int16"),
        (torch.tensor([[0, 5]]), 1, ValueError, r"cu_seqlens: expected \(n \+ 1,\).*got \(1, 2\)"),
        (torch.tensor([], dtype=torch.int64), 1, ValueError, r"cu_seqlens: .*got \(0,\)"),
        (torch.tensor([0, 5]), 2, ValueError, "cu_seqlens: .*B = 1, got B = 2"),
        (torch.tensor([0, 5], device="meta"), 1, ValueError, "cu_seqlens: expected device cpu, got meta"),
        (torch.tensor([1, 5]), 1, ValueError, "cu_seqlens: expected 0 at its start, got 1"),
        (torch.tensor([0, 4]), 1, ValueError, "cu_seqlens: expected L = 5 at its end, got 4"),
        (torch.tensor([0, 4, 3, 5]), 1, ValueError, "cu_seqlens: expected no decrease, got 4 then 3 at index 2"),
        (torch.tensor([0, 7, 5]), 1, ValueError, "cu_seqlens: expected no decrease, got 7 then 5 at index 2"),
    ],
)
def test_cu_seqlens_refuses(cu_seqlens, B, error, match):
    with pytest.raises(error, match=match):
        check_cu_seqlens(cu_seqlens, B, 5, CPU)
