"""Loads published or trained weights strictly: every key must fit, or the error names the first that do not."""

import hashlib
import json
import mmap
import os
import stat
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

# What a checkpoint may hold beyond the encoder when only the encoder is wanted.
HEADS = ("predictions.", "sop_classifier.", "classifier.")
POOLER = "pooler."
BACKBONE_PREFIX = "albert."
MAX_NAMED_KEYS = 3
ALLOCATING_CALL = b"bytearray"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"  # names that transformers gives them
# The same of checkpoints from before safetensors, which models of other families may still have.
OLD_WEIGHTS_FILE, OLD_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"


def read_state_dict(path):
    """{name: tensor} from a state.pth ({"model": ...} or the tensors themselves), a .safetensors file, or a
    directory written by `save_pretrained`. Raises ValueError for a file that is damaged or holds something else."""
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = read_pytorch(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a complete PyTorch checkpoint ({error})") from error
    state_dict = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f'{path}: expected {{"model": state dict}} or a state dict, found neither')
    odd = [name for name, tensor in state_dict.items() if not isinstance(name, str) or not _is_plain(tensor)]
    if odd:
        raise ValueError(
            f"{path}: {str(odd[0])[:80]!r} is no ordinary tensor with a name (sparse, quantised, no values)"
        )
    return state_dict


def _is_plain(tensor):
    return (
        tensor.layout is torch.strided and tensor.device.type == "cpu" and not (tensor.is_quantized or tensor.is_nested)
    )


def read_pytorch(path):
    """What `torch.save` has written to a file. Raises ValueError, with the reason alone, for anything else.

    Refused before it is read: what would fill the memory. torch.save does not compress, so an archive never holds more
    than the file has bytes (2.5 MB could become 2.5 GiB). And the one call that torch allows in a pickle and that takes
    as much memory as it is told to, bytearray(), is not needed for tensors.
    """
    with path.open("rb") as file:
        try:
            is_archive = file.read(4) == b"PK\x03\x04"  # how torch recognises one
            is_bomb = _archive_is_bomb(file) if is_archive else _holds(file, ALLOCATING_CALL)
            if not is_bomb:
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no pickle fail in a dozen ways; torch's words advise unsafe loading
            raise ValueError("truncated, or something else") from error
    raise ValueError("its parts claim more memory than the file holds")


def _archive_is_bomb(file):
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
            return True
        pickles = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
        return any(ALLOCATING_CALL in content for content in pickles)


def _holds(file, words):
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(words) >= 0


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

    Every weight of the encoder must be there. What may be left over: heads, and the pooler when `backbone` has none.
    Raises ValueError as `load_checkpoint` does.
    """
    state_dict = encoder_weights(read_state_dict(path))
    if backbone.pooler is None:
        state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith(POOLER)}
    load_strictly(backbone, state_dict, source=path)


def encoder_weights(state_dict):
    """The weights of the encoder under the names it has by itself; those of heads are left out."""
    if not any(key.startswith(BACKBONE_PREFIX) for key in state_dict):
        return state_dict
    return {
        key.removeprefix(BACKBONE_PREFIX): tensor for key, tensor in state_dict.items() if not key.startswith(HEADS)
    }


def has_untrained_pooler(state_dict):
    """Whether a checkpoint holds a pooler as it was initialised: with a bias of zeros, which no training leaves."""
    bias = encoder_weights(state_dict).get(f"{POOLER}bias")
    return bias is not None and not bias.any()


def has_pooler(state_dict):
    return any(key.startswith(POOLER) for key in encoder_weights(state_dict))


def load_strictly(model, state_dict, *, source):
    """Loads `state_dict`, which may omit second names of a tensor, as safetensors files do.

    Raises ValueError where names or shapes differ, and where values are not finite: whatever is computed with those is
    not a number, too.
    """
    expected = model.state_dict()
    state_dict = complete_aliases(expected, state_dict)
    problems = [
        _name_keys("missing", [key for key in expected if key not in state_dict]),
        _name_keys("unexpected", [key for key in state_dict if key not in expected]),
        _name_keys("of another shape", _different_shapes(expected, state_dict)),
        _name_keys("whole numbers", [key for key, tensor in expected.items() if _is_integer(key, tensor, state_dict)]),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    broken = [key for key, tensor in expected.items() if not is_finite(state_dict[key].to(tensor.dtype))]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ValueError(f"{source}: values of {broken[0]}{more} are not finite; take a checkpoint from before that")
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error


def check_size(build, state_dict, *, source):
    """Raises ValueError if `build()` makes a model far larger than a checkpoint, before memory is taken for it."""
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in build().parameters())
    there = sum(tensor.numel() for tensor in state_dict.values())
    if needed > 2 * there + 2**20:
        raise ValueError(
            f"{source} does not fit its configuration: that describes {needed:,} parameters, the file holds {there:,}"
        )


def is_finite(tensor):
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


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


def weight_files(directory):
    """The files from which `from_pretrained` takes the weights in a directory; [] if there are none.

    Others, such as an older copy, a stale shard or an adapter, may lie beside them.
    """
    for single, index in ((WEIGHTS_FILE, INDEX_FILE), (OLD_WEIGHTS_FILE, OLD_INDEX_FILE)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return [directory / name for name in sorted(set(_read_index(directory / index).values()))]
    return []


def _read_directory(path):
    files = weight_files(path)
    if not files or files[0].suffix != ".safetensors":
        raise ValueError(f"{path}: no {WEIGHTS_FILE} in this directory; pass one written by save_pretrained")
    if files == [path / WEIGHTS_FILE]:
        return _read_safetensors(files[0])
    shard_of = _read_index(path / INDEX_FILE)
    state_dict = {}
    for file in files:
        shard = _read_safetensors(file)
        promised = {name for name, shard_name in shard_of.items() if shard_name == file.name}
        if shard.keys() != promised:
            name = min(shard.keys() ^ promised)
            what = "here, and it is not" if name in promised else "not here"
            raise ValueError(
                f"{file}: {INDEX_FILE} says that {name} is {what}; pass a directory whose files were written together"
            )
        state_dict |= shard
    return state_dict


def _read_index(path):
    """{name of a tensor: name of the file that holds it}; all of these files are there, beside the index."""
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(shard_of.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of shards; pass a directory written by save_pretrained") from error
    for name in sorted(names, key=str):
        if not isinstance(name, str) or name != Path(name).name or "\0" in name:
            raise ValueError(f"{path} names {str(name)[:80]!r}, which is no file in {path.parent}")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path.parent}: {path.name} names {name}, which is not there")
    return shard_of


def _read_safetensors(path):
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # SafetensorError, but also KeyError for a kind of number that torch does not have
        raise ValueError(f"{path}: not a complete safetensors file ({_first_line(error)})") from error


def _is_integer(key, expected, state_dict):
    """Quantised weights mean nothing without the scale that belongs to them; torch would take them as they are."""
    return expected.is_floating_point() and key in state_dict and not state_dict[key].is_floating_point()


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
