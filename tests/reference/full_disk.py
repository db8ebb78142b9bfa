"""A disk that is full, for this process: the kernel refuses to make any file longer than a limit."""

import contextlib
import resource


@contextlib.contextmanager
def file_size_limit(num_bytes: int):
    """Writing beyond ``num_bytes`` raises OSError (errno 27) while this is active."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
