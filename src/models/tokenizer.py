"""Tokenizers exactly as their files describe them.

`AlbertTokenizer` of transformers 5 keeps only the pieces of a tokenizer.json and writes the rest of the pipeline anew:
lower case, accents stripped (й becomes и, ё becomes е), no token_type_ids. Nothing here goes through it.
"""

import json
import logging
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .hub import explain_hub_error, give_up_on_silence
from .sentencepiece_model import convert_sentencepiece

logger = logging.getLogger(__name__)

PIPELINE_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "spiece.model"
OTHER_VOCABULARY_FILES = ("vocab.json", "vocab.txt", "sentencepiece.bpe.model", "tokenizer.model")
SETTINGS_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
VOCABULARY_FILES = (PIPELINE_FILE, SENTENCEPIECE_FILE, *OTHER_VOCABULARY_FILES)
OWN_FILES = (PIPELINE_FILE, SENTENCEPIECE_FILE, "tokenizer_config.json", "special_tokens_map.json")  # of load_exactly
SUBFOLDER = "tokenizer"  # where the published repository keeps them

# What transformers calls the tokenizers that are read here; any other class is loaded by AutoTokenizer.
OWN_CLASSES = ("AlbertTokenizer", "AlbertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
MODEL_INPUT_NAMES = ["input_ids", "token_type_ids", "attention_mask"]
SPECIAL_TOKENS = {
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
    "unk_token": "<unk>",
    "sep_token": "[SEP]",
    "pad_token": "<pad>",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
WHAT_TO_PASS = f"pass a directory that holds {PIPELINE_FILE} or {SENTENCEPIECE_FILE}, or the id of a model on the hub"


def raw_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """An independent copy of the Rust tokenizer with padding and truncation off, for raw batch encoding.

    Calling a transformers tokenizer with padding or truncation leaves both switched on in the Rust object behind
    `backend_tokenizer`. Encoding through a copy is not affected, whatever happens to the original.
    """
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # The Rust library misreads some scores it has written itself by the last bit, which can decide between equally good
    # segmentations. The model, unlike padding and truncation, is never changed by use, so both can hold the same one.
    copy.model = tokenizer.backend_tokenizer.model
    copy.no_padding()
    copy.no_truncation()
    return copy


def read_json(path: Path) -> dict:
    """The content of a settings file, {} when there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or download the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def has_vocabulary(directory: Path) -> bool:
    return any((directory / name).is_file() for name in VOCABULARY_FILES)


def looks_like_hub_id(name) -> bool:
    """`name` or `owner/name`, unless it begins like a path or with a directory that exists here."""
    parts = str(name).split("/")
    begins_like_path = str(name).startswith((".", "~", os.sep))
    is_typing_error = len(parts) == 2 and Path(parts[0]).is_dir()
    return isinstance(name, str) and 1 <= len(parts) <= 2 and all(parts) and not (begins_like_path or is_typing_error)


def download(hub_id: str) -> Path:
    """The local copy of a hub repository's tokenizer files, no weights."""
    names = [*VOCABULARY_FILES, *SETTINGS_FILES]
    give_up_on_silence()
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*names, *(f"{SUBFOLDER}/{name}" for name in names)]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason, advice = explain_hub_error(error)
        raise ValueError(
            f"no tokenizer {hub_id!r}: there is no such directory, and it could not be fetched from the Hugging Face "
            f"hub ({type(error).__name__}: {reason}); {advice}, or {WHAT_TO_PASS}"
        ) from error


def find_directory(path_or_hub_id) -> Path:
    """The directory that holds the vocabulary: the one given, its `tokenizer` sub-folder, or a download."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        raise ValueError(f"{path} is a file; pass the directory it is in, {path.parent}")
    if not path.is_dir():
        if not looks_like_hub_id(path_or_hub_id):
            raise ValueError(f"no tokenizer {str(path_or_hub_id)!r}: there is no such directory; {WHAT_TO_PASS}")
        path = download(path_or_hub_id)
    for directory in (path, path / SUBFOLDER):
        if has_vocabulary(directory):
            return directory
    raise ValueError(
        f"no tokenizer in {str(path_or_hub_id)!r}: looked for {', '.join(VOCABULARY_FILES)} in it and in its folder "
        f"{SUBFOLDER}/; {WHAT_TO_PASS}"
    )


def read_pipeline(directory: Path, settings: dict) -> Tokenizer:
    """The Rust tokenizer that tokenizer.json describes, or else the one spiece.model describes.

    transformers takes `do_lower_case` as true and `keep_accents` as false when a directory does not mention them; here
    only what tokenizer_config.json says itself is added to the normalisation stored in spiece.model.
    """
    path = directory / PIPELINE_FILE
    if path.is_file():
        try:
            return Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{path} does not describe a tokenizer ({error}); copy or download it again") from error
    path = directory / SENTENCEPIECE_FILE
    lower_case, strip_accents = settings.get("do_lower_case", False), not settings.get("keep_accents", True)
    if lower_case or strip_accents:
        logger.warning(
            "%s asks for do_lower_case=%s and keep_accents=%s: texts lose this before %s sees them",
            directory / "tokenizer_config.json",
            lower_case,
            not strip_accents,
            SENTENCEPIECE_FILE,
        )
    return convert_sentencepiece(path, lower_case=lower_case, strip_accents=strip_accents)


def find_special_tokens(pipeline: Tokenizer, directory: Path, settings: dict) -> dict[str, AddedToken]:
    """Role -> token, as special_tokens_map.json, else tokenizer_config.json, else ALBERT's names give them.

    A token keeps the properties (lstrip of [MASK]) it has in tokenizer.json. One that is an ordinary piece there
    becomes special, with a warning; one that is not there at all is a ValueError, as its id would lie beyond the
    vocabulary.
    """
    named = settings | read_json(directory / "special_tokens_map.json")
    added = {token.content: token for token in pipeline.get_added_tokens_decoder().values()}
    found = {}
    for role, default in SPECIAL_TOKENS.items():
        entry = named.get(role) or (default if pipeline.token_to_id(default) is not None else None)
        if entry is None:
            continue
        properties = dict(entry) if isinstance(entry, dict) else {"content": entry}
        content = properties["content"]
        if pipeline.token_to_id(content) is None:
            raise ValueError(
                f"{directory}: {role} is {content!r}, which is not in the vocabulary; correct the one or other"
            )
        if content not in added:
            logger.warning("%s does not mark %s as a special token; it is treated as one", directory, content)
            flags = {flag: properties.get(flag, False) for flag in ("lstrip", "rstrip", "single_word")}
            added[content] = AddedToken(content, normalized=False, special=True, **flags)
            pipeline.add_special_tokens([added[content]])
        found[role] = added[content]
    return found


def set_template(pipeline: Tokenizer, special_tokens: dict[str, AddedToken], directory: Path) -> None:
    """Give a pipeline made from spiece.model, which knows no template, ALBERT's `[CLS] A [SEP] B [SEP]`."""
    missing = [role for role in ("cls_token", "sep_token") if role not in special_tokens]
    if missing:
        raise ValueError(
            f"{directory / SENTENCEPIECE_FILE} has no [CLS] and [SEP] pieces: train it with control_symbols="
            f"[CLS],[SEP],[MASK], or name the pieces to use as {' and '.join(missing)} in special_tokens_map.json"
        )
    cls, sep = special_tokens["cls_token"].content, special_tokens["sep_token"].content
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, pipeline.token_to_id(token)) for token in {cls, sep}],
    )


def load_exactly(directory: Path, settings: dict) -> PreTrainedTokenizerFast:
    """The pipeline of the directory's files in a transformers tokenizer that adds nothing of its own."""
    pipeline = read_pipeline(directory, settings)
    special_tokens = find_special_tokens(pipeline, directory, settings)
    if not (directory / PIPELINE_FILE).is_file():
        set_template(pipeline, special_tokens, directory)
    if pipeline.post_processor is None:
        logger.warning("%s has no post_processor: no [CLS] and [SEP] are added to texts", directory / PIPELINE_FILE)
    # Padding and truncation are chosen per call; those stored in a file would be transformers' defaults for all calls.
    pipeline.no_padding()
    pipeline.no_truncation()
    kept = {
        name: settings[name] for name in ("model_max_length", "padding_side", "truncation_side") if name in settings
    }
    if not settings.get("tokenizer_class", "AlbertTokenizer").startswith("Albert"):  # Albert's own leave segments out
        kept |= {name: settings[name] for name in ("model_input_names",) if name in settings}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        name_or_path=str(directory),
        **special_tokens,
        **({"model_input_names": MODEL_INPUT_NAMES} | kept),
    )
    # transformers sets a post-processor of its own where a file has none, and holds a copy whose scores have gone
    # through text once more (see raw_tokenizer); every other part is as it was read.
    tokenizer.backend_tokenizer.post_processor = pipeline.post_processor
    tokenizer.backend_tokenizer.model = pipeline.model
    assert tokenizer.backend_tokenizer.to_str() == pipeline.to_str(), "transformers has changed the pipeline"
    return tokenizer


def is_of_own_family(directory: Path) -> bool:
    """Whether `load_exactly` reads a directory's tokenizer, and transformers has no say in it."""
    tokenizer_class = read_json(directory / "tokenizer_config.json").get("tokenizer_class", OWN_CLASSES[0])
    return tokenizer_class in OWN_CLASSES and any(
        (directory / name).is_file() for name in (PIPELINE_FILE, SENTENCEPIECE_FILE)
    )


def load_tokenizer(path_or_hub_id: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or a Hugging Face repository, with exactly the pipeline its files describe.

    Reads tokenizer.json as it stands (ids equal those of `tokenizers.Tokenizer.from_file`), or else spiece.model with
    the normalisation stored in it (ids equal those of sentencepiece, see `convert_sentencepiece`). Texts come back with
    token_type_ids. A pipeline without a post-processor gets none: a warning says so. A tokenizer of another family (its
    tokenizer_config.json names another class, or it has only vocab.txt, vocab.json, ...) is loaded by transformers'
    AutoTokenizer.

    Raises ValueError when there is no such directory, no vocabulary in it, or a file in it is damaged.
    """
    directory = find_directory(path_or_hub_id)
    if is_of_own_family(directory):
        return load_exactly(directory, read_json(directory / "tokenizer_config.json"))
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # damaged files show as errors of any kind here, bare Exception among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"AutoTokenizer could not load {directory} ({reason}); {WHAT_TO_PASS}") from error
