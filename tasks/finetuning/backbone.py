"""Finds a pretrained encoder and its tokenizer: published weights, our own checkpoints, any masked model of the hub."""

import codecs
import copy
import dataclasses
import functools
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedTokenizerBase

from src.models import LeanAlbertConfig, LeanAlbertForMaskedLM, LeanAlbertModel, load_tokenizer
from src.models.checkpoint import (
    POOLER,
    check_size,
    encoder_weights,
    has_pooler,
    has_untrained_pooler,
    is_finite,
    load_strictly,
    read_state_dict,
    weight_files,
)
from src.models.companions import AUXILIARY_CHECKPOINT, configs_in, places_of, read_config, tokenizers_in
from src.models.config import refuse_absurd_numbers
from src.models.hub import STATE_FILE, download_model, explain_hub_error, first_line

logger = logging.getLogger(__name__)

ALIASES = {"ruroberta-large": "ai-forever/ruRoberta-large"}
REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "demo"
BACKUP_FILE = "backup.pth"
# Parts of a path that say what kind of thing it is, not which model.
GENERIC_NAMES = {"checkpoint", "aux", "trainer", "backup", "model", "outputs", ""}
SENTENCE_ORDER = ("albert.pooler.", "sop_classifier.")  # parts of a checkpoint
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
MAX_NAMED_KEYS = 3
LARGEST_MODEL = 2**36  # parameters of an encoder whose weights are still to be fetched
WHAT_TO_PASS = (
    "pass -c CHECKPOINT (state.pth, a trainer's backup.pth or a directory), or -m MODEL (ruroberta-large, an id of the "
    "Hugging Face hub, or a baseline)"
)


@dataclass
class Pretrained:
    """Where a pretrained encoder comes from and all that is needed to load it, as often as there are seeds.

    name: for folders; source: what the user passed; fingerprint: equal for equal weights, config and tokenizer;
    notes: what was chosen without being asked for.
    """

    name: str
    source: str
    path: str
    config: object
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    notes: list[str]

    def load(self) -> nn.Module:
        """A fresh copy of the encoder. Raises ValueError where the weights do not fit, naming the first keys."""
        if isinstance(self.config, LeanAlbertConfig):
            return load_own_encoder(self.path, copy.deepcopy(self.config))
        return load_hub_encoder(self.path, copy.deepcopy(self.config))

    def load_masked_model(self) -> nn.Module:
        """A fresh copy of the model with its masked-LM head. Raises ValueError where there is none, or as `load`."""
        if isinstance(self.config, LeanAlbertConfig):
            return load_own_masked_model(self.path, copy.deepcopy(self.config))
        return load_hub_model(self.path, copy.deepcopy(self.config), AutoModelForMaskedLM)


def find_pretrained(
    model_name: str | None, checkpoint: str | None, *, model_config: str | None = None, tokenizer: str | None = None
) -> Pretrained:
    """The encoder that -m or -c names, or else ./state.pth, or else the newest checkpoint under ./outputs.

    Raises ValueError (or OSError) that says what is missing or does not fit; the weights themselves are read by `load`.
    """
    if model_name is not None and checkpoint is not None:
        raise ValueError(f"-m {model_name} and -c {checkpoint} both name a model; pass one of them")
    notes = []
    if model_name is None and checkpoint is None:
        checkpoint = str(find_checkpoint(Path()))
        notes.append(f"neither -m nor -c given: fine-tuning {checkpoint}")
    source = checkpoint if checkpoint is not None else model_name
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(source, path, model_config, tokenizer, notes)
    if checkpoint is not None and not path.is_dir():
        raise ValueError(f"-c {checkpoint}: no such file or directory; {WHAT_TO_PASS}")
    return _from_directory_or_hub(source, path, model_config, tokenizer, notes)


def find_checkpoint(directory: Path) -> Path:
    """state.pth in the directory, or the newest checkpoint that pretraining has left under its outputs/."""
    if (directory / STATE_FILE).is_file():
        return directory / STATE_FILE
    outputs = directory / "outputs"
    checkpoints = [
        (file.stat().st_mtime, path)
        for path in outputs.glob(f"**/{AUXILIARY_CHECKPOINT}")
        for file in weight_files(path)
    ]
    checkpoints += [(path.stat().st_mtime, path) for path in outputs.glob(f"**/{BACKUP_FILE}")]
    if not checkpoints:
        raise ValueError(
            f"no model to fine-tune: there is no {STATE_FILE} here and no checkpoint of a pretraining run under "
            f"{outputs}/; {WHAT_TO_PASS}"
        )
    return max(checkpoints)[1]


def _from_file(source: str, path: Path, model_config, tokenizer, notes: list[str]) -> Pretrained:
    """state.pth or backup.pth, which hold weights alone: configuration and tokenizer lie elsewhere."""
    shapes = {name: tuple(value.shape) for name, value in encoder_weights(read_state_dict(path)).items()}
    num_embeddings = next(iter(shapes.get(WORD_EMBEDDINGS, ())), None)
    places = [*places_of(path), Path(), DEMO]
    tokenizers = [tokenizer] if tokenizer else tokenizers_in(places)
    loaded = _first_fitting_tokenizer(tokenizers, num_embeddings, path)
    configs = [Path(model_config)] if model_config else configs_in(places)
    config_path, config = _first_fitting_config(configs, shapes, num_embeddings, len(loaded), path)
    if not model_config:
        notes.append(f"{path} is read with the configuration {config_path} (--model-config)")
    if not tokenizer:
        notes.append(f"and the tokenizer {loaded.name_or_path} (--tokenizer)")
    digest = _digest([path], config, loaded)
    return Pretrained(_local_name(path, digest), source, str(path), config, loaded, digest, notes)


def _first_fitting_tokenizer(directories: list, num_embeddings: int | None, path: Path) -> PreTrainedTokenizerBase:
    if not directories:
        raise ValueError(f"{path}: no tokenizer beside it; pass --tokenizer DIRECTORY (or a hub id)")
    loaded = [load_tokenizer(str(directory)) for directory in directories]
    return next((tokenizer for tokenizer in loaded if len(tokenizer) == num_embeddings), loaded[0])


def _first_fitting_config(
    paths: list[Path], shapes: dict, num_embeddings: int | None, vocabulary_size: int, checkpoint: Path
):
    """(path, config) of the first configuration whose model has the checkpoint's shapes, else of the first.

    The number of embeddings may be that of the tokenizer instead of the configuration's: the published model was
    resized before it was trained. What does not fit is told in full when the weights are loaded.
    """
    if not paths:
        raise ValueError(f"{checkpoint}: no config.json beside it nor here; pass --model-config FILE")
    configs = []
    for path in paths:
        config = read_config(path)
        if num_embeddings == vocabulary_size:
            config.vocab_size = num_embeddings
        configs.append((path, config))
    return next((found for found in configs if _fits(found[1], shapes)), configs[0])


def _fits(config: LeanAlbertConfig, shapes: dict) -> bool:
    with torch.device("meta"):
        expected = LeanAlbertModel(config, add_pooling_layer=has_pooler(shapes)).state_dict()
    return all(shapes.get(name) == tuple(tensor.shape) for name, tensor in expected.items())


def _from_directory_or_hub(source: str, path: Path, model_config, tokenizer, notes: list[str]) -> Pretrained:
    is_local = path.is_dir()
    location = str(path) if is_local else ALIASES.get(source.lower(), source)
    if is_local and not (path / "config.json").is_file() and model_config is None:
        raise ValueError(f"{path}: no config.json in this directory; pass one written by save_pretrained")
    try:
        refuse_absurd_numbers(PreTrainedConfig.get_config_dict(model_config or location)[0])
        config = AutoConfig.from_pretrained(model_config or location)
    except Exception as error:  # a damaged file, a repository that does not exist, no network: all kinds
        reason, advice = (first_line(error), "") if is_local else explain_hub_error(error)
        if is_local and begins_with_mark(
            Path(model_config or path / "config.json")
        ):  # which transformers does not read
            reason, advice = "config.json begins with a byte order mark", "save it as UTF-8 without one"
        advice = f"{advice}, or " if advice else ""
        raise ValueError(
            f"{source}: no model configuration could be read ({reason}); {advice}{WHAT_TO_PASS}"
        ) from error
    name = source.lower() if source.lower() in ALIASES else source.replace("/", "--")
    if not is_local and isinstance(config, LeanAlbertConfig):
        return _own_model_of_hub(source, location, name, config, tokenizer, model_config)
    loaded = load_tokenizer(tokenizer or location)
    _check_vocabulary(source, loaded, config)
    if is_local:
        files = weight_files(path)
        if not files:
            raise ValueError(f"{path}: no weights in this directory; pass one written by save_pretrained")
        digest = _digest(files, config, loaded)
        return Pretrained(_local_name(path, digest), source, location, config, loaded, digest, notes)
    version = f"{location}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256((version + loaded.backend_tokenizer.to_str()).encode()).hexdigest()
    return Pretrained(name, source, location, config, loaded, digest, notes)


def _check_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase, config) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the model only "
            f"{config.vocab_size}; they do not belong together (--tokenizer)"
        )


def begins_with_mark(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:3] == codecs.BOM_UTF8


def _own_model_of_hub(source: str, hub_id: str, name: str, config, tokenizer, model_config) -> Pretrained:
    """A LeanALBERT of the hub: the files are fetched and read as those of a directory are, with the same strictness."""
    directory = download_model(hub_id, revision=getattr(config, "_commit_hash", None))
    tokenizer = tokenizer or hub_id
    if not weight_files(directory) and (directory / STATE_FILE).is_file():
        model_config = model_config or directory / "config.json"
        found = _from_file(source, directory / STATE_FILE, model_config, tokenizer, [])
        return dataclasses.replace(found, name=name)
    files = weight_files(directory)
    if not files:
        raise ValueError(f"{source}: the repository holds no weights of a LeanALBERT; {WHAT_TO_PASS}")
    loaded = load_tokenizer(tokenizer)
    _check_vocabulary(source, loaded, config)
    return Pretrained(name, source, str(directory), config, loaded, _digest(files, config, loaded), [])


def load_own_encoder(path: str, config: LeanAlbertConfig) -> nn.Module:
    """The encoder of a LeanALBERT with any head; without a pooler if the checkpoint has none, as a masked model.

    One that pretraining has not touched is drawn anew for each run, as a head is.
    """
    state_dict = read_state_dict(path)
    build = functools.partial(LeanAlbertModel, config, add_pooling_layer=has_pooler(state_dict))
    check_size(build, state_dict, source=path)
    backbone = build()
    weights = encoder_weights(state_dict)
    if has_untrained_pooler(state_dict):
        say_pooler_is_new(path)
        weights |= {name: value for name, value in backbone.state_dict().items() if name.startswith(POOLER)}
    load_strictly(backbone, weights, source=path)
    return backbone


def load_own_masked_model(path: str, config: LeanAlbertConfig) -> nn.Module:
    """A LeanALBERT with its masked-LM head, without what only the sentence-order objective needs."""
    state_dict = read_state_dict(path)
    build = functools.partial(LeanAlbertForMaskedLM, config)
    check_size(build, state_dict, source=path)
    model = build()
    kept = {name: tensor for name, tensor in state_dict.items() if not name.startswith(SENTENCE_ORDER)}
    load_strictly(model, kept, source=path)
    return model


@functools.cache
def say_pooler_is_new(path: str) -> None:
    logger.warning(
        "%s: its pooler was never trained (as with --sentence_order False); fine-tuning starts it anew", path
    )


def load_hub_encoder(path: str, config) -> nn.Module:
    """The encoder of any masked model."""
    return load_hub_model(path, config, AutoModel)


def load_hub_model(path: str, config, kind) -> nn.Module:
    """A model of the hub, or of a directory: ``kind`` is AutoModel or one for a head. Its keys must all be there, but
    for a pooler, which counts as a head here; what else a checkpoint holds must belong to another head."""
    try:
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
    except ValueError as error:  # transformers lists all families that it knows
        raise ValueError(f"{path}: a model of the family {config.model_type} is no masked language model") from error
    files = weight_files(Path(path)) if Path(path).is_dir() else []
    most = 2 * sum(file.stat().st_size for file in files) + 2**20 if files else LARGEST_MODEL
    if needed > most:  # transformers would take the memory first, and then say that it does not fit
        raise ValueError(f"{path}: its config.json describes {needed:,} parameters, far more than its weights can be")
    model, loading = kind.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told below
    )
    prefix = f"{model.base_model_prefix}."
    missing = [key for key in loading["missing_keys"] if not key.removeprefix(prefix).startswith("pooler.")]
    own_parts = {name.split(".")[0] for name, _ in model.base_model.named_parameters()}
    left_over = [key for key in loading["unexpected_keys"] if key.removeprefix(prefix).split(".")[0] in own_parts]
    left_over = [key for key in left_over if not key.endswith("position_ids")]  # a buffer of old releases
    problems = {"missing": missing, "unexpected": left_over, "of another shape": loading["mismatched_keys"]}
    found = [f"{what}: {_name_keys(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(found)}")
    broken = [name for name, tensor in model.named_parameters() if not is_finite(tensor)]
    if broken:
        raise ValueError(f"{path}: values of {_name_keys(broken)} are not finite; take another copy of the model")
    return model


def _name_keys(keys) -> str:
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    rest = f" and {len(names) - MAX_NAMED_KEYS} more" if len(names) > MAX_NAMED_KEYS else ""
    return ", ".join(names[:MAX_NAMED_KEYS]) + rest


def max_positions(backbone: nn.Module) -> int | None:
    """The longest input that learned position embeddings allow; None where there are none (rotary)."""
    embeddings = getattr(backbone, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    offset = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from after the padding
    return table.num_embeddings - offset


def build_encoder(directory: Path, *, pooler: bool) -> nn.Module:
    """An encoder of the architecture that config.json in the directory names, with random weights."""
    encoder = AutoModel.from_config(AutoConfig.from_pretrained(directory))
    if not pooler and getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def _digest(files: list[Path], config, tokenizer) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    digest.update(config.to_json_string().encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _local_name(path: Path, digest: str) -> str:
    """A folder name: the part of the path that tells models apart, and the first digits of the fingerprint."""
    path = path.resolve()
    parts = [*path.parent.parts, path.stem if path.is_file() else path.name]
    telling = [part for part in parts[1:] if part not in GENERIC_NAMES]
    return f"{telling[-1] if telling else 'model'}-{digest[:6]}"
