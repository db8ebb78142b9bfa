"""Halves of characters: what is left of an emoji where a text was cut by UTF-16 units, as JavaScript and Java do.

JSON can hold one ("\\ud83d"), and Python keeps it, but no tokenizer takes it and no file can be written with it.
"""

import re

SURROGATE = re.compile("[\ud800-\udfff]")


def replace_lone_surrogates(text: str) -> str:
    """Two halves that belong together become their character, one that is alone becomes U+FFFD."""
    if text.isascii() or not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
