"""What a run hands over to whoever joins it: the flags that its peers share, its model, its tokenizer, its data sets.

A manifest is JSON; the files of model and tokenizer are named in it by size and hash, so that the hash of the manifest
stands for all. One that comes from outside is an attack until `read_manifest` has checked it: known flags only, each
of its own type and in its range; files under names from a fixed list; data sets of the hub at a fixed revision.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from arguments import FLAGS, SHARED, check_handed_over, handed_over_flags
from src.models import LeanAlbertConfig
from src.models.tokenizer import OWN_FILES

FORMAT = 1  # of manifests; to be changed when those of before are not understood any more
MAX_BYTES = 2**16
CONFIG_FILE, TOKENIZER = "config.json", "tokenizer"
MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES = 2**16, 2**25  # the latter of all its files together
FILES = (CONFIG_FILE, *(f"{TOKENIZER}/{name}" for name in OWN_FILES))  # no other name is ever taken from outside
MAX_DATA_SETS = 64
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
DATA_SET = re.compile(rf"{_PART}/{_PART}(:[A-Za-z0-9][\w.+-]{{0,95}})?@[0-9a-f]{{40}}", re.ASCII)
NOT_SHARED = ("sparse_prediction",)  # set by the task, whatever a configuration says
NAMES = {"model_type", "hidden_act", "position_embedding_type", "activation_memory"}  # options that are words
PLAIN = (bool, int, float, type(None))
OWN_OPTIONS = ("activation_memory", "classifier_dropout_prob")  # handed over, but a peer may have another


@dataclass(frozen=True)
class Manifest:
    """What peers of a run have in common. ``files``: {name: (SHA-256, bytes)}; ``weights``: of the data sets, or none.

    ``flags`` of a run that an auxiliary peer has begun may lack those of trainers.
    """

    run_id: str
    flags: dict[str, object]
    files: dict[str, tuple[str, int]]
    data_sets: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    format: int = field(default=FORMAT, kw_only=True)

    def content(self) -> bytes:
        """The one way in which it is written."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def hash(self) -> str:
        return sha256(self.content())

    @property
    def has_tokenizer(self) -> bool:
        return any(name.startswith(TOKENIZER) for name in self.files)

    def fields(self) -> dict[str, str]:
        """{what people call it: value}, for comparisons: manifests are equal if these are, so hashes are whole."""
        files = {name: f"{size} bytes with hash {digest}" for name, (digest, size) in self.files.items()}
        flags = {f"--{name}": str(value) for name, value in self.flags.items()}
        weights = " ".join(map(str, self.weights)) or "equal"
        return {**flags, **files, "data sets": " ".join(self.data_sets) or "none", "weights": weights}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_manifest(content: bytes, run_id: str) -> Manifest:
    """Raises ValueError, with what is wrong, for whatever is no manifest of this run."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    try:
        values = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise ValueError("it is no manifest of a run")
    if values["format"] != FORMAT:
        raise ValueError(f"its format is {values['format']}, this version reads {FORMAT}: update the older side")
    if values.keys() != Manifest.__dataclass_fields__.keys() or values["run_id"] != run_id:
        raise ValueError(f"it is not of the run {run_id}")
    flags, files = values["flags"], values["files"]
    if not isinstance(flags, dict) or not isinstance(files, dict):
        raise ValueError("it names no flags and files")
    check_handed_over(flags)
    manifest = Manifest(
        run_id,
        flags,
        {name: _checked_file(name, entry) for name, entry in files.items()},
        *_checked_data_sets(values["data_sets"], values["weights"]),
    )
    if CONFIG_FILE not in files:
        raise ValueError(f"it names no {CONFIG_FILE}")
    if sum(size for name, (_, size) in manifest.files.items() if name != CONFIG_FILE) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"its tokenizer is larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
    if manifest.content() != content:  # else one content could have many hashes
        raise ValueError("it is not written as manifests are")
    return manifest


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def _checked_file(name: str, entry: object) -> tuple[str, int]:
    if name not in FILES:
        raise ValueError(f"it names a file {name[:50]!r}, which no run hands over")
    is_pair = isinstance(entry, list) and len(entry) == 2
    if not is_pair or type(entry[1]) is not int or not re.fullmatch("[0-9a-f]{64}", str(entry[0])):
        raise ValueError(f"it does not tell hash and size of {name}")
    limit = MAX_CONFIG_BYTES if name == CONFIG_FILE else MAX_TOKENIZER_BYTES
    if not 0 < entry[1] <= limit:
        raise ValueError(f"{name} would have {entry[1]} bytes, at most {limit} are taken")
    return str(entry[0]), entry[1]


def _checked_data_sets(names: object, weights: object) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if not isinstance(names, list) or not isinstance(weights, list) or len(names) > MAX_DATA_SETS:
        raise ValueError("its list of data sets is none")
    for name in names:
        if not isinstance(name, str) or not DATA_SET.fullmatch(name):
            shown = repr(str(name)[:80])
            raise ValueError(f"{shown} is no data set of the hub at a fixed commit (ORG/NAME[:config]@COMMIT)")
    if weights and (len(weights) != len(names) or not all(type(one) is float and 0 <= one < 1e9 for one in weights)):
        raise ValueError("its weights of data sets are none")
    return tuple(names), tuple(weights)


def is_handed_over(source: str) -> bool:
    """Whether a source of text can be named to others: a data set of the hub at a fixed commit, and nothing here."""
    places = (source, source.partition("@")[0], source.partition("@")[0].partition(":")[0])
    return DATA_SET.fullmatch(source) is not None and not any(Path(place).exists() for place in places)


def make_manifest(
    run_id: str,
    flags: Mapping[str, object],
    files: Mapping[str, bytes],
    *,
    sources: Sequence[str] = (),
    weights: Sequence[float] | None = None,
) -> Manifest:
    """What is said of a run by whoever starts it, of all ``flags`` those that are handed over.

    Of ``sources`` with local text among them, none are named: newcomers are asked for text of their own.
    """
    known = handed_over_flags()
    named = tuple(sources) if all(map(is_handed_over, sources)) else ()
    manifest = Manifest(
        run_id,
        {name: value for name, value in flags.items() if name in known},
        {name: (sha256(content), len(content)) for name, content in files.items()},
        named,
        tuple(map(float, weights or ())) if named else (),
    )
    return read_manifest(manifest.content(), run_id)  # what others would refuse is refused here


def make_files(config: LeanAlbertConfig, tokenizer_directory: Path | None) -> dict[str, bytes]:
    """{name: content} of what is handed over; no tokenizer if its files are not of the kind that is (``None``)."""
    names = [name for name in LeanAlbertConfig.__annotations__ if name not in NOT_SHARED]
    options = {"model_type": config.model_type, **{name: getattr(config, name) for name in names}}
    files = {CONFIG_FILE: json.dumps(options, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"}
    for name in OWN_FILES if tokenizer_directory is not None else ():
        with contextlib.suppress(FileNotFoundError):
            files[f"{TOKENIZER}/{name}"] = (tokenizer_directory / name).read_bytes()
    return files


def read_config(content: bytes) -> LeanAlbertConfig:
    """Raises ValueError for whatever is no configuration of a model that `make_files` has written."""
    try:
        options = json.loads(content.decode(), parse_constant=_no_constant)  # from bytes it would read UTF-16, too
        unknown = options.keys() - {"model_type", *LeanAlbertConfig.__annotations__} | options.keys() & {*NOT_SHARED}
        if unknown:
            raise ValueError(f"there is no option {min(unknown)[:50]!r}")
        if any(type(options[name]) not in PLAIN for name in options.keys() - NAMES):
            raise ValueError("options are numbers and switches")
        if options.pop("model_type", "") != LeanAlbertConfig.model_type:
            raise ValueError(f"its model_type is not {LeanAlbertConfig.model_type}")
        return LeanAlbertConfig(**options)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from error


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(field, value, other value) of each that both have and in which they differ, or that only one has."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [(name, one.get(name, "not given"), other.get(name, "not given")) for name in names]


def contradictions(given: Mapping[str, object], manifest: Manifest) -> list[str]:
    """Flags given by hand that must be as in the run and are not, each with both values."""
    return [
        f"--{name} is {value} here and {manifest.flags[name]} in the run"
        for name, value in given.items()
        if name in manifest.flags and FLAGS[name].metadata["scope"] in SHARED and value != manifest.flags[name]
    ]


def _signed_part(content: bytes, run_id: str) -> bytes:
    """Nothing else that an organiser signs begins like this."""
    return json.dumps(["LeanALBERT settings", run_id, sha256(content)]).encode()


def sign_manifest(organiser: RSAPrivateKey, manifest: Manifest) -> bytes:
    return organiser.sign(_signed_part(manifest.content(), manifest.run_id))


def is_signed(organiser: RSAPublicKey, manifest: Manifest, signature: bytes) -> bool:
    """Whether a private run's organiser has signed it."""
    return organiser.verify(_signed_part(manifest.content(), manifest.run_id), signature)
