"""A peer with another model, tokenizer or schedule is told what differs, and does not join."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hivemind.utils.crypto import RSAPrivateKey

from arguments import CollaborationArguments, HFTrainerArguments, PeerArguments, run_settings, shared_flags
from src import LeanAlbertConfig, load_tokenizer
from src.access.ownership import peer_id_of
from src.swarm.run_card import RunCard, differences, make_run_card

DEMO_TOKENIZER = Path(__file__).resolve().parents[2] / "demo" / "tokenizer"


def settings(tmp_path, **changes) -> dict:
    training = HFTrainerArguments(output_dir=str(tmp_path), use_cpu=True)
    return {**run_settings(PeerArguments(run_id="run"), CollaborationArguments(), training), **changes}


def card(tmp_path, *, trainer: bool = True, tokenizer=None, config=None, **changes) -> dict[str, str]:
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(DEMO_TOKENIZER)
    config = LeanAlbertConfig(hidden_size=64, num_attention_heads=2, **(config or {}))
    return make_run_card(config, tokenizer, settings(tmp_path, **changes), trainer=trainer)


def test_equal_peers_have_equal_cards(tmp_path):
    own, other = card(tmp_path), card(tmp_path)
    assert own == other and len(own) > 40
    assert differences(own, [other, other]) == []
    used = load_tokenizer(DEMO_TOKENIZER)
    used(["одно", "и другое слово"], padding=True, truncation=True, max_length=4)  # leaves both switched on
    assert card(tmp_path, tokenizer=used) == own


@pytest.mark.parametrize("flag", shared_flags(trainer=True))
def test_card_names_each_flag_that_differs_with_both_values(tmp_path, flag):
    (difference,) = differences(card(tmp_path, **{flag: 12345}), [card(tmp_path)])
    assert difference == f"--{flag} is 12345 here and {settings(tmp_path)[flag]} in the run"


def test_card_names_what_differs_in_the_model(tmp_path):
    (difference,) = differences(card(tmp_path, config={"num_hidden_layers": 3}), [card(tmp_path)])[:1]
    assert difference == "model.num_hidden_layers is 3 here and 32 in the run"
    assert card(tmp_path, config={"activation_memory": "lean", "sparse_prediction": True}) == card(tmp_path)


def test_card_tells_tokenizers_apart(tmp_path):
    other = load_tokenizer(DEMO_TOKENIZER)
    other.add_tokens(["ъъъ"])
    found = " ".join(differences(card(tmp_path, tokenizer=other), [card(tmp_path)]))
    assert "vocabulary is " in found and "tokenizer is " in found


def test_auxiliary_peer_need_not_know_what_concerns_the_data(tmp_path):
    auxiliary = card(tmp_path, trainer=False, max_sequence_length=7)
    assert differences(auxiliary, [card(tmp_path)]) == differences(card(tmp_path), [auxiliary]) == []


class Board:
    """A DHT of one process: what is stored is there at once."""

    def __init__(self, records=None):
        self.records = records or {}

    def store(self, key, subkey, value, **kwargs):
        self.records[subkey] = SimpleNamespace(value=value)
        return SimpleNamespace(result=lambda timeout: True)

    def get(self, key, **kwargs):
        found = SimpleNamespace(value=self.records) if self.records else None
        return SimpleNamespace(result=lambda timeout: found)


def join(board, owner: bytes, own: dict, *, trains: bool = True) -> RunCard:
    run_card = RunCard(board, "run", owner, own)
    run_card.start = lambda: None
    run_card.join_run(trains=trains)
    return run_card


def test_peer_that_differs_is_refused_and_publishes_nothing(tmp_path):
    board = Board()
    join(board, b"first", card(tmp_path))
    join(board, b"second", card(tmp_path))
    with pytest.raises(ValueError, match=r"^this peer does not fit the run: --learning_rate is 9\.0 here and 0\.00"):
        join(board, b"third", card(tmp_path, learning_rate=9.0))
    assert set(board.records) == {b"first", b"second"}
    join(board, b"first", card(tmp_path))  # back again


def test_majority_of_the_cards_decides_and_rubbish_is_ignored(tmp_path):
    rubbish = ("text", None, "[1]", b"\x80", '{"--learning_rate": "7"}')
    board = Board({bytes([number]): SimpleNamespace(value=value) for number, value in enumerate(rubbish)})
    for owner in (b"first", b"second"):
        board.store("", owner, json.dumps(card(tmp_path)))
    join(board, b"third", card(tmp_path))
    board.records = [1, 2]
    assert RunCard(board, "run", b"x", {}).read_others() == []


STRANGE = {
    "escapes": json.dumps({"--seed": "\x1b]0;x\x07\x1b[2J\u202e"}),
    "long": json.dumps({"--seed": "x" * 10**6}),
    "rather long": json.dumps({"--seed": "x " * 5000}),
    "deep": "[" * 100_000,
    "deep inside": '{"--seed":' + "[" * 5000 + "]" * 5000 + "}",
    "no text": json.dumps({"--seed": {"a": ["1"]}}),
    "a long number": '{"--seed": ' + "9" * 10_000 + "}",
    "many lines": json.dumps({"--seed": "1\n" * 100}),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_card_of_a_stranger_gives_at_most_one_short_printable_line(kind):
    board = Board({b"stranger": SimpleNamespace(value=STRANGE[kind])})
    try:
        join(board, b"own", {"--seed": "1"})
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 300
    else:
        assert b"own" in board.records


def test_cards_of_the_initial_peers_count_for_all_however_many_others_there_are():
    key = RSAPrivateKey().get_public_key().to_bytes()
    initial_peer, address = b"[owner:" + key + b"]", f"/ip4/203.0.113.5/tcp/1/p2p/{peer_id_of(key).to_base58()}"
    forged = {b"stranger%d" % n: SimpleNamespace(value='{"--seed": "666"}') for n in range(9)}
    board = Board({**forged, initial_peer: SimpleNamespace(value='{"--seed": "1"}')})
    run_card = RunCard(board, "run", b"own", {"--seed": "1"}, initial_peers=[address])
    run_card.start = lambda: None
    run_card.join_run()
    assert b"own" in board.records
    with pytest.raises(ValueError, match="--seed is 2 here and 1 in the run"):
        RunCard(board, "run", b"other", {"--seed": "2"}, initial_peers=[address]).join_run()


ONE, OTHER = "0123456789abcdef", "fedcba9876543210"


def test_card_names_the_weights_a_run_began_with_only_if_there_are_some(tmp_path):
    assert card(tmp_path, init_checkpoint=ONE)["--init_checkpoint"] == ONE
    assert "--init_checkpoint" not in card(tmp_path)


def test_peers_with_other_initial_weights_are_refused_and_those_without_are_not(tmp_path):
    board = Board()
    join(board, b"first", card(tmp_path, init_checkpoint=ONE))
    with pytest.raises(ValueError, match=f"--init_checkpoint is {OTHER} here and {ONE} in the run"):
        join(board, b"second", card(tmp_path, init_checkpoint=OTHER))
    join(board, b"third", card(tmp_path, init_checkpoint=ONE))
    assert join(board, b"fourth", card(tmp_path)).initial_weights == ONE
    del board.records[b"first"], board.records[b"third"]
    with pytest.raises(ValueError, match=f"and {ONE} in the run"):  # the joiner's card still says so
        join(board, b"second", card(tmp_path, init_checkpoint=OTHER))


def test_peer_that_does_not_train_does_not_keep_a_new_run_from_other_weights(tmp_path):
    board = Board()
    join(board, b"trainer", card(tmp_path, init_checkpoint=ONE))
    auxiliary = join(board, b"auxiliary", card(tmp_path, trainer=False), trains=False)
    assert auxiliary.initial_weights is None
    del board.records[b"trainer"]
    join(board, b"trainer", card(tmp_path, init_checkpoint=OTHER))


def test_peer_learns_initial_weights_from_most_and_ignores_what_is_no_fingerprint(tmp_path):
    said = (ONE, ONE, OTHER, "\x1b[2J", "ab" * 400, 7)
    board = Board(
        {bytes([n]): SimpleNamespace(value=json.dumps({"--init_checkpoint": text})) for n, text in enumerate(said)}
    )
    assert join(board, b"new", card(tmp_path)).initial_weights == ONE


def test_peer_takes_back_initial_weights_that_nobody_else_names(tmp_path):
    board = Board()
    join(board, b"first", card(tmp_path))
    late = join(board, b"late", card(tmp_path, init_checkpoint=ONE))
    assert late.correct_initial_weights() and late.initial_weights is None
    join(board, b"third", card(tmp_path, init_checkpoint=OTHER))
    assert not join(board, b"fourth", card(tmp_path, init_checkpoint=OTHER)).correct_initial_weights()
