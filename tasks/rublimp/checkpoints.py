"""What an auxiliary peer measures of each stored checkpoint: a small, fixed sample of minimal pairs."""

import logging
from collections.abc import Callable
from pathlib import Path

from src.models import LeanAlbertForMaskedLM
from tasks.rublimp import results
from tasks.rublimp.pairs import TASK, missing_paradigms, read_pairs
from tasks.rublimp.pseudo_likelihood import PseudoLikelihood, check_tokenizer

logger = logging.getLogger(__name__)

FORM = "mean"


def pair_scorer(tokenizer, data_dir: str, *, pairs_each: int) -> Callable[[Path], dict[str, float]]:
    """A function that scores a checkpoint directory on so many pairs of each paradigm, always the same ones.

    The pairs are read here, so that wrong data are an error now and not at the first checkpoint.
    """
    check_tokenizer(tokenizer, by_word=False)
    pairs = read_pairs(Path(data_dir).expanduser(), pairs_each=pairs_each)
    num_paradigms = len({pair.paradigm for pair in pairs})
    missing = missing_paradigms(pairs)
    if missing:
        logger.warning("%d paradigms of %s are not in %s: %s", len(missing), TASK, data_dir, ", ".join(missing))

    def score(checkpoint: Path) -> dict[str, float]:
        judge = PseudoLikelihood(LeanAlbertForMaskedLM.from_pretrained(checkpoint), tokenizer)
        scored = results.score_pairs(judge, pairs)
        of_all = results.accuracy(scored, FORM)
        levels = {
            level.lower(): results.accuracy(group, FORM).accuracy
            for (level,), group in results.grouped(scored, "level").items()
            if level in results.LEVELS
        }
        shares = {"accuracy": of_all.accuracy, "low": of_all.low, "high": of_all.high}
        return {**shares, **levels, "num_pairs": of_all.pairs, "num_paradigms": num_paradigms}

    return score
