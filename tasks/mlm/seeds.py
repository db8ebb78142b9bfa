"""Seeds that are the same in every process, which Python's `hash` is not."""

import hashlib


def derive_seed(*parts) -> int:
    """A 63-bit seed that is the same in every process (`hash` is not) and differs when any of the parts does."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
