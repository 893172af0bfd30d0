from __future__ import annotations

import pytest

from stepbatch.errors import NotFound
from stepbatch.server.files import FileStore


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_file_lives_until_its_time_is_over() -> None:
    clock = Clock()
    store = FileStore(10.0, clock=clock)
    name = store.put(b"data", "image/png", "png")
    assert name.endswith(".png")
    clock.now += 9.9
    assert store.get(name).data == b"data"
    clock.now += 0.1
    with pytest.raises(NotFound):
        store.get(name)
    assert store.size == 0


def test_the_oldest_go_when_there_are_too_many_bytes() -> None:
    store = FileStore(10.0, max_bytes=10)
    names = [store.put(b"x" * 4, "image/png", "png") for _ in range(3)]
    with pytest.raises(NotFound):
        store.get(names[0])
    assert store.get(names[1]).data == store.get(names[2]).data == b"xxxx"
    assert store.size == 8


def test_a_file_over_the_bound_is_not_kept() -> None:
    store = FileStore(10.0, max_bytes=10)
    with pytest.raises(NotFound):
        store.get(store.put(b"x" * 11, "image/png", "png"))
    assert store.size == 0


def test_names_can_not_be_guessed() -> None:
    store = FileStore(10.0)
    names = {store.put(b"", "image/png", "png") for _ in range(100)}
    assert len(names) == 100
    assert min(len(name) for name in names) >= 36
