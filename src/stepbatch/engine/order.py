"""Jobs in the order of keys."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from stepbatch.request import Job

Key = tuple[float, ...]
JobId = tuple[str, int]
Place = tuple[Key, int]


class Order:
    """Jobs, the one with the least key first; of equal keys, the one that was put in first."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._jobs: dict[Place, Job] = {}
        self._of: dict[JobId, Place] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Job]:
        return map(self._jobs.__getitem__, self._places)

    def items(self) -> Iterator[tuple[Place, Job]]:
        """The jobs with their places, the least first."""
        return zip(self._places, self, strict=True)

    @property
    def first(self) -> Place:
        """The least key there is, with what breaks ties among equal ones."""
        return self._places[0]

    def put(self, job: Job, key: Key, number: int) -> bool:
        """Put in a job, or move it to where a new key belongs. ``number`` breaks ties.

        Returns:
            Whether it was there before and goes later now.
        """
        place = key, number
        before = self._of.get(job.id, place)
        if job.id in self._of:
            if before == place:
                return False
            self.remove(job)
        insort(self._places, place)
        self._jobs[place], self._of[job.id] = job, place
        return place > before

    def remove(self, job: Job) -> None:
        """Take a job out."""
        place = self._of.pop(job.id)
        del self._jobs[place]
        del self._places[bisect_left(self._places, place)]
