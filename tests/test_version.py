"""One version number, wherever it is said."""

import re
from pathlib import Path

from src.version import COMPATIBLE, VERSION

REPOSITORY = Path(__file__).resolve().parents[1]


def test_version_is_the_newest_of_the_changelog_and_that_of_the_citation():
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    cited = re.search(r"^version: (\S+)", (REPOSITORY / "CITATION.cff").read_text(), flags=re.MULTILINE)[1]
    assert newest == cited == VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION) and VERSION.startswith(f"{COMPATIBLE}.")
