"""One check of `--check`: what was tested, how it went, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Check:
    """What was tested, how it went, what was found, and what to do if that is not well."""

    name: str
    state: str
    found: str
    fix: str = ""

    def lines(self) -> str:
        first = f"{self.state:>8}  {self.name}: {self.found}"
        return first if not self.fix else f"{first}\n{'':>10}-> {self.fix}"


def attempt(name: str, action: Callable[[], object], describe: Callable[[object], str]) -> tuple[Check, object]:
    """Do what the run itself would do; its own error message says what to change."""
    try:
        result = action()
    except (ValueError, OSError) as error:
        return Check(name, FAILED, " ".join(str(error).split()), "change what the message names"), None
    return Check(name, OK, describe(result)), result
