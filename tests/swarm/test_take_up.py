"""Whom a newcomer believes, and what a liar gets for it: one refused download, one line, and the next peer is asked."""

import dataclasses
import json

import pytest
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments
from src.settings.folder import SETTINGS, folder_of, read_folder, write_folder
from src.settings.manifest import make_files, make_manifest, sha256, sign_manifest
from src.swarm.run_files import NothingThereError
from src.swarm.take_up import Network, own_files, settings_of_own, take_up, words_of
from tests.settings.test_manifest import COMMIT, CONFIG, DEFAULTS, REPOSITORY, TOKENIZER, manifest_of_demo

A, B = "QmAlice", "QmBob"
FILES = make_files(CONFIG, TOKENIZER)
DEMO_CONFIG = str(REPOSITORY / "demo" / "config.json")
ORGANISER = RSAPrivateKey()


class FakePeers:
    """What peers hand over: {peer id: (content, signature, files)}, or an error."""

    def __init__(self, peers: dict, *, bad: tuple[str, ...] = ()):
        self.peers, self.bad, self.fetched = peers, bad, []
        self.network = Network(None, self.fetch_manifest, self.fetch_file, self.examine)

    def fetch_manifest(self, dht, peer_id):
        found = self.peers[peer_id]
        if isinstance(found, Exception):
            raise found
        return found[0], found[1]

    def fetch_file(self, dht, peer_id, name, digest, size):
        self.fetched.append((peer_id, name))
        if isinstance(self.peers[peer_id][2], Exception):
            raise self.peers[peer_id][2]
        content = self.peers[peer_id][2].get(name, b"")
        if sha256(content) != digest:
            raise ValueError(f"its {name} does not have the hash that its settings name")
        return content

    def examine(self, folder):
        assert (folder / "config.json").read_bytes()
        for mark in self.bad:
            if mark in (folder / "config.json").read_text():
                raise ValueError("its model needs 10000.0 GB at the least, this machine has 8.0 GB free")


def offer(manifest=None, *, signature=b"", files=FILES):
    return (manifest or manifest_of_demo()).content(), signature, files


def joined(tmp_path, peers: FakePeers | None, *, organiser=None, own=None, **changes):
    """(manifest, lines that were said)."""
    addresses = [f"/ip4/203.0.113.5/tcp/1/p2p/{name}" for name in (peers.peers if peers else ())]
    peer = PeerArguments(run_id="run", initial_peers=addresses)
    vars(peer).update(changes)
    said = []
    manifest = take_up(
        peer, folder_of(tmp_path, "run"), network=peers and peers.network, organiser=organiser, own_files=own or {},
        say=said.append,
    )  # fmt: skip
    assert all(line.isprintable() for line in said)
    return manifest, said


def test_newcomer_takes_what_its_initial_peer_hands_over_and_keeps_it(tmp_path):
    peers = FakePeers({A: offer()})
    manifest, said = joined(tmp_path, peers)
    assert manifest == manifest_of_demo() and said == [
        f"fetching 0.3 MB of the run's files from {A}",
        f"took the settings of run run (hash {manifest.hash[:12]}) from {A}",
    ]
    assert {name for _, name in peers.fetched} == set(FILES)
    assert read_folder(folder_of(tmp_path, "run"), "run") == (manifest, b"")
    again = FakePeers({A: offer(files={})})
    assert joined(tmp_path, again) == (manifest, []) and again.fetched == []


def test_what_lies_on_this_machine_is_not_fetched(tmp_path):
    peers = FakePeers({A: offer(files={})})
    own = own_files(DEMO_CONFIG, str(TOKENIZER))
    assert joined(tmp_path, peers, own=own)[0] == manifest_of_demo() and peers.fetched == []
    assert own_files("nothing.json", None) == {} == own_files(None, None)


def test_own_file_is_taken_under_its_own_name_only(tmp_path):
    """Recipes are public: a liar knows what lies here, and would have it pinned where it does not belong."""
    own = own_files(DEMO_CONFIG, str(TOKENIZER))
    evil = {**FILES, "config.json": FILES["tokenizer/special_tokens_map.json"]}
    peers = FakePeers({A: offer(make_manifest("run", DEFAULTS, evil), files={})})
    with pytest.raises(ValueError, match="no initial peer hands over settings"):
        joined(tmp_path, peers, own=own)
    part = {name: content for name, content in FILES.items() if name != "tokenizer/tokenizer.json"}
    peers = FakePeers({A: offer(make_manifest("run", DEFAULTS, part), files={})}, bad=("vocab_size",))
    with pytest.raises(ValueError, match="no initial peer hands over settings"):  # a part of them is parsed anew
        joined(tmp_path, peers, own=own)
    assert not folder_of(tmp_path, "run").exists()


def test_kept_settings_are_enough_without_anybody(tmp_path):
    joined(tmp_path, FakePeers({A: offer()}))
    manifest, said = joined(tmp_path, FakePeers({A: NothingThereError(), B: ConnectionError("it does not answer")}))
    assert manifest == manifest_of_demo() and "no initial peer confirms" in said[-1]
    assert joined(tmp_path, None) == (manifest, [])


def test_changed_settings_are_refused_with_both_values(tmp_path):
    joined(tmp_path, FakePeers({A: offer()}))
    with pytest.raises(ValueError, match=rf"--learning_rate was 0.0025 .* is 0.5 in the run, as {A} says.*remove"):
        joined(tmp_path, FakePeers({A: offer(manifest_of_demo(learning_rate=0.5))}))
    assert read_folder(folder_of(tmp_path, "run"), "run")[0] == manifest_of_demo()


def test_initial_peers_that_disagree_are_both_named(tmp_path):
    peers = FakePeers({A: offer(), B: offer(manifest_of_demo(learning_rate=0.5))})
    with pytest.raises(ValueError, match="disagree") as caught:
        joined(tmp_path, peers)
    message = str(caught.value)
    assert f"--learning_rate is 0.0025 according to {A}, and 0.5 according to {B}" in message
    assert not folder_of(tmp_path, "run").exists()


@pytest.mark.parametrize("liar", [A, B])
def test_liar_is_not_believed_while_it_keeps_an_honest_peer_busy(tmp_path, liar):
    busy = offer(files=ConnectionError("config.json could not be fetched: it is busy"))
    peers = {liar: offer(manifest_of_demo(learning_rate=0.5)), (B if liar == A else A): busy}
    with pytest.raises(ValueError, match=r"disagree about the run: --learning_rate is 0.5 according to"):
        joined(tmp_path, FakePeers(peers))
    assert not folder_of(tmp_path, "run").exists()
    with pytest.raises(ValueError, match="no initial peer hands over settings of run run that can be taken"):
        joined(tmp_path, FakePeers({A: busy}))
    assert joined(tmp_path, FakePeers({A: busy, B: offer()}))[0] == manifest_of_demo()


def test_no_more_than_eight_are_asked_and_that_is_said(tmp_path):
    _, said = joined(tmp_path, FakePeers({f"Qm{number}": offer() for number in range(9)}))
    assert said[0] == "8 of the 9 initial peers are asked for the settings of the run"


LARGE = make_files(
    type(CONFIG).from_dict({**json.loads(FILES["config.json"]), "intermediate_size": 2**27 - 2}), TOKENIZER
)
BAD_TOKENIZER = {**FILES, "tokenizer/tokenizer.json": b"nonsense"}


@pytest.mark.parametrize(
    ("evil", "reason"),
    [
        (offer(files=BAD_TOKENIZER), "does not have the hash"),
        (offer(files={}), "does not have the hash"),
        (offer(make_manifest("run", DEFAULTS, LARGE), files=LARGE), "needs 10000.0 GB"),
        ((b"x" * 2**17, b"", {}), "larger than 65536 bytes"),
        ((manifest_of_demo().content().replace(b"tokenizer/tokenizer.json", b"../../../../.bashrc"), b"", FILES),
         "'../../../../.bashrc', which no run hands over"),
        ((manifest_of_demo().content().replace(b'"seed"', b'"output_dir"'), b"", FILES),
         "--output_dir is for each peer"),
        ((manifest_of_demo().content().replace(b"274644", b"1073741824"), b"", FILES), "1073741824 bytes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [A, B])
def test_liar_costs_one_line_and_the_other_is_believed(tmp_path, evil, reason, first):
    peers = {first: evil, (B if first == A else A): offer()}
    peers = FakePeers(dict(sorted(peers.items())), bad=(str(2**27 - 2),))
    manifest, said = joined(tmp_path, peers)
    assert manifest == manifest_of_demo()
    lines = [line for line in said if "refused" in line]
    assert len(lines) == (first == A or "hash" not in reason)  # of two with the same settings one is asked for files
    for line in lines:
        assert line.startswith(f"refused the settings of the run from {first}: ") and reason in line and len(line) < 300
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        [".run.lock", "config.json", "run", "run", "run.json", "special_tokens_map.json", "tokenizer", "tokenizer.json"]
    )
    alone = FakePeers({first: evil}, bad=(str(2**27 - 2),))
    with pytest.raises(ValueError, match="no initial peer hands over settings of run run that can be taken"):
        joined(tmp_path / "other", alone)


def test_peer_that_is_not_there_is_named_and_the_other_is_believed(tmp_path):
    away = ConnectionError("run.json could not be fetched: \x1b[2J\n")
    manifest, said = joined(tmp_path, FakePeers({A: away, B: offer()}))
    assert manifest == manifest_of_demo() and f"not to be had from {A}: run.json could not be fetched" in said[0]
    assert joined(tmp_path / "other", FakePeers({A: away, B: NothingThereError()}))[0] is None
    with pytest.raises(ValueError, match="no initial peer hands over"):  # nobody says that flags alone count
        joined(tmp_path / "third", FakePeers({A: away}))


def test_older_version_hands_over_nothing_and_flags_count(tmp_path):
    manifest, said = joined(tmp_path, FakePeers({A: NothingThereError()}))
    assert manifest is None and "the flags given here count" in said[0] and not folder_of(tmp_path, "run").exists()


# -- private runs


def signed(organiser=ORGANISER, manifest=None):
    manifest = manifest or manifest_of_demo()
    return offer(manifest, signature=sign_manifest(organiser, manifest))


def test_members_believe_what_the_organiser_has_signed(tmp_path):
    public = ORGANISER.get_public_key()
    manifest, _ = joined(tmp_path, FakePeers({A: signed()}), organiser=public)
    kept, signature = read_folder(folder_of(tmp_path, "run"), "run")
    assert kept == manifest == manifest_of_demo() and signature
    assert joined(tmp_path, None, organiser=public, authorize=str(tmp_path / "a.token"))[0] == kept


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (offer(), "not signed by"),
        (signed(RSAPrivateKey()), "wrongly signed"),
        (offer(manifest_of_demo(seed=1), signature=sign_manifest(ORGANISER, manifest_of_demo())), "wrongly signed"),
        (offer(signature=b"\xff nonsense"), "wrongly signed"),
    ],
)
def test_members_refuse_whatever_else_is_offered(tmp_path, found, reason):
    public = ORGANISER.get_public_key()
    with pytest.raises(ValueError, match="that can be taken"):
        joined(tmp_path, FakePeers({A: found}), organiser=public)
    manifest, said = joined(tmp_path, FakePeers({A: found, B: signed()}), organiser=public)
    assert manifest == manifest_of_demo() and reason in said[0] and A in said[0]


def test_folder_of_an_open_run_does_not_count_in_a_private_one(tmp_path):
    joined(tmp_path, FakePeers({A: offer()}))
    with pytest.raises(ValueError, match="organiser has not signed; remove it"):
        joined(tmp_path, FakePeers({A: signed()}), organiser=ORGANISER.get_public_key())


def test_who_begins_a_private_run_has_the_signed_folder_beside_its_token(tmp_path):
    public, manifest = ORGANISER.get_public_key(), manifest_of_demo()
    options = {"organiser": public, "authorize": str(tmp_path / "access" / "aux.token")}
    assert joined(tmp_path, None, **options) == (None, [])
    write_folder(tmp_path / "access" / SETTINGS, manifest, FILES, sign_manifest(ORGANISER, manifest))
    assert joined(tmp_path, None, **options)[0] == manifest
    assert joined(tmp_path, None, **options)[0] == manifest  # from its own folder now
    other = {**options, "authorize": str(tmp_path / "other" / "aux.token")}
    write_folder(tmp_path / "other" / SETTINGS, manifest, FILES, sign_manifest(RSAPrivateKey(), manifest))
    with pytest.raises(ValueError, match="the run's organiser has not signed this"):
        joined(tmp_path, None, **other)


# -- beside this peer's own flags


@pytest.fixture
def kept(tmp_path):
    folder = folder_of(tmp_path, "run")
    write_folder(folder, manifest_of_demo(), FILES)
    return folder


def test_words_say_what_the_run_does_and_nothing_of_this_peer(kept):
    words = words_of(manifest_of_demo(), kept, {"dataset_sources": ["a.txt"]}, reads_text=True)
    assert "--learning_rate=0.0025" in words and f"--model_config_path={kept / 'config.json'}" in words
    assert f"--tokenizer_path={kept / 'tokenizer'}" in words and not any("dataset" in word for word in words)
    assert not any(word.startswith("--min_learning_rate") for word in words)  # none: its default


def test_contradicting_flag_is_named_with_both_values(kept, tmp_path):
    given = {"dataset_sources": ["a.txt"], "learning_rate": 0.1, "averaging_timeout": 500.0}
    with pytest.raises(ValueError, match=r"^--learning_rate is 0.1 here and 0.0025 in the run: leave that out"):
        words_of(manifest_of_demo(), kept, given, reads_text=True)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(FILES["config.json"]), "hidden_size": 512}))
    with pytest.raises(ValueError, match=r"--model_config_path .*: hidden_size is 512 here and \d+ in the run"):
        words_of(manifest_of_demo(), kept, {"model_config_path": str(other)}, reads_text=False)


def test_auxiliary_peer_cannot_name_other_data_sets_than_the_run(kept):
    source = f"me/text@{COMMIT}"
    manifest = make_manifest("run", DEFAULTS, FILES, sources=[source])
    words_of(manifest, kept, {"run_datasets": [source]}, reads_text=False)
    for other, theirs in ((manifest, rf"me/text@{COMMIT}"), (manifest_of_demo(), "none")):
        with pytest.raises(ValueError, match=rf"--run_datasets is me/other@{COMMIT} here and {theirs} in the run"):
            words_of(other, kept, {"run_datasets": [f"me/other@{COMMIT}"]}, reads_text=False)


def test_equal_flags_and_files_by_hand_are_fine(kept):
    given = {"learning_rate": 0.0025, "model_config_path": DEMO_CONFIG, "tokenizer_path": str(TOKENIZER)}
    words_of(manifest_of_demo(), kept, given, reads_text=False)


def test_text_is_the_runs_or_asked_for(kept):
    with pytest.raises(ValueError, match="--dataset_sources is missing: this run names no data sets"):
        words_of(manifest_of_demo(), kept, {}, reads_text=True)
    source = f"me/text:ru@{COMMIT}"
    manifest = make_manifest("run", DEFAULTS, FILES, sources=[source], weights=[2])
    words = words_of(manifest, kept, {}, reads_text=True)
    assert words[-4:] == ["--dataset_sources", source, "--dataset_weights", "2.0"]
    assert "--dataset_sources" not in words_of(manifest, kept, {"dataset_sources": ["a"]}, reads_text=True)


@pytest.mark.parametrize("place", ["me/text", "me/text:ru", f"me/text:ru@{COMMIT}"])
def test_data_set_that_the_run_names_is_never_a_path(kept, tmp_path, monkeypatch, place):
    manifest = make_manifest("run", DEFAULTS, FILES, sources=[f"me/text:ru@{COMMIT}"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    with pytest.raises(ValueError, match="here is a path of that name"):
        words_of(manifest, kept, {}, reads_text=True)


def test_auxiliary_peer_names_data_sets_at_a_fixed_commit_only():
    peer = PeerArguments(run_id="run", model_config_path=DEMO_CONFIG, tokenizer_path=str(TOKENIZER))
    peer.run_datasets = ["me/text"]
    with pytest.raises(ValueError, match="--run_datasets me/text: name data sets of the hub as ORG/NAME"):
        settings_of_own(peer, DEFAULTS, {}, trainer=False)


def test_auxiliary_peer_says_of_trainers_what_it_was_told():
    peer = PeerArguments(run_id="run", model_config_path=DEMO_CONFIG, tokenizer_path=str(TOKENIZER))
    peer.run_datasets = [f"me/text@{COMMIT}"]
    manifest, files = settings_of_own(peer, DEFAULTS, {"max_sequence_length": 2048}, trainer=False)
    assert files == FILES and manifest.data_sets == (f"me/text@{COMMIT}",)
    assert "max_sequence_length" in manifest.flags and "pad_to_multiple_of" not in manifest.flags
    assert set(DEFAULTS) - set(manifest.flags) == {
        "initial_sequence_length", "sequence_length_warmup_steps", "pad_to_multiple_of", "mlm_probability",
        "final_mlm_probability",
    }  # fmt: skip
    assert dataclasses.replace(manifest, data_sets=()).files == manifest_of_demo().files
