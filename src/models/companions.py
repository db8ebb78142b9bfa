"""The configuration and the tokenizer that belong to weights: where they may lie, and reading a configuration."""

import json
from collections.abc import Iterable
from pathlib import Path

from .config import LeanAlbertConfig
from .tokenizer import SUBFOLDER, has_vocabulary

AUXILIARY_CHECKPOINT = "aux/checkpoint"  # of a run, in its folder


def places_of(weights: Path) -> list[Path]:
    """Where such files may lie: with the weights, or with what the auxiliary peer of the same run has stored."""
    return [weights if weights.is_dir() else weights.parent, weights.resolve().parent.parent / AUXILIARY_CHECKPOINT]


def configs_in(places: Iterable[Path]) -> list[Path]:
    """The configurations that lie in these directories."""
    return list(dict.fromkeys(place / "config.json" for place in places if (place / "config.json").is_file()))


def tokenizers_in(places: Iterable[Path]) -> list[Path]:
    """The directories of a tokenizer among these and their sub-folders for one."""
    candidates = [directory for place in places for directory in (place, place / SUBFOLDER)]
    return list(
        dict.fromkeys(directory for directory in candidates if directory.is_dir() and has_vocabulary(directory))
    )


def read_config(path: Path) -> LeanAlbertConfig:
    """Raises ValueError, naming the flag --model-config or the file, for anything but a LeanALBERT configuration."""
    if not path.is_file():
        raise ValueError(f"--model-config {path}: no such file")
    try:
        return LeanAlbertConfig.from_dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: not a LeanALBERT configuration ({error})") from error
