"""A clock that only a test moves: what is said of time holds however busy the machine is."""

from types import SimpleNamespace


class Clock(SimpleNamespace):
    """Stands in for the module ``time`` of the module under test."""

    def __init__(self, now: float = 1000.0):
        super().__init__(now=now)

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
