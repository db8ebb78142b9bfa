"""What changes in the batches from epoch to epoch: how long sequences are, and how much of them is masked."""

import multiprocessing

from arguments import HFTrainerArguments
from src.optim.schedules import masked_share, sequence_length


class DataSchedule:
    """Sequence length and share of masked tokens of the run's schedule, as the processes that make batches see them.

    ``length`` (an int) and ``mlm_probability`` are values in shared memory: data follow them while they are made.
    """

    def __init__(self, training: HFTrainerArguments):
        self.training = training
        self.length = multiprocessing.Value("i", training.initial_sequence_length or training.max_sequence_length)
        self.mlm_probability = multiprocessing.Value("d", training.mlm_probability)

    def follow(self, epoch: int) -> None:
        """From now on batches are those of an epoch."""
        training = self.training
        self.length.value = sequence_length(
            epoch,
            max_sequence_length=training.max_sequence_length,
            initial_sequence_length=training.initial_sequence_length,
            sequence_length_warmup_steps=training.sequence_length_warmup_steps,
            pad_to_multiple_of=training.pad_to_multiple_of,
        )
        self.mlm_probability.value = masked_share(
            epoch,
            mlm_probability=training.mlm_probability,
            final_mlm_probability=training.final_mlm_probability,
            total_steps=training.total_steps,
        )
