"""Training instances for masked language modelling and sentence order, from raw text.

Documents -> sentences -> token ids, each sentence once and in batches -> chunks that fill an instance -> two segments
in the right order or swapped (the ALBERT objective, arXiv 1909.11942). Instances are drawn from many open documents, so
neighbours in the stream come from different texts; whatever does not fit an instance opens the document's next one.
"""

import bisect
import itertools
import logging
import os
import random
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from src.models.tokenizer import raw_tokenizer
from tasks.mlm.encoding import SentenceEncoder
from tasks.mlm.hub_text import HubDataset
from tasks.mlm.seeds import derive_seed
from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import DEFAULT_SOURCE, DocumentStream, open_source
from tasks.mlm.text_files import LocalFiles

logger = logging.getLogger(__name__)

NUM_OPEN_DOCUMENTS = 64  # per source; instances are drawn from them at random
MAX_DOCUMENT_SENTENCES = 256  # a longer document is treated as several, which bounds the memory of the open ones
NUM_POOLED_INSTANCES = 1024  # sorted by length when the batch size is known
NUM_CANDIDATES = 2  # runs of neighbours in the pool that are compared for each batch
NUM_FIRST_POOLED_INSTANCES = 256  # when rows are packed: enough to fill the first ones well
NUM_SPECIAL_TOKENS = 3  # at most, in one instance
MIN_SEQUENCE_LENGTH = 8
ORDERED, SWAPPED, NO_ORDER = 0, 1, -100
ZERO, ONE = array("i", [0]), array("i", [1])

# array("i"): a list of numbers in 4 bytes each, which is cut, joined and handed to numpy without a loop in Python
Sentences = list[array]  # token ids of each


def truncate_longest_first(first: array, second: array, max_tokens: int) -> tuple[array, array]:
    """Cut the ends of two segments so that they hold max_tokens together: the longer one first, then both evenly.

    The rule of the tokenizers library's `longest_first`: of an odd number, the longer segment keeps the larger half.
    """
    shorter, longer = sorted((len(first), len(second)))
    longer = max(shorter, max_tokens - shorter)
    if shorter + longer > max_tokens:
        shorter = max_tokens // 2
        longer = max_tokens - shorter
    lengths = (longer, shorter) if len(first) > len(second) else (shorter, longer)
    return first[: lengths[0]], second[: lengths[1]]


def cut_sentence(sentence: array, num_tokens: int, starts_word: Sequence[bool]) -> int:
    """Tokens of a sentence's head, at most num_tokens: it ends before a word where one starts in its second half."""
    for cut in range(num_tokens, num_tokens // 2, -1):
        if starts_word[sentence[cut]]:
            return cut
    return num_tokens


def take_chunk(document: Sentences, max_tokens: int, starts_word: Sequence[bool]) -> Sentences:
    """Remove from a document (reversed: the next sentence is its last item) the sentences of one instance.

    A sentence that does not fit is cut between two words, and its rest begins the next instance: leaving the sentence
    to it whole would waste half a sentence of padding. An overflow of up to 1 % of the length is left to truncation,
    and room for as little is left empty, so that no instance begins with a word or two of a sentence.
    """
    chunk, num_tokens = [], 0
    while document and num_tokens < max_tokens:
        sentence = document[-1]
        room = max_tokens - num_tokens
        if len(sentence) <= room or (chunk and len(sentence) <= room + max_tokens // 100):
            chunk.append(document.pop())
            num_tokens += len(sentence)
            continue
        if room > max_tokens // 100:
            cut = cut_sentence(sentence, room, starts_word)
            chunk.append(sentence[:cut])
            document[-1] = sentence[cut:]
        break
    return chunk


class Instance:
    """Two segments, or one (second is empty, no order to predict), in the order in which the model sees them."""

    __slots__ = ("first", "order", "second")

    def __init__(self, first: array, second: array, order: int):
        self.first, self.second, self.order = first, second, order

    def __len__(self):
        return len(self.first) + len(self.second)


def padding_share(instances: Sequence[Instance]) -> float:
    """Of the positions of a batch, that of the padding."""
    lengths = list(map(len, instances))
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def make_instance(
    chunk: Sentences, max_tokens: int, generator: random.Random, *, sentence_order: bool = True
) -> Instance:
    """Cut a chunk at a random sentence, swap the halves with probability 1/2. A single sentence gets no order label;
    without ``sentence_order`` a chunk stays in one piece, and none gets one."""
    if len(chunk) == 1 or not sentence_order:
        return Instance(join(chunk)[:max_tokens], array("i"), NO_ORDER)
    cut = generator.randrange(1, len(chunk))
    first, second = join(chunk[:cut]), join(chunk[cut:])
    order = SWAPPED if generator.random() < 0.5 else ORDERED
    if order == SWAPPED:
        first, second = second, first
    if len(first) + len(second) > max_tokens:
        first, second = truncate_longest_first(first, second, max_tokens)
    return Instance(first, second, order)


def join(sentences: Sequence[array]) -> array:
    return array("i", b"".join(sentences))


def pack_ragged(rows: Sequence[array]) -> dict[str, torch.Tensor]:
    """Arrays of ids as two flat tensors: small to save, and loadable with weights_only=True."""
    values = np.array(join(rows), dtype=np.int32)
    lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
    return {"values": torch.from_numpy(values), "lengths": torch.from_numpy(lengths)}


def unpack_ragged(packed: dict[str, torch.Tensor]) -> list[array]:
    values = array("i", packed["values"].numpy().tobytes())
    ends = itertools.accumulate(packed["lengths"].tolist(), initial=0)
    return [values[begin:end] for begin, end in itertools.pairwise(ends)]


class OpenDocuments:
    """Tokenised documents of one source from which instances are drawn, refilled from its endless stream."""

    def __init__(self, documents: DocumentStream, encoder: SentenceEncoder, *, batch_size: int):
        self.documents = documents
        self.encoder = encoder
        self.batch_size = batch_size  # sentences per call of the tokenizer
        self.open: list[Sentences] = []

    def refill(self) -> bool:
        """Have NUM_OPEN_DOCUMENTS open; False when the stream gives this worker none at all."""
        epoch = self.documents.epoch
        while len(self.open) < NUM_OPEN_DOCUMENTS:
            if not self._open_batch() and not self.open:
                return False
            if not self.open and self.documents.epoch > epoch + 1:
                raise ValueError(f"{self.documents.source.name}: no text is left after tokenisation")
        return True

    def _open_batch(self) -> bool:
        """Split and tokenise documents until they give one batch of sentences, at most as many as that."""
        sentences, ends = [], []
        for document in itertools.islice(self.documents, self.batch_size):
            begin = len(sentences)
            sentences.extend(split_sentences(document))
            ends.extend(range(begin + MAX_DOCUMENT_SENTENCES, len(sentences), MAX_DOCUMENT_SENTENCES))
            ends.append(len(sentences))
            if len(sentences) >= self.batch_size:
                break
        encoded = self.encoder.encode(sentences)
        for begin, end in itertools.pairwise([0, *ends]):
            document = [ids for ids in encoded[begin:end] if ids]
            if document:
                document.reverse()
                self.open.append(document)
        return bool(ends)

    def take_chunk(self, max_tokens: int, starts_word: Sequence[bool], generator: random.Random) -> Sentences:
        index = int(generator.random() * len(self.open))
        document = self.open[index]
        chunk = take_chunk(document, max_tokens, starts_word)
        if not document:
            self.open[index] = self.open[-1]
            self.open.pop()
        return chunk

    def state_dict(self) -> dict:
        return {
            "documents": self.documents.state_dict(),
            "num_sentences": [len(document) for document in self.open],
            "sentences": pack_ragged(list(itertools.chain(*self.open))),
        }

    def load_state_dict(self, state: dict) -> None:
        self.documents.load_state_dict(state["documents"])
        sentences = iter(unpack_ragged(state["sentences"]))
        self.open = [list(itertools.islice(sentences, count)) for count in state["num_sentences"]]


class InstanceStream:
    """The endless instances of one worker. All its choices come from one seeded generator."""

    def __init__(self, sources: list[OpenDocuments], weights: list[float], *, settings, generator: random.Random):
        self.sources = sources
        self.cumulative_weights = list(itertools.accumulate(weights))
        self.settings = settings  # the dataset: its tables, special ids and current maximum length
        self.generator = generator
        self.pool: list[Instance] = []  # sorted by length
        self.batch: list[Instance] = []  # rest of the batch that is being emitted
        self.num_batches = 0
        self.num_tokens, self.num_discarded_tokens = 0, 0

    def __iter__(self) -> Iterator[dict]:
        if self.settings.pack_sequences:
            while (row := self._next_row()) is not None:
                yield self.settings.assemble_row(row)
            return
        next_instance = self._next_of_similar_length if (self.settings.batch_size or 1) > 1 else self._next_instance
        while (instance := next_instance()) is not None:
            yield self.settings.assemble(instance)

    def _next_instance(self) -> Instance | None:
        """The next sentences of a random open document; None when there is no text for this worker."""
        while True:
            point = self.generator.random() * self.cumulative_weights[-1]
            index = bisect.bisect_right(self.cumulative_weights, point)
            source = self.sources[index]
            if source.refill():
                break
            logger.warning("%s: fewer documents than data loader workers, one gets none", source.documents.source.name)
            weights = np.diff(self.cumulative_weights, prepend=0.0)
            weights[index] = 0.0
            if not weights.any():
                return None
            self.cumulative_weights = np.cumsum(weights).tolist()
        max_tokens = self.settings.current_length() - NUM_SPECIAL_TOKENS
        chunk = source.take_chunk(max_tokens, self.settings.starts_word, self.generator)
        instance = make_instance(chunk, max_tokens, self.generator, sentence_order=self.settings.sentence_order)
        num_tokens = sum(map(len, chunk))
        self.num_tokens += num_tokens
        self.num_discarded_tokens += num_tokens - len(instance)
        return instance

    def _next_of_similar_length(self) -> Instance | None:
        """The next of a batch of neighbours in a pool sorted by length.

        The batch is the one with less padding of two random ones: rare lengths wait until there are more of them. The
        pool begins with a few batches and grows while it is used, so the first batch does not wait for all of it.
        """
        if not self.batch:
            size = self.settings.batch_size
            max_batches = max(-(-NUM_POOLED_INSTANCES // size), 16)
            num_batches = min(max_batches, 8 + self.num_batches)
            if not self._fill_pool(num_batches * size):
                return None
            starts = [size * self.generator.randrange(num_batches) for _ in range(NUM_CANDIDATES)]
            start = min(starts, key=lambda start: padding_share(self.pool[start : start + size]))
            self.batch = self.pool[start : start + size]
            del self.pool[start : start + size]
            self.generator.shuffle(self.batch)
            self.num_batches += 1
        return self.batch.pop()

    def _next_row(self) -> list[Instance] | None:
        """Instances that fill the maximum length: a random one of the pool, then the longest that fits, while one does.

        The rest of the pool serves later rows; it grows while it is used, as for batches of similar lengths.
        """
        if not self._fill_pool(min(NUM_POOLED_INSTANCES, NUM_FIRST_POOLED_INSTANCES + self.num_batches)):
            return None
        row = [self.pool.pop(self.generator.randrange(len(self.pool)))]
        room = self.settings.current_length() - len(row[0]) - NUM_SPECIAL_TOKENS
        while (index := bisect.bisect_right(self.pool, room - NUM_SPECIAL_TOKENS, key=len)) > 0:
            row.append(self.pool.pop(index - 1))
            room -= len(row[-1]) + NUM_SPECIAL_TOKENS
        self.generator.shuffle(row)
        self.num_batches += 1
        return row

    def _fill_pool(self, size: int) -> bool:
        """Have so many instances in the pool; False when there is no text for this worker."""
        while len(self.pool) < size:
            instance = self._next_instance()
            if instance is None:
                return False
            bisect.insort(self.pool, instance, key=len)
        return True

    def state_dict(self) -> dict:
        kept = self.pool + self.batch
        return {
            "sources": [source.state_dict() for source in self.sources],
            "cumulative_weights": self.cumulative_weights,
            "generator": self.generator.getstate(),
            "segments": pack_ragged([segment for each in kept for segment in (each.first, each.second)]),
            "orders": [each.order for each in kept],
            "batch_length": len(self.batch),
            "num_batches": self.num_batches,
            "num_tokens": self.num_tokens,
            "num_discarded_tokens": self.num_discarded_tokens,
        }

    def load_state_dict(self, state: dict) -> None:
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(source_state)
        self.cumulative_weights = list(state["cumulative_weights"])
        version, internal, gauss_next = state["generator"]
        self.generator.setstate((version, tuple(internal), gauss_next))
        segments = iter(unpack_ragged(state["segments"]))
        kept = [Instance(next(segments), next(segments), order) for order in state["orders"]]
        num_pooled = len(kept) - state["batch_length"]
        self.pool, self.batch = kept[:num_pooled], kept[num_pooled:]
        self.num_batches = state["num_batches"]
        self.num_tokens, self.num_discarded_tokens = state["num_tokens"], state["num_discarded_tokens"]


class TrainingDataset(IterableDataset):
    """Endless stream of instances; for the arguments see `make_training_dataset`."""

    def __init__(  # noqa: PLR0913 (options of the data)
        self,
        tokenizer,
        sources: list[LocalFiles | HubDataset],
        weights: list[float],
        *,
        shuffle_seed: int,
        shuffle_buffer_size: int = 10_000,
        preprocessing_batch_size: int = 256,
        max_sequence_length=512,
        batch_size: int | None = None,
        pack_sequences: bool = False,
        sentence_order: bool = True,
    ):
        super().__init__()
        self.sources, self.weights, self.shuffle_seed = sources, weights, shuffle_seed
        self.shuffle_buffer_size, self.preprocessing_batch_size = shuffle_buffer_size, preprocessing_batch_size
        self.max_sequence_length, self.batch_size, self.pack_sequences = max_sequence_length, batch_size, pack_sequences
        self.sentence_order = sentence_order
        self.tokenizer = raw_tokenizer(tokenizer)
        self.starts_word = [
            token.startswith("▁") for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        ]
        self.cls_token_id, self.sep_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self._stream: InstanceStream | None = None
        self._state: dict | None = None

    def current_length(self) -> int:
        """The maximum length now: a multiprocessing.Value may have grown since the last instance."""
        return read_length(self.max_sequence_length)

    def assemble(self, instance: Instance) -> dict:
        """[CLS] A [SEP] B [SEP], or [CLS] A [SEP] without a second segment."""
        first_length, second_length = len(instance.first), len(instance.second)
        cls, sep = array("i", [self.cls_token_id]), array("i", [self.sep_token_id])
        input_ids = cls + instance.first + sep
        token_type_ids = ZERO * (first_length + 2)
        special_tokens_mask = ONE + ZERO * first_length + ONE
        if second_length:
            input_ids += instance.second + sep
            token_type_ids += ONE * (second_length + 1)
            special_tokens_mask += ZERO * second_length + ONE
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "special_tokens_mask": special_tokens_mask,
            "sentence_order_label": instance.order,
        }

    def assemble_row(self, instances: list[Instance]) -> dict:
        """Instances end to end; the order labels and the lengths of all."""
        items = list(map(self.assemble, instances))
        names = ("input_ids", "token_type_ids", "special_tokens_mask")
        return {
            **{name: join([item[name] for item in items]) for name in names},
            "instance_lengths": array("i", [len(item["input_ids"]) for item in items]),
            "sentence_order_label": array("i", [instance.order for instance in instances]),
        }

    def _open_stream(self) -> InstanceStream:
        worker_info = get_worker_info()
        worker, num_workers = (worker_info.id, worker_info.num_workers) if worker_info else (0, 1)
        encoder = SentenceEncoder(self.tokenizer)
        sources = [
            OpenDocuments(
                DocumentStream(
                    source,
                    seed=derive_seed(self.shuffle_seed, "source", number),
                    buffer_size=self.shuffle_buffer_size,
                    worker=worker,
                    num_workers=num_workers,
                ),
                encoder,
                batch_size=self.preprocessing_batch_size,
            )
            for number, source in enumerate(self.sources)
        ]
        generator = random.Random(derive_seed(self.shuffle_seed, "instances", worker))
        return InstanceStream(sources, self.weights, settings=self, generator=generator)

    def __iter__(self) -> Iterator[dict]:
        """From the beginning, or from where the loaded state was taken."""
        stream = self._open_stream()
        if self._state is not None:
            stream.load_state_dict(self._state["stream"])
        self._stream = stream
        return iter(stream)

    def check(self) -> None:
        """Make one instance and forget it: raises ValueError if the text cannot be read."""
        next(iter(self._open_stream()), None)

    def discarded_share(self) -> float:
        """Tokens cut off by truncation over tokens read, in the stream that was begun last."""
        if self._stream is None or not self._stream.num_tokens:
            return 0.0
        return self._stream.num_discarded_tokens / self._stream.num_tokens

    def state_dict(self) -> dict:
        """Where the stream that was begun last stands, for `torch.save`.

        Loading it into a dataset made with the same arguments and iterating gives exactly the instances that would have
        come next. It belongs to one process: with a DataLoader of num_workers=0 take it between two batches. With
        worker processes each has its own stream and state (torchdata's StatefulDataLoader collects and restores them).
        """
        stream = self._stream if self._stream is not None else self._open_stream()
        return {
            "shuffle_seed": self.shuffle_seed,
            "sources": [source.name for source in self.sources],
            "stream": stream.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue, from the next `iter` on, where `state_dict` was taken, with the seed it was taken with."""
        names = [source.name for source in self.sources]
        if state["sources"] != names:
            raise ValueError(f"the data state was saved for sources {state['sources']}, not {names}; start without it")
        self.shuffle_seed = state["shuffle_seed"]
        self._state, self._stream = state, None


def read_length(length) -> int:
    """An int, or what a multiprocessing.Value holds now."""
    return getattr(length, "value", length)


def check_weights(weights: Sequence[float] | None, sources: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(sources)
    weights = [float(weight) for weight in weights]
    if len(weights) != len(sources):
        raise ValueError(f"{len(weights)} dataset weights for {len(sources)} dataset sources; give one per source")
    if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise ValueError(f"dataset weights {weights}: none may be negative, and not all zero")
    return weights


def check_tokenizer(tokenizer) -> None:
    missing = [
        name for name in ("cls_token", "sep_token", "mask_token", "pad_token") if getattr(tokenizer, name) is None
    ]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; name it in its special_tokens_map.json")


def make_training_dataset(  # noqa: PLR0913 (options of the data)
    tokenizer,
    *,
    sources: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    shuffle_buffer_size: int = 10_000,
    shuffle_seed: int | None = None,
    preprocessing_batch_size: int = 256,
    max_sequence_length=512,
    batch_size: int | None = None,
    pack_sequences: bool = False,
    sentence_order: bool = True,
) -> TrainingDataset:
    """Endless dataset of instances [CLS] A [SEP] B [SEP] for `DataCollatorForWholeWordMask`.

    sources: local .txt (documents between blank lines), .jsonl, .jsonl.gz (field "text") and .parquet (column "text")
        files, globs or directories of them, or Hugging Face datasets `name[:config]`, streamed. Default: the demo text.
    weights: the share of instances that comes from each source; equal by default.
    shuffle_buffer_size: documents shuffled together. The parts of a corpus are read in a seeded order besides, so
        trainers with different seeds begin in different places.
    shuffle_seed: same seed, same stream, in any process. None: a new one each time. DataLoader workers share out the
        documents of each pass.
    preprocessing_batch_size: sentences per call of the tokenizer.
    max_sequence_length: tokens with specials; an int, or a multiprocessing.Value read at each instance, so it may grow.
    batch_size: when given, each run of that many instances has similar lengths (a DataLoader with the same batch_size
        then pads little); up to 1024 of them are made ahead, before a growing maximum length is read.

    pack_sequences: an item is a row of several instances end to end that fill the maximum length, with their
        instance_lengths and a sentence_order_label for each; the collator turns rows into input that keeps the
        instances apart. batch_size then changes nothing.
    sentence_order: False makes instances [CLS] A [SEP] only, of as many sentences; none has an order to predict.

    An item holds input_ids, token_type_ids, special_tokens_mask (each an array.array of ints, which works like a list)
    and sentence_order_label: 0 in order, 1 swapped, -100 for a single sentence. Raises ValueError for missing, empty or
    unreadable sources and unfit arguments. A document that cannot be read is left out and said; a file that is damaged,
    or a hub that refuses, is a `tasks.mlm.sources.TextError` when the stream comes to it.
    """
    sources = [DEFAULT_SOURCE] if sources is None else [sources] if isinstance(sources, str) else list(sources)
    if not sources:
        raise ValueError("no dataset sources given")
    check_tokenizer(tokenizer)
    weights = check_weights(weights, sources)
    if read_length(max_sequence_length) < MIN_SEQUENCE_LENGTH:
        raise ValueError(f"max_sequence_length {read_length(max_sequence_length)} is below {MIN_SEQUENCE_LENGTH}")
    counts = {
        "shuffle_buffer_size": shuffle_buffer_size,
        "preprocessing_batch_size": preprocessing_batch_size,
        "batch_size": 1 if batch_size is None else batch_size,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, should be at least 1")
    return TrainingDataset(
        tokenizer,
        [open_source(source) for source in sources],
        weights,
        shuffle_seed=int.from_bytes(os.urandom(7), "big") if shuffle_seed is None else shuffle_seed,
        shuffle_buffer_size=shuffle_buffer_size,
        preprocessing_batch_size=preprocessing_batch_size,
        max_sequence_length=max_sequence_length,
        batch_size=batch_size,
        pack_sequences=pack_sequences,
        sentence_order=sentence_order,
    )
