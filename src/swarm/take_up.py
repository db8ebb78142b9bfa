"""What a peer takes from its run before it builds anything: whom it believes, what it checks, what its own flags mean.

In an open run the peers of ``--initial_peers`` count, which a person has chosen: the id in an address proves whose key
it is, and keys of others are free for a liar. In a private run what counts is the organiser's signature.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hivemind.utils.crypto import RSAPublicKey

from arguments import FLAGS, TRAINERS, PeerArguments
from src.access.ownership import names_in
from src.metrics.records import printable
from src.models import LeanAlbertConfig, load_tokenizer
from src.models.tokenizer import find_directory, is_of_own_family
from src.settings.examine import examine
from src.settings.folder import SETTINGS, paths_in, read_folder, require_same, write_files, write_folder
from src.settings.manifest import (
    CONFIG_FILE,
    OWN_OPTIONS,
    Manifest,
    contradictions,
    differences,
    is_handed_over,
    is_signed,
    make_files,
    make_manifest,
    read_config,
    read_manifest,
    sha256,
)
from src.swarm.run_card import fingerprints_of
from src.swarm.run_files import NothingThereError, fetch_file, fetch_manifest

MAX_ASKED = 8
BY_HAND = (
    "no initial peer hands over the settings of run {run_id} (an older version?): the flags given here count, and must "
    "be those of the run"
)


@dataclass
class Source:
    """Peers, by their ids, that hand over the same manifest."""

    manifest: Manifest
    signature: bytes
    peers: list[str]


@dataclass(frozen=True)
class Network:
    """How others are asked; replaced in tests. Each raises as in `run_files`."""

    dht: object
    fetch_manifest: Callable = fetch_manifest
    fetch_file: Callable = fetch_file
    examine: Callable = examine


def take_up(
    peer: PeerArguments,
    folder: Path,
    *,
    network: Network | None,
    organiser: RSAPublicKey | None,
    own_files: Mapping[str, bytes],
    say: Callable[[str], None],
) -> Manifest | None:
    """The settings of the run, which then lie in ``folder``; None if nobody hands them over: then flags count.

    ``network``: None for a peer that begins a run. ``organiser``: of a private run. ``own_files``: what this machine
    has of the files that runs hand over, by name. Raises ValueError, in one line, if there is nobody to be believed, or
    if the run has other settings than those that the folder holds.
    """
    found = read_folder(folder, peer.run_id)
    pinned = None if found is None else found[0]
    if found is not None and organiser is not None and not is_signed(organiser, *found):
        raise ValueError(f"{folder} holds settings that this run's organiser has not signed; remove it")
    if network is None:
        return pinned if organiser is None else _from_organiser(peer, folder, pinned, organiser)
    offers, is_by_hand = collect(peer, network, organiser, say=say)
    for offer in offers if pinned is not None else ():
        require_same(pinned, offer.manifest, folder, f"in the run, as {' '.join(offer.peers)} says")
    if pinned is not None:
        if not offers:
            say(f"no initial peer confirms the settings of the run; going on with those in {folder}")
        return pinned
    good, unheard = [], []
    for offer in offers:
        try:
            good.append((offer, _fetch_files(offer, network, own_files, say=say)))
        except ConnectionError:  # it counts all the same: a liar can keep an honest peer busy
            unheard.append(offer)
        except ValueError:
            is_by_hand = False
    if good and len(good) + len(unheard) > 1:
        raise ValueError(_disagreement(*(offer for offer, _ in good), *unheard))
    if not good and is_by_hand:
        say(BY_HAND.format(run_id=peer.run_id))
        return None
    if not good:
        raise ValueError(f"no initial peer hands over settings of run {peer.run_id} that can be taken (see above)")
    (offer, files), *_ = good
    write_folder(folder, offer.manifest, files, offer.signature)
    say(f"took the settings of run {peer.run_id} (hash {offer.manifest.hash[:12]}) from {' '.join(offer.peers)}")
    return offer.manifest


def collect(
    peer: PeerArguments, network: Network, organiser: RSAPublicKey | None, *, say: Callable[[str], None]
) -> tuple[list[Source], bool]:
    """What the initial peers hand over, as far as it may count; and whether that is nothing at all, but an answer."""
    sources: dict[bytes, Source] = {}
    has_nothing, is_refused = False, False
    peer_ids = names_in(peer.initial_peers)
    if len(peer_ids) > MAX_ASKED:
        say(f"{MAX_ASKED} of the {len(peer_ids)} initial peers are asked for the settings of the run")
    for peer_id in peer_ids[:MAX_ASKED]:
        try:
            content, signature = network.fetch_manifest(network.dht, peer_id)
            manifest = read_manifest(content, peer.run_id)
            if organiser is not None and not is_signed(organiser, manifest, signature):
                raise ValueError(f"they are {'wrongly signed' if signature else 'not signed by the run’s organiser'}")
        except NothingThereError:
            has_nothing = True
            continue
        except ConnectionError as error:
            _say_away(peer_id, error, say)
            continue
        except ValueError as error:
            is_refused = True
            _say_refused(peer_id, error, say)
            continue
        source = sources.setdefault(content, Source(manifest, b"" if organiser is None else signature, []))
        source.peers.append(peer_id)
    return list(sources.values()), has_nothing and not is_refused and not sources


def _say_away(peer_id: str, reason: object, say: Callable[[str], None]) -> None:
    say(f"the settings of the run were not to be had from {peer_id}: {printable(reason, 200)}")


def _say_refused(peer_id: str, reason: object, say: Callable[[str], None]) -> None:
    say(f"refused the settings of the run from {peer_id}: {printable(reason, 200)}")


def _fetch_files(
    offer: Source, network: Network, own_files: Mapping[str, bytes], *, say: Callable[[str], None]
) -> dict[str, bytes]:
    """The files of a manifest, from the first of its peers that has them, found to be good.

    Raises ValueError, after one line for each peer that has nothing good; ConnectionError if one could not be asked.
    """
    wanted = offer.manifest.files
    own = {name: content for name, content in own_files.items() if sha256(content) == wanted.get(name, ("", 0))[0]}
    if own.keys() == wanted.keys() == own_files.keys():
        return own
    files, nothing_good = own, ValueError("nobody has its files")
    for peer_id in offer.peers:
        if missing := sum(size for name, (_, size) in wanted.items() if name not in files):
            say(f"fetching {missing / 1e6:.1f} MB of the run's files from {peer_id}")  # which may take its time
        try:
            for name, (digest, size) in wanted.items():
                if name not in files:
                    files[name] = network.fetch_file(network.dht, peer_id, name, digest, size)
            with tempfile.TemporaryDirectory() as aside:
                write_files(Path(aside), files)
                network.examine(Path(aside))
            return files
        except ConnectionError as error:
            _say_away(peer_id, error, say)
            nothing_good = ConnectionError("not all who may have its files could be asked")
        except ValueError as error:
            _say_refused(peer_id, error, say)
            if len(files) == len(wanted):
                raise  # each other peer has the same, by hash
    raise nothing_good


def _disagreement(one: Source, other: Source, *_) -> str:
    name, value, others = differences(one.manifest.fields(), other.manifest.fields())[0]
    return (
        f"--initial_peers disagree about the run: {name} is {value} according to {' '.join(one.peers)}, and {others} "
        f"according to {' '.join(other.peers)}; ask the run's organisers, and name only peers that are right"
    )


def _from_organiser(
    peer: PeerArguments, folder: Path, pinned: Manifest | None, organiser: RSAPublicKey
) -> Manifest | None:
    """What the organiser has signed, from the folder beside the token of a peer that begins a private run."""
    signed = Path(peer.token_file).expanduser().with_name(SETTINGS)
    found = read_folder(signed, peer.run_id)
    if found is None:
        return pinned
    manifest, signature = found
    if not is_signed(organiser, manifest, signature):
        raise ValueError(f"{signed}: the run's organiser has not signed this; ask for the folder again")
    if pinned is not None:
        require_same(pinned, manifest, folder, f"in {signed}")
    write_folder(folder, manifest, {name: (signed / name).read_bytes() for name in manifest.files}, signature)
    return manifest


# -- what this peer's own flags mean beside the run's


def own_files(model_config_path: str | None, tokenizer_path: str | None) -> dict[str, bytes]:
    """{name: content} of what lies on this machine, as it would be handed over; what cannot be read is left out."""
    try:
        config = read_options(model_config_path)
        directory = Path(tokenizer_path or "").expanduser()
        return make_files(config, directory if tokenizer_path and directory.is_dir() else None)
    except (OSError, ValueError, TypeError):
        return {}


def read_options(path: str | None) -> LeanAlbertConfig:
    """A model's configuration as its file has it. Raises OSError, ValueError or TypeError."""
    return LeanAlbertConfig.from_dict(json.loads(Path(path or "").expanduser().read_text(encoding="utf-8-sig")))


def words_of(manifest: Manifest, folder: Path, given: Mapping[str, object], *, reads_text: bool) -> list[str]:
    """The words of a command line with which this peer does as its run does; those of its own come after them.

    ``given``: {flag: value} of its own. Raises ValueError, naming both values, if they contradict the run, and if
    there is no text to train on.
    """
    found = contradictions(given, manifest) + _contradicting_files(manifest, folder, given)
    if given.get("run_datasets") and tuple(given["run_datasets"]) != manifest.data_sets:
        theirs = " ".join(manifest.data_sets) or "none"
        found.append(f"--run_datasets is {' '.join(given['run_datasets'])} here and {theirs} in the run")
    if found:
        raise ValueError(
            f"{'; '.join(found[:4])}: leave that out, or choose another --run_id; if all peers of the run change it, "
            f"remove {folder}"
        )
    paths = paths_in(folder, manifest)
    if "tokenizer_path" not in {**paths, **given}:
        raise ValueError("--tokenizer_path is missing: this run hands over no tokenizer; ask its organisers")
    words = [f"--{name}={value}" for name, value in {**manifest.flags, **paths}.items() if value is not None]
    if reads_text and "dataset_sources" not in given:
        if not manifest.data_sets:
            raise ValueError("--dataset_sources is missing: this run names no data sets, so pass text of your own")
        if here := [name for name in manifest.data_sets if not is_handed_over(name)]:
            raise ValueError(
                f"the run names a data set {here[0]}, and here is a path of that name; start this elsewhere"
            )
        words += ["--dataset_sources", *manifest.data_sets]
        words += ["--dataset_weights", *map(str, manifest.weights)] if manifest.weights else []
    return words


def _contradicting_files(manifest: Manifest, folder: Path, given: Mapping[str, object]) -> list[str]:
    """Where a model or a tokenizer given by hand is not that of the run."""
    found = []
    if given.get("model_config_path"):
        try:
            own = read_options(given["model_config_path"])
        except (OSError, ValueError, TypeError):
            return []  # `build_model` says what is wrong with it
        theirs = read_config((folder / CONFIG_FILE).read_bytes())
        names = [name for name in LeanAlbertConfig.__annotations__ if name not in ("sparse_prediction", *OWN_OPTIONS)]
        cards = ({name: str(getattr(config, name)) for name in names} for config in (own, theirs))
        path = given["model_config_path"]
        found += [f"--model_config_path {path}: {name} is {value} here and {other} in the run"
                  for name, value, other in differences(*cards)]  # fmt: skip
    if given.get("tokenizer_path") and manifest.has_tokenizer:
        own, theirs = (fingerprints_of(load_tokenizer(path))
                       for path in (given["tokenizer_path"], paths_in(folder, manifest)["tokenizer_path"]))  # fmt: skip
        found += [f"--tokenizer_path {given['tokenizer_path']}: {name} is {value} here and {other} in the run"
                  for name, value, other in differences(own, theirs)]  # fmt: skip
    return found


def settings_of_own(
    peer: PeerArguments, flags: Mapping[str, object], given: Mapping[str, object], *, trainer: bool
) -> tuple[Manifest, dict[str, bytes]]:
    """What whoever begins a run says of it: ``flags``; an auxiliary peer those of trainers only if it was told them."""
    said = {name: value for name, value in flags.items()
            if trainer or FLAGS[name].metadata["scope"] != TRAINERS or name in given}  # fmt: skip
    directory = find_directory(peer.tokenizer_path)
    files = make_files(read_options(peer.model_config_path), directory if is_of_own_family(directory) else None)
    sources = peer.dataset_sources if trainer else peer.run_datasets
    if not trainer and not all(map(is_handed_over, sources)):
        raise ValueError(f"--run_datasets {' '.join(sources)}: name data sets of the hub as ORG/NAME[:config]@COMMIT")
    weights = getattr(peer, "dataset_weights", None)
    return make_manifest(peer.run_id, said, files, sources=sources or (), weights=weights), files
