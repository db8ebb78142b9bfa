"""Compiled functions need no place for a cache."""

import numba.core.caching
import pytest

from src.compiled import compiled


@pytest.mark.parametrize("locators", [None, []])
def test_compiled_function_works_with_and_without_a_place_for_its_cache(monkeypatch, locators):
    if locators is not None:  # what numba finds in a read-only checkout without a HOME
        monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", locators)

    @compiled(nogil=True)
    def double(value):
        return 2 * value

    assert double(21) == 42
    assert double.signatures
