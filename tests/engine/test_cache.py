from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from stepbatch.engine.cache import ByteCache


@dataclass(frozen=True)
class Value:
    nbytes: int


def test_the_least_recently_used_goes_first() -> None:
    cache: ByteCache[Value] = ByteCache(10)
    for key in "abc":
        cache.put(key, Value(3))
    assert cache.get("a") == Value(3)
    cache.put("d", Value(4))
    assert cache.get("b") is None
    assert [cache.get(key) for key in "acd"] == [Value(3), Value(3), Value(4)]
    assert cache.nbytes == 10


def test_what_is_too_large_is_not_kept() -> None:
    cache: ByteCache[Value] = ByteCache(10)
    cache.put("a", Value(10))
    cache.put("b", Value(11))
    assert cache.get("b") is None
    assert cache.get("a") == Value(10)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12))))
def test_it_never_holds_more_than_its_limit(puts: list[tuple[int, int]]) -> None:
    cache: ByteCache[Value] = ByteCache(10)
    for key, size in puts:
        cache.put(key, Value(size))
        kept = [value for value in map(cache.get, range(6)) if value]
        assert cache.nbytes == sum(value.nbytes for value in kept) <= 10
        assert len(cache) == len(kept)
        assert cache.get(key) == (Value(size) if size <= 10 else None)
