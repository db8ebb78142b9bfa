"""Fixtures shared by all tests: where the optional reference data lies, and how many threads a test may use."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LEANALBERT_SHARED", REPOSITORY.parent / "shared"))

torch.set_num_threads(1)


def _directory_or_skip(path: Path, what: str) -> Path:
    if not path.is_dir():
        pytest.skip(
            f"{what} not available at {path} (set LEANALBERT_SHARED to the folder that holds golden/ and data/)"
        )
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs, gradients and optimizer states recorded from the original implementation."""
    return _directory_or_skip(SHARED / "golden", "golden reference files are")


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """Real RuCoLA and Russian SuperGLUE records and a corpus of Russian prose."""
    return _directory_or_skip(SHARED / "data", "real evaluation data is")
