import gc

from stepbatch.garbage import settle


def test_what_is_there_is_looked_through_no_more() -> None:
    kept = [object() for _ in range(10)]
    frozen = gc.get_freeze_count()
    try:
        settle()
        assert gc.get_freeze_count() > frozen
        assert not any(found is kept for found in gc.get_objects())
    finally:
        gc.unfreeze()
