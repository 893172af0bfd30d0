import pytest

from stepbatch.server.wall_clock import WallClock


class Machine:
    """What a machine's clocks say."""

    wall, monotonic = 1_000_000.0, 50.0

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 0.0])
def test_nothing_expires_early_though_the_clock_is_set(jump: float) -> None:
    machine = Machine()
    clock = WallClock(lambda: machine.wall, lambda: machine.monotonic)
    for before, after in ((jump, 0.0), (0.0, jump), (jump, -jump)):
        machine.wall += before
        expires = clock.latest() + 100.0
        machine.wall += after
        machine.wait(99.0)
        assert clock.earliest() < expires
        machine.wait(1.0 + 4 * abs(jump))
        assert clock.earliest() >= expires
        assert clock.now() == machine.wall
