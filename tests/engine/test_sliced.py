import gc
import math
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.sliced import Sliced


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()) for _ in range(4)]
    return nn.Sequential(*blocks)


PICTURE = torch.linspace(-1, 1, 4 * 16 * 16).view(1, 4, 16, 16)


def slices(work: Sliced[torch.Tensor], seconds: float) -> Iterator[int]:
    """Go on until it is done; yields how many slices there have been, while it is paused."""
    count = 1
    while not work.go_on(seconds):
        yield count
        count += 1


def hooks(module: nn.Module) -> int:
    return sum(len(layer._forward_pre_hooks) for layer in module.modules())


def test_it_pauses_between_layers_and_gives_what_it_would_have_in_one_go(module: nn.Module) -> None:
    with torch.inference_mode():
        whole = module(PICTURE)
        work = Sliced(module, lambda: module(PICTURE), DeviceClock())
        for _ in slices(work, 0.0):
            assert hooks(module) == 0  # others that go through the same layers meanwhile are let be
            assert torch.equal(module(PICTURE), whole)
        assert torch.equal(work.result, whole)
        assert hooks(module) == 0
        assert work.go_on(0.0)
    one_by_one = Sliced(module, lambda: module(PICTURE), DeviceClock())
    assert len(list(slices(one_by_one, 0.0))) == 12
    assert not list(slices(Sliced(module, lambda: module(PICTURE), DeviceClock()), math.inf))


def test_it_pauses_when_its_time_is_up(module: nn.Module) -> None:
    def slow() -> torch.Tensor:
        for layer in module.modules():
            if isinstance(layer, nn.SiLU):
                time.sleep(0.02)
            if not list(layer.children()):
                layer(PICTURE)
        return PICTURE

    assert 1 <= len(list(slices(Sliced(module, slow, DeviceClock()), 0.03))) <= 3


def test_modes_and_threads_are_the_callers(module: nn.Module) -> None:
    seen = []

    def work() -> bool:
        seen.append((torch.is_inference_mode_enabled(), threading.current_thread()))
        result = module(PICTURE)
        seen.append((torch.is_inference_mode_enabled(), threading.current_thread()))
        return bool(result.is_inference())

    sliced = Sliced(module, work, DeviceClock())
    done = False
    while not done:
        with torch.inference_mode():
            done = sliced.go_on(0.0)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert sliced.result
    assert seen == [(True, threading.main_thread())] * 2


def test_what_the_work_raises_comes_through_and_leaves_no_hooks(module: nn.Module) -> None:
    def work() -> None:
        module(PICTURE)
        raise MemoryError("in the work")

    sliced = Sliced(module, work, DeviceClock())
    assert not sliced.go_on(0.0)
    with pytest.raises(MemoryError, match="in the work"):
        sliced.go_on(math.inf)
    assert hooks(module) == 0


@pytest.mark.parametrize("begun", [True, False])
def test_work_that_is_abandoned_is_gone(module: nn.Module, begun: bool) -> None:
    ended = []

    def work() -> torch.Tensor:
        held = PICTURE.clone()
        references.append(weakref.ref(held))
        try:
            return torch.as_tensor(module(held))
        finally:
            ended.append(True)

    references: list[weakref.ref[torch.Tensor]] = []
    sliced = Sliced(module, work, DeviceClock())
    assert not begun or not sliced.go_on(0.0)
    threads = threading.active_count()
    sliced.abandon()
    gc.collect()
    assert ended == [True] * begun
    assert all(reference() is None for reference in references)
    assert hooks(module) == 0
    assert threading.active_count() == threads
    sliced.abandon()  # once more does nothing
