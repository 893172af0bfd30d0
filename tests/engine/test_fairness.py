from stepbatch.engine.fairness import FairShares
from stepbatch.request import GenerationRequest, Job


def job(user: str | None) -> Job:
    return Job("a", 0, GenerationRequest(prompt="x", num_inference_steps=1, seed=0, user=user), (1,), 0.0)


def test_whoever_sends_much_queues_behind_itself() -> None:
    shares = FairShares()
    flood = [shares.tag(job("much"), 2.0) for _ in range(5)]
    assert flood == [0.0, 2.0, 4.0, 6.0, 8.0]
    shares.begin(flood[0])
    assert shares.tag(job("little"), 2.0) < flood[1]
    assert shares.tag(job(None), 2.0) < flood[1]


def test_seconds_count_and_not_requests() -> None:
    shares = FairShares()
    long = [shares.tag(job("long"), 10.0) for _ in range(2)]
    short = [shares.tag(job("short"), 1.0) for _ in range(10)]
    assert max(short) < long[1]


def test_a_pause_saves_nothing_up() -> None:
    shares = FairShares()
    for _ in range(100):
        shares.begin(shares.tag(job("busy"), 1.0))
    assert shares.tag(job("back"), 1.0) == 99.0
    assert shares.tag(job("busy"), 1.0) == 100.0


def test_what_never_began_is_not_held_against_its_user() -> None:
    shares = FairShares()
    gone = [job("gave up") for _ in range(50)]
    for one in gone:
        shares.tag(one, 1.0)
    for one in gone:
        shares.refund(one, 1.0)
    assert shares.tag(job("gave up"), 1.0) == 0.0
