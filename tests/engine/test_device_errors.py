import pytest
import torch

from stepbatch.engine.device_errors import device_errors
from stepbatch.errors import DeviceLost


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), MemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MemoryError),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory"), MemoryError),
        (torch.AcceleratorError("CUDA error: device-side assert triggered\nmore"), DeviceLost),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), DeviceLost),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceLost),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), RuntimeError),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), torch.AcceleratorError),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), RuntimeError),
        (ValueError("CUDA error"), ValueError),
    ],
)
def test_errors_are_told_apart(raised: Exception, becomes: type[BaseException]) -> None:
    with pytest.raises(becomes) as told, device_errors():
        raise raised
    assert type(told.value) is becomes
    assert "\n" not in str(told.value) or told.value is raised


def test_what_torch_raises_where_there_is_no_memory_on_the_cpu() -> None:
    with pytest.raises(MemoryError, match="allocate"), device_errors():
        torch.empty(2**60, dtype=torch.uint8)
