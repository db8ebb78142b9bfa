"""Learning rate, sequence length and share of masked tokens, pure functions of the epoch (one collaborative step).

All return the same value for the same epoch on every peer, so a peer that joins or restarts needs nothing but the
epoch number to continue where the swarm is.
"""


def _check(condition: bool, option: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{option} must be {expected}, got {value!r}")


DEFAULT_DECAY_SHARE = 0.2  # of all epochs, of the schedule WSD


def decay_epochs(decay_steps: int | None, *, warmup_steps: int, total_steps: int) -> int:
    """Epochs in which the learning rate falls at the end of a run with the schedule WSD, given or usual ones."""
    if decay_steps is not None:
        return decay_steps
    return min(round(DEFAULT_DECAY_SHARE * total_steps), total_steps - warmup_steps)


def learning_rate_factor(
    epoch: int,
    *,
    warmup_steps: int = 3125,
    total_steps: int = 15625,
    num_zero_steps: int = 50,
    min_lr_ratio: float = 0.02,
    decay_steps: int | None = None,
) -> float:
    """Share of the peak learning rate at an epoch: zero, then a linear rise, then a linear fall down to a floor.

    1. 0 before ``num_zero_steps``: optimizer statistics gather before the first parameter moves.
    2. From there to ``warmup_steps``: from 0 to 1.
    3. 1 until ``decay_steps`` epochs before ``total_steps``; by default it falls right after the warm-up. A long stay
       at the peak is the schedule WSD (warm-up, stable, decay; arXiv 2404.06395).
    4. From there to ``total_steps``: from 1 towards 0, but never below ``min_lr_ratio``, which is also the value after
       ``total_steps``.

    A warm-up that ends before ``num_zero_steps`` is skipped: the first non-zero value then lies on the falling line.
    """
    _check(warmup_steps >= 0, "warmup_steps", warmup_steps, "0 or more")
    _check(total_steps > 0, "total_steps", total_steps, "1 or more")
    _check(total_steps >= warmup_steps, "total_steps", total_steps, f"at least warmup_steps ({warmup_steps})")
    _check(num_zero_steps >= 0, "num_zero_steps", num_zero_steps, "0 or more")
    _check(0.0 <= min_lr_ratio <= 1.0, "min_lr_ratio", min_lr_ratio, "between 0 and 1")
    if decay_steps is None:
        decay_steps = total_steps - warmup_steps
    expected = f"between 0 and total_steps - warmup_steps ({total_steps - warmup_steps})"
    _check(0 <= decay_steps <= total_steps - warmup_steps, "decay_steps", decay_steps, expected)
    if epoch < num_zero_steps:
        return 0.0
    if epoch < warmup_steps:
        return (epoch - num_zero_steps) / (warmup_steps - num_zero_steps)
    return max(min_lr_ratio, min(1.0, (total_steps - epoch) / max(1, decay_steps)))


def learning_rate(
    epoch: int,
    *,
    peak_learning_rate: float = 2.5e-3,
    min_learning_rate: float | None = None,
    warmup_steps: int = 3125,
    total_steps: int = 15625,
    num_zero_steps: int = 50,
    min_lr_ratio: float = 0.02,
    decay_steps: int | None = None,
) -> float:
    """Learning rate at an epoch: the peak times :func:`learning_rate_factor`.

    ``min_learning_rate``, where given, is the floor in absolute terms and replaces ``min_lr_ratio``.
    """
    _check(peak_learning_rate > 0, "learning_rate", peak_learning_rate, "positive")
    if min_learning_rate is not None:
        expected = f"between 0 and learning_rate ({peak_learning_rate})"
        _check(0 <= min_learning_rate <= peak_learning_rate, "min_learning_rate", min_learning_rate, expected)
        min_lr_ratio = min_learning_rate / peak_learning_rate
    return peak_learning_rate * learning_rate_factor(
        epoch,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        num_zero_steps=num_zero_steps,
        min_lr_ratio=min_lr_ratio,
        decay_steps=decay_steps,
    )


def sequence_length(
    epoch: int,
    *,
    max_sequence_length: int = 2048,
    initial_sequence_length: int | None = 256,
    sequence_length_warmup_steps: int = 7000,
    pad_to_multiple_of: int = 128,
) -> int:
    """Tokens per training sequence at an epoch: a linear rise, rounded down to a multiple, then the maximum.

    Grows from ``initial_sequence_length`` (None: from ``pad_to_multiple_of``) to ``max_sequence_length`` over
    ``sequence_length_warmup_steps`` epochs. While it grows it is a multiple of ``pad_to_multiple_of``, except that
    it is never below the initial length.
    """
    _check(max_sequence_length > 0, "max_sequence_length", max_sequence_length, "1 or more")
    _check(pad_to_multiple_of > 0, "pad_to_multiple_of", pad_to_multiple_of, "1 or more")
    _check(sequence_length_warmup_steps >= 0, "sequence_length_warmup_steps", sequence_length_warmup_steps, "0 or more")
    start = initial_sequence_length
    if start is None:
        start = min(pad_to_multiple_of, max_sequence_length)
    expected = f"between 1 and max_sequence_length ({max_sequence_length})"
    _check(1 <= start <= max_sequence_length, "initial_sequence_length", start, expected)
    if epoch >= sequence_length_warmup_steps:
        return max_sequence_length
    length = start + (max_sequence_length - start) * epoch // sequence_length_warmup_steps
    return max(start, length // pad_to_multiple_of * pad_to_multiple_of)


def masked_share(epoch: int, *, mlm_probability: float, final_mlm_probability: float | None, total_steps: int) -> float:
    """Share of the tokens to be predicted at an epoch: on a line from the first value to the last, at ``total_steps``.

    A rate that falls to 15 % learns faster than 15 % from the beginning (arXiv 2305.15096).
    """
    if final_mlm_probability is None:
        return mlm_probability
    progress = min(1.0, epoch / total_steps)
    return mlm_probability + progress * (final_mlm_probability - mlm_probability)
