"""Fair shares: users get equal seconds of the machine while they have work, however many requests each sends."""

from __future__ import annotations

from stepbatch.request import Job


class FairShares:
    """Start-time fair queuing: a job's tag is when its user, at an equal share, would have got through all before it.

    Whoever sends much queues behind itself; whoever comes after a pause begins where the others are now, and has saved
    up nothing.
    """

    def __init__(self) -> None:
        self._now = 0.0  # the greatest tag that has begun
        self._ends: dict[str, float] = {}  # by user, the tag at which its next job would start

    def tag(self, job: Job, seconds: float) -> float:
        """A new job's; the least goes first. ``seconds`` is what the job takes by itself."""
        user = job.request.user or ""
        start = max(self._now, self._ends.get(user, 0.0))
        self._ends[user] = start + seconds
        return start

    def refund(self, job: Job, seconds: float) -> None:
        """A job that was given a tag ends without having begun."""
        user = job.request.user or ""
        if user in self._ends:
            self._ends[user] -= seconds

    def begin(self, tag: float) -> None:
        """A job with this tag begins."""
        self._now = max(self._now, tag)
        self._ends = {user: end for user, end in self._ends.items() if end > self._now}  # the others are as new
