from hypothesis import given
from hypothesis import strategies as st

from stepbatch.engine.order import Order
from stepbatch.request import GenerationRequest, Job

REQUEST = GenerationRequest(prompt="x", num_inference_steps=1, seed=0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9))
def test_new_keys_for_all_at_once(keys: list[tuple[int, int]]) -> None:
    jobs = [Job(str(number), 0, REQUEST, (1,), 0.0) for number in range(len(keys))]
    order, afresh = Order(), Order()
    for number, (before, after) in enumerate(keys):
        order.put(jobs[number], (float(before),), number)
        afresh.put(jobs[number], (float(after),), number)
    order.renew(lambda job: ((float(keys[int(job.request_id)][1]),), int(job.request_id)))
    assert list(order.items()) == list(afresh.items())
    for job in jobs[::2]:
        order.remove(job)
        afresh.remove(job)
    assert list(order.items()) == list(afresh.items())


@given(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.integers(0, 8), st.integers(0, 3))))
def test_it_is_always_sorted_by_key_then_number(operations: list[tuple[str, int, int]]) -> None:
    order, keys = Order(), dict[int, int]()
    jobs = [Job(str(number), 0, REQUEST, (1,), 0.0) for number in range(9)]
    for what, number, key in operations:
        if what == "put":
            order.put(jobs[number], (float(key),), number)
            keys[number] = key
        elif number in keys:
            order.remove(jobs[number])
            del keys[number]
        expected = sorted(keys, key=lambda number: (keys[number], number))
        assert [job.request_id for job in order] == [str(number) for number in expected]
        assert len(order) == len(keys)
        if keys:
            assert order.first == ((float(keys[expected[0]]),), expected[0])
