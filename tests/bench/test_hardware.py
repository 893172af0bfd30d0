import pytest
import torch
from torch.nn import functional as F

from stepbatch.bench.hardware import about, copy_rate, count_operations, matrix_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_multiplying_is_that_of_the_operations(dtype: torch.dtype) -> None:
    assert 1e6 < matrix_rate(CPU, dtype, (64, 128, 32)) < 1e15


def test_copies_within_a_device_count_both_ways() -> None:
    assert 1e7 < copy_rate(CPU, CPU) < 1e14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_operation_that_models_use_is_counted(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(7, 16, dtype=dtype), torch.randn(32, 16, dtype=dtype), torch.randn(32, dtype=dtype)
    query, key = torch.randn(2, 3, 50, 8, dtype=dtype), torch.randn(2, 3, 20, 8, dtype=dtype)
    picture, filters = torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(6, 4, 3, 3, dtype=dtype)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert count_operations(lambda: F.linear(x, weight, bias)) == 2 * 7 * 16 * 32
            assert count_operations(lambda: F.scaled_dot_product_attention(query, key, key)) == 4 * 2 * 3 * 50 * 20 * 8
            assert count_operations(lambda: F.conv2d(picture, filters, padding=1)) == 2 * 6 * 4 * 3 * 3 * 8 * 8
            assert count_operations(lambda: x + 1) == 0


def test_a_cpu_is_told_by_its_name() -> None:
    assert about(CPU) == {"device": "cpu"}
