"""How the programs of an evaluation tell errors."""

import sys


class InputError(ValueError):
    """Something wrong with what was passed in that only shows during the work; told in one line, as at the start."""


def fail(program: str, error: Exception) -> int:
    """Tells an error in one line; returns the exit code."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
