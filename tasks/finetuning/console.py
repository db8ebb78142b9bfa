"""What the person at the terminal sees of the libraries: errors only; of this project: everything worth knowing."""

import logging
import os
import sys
import warnings


class InputError(ValueError):
    """Something wrong with what was passed in that only shows during the work; told in one line, as at the start."""


def fail(program: str, error: Exception) -> int:
    """Tells an error in one line; returns the exit code."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tasks").setLevel(logging.INFO)
    for name in ("transformers", "accelerate", "datasets", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
