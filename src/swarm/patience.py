"""How long a peer still waits for others."""

import contextlib
import multiprocessing


class Patience:
    """How long a peer still waits for others at the end of an epoch: ``seconds`` for all its rounds and searches.

    Its averagers' processes share it, so it must be made before they are forked.
    """

    def __init__(self, seconds: float = float("inf")):
        self.seconds, self._spent = seconds, multiprocessing.Value("d", 0.0)
        self._is_over = multiprocessing.RawValue("b", False)  # without a lock: a signal handler may set it
        self._owner_is_blocked = multiprocessing.RawValue("b", False)

    @property
    def spent(self) -> float:
        return float("inf") if self.is_over else self._spent.value

    @property
    def is_over(self) -> bool:
        """Whether this peer leaves, and waits for nobody any more."""
        return bool(self._is_over.value)

    @property
    def left(self) -> float:
        """Seconds; below any number once this peer has given up."""
        return self.seconds - self.spent if self.spent < float("inf") else -float("inf")

    @property
    def owner_is_blocked(self) -> bool:
        """Whether this peer stands still because of a round, instead of computing the next batch."""
        return bool(self._owner_is_blocked.value)

    @contextlib.contextmanager
    def blocking(self):
        """For the time in which the owner stands still."""
        self._owner_is_blocked.value = True
        try:
            yield
        finally:
            self._owner_is_blocked.value = False

    def renew(self) -> None:
        self._spent.value = 0.0

    def spend(self, seconds: float) -> None:
        with self._spent.get_lock():
            self._spent.value += seconds

    def give_up(self) -> None:
        """Until renewed: wait for no search, and for no round longer than it takes at least."""
        self._spent.value = float("inf")

    def end(self) -> None:
        """As `give_up`, but for good."""
        self._is_over.value = True
