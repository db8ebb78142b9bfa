"""Loads published or trained weights strictly: every key must fit, or the error names the first that do not."""

import hashlib
import json
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# What a pretraining checkpoint may hold beyond the encoder when only the encoder is wanted.
PRETRAINING_HEADS = ("predictions.", "sop_classifier.")
POOLER = "pooler."
BACKBONE_PREFIX = "albert."
MAX_NAMED_KEYS = 3
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"  # names that transformers gives them


def read_state_dict(path):
    """{name: tensor} from a state.pth ({"model": ...} or the tensors themselves), a .safetensors file, or a
    directory written by `save_pretrained`. Raises ValueError for a file that is damaged or holds something else."""
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no pickle fail in a dozen ways; torch's words advise unsafe loading
            raise ValueError(f"{path}: not a complete PyTorch checkpoint (truncated, or something else)") from error
    state_dict = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f'{path}: expected {{"model": state dict}} or a state dict, found neither')
    return state_dict


def load_checkpoint(model, path):
    """Loads all weights of `model` from `path` (see `read_state_dict`).

    Raises ValueError, naming the first keys, where the file and the model disagree on names, shapes, or on which
    tensors are one and the same.
    """
    load_strictly(model, read_state_dict(path), source=path)


def give_usual_mode(directory):
    """Lets the files of a directory be read by whoever may read new files: safetensors writes for its owner alone."""
    probe = Path(directory) / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)  # asking for the umask itself means setting it, for all threads
    probe.unlink()
    for path in Path(directory).iterdir():
        if path.is_file():
            path.chmod(mode)


def load_backbone(backbone, path):
    """Loads a pretraining checkpoint into the encoder of a fine-tuning model, a `LeanAlbertModel`.

    Every weight of the encoder must be there. What may be left over: the masked-LM and sentence-order heads, and the
    pooler when `backbone` has none. Raises ValueError as `load_checkpoint` does.
    """
    state_dict = read_state_dict(path)
    if any(key.startswith(BACKBONE_PREFIX) for key in state_dict):
        state_dict = {
            key.removeprefix(BACKBONE_PREFIX): tensor
            for key, tensor in state_dict.items()
            if not key.startswith(PRETRAINING_HEADS)
        }
    if backbone.pooler is None:
        state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith(POOLER)}
    load_strictly(backbone, state_dict, source=path)


def load_strictly(model, state_dict, *, source):
    """Loads `state_dict`, which may omit second names of a tensor, as safetensors files do."""
    expected = model.state_dict()
    state_dict = complete_aliases(expected, state_dict)
    problems = [
        _name_keys("missing", [key for key in expected if key not in state_dict]),
        _name_keys("unexpected", [key for key in state_dict if key not in expected]),
        _name_keys("of another shape", _different_shapes(expected, state_dict)),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error


def complete_aliases(expected, state_dict):
    """Adds the names that `expected` has for a tensor which `state_dict` holds under another of its names."""
    names_of = {}
    for name, tensor in expected.items():
        names_of.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    completed = dict(state_dict)
    for names in names_of.values():
        present = [name for name in names if name in state_dict]
        if present:
            completed.update({name: state_dict[present[0]] for name in names if name not in state_dict})
    return completed


def fingerprint(model):
    """Sixteen hexadecimal digits that stand for a model's weights: names, shapes and values as the model holds them.

    The same for equal weights, whatever file, file format or (within float32) number format they came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _read_directory(path):
    """The files that `from_pretrained` takes; others, such as an older copy or a stale shard, may lie beside them."""
    if (path / WEIGHTS_FILE).is_file():
        return _read_safetensors(path / WEIGHTS_FILE)
    if not (path / INDEX_FILE).is_file():
        raise ValueError(f"{path}: no {WEIGHTS_FILE} in this directory; pass one written by save_pretrained")
    state_dict = {}
    for name in _shards(path / INDEX_FILE):
        if not (path / name).is_file():
            raise ValueError(f"{path}: {INDEX_FILE} names {name}, which is not there")
        state_dict |= _read_safetensors(path / name)
    return state_dict


def _shards(index):
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{index}: not an index of shards; pass a directory written by save_pretrained") from error


def _read_safetensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({_first_line(error)})") from error


def _different_shapes(expected, state_dict):
    return [
        f"{key} ({list(state_dict[key].shape)}, the model has {list(tensor.shape)})"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]


def _name_keys(what, keys):
    if not keys:
        return ""
    rest = f" and {len(keys) - MAX_NAMED_KEYS} more" if len(keys) > MAX_NAMED_KEYS else ""
    return f"{what}: {', '.join(keys[:MAX_NAMED_KEYS])}{rest}"


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]
