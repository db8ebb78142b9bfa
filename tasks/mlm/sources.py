"""Documents of the training text, from local files and streamed Hugging Face data sets, in seeded order.

The order of a source's shards depends on the seed, so trainers with different seeds begin in different places.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.mlm.hub_text import HubDataset, load_hub_dataset
from tasks.mlm.seeds import derive_seed
from tasks.mlm.text_files import LocalFiles, find_files

FIRST_BLOCK_DOCUMENTS = 256  # the shuffle buffer starts small and doubles: training need not wait until it is full
MAX_BLOCK_CHARACTERS = 2**25  # 64 MB of Russian text, whatever the number of documents
DEFAULT_SOURCE = str(Path(__file__).resolve().parents[2] / "demo" / "corpus" / "*.txt")


def open_source(source: str) -> LocalFiles | HubDataset:
    """Local file, directory, glob, or `name[:config]` of a Hugging Face dataset; ValueError when it holds no text."""
    paths = find_files(source)
    opened = load_hub_dataset(source) if paths is None else LocalFiles(source, paths)
    if next(opened.read(seed=None, worker=0, num_workers=1, position=None), None) is None:
        raise ValueError(opened.left_out.first or f"{source}: holds no text, not a single document")
    opened.left_out.opened()
    return opened


def iterate_documents(source: str | Sequence[str]) -> Iterator[str]:
    """Every document of a source, or of several, once and in file order."""
    for name in [source] if isinstance(source, str) else source:
        for document, _ in open_source(name).read(seed=None, worker=0, num_workers=1, position=None):
            yield document


class DocumentStream:
    """Endless documents of a source for one worker, shuffled in blocks, with a position that can be saved.

    A block is the next `buffer_size` documents in the order of the shards; it is shuffled as a whole. Unlike a sliding
    buffer, its content follows from where it starts, so the saved position is a few numbers and resuming is exact.
    """

    def __init__(self, source, *, seed: int, buffer_size: int, worker: int = 0, num_workers: int = 1):
        self.source = source
        self.seed = seed
        self.buffer_size = buffer_size
        self.worker, self.num_workers = worker, num_workers
        self.epoch = 0
        self.num_blocks = 0  # blocks begun
        self._block_start = None  # position in the pass over the source
        self._num_taken = 0
        self._block: list[str] = []
        self._block_end = None
        self._reader = None

    def __iter__(self):
        return self

    def __next__(self) -> str:
        """The next document; StopIteration only if there are fewer documents than workers and this one gets none."""
        if self._num_taken == len(self._block):
            self._begin_block()
            if not self._block:
                self.epoch, self._block_end, self._reader = self.epoch + 1, None, None
                self._begin_block()
            if not self._block:
                raise StopIteration
        document, self._block[self._num_taken] = self._block[self._num_taken], ""
        self._num_taken += 1
        return document

    def _begin_block(self) -> None:
        self._block_start, self._num_taken = self._block_end, 0
        self._read_block()
        self.num_blocks += 1

    def _read_block(self) -> None:
        """Read and shuffle the block that starts at `_block_start`."""
        if self._reader is None:
            self._reader = self.source.read(
                seed=derive_seed(self.seed, self.epoch),
                worker=self.worker,
                num_workers=self.num_workers,
                position=self._block_start,
            )
        num_documents = min(self.buffer_size, FIRST_BLOCK_DOCUMENTS << min(self.num_blocks, 32))
        self._block, num_characters = [], 0
        while len(self._block) < num_documents and num_characters < MAX_BLOCK_CHARACTERS:
            document, self._block_end = next(self._reader, (None, self._block_end))
            if document is None:
                break
            self._block.append(document)
            num_characters += len(document)
        random.Random(derive_seed(self.seed, "block", self.num_blocks)).shuffle(self._block)

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "num_blocks": self.num_blocks,
            "block_start": self._block_start,
            "num_taken": self._num_taken,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on after the document that was the last one when the state was taken. Reads one block again."""
        self.epoch, self._block_start, self._block_end = state["epoch"], state["block_start"], state["block_start"]
        self._reader, self._block, self._num_taken, self.num_blocks = None, [], 0, 0
        if state["num_blocks"]:
            self.num_blocks = state["num_blocks"] - 1
            self._read_block()
            self.num_blocks = state["num_blocks"]
            self._num_taken = state["num_taken"]
            if self._num_taken > len(self._block):
                raise ValueError(f"{self.source.name}: fewer documents than when the state was saved; start without it")
