"""The settings of a private run, signed by its organiser: what its peers believe."""

import json
import shutil
import tempfile
from pathlib import Path

from hivemind.utils.crypto import RSAPrivateKey

from arguments import (
    FLAGS,
    ArgumentParser,
    CollaborationArguments,
    HFTrainerArguments,
    TrainerPeerArguments,
    check_handed_over,
    handed_over_flags,
)
from src.models import LeanAlbertConfig
from src.models.tokenizer import find_directory, is_of_own_family
from src.settings.examine import parse
from src.settings.folder import SETTINGS, read_folder, write_files, write_folder
from src.settings.manifest import is_signed, make_files, make_manifest, sign_manifest


def sign_settings(organiser: RSAPrivateKey, run_id: str, flags: list[str], directory: Path) -> Path:
    """Write and sign what flags of run_trainer.py say of a run; returns the folder.

    Raises ValueError, with what to do, if they do not name a model and a tokenizer that can be handed over.
    """
    parser = ArgumentParser(
        TrainerPeerArguments, CollaborationArguments, HFTrainerArguments, prog="python -m src.access sign"
    )
    peer, given = parser.parse_first([*parser.read_files(flags), "--run_id", run_id])
    for name in ("model_config_path", "tokenizer_path"):
        if getattr(peer, name) is None:
            raise ValueError(f"--{name} is missing: name the run's, or take a recipe (@recipes/base/swarm.args)")
    values = {name: given.get(name, FLAGS[name].default) for name in handed_over_flags()}
    check_handed_over(values)
    tokenizer = find_directory(peer.tokenizer_path)
    if not is_of_own_family(tokenizer):
        raise ValueError(f"--tokenizer_path {peer.tokenizer_path}: a tokenizer of this kind cannot be handed over")
    options = json.loads(Path(peer.model_config_path).expanduser().read_text(encoding="utf-8-sig"))
    files = make_files(LeanAlbertConfig.from_dict(options), tokenizer)
    manifest = make_manifest(run_id, values, files, sources=peer.dataset_sources or (), weights=peer.dataset_weights)
    if peer.dataset_sources and not manifest.data_sets:
        raise ValueError(
            "--dataset_sources: only data sets of the hub at a fixed commit (ORG/NAME[:config]@COMMIT) are handed over"
        )
    with tempfile.TemporaryDirectory() as aside:
        write_files(Path(aside), files)
        parse(Path(aside))  # else members would refuse them
    folder = directory / SETTINGS
    present = read_folder(folder, run_id) if folder.exists() else None
    if present is not None and not (present[0] == manifest and is_signed(organiser.get_public_key(), *present)):
        shutil.rmtree(folder)  # the organiser has other settings now, or another key
    write_folder(folder, manifest, files, sign_manifest(organiser, manifest))
    return folder
