"""Jobs in the order of keys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from stepbatch.request import Job

Key = tuple[float, ...]
JobId = tuple[str, int]
Place = tuple[Key, int]


class Order:
    """Jobs, the one with the least key first; of equal keys, the one with the least number."""

    def __init__(self) -> None:
        self._places: list[Place] = []  # sorted
        self._jobs: list[Job] = []  # at the same indices
        self._of: dict[JobId, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def items(self) -> Iterator[tuple[Place, Job]]:
        """The jobs with their places, the least first."""
        return zip(self._places, self._jobs, strict=True)

    @property
    def first(self) -> Place:
        """The least key there is, with its number."""
        return self._places[0]

    def place(self, job: Job) -> Place:
        """Where a job is."""
        return self._of[job.id]

    def put(self, job: Job, key: Key, number: int) -> bool:
        """Put in a job, or move it to where a new key belongs.

        Returns:
            Whether it was there before and goes later now.
        """
        place = key, number
        before = self._of.get(job.id, place)
        if job.id in self._of:
            if before == place:
                return False
            self.remove(job)
        index = bisect_left(self._places, place)
        self._places.insert(index, place)
        self._jobs.insert(index, job)
        self._of[job.id] = place
        return place > before

    def renew(self, place: Callable[[Job], Place]) -> None:
        """Move all to where new keys belong."""
        self._of = {job.id: place(job) for job in self._jobs}
        self._jobs.sort(key=lambda job: self._of[job.id])
        self._places = [self._of[job.id] for job in self._jobs]

    def remove(self, job: Job) -> None:
        """Take a job out."""
        index = bisect_left(self._places, self._of.pop(job.id))
        del self._places[index], self._jobs[index]
