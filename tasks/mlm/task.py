"""Masked-language-model pretraining put together: model, tokenizer, data."""

import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import huggingface_hub.constants
import torch

from arguments import HFTrainerArguments, PeerArguments, TrainerPeerArguments
from src.models import LeanAlbertConfig, LeanAlbertForPreTraining, load_tokenizer
from src.models.config import LEGACY_OPTIONS
from src.preflight.plan import Text
from src.trainer.data_schedule import DataSchedule
from tasks.mlm.data import TrainingDataset, make_training_dataset
from tasks.mlm.text_errors import LeftOut, TextError
from tasks.mlm.text_files import LocalFiles
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

CACHES = {
    "HF_HUB_CACHE": "hub",
    "HF_ASSETS_CACHE": "assets",
    "HF_XET_CACHE": "xet",
    "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules",
}
LOOKED_AT_DOCUMENTS, LOOKED_AT_CHARACTERS = 100, 5000  # of each source; of each document


def use_cache_dir(directory: str) -> None:
    """Keep downloads of this process in ``directory``, and everything that the hub's libraries write besides.

    They read the environment when they are imported, which transformers' Trainer does long before flags are known; so
    what they have read is replaced, too. A login stays where it is.
    """
    path = Path(directory).expanduser().resolve()
    places = {name: path / folder for name, folder in CACHES.items()}
    os.environ.update({name: str(place) for name, place in places.items()})
    for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE"):
        setattr(huggingface_hub.constants, name, str(places[name]))
    huggingface_hub.constants.HUGGINGFACE_HUB_CACHE = str(places["HF_HUB_CACHE"])
    if config := sys.modules.get("datasets.config"):
        config.HF_DATASETS_CACHE, config.HF_MODULES_CACHE = places["HF_DATASETS_CACHE"], places["HF_MODULES_CACHE"]
        config.DOWNLOADED_DATASETS_PATH = config.HF_DATASETS_CACHE / config.DOWNLOADED_DATASETS_DIR
        config.EXTRACTED_DATASETS_PATH = config.DOWNLOADED_DATASETS_PATH / config.EXTRACTED_DATASETS_DIR


def build_model(peer: PeerArguments, *, seed: int, activation_memory: str | None = None, sentence_order: bool = True):
    """The tokenizer, and a model with initial parameters drawn from ``seed`` (equal on all peers).

    ``activation_memory``, if given, replaces that option of the configuration; peers of a run may differ in it. Without
    ``sentence_order`` the pooler and the head above it get no gradient: nobody averages them or sends them around.

    Raises ValueError if a file is missing or broken, or if the tokenizer has more tokens than the model.
    """
    if peer.cache_dir is not None:
        use_cache_dir(peer.cache_dir)
    path = Path(peer.model_config_path).expanduser()
    if not path.is_file():
        raise ValueError(f"--model_config_path: there is no file {path}; pass a model configuration (.json)")
    try:
        options = json.loads(path.read_text(encoding="utf-8-sig"))
        check_options(options)
        config = LeanAlbertConfig.from_dict(options)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"--model_config_path: {path}: {error}") from error
    tokenizer = _load_tokenizer(peer, vocab_size=config.vocab_size)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--tokenizer_path: {peer.tokenizer_path} has {len(tokenizer)} tokens, but vocab_size in {path} is "
            f"{config.vocab_size}; raise vocab_size or take another tokenizer"
        )
    config.sparse_prediction = True  # logits at masked positions only: the same loss, a seventh of the work
    if activation_memory is not None:
        config.activation_memory = activation_memory
    torch.manual_seed(seed)
    try:
        model = LeanAlbertForPreTraining(config)
    except (RuntimeError, MemoryError) as error:  # torch's allocator raises RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model_config_path: {path}: there is not enough memory for this model ({reason})"
        ) from error
    if not sentence_order:
        model.albert.pooler.requires_grad_(False)
        model.sop_classifier.requires_grad_(False)
    return model, tokenizer


def _load_tokenizer(peer: PeerArguments, *, vocab_size: int):
    path = peer.tokenizer_path
    try:
        return load_tokenizer(path)
    except ValueError as error:
        if Path(path).expanduser().exists():
            raise
        make = f"make one: python -m tasks.mlm.train_tokenizer --sources TEXT --vocab_size {vocab_size} --output {path}"
        advice = "ask the run's operator for this folder" if peer.initial_peers else make
        raise ValueError(f"--tokenizer_path: {error}; or {advice}") from error


def check_options(options) -> None:
    """Raises ValueError if a configuration is no JSON object, is of another model, or has an option nobody knows."""
    if not isinstance(options, dict):
        raise ValueError(f"expected a JSON object, found {type(options).__name__}")
    model_type = options.get("model_type", LeanAlbertConfig.model_type)
    if model_type != LeanAlbertConfig.model_type:
        raise ValueError(f"model_type is {model_type!r}, should be {LeanAlbertConfig.model_type!r}")
    known = set(LeanAlbertConfig().to_dict()) | {field.name for field in dataclasses.fields(LeanAlbertConfig)}
    known |= {"architectures", "torch_dtype", "auto_map", *LEGACY_OPTIONS}
    for name in options.keys() - known:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"there is no option {name}{hint}")


def check_sequence_length(model: LeanAlbertForPreTraining, max_sequence_length: int) -> None:
    """Raises ValueError if sequences will outgrow the position embeddings; rotary positions have no limit."""
    config = model.config
    if config.position_embedding_type == "absolute" and max_sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"--max_sequence_length {max_sequence_length}: the model has position embeddings for "
            f"{config.max_position_embeddings} tokens (max_position_embeddings); lower it, or use rotary positions"
        )


def build_data(
    tokenizer, peer: TrainerPeerArguments, training: HFTrainerArguments, *, peer_seed: bytes
) -> tuple[TrainingDataset, DataCollatorForWholeWordMask, DataSchedule]:
    """Endless training instances, their collator, and the schedule that both follow from epoch to epoch.

    ``peer_seed`` (the peer's id, and which start of it this is) decides the order of documents and the masks, so that
    trainers see different data, and none sees the same again and again when it is restarted often.
    The first instance is read here, so that a wrong source is an error before the peer joins the swarm.
    """
    seed = int.from_bytes(hashlib.sha256(peer_seed).digest()[:4], "big")
    schedule = DataSchedule(training)
    dataset = make_training_dataset(
        tokenizer,
        sources=peer.dataset_sources,
        weights=peer.dataset_weights,
        shuffle_seed=seed,
        max_sequence_length=schedule.length,
        batch_size=training.per_device_train_batch_size,
        pack_sequences=peer.pack_sequences,
        sentence_order=training.sentence_order,
    )
    dataset.check()
    collator = DataCollatorForWholeWordMask(
        tokenizer,
        mlm_probability=schedule.mlm_probability,
        pad_to_multiple_of=training.pad_to_multiple_of,
        seed=seed,
    )
    return dataset, collator, schedule


def look_at_text(tokenizer, dataset: TrainingDataset, *, num_readers: int) -> Text:
    """How much text there is, and what its first documents are like; at least ``num_readers`` are counted."""
    documents, is_all = [], True
    for source in dataset.sources:
        source = copy.copy(source)
        source.left_out = LeftOut(source.name)  # what cannot be read is said when training comes to it
        reader = source.read(seed=None, worker=0, num_workers=1, position=None)
        try:
            for document, _ in itertools.islice(reader, max(LOOKED_AT_DOCUMENTS, num_readers)):
                documents.append(document[:LOOKED_AT_CHARACTERS])
            is_all = is_all and next(reader, None) is None
        except TextError:
            is_all = False
    num_tokens = num_unknown = 0
    for document in documents:
        ids = dataset.tokenizer.encode(document, add_special_tokens=False).ids
        num_tokens, num_unknown = num_tokens + len(ids), num_unknown + ids.count(tokenizer.unk_token_id)
    return Text(
        num_bytes=size_of_files(dataset), num_documents=len(documents), is_all=is_all,
        unknown_share=num_unknown / max(1, num_tokens),
    )  # fmt: skip


def size_of_files(dataset: TrainingDataset) -> int | None:
    """Bytes; None if some of the text is in no file of this machine."""
    if not all(isinstance(source, LocalFiles) for source in dataset.sources):
        return None
    return sum(os.path.getsize(path) for source in dataset.sources for path in {one.path for one in source.shards})
