"""What cannot be read of a text: a document is left out, and said; a file that cannot be read further is an error."""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


MIN_LEFT_OUT = 100  # documents left out before it matters whether they are the larger part


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TextError(ValueError):
    """Text that cannot be read; the message is one line that says which and why.

    torch raises an error of a data loader's worker anew, with the worker's traceback for a message. Of that only the
    last line is kept.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.rpartition("TextError: ")[2].split()))


class LeftOut:
    """Documents of a source that were left out because they cannot be read.

    The first is said with the reason, later ones when there are ten times as many. When most of the documents are such,
    the source is something else than it should be: a TextError.
    """

    def __init__(self, name: str):
        self.name = name
        self.num_read = 0  # documents looked at, those of an earlier pass again
        self.places: set[tuple] = set()
        self.first = ""
        self.is_opening = True  # nothing is said yet: if there is no document at all, the reason is the error

    def add(self, place: tuple, reason: str, name: Callable[[], str]) -> None:
        """`place` tells documents apart; `name` gives file and place for a person, and may take its time."""
        if place in self.places:
            return
        self.places.add(place)
        count = len(self.places)
        self.first = self.first or f"{name()}: {reason}"
        if count == 1 and not self.is_opening:
            self.say_first()
        elif count >= MIN_LEFT_OUT and 2 * count > self.num_read:
            raise TextError(f"{self.name}: {count} of {self.num_read} documents cannot be read; {name()}: {reason}")
        elif str(count).strip("0") == "1" and not self.is_opening:  # 10, 100, ...
            logger.warning("%s: %d documents left out that cannot be read; %s: %s", self.name, count, name(), reason)

    def say_first(self) -> None:
        logger.warning("%s; left out, as is every document that cannot be read", self.first)

    def opened(self) -> None:
        """A document was found."""
        self.is_opening = False
        if self.places:
            self.say_first()
