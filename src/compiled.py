"""numba's compiler with its cache on disk where there is a place for one."""

from collections.abc import Callable

import numba


def compiled(**options) -> Callable[[Callable], Callable]:
    """As `numba.njit(cache=True, ...)`, which fails where neither the source's folder nor HOME can be written to.

    There every process compiles for itself, some seconds each. A folder in the temporary directory would be no better
    place: numba unpickles what it finds in its cache, and anybody may write there.
    """

    def decorate(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # "cannot cache function ...: no locator available"
            return numba.njit(**options)(function)

    return decorate
