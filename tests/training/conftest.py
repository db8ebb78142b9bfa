"""Fixtures of the tests that start hivemind's processes."""

import contextlib
import signal

import pytest


@pytest.fixture(autouse=True)
def interrupts_still_work():
    """hivemind makes the process that starts its averagers deaf to Ctrl+C; a test run must not stay so."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def shut_down_at_end():
    """Call it with anything that has ``shutdown()``; the last one started is shut down first."""
    with contextlib.ExitStack() as stack:

        def register(started):
            stack.callback(started.shutdown)
            return started

        yield register
