"""What all peers of a run must have in common: published by each, compared by whoever joins.

hivemind takes any peer whose tensors have the right shapes: another tokenizer or schedule would go unnoticed.
"""

import dataclasses
import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Sequence

import hivemind
from hivemind.utils import get_dht_time

from src.models import LeanAlbertConfig
from src.training.journal import printable
from src.training.records import MAX_BYTES, name_of

logger = logging.getLogger(__name__)

# How values travel, how records are signed, and which remote calls there are; to be changed with any of them.
PROTOCOL = (
    "LeanALBERT 2: owned records; gradients in 8 bits by blocks from 65537 values, else float16; parameters float16"
)
PUBLISH_SECONDS, EXPIRE_SECONDS = 30.0, 150.0
ANSWER_SECONDS = 15.0  # the DHT's process may have ended: never wait for it for ever
MAX_NAMED, MAX_VALUE_LENGTH = 4, 80
OWN_OPTIONS = {"activation_memory", "sparse_prediction", "classifier_dropout_prob"}  # of the model: a peer's own affair
SCHEDULE = (
    "target_batch_size", "average_state_every", "matchmaking_time", "min_vector_size", "learning_rate",
    "min_learning_rate", "num_zero_lr_steps", "total_steps", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "clamp_value", "min_8bit_size",
)  # fmt: skip
# What an auxiliary peer, who reads no data, need not be told. Peers may differ in --pack_sequences, as in the batch of
# a forward pass: that is how a peer lays out its instances, which are as long and count one sample each either way.
TRAINERS_ONLY = ("max_sequence_length", "initial_sequence_length", "sequence_length_warmup_steps", "pad_to_multiple_of")


def make_run_card(config: LeanAlbertConfig, tokenizer, settings: dict, *, trainer: bool) -> dict[str, str]:
    """{field: value as text}; a field is ``model.OPTION``, ``--FLAG``, or a fingerprint.

    ``settings``: {flag: value}, of which those that a run has in common are taken.
    """
    card = {"protocol": PROTOCOL}
    for option in dataclasses.fields(LeanAlbertConfig):
        if option.name in LeanAlbertConfig.__annotations__ and option.name not in OWN_OPTIONS:
            card[f"model.{option.name}"] = str(getattr(config, option.name))
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for switch in ("padding", "truncation"):  # left on by whoever used the tokenizer last
        pipeline.pop(switch, None)
    card["vocabulary"] = _fingerprint(sorted(tokenizer.get_vocab().items()))
    card["tokenizer"] = _fingerprint(pipeline)
    for flag in (*SCHEDULE, *(TRAINERS_ONLY if trainer else ())):
        card[f"--{flag}"] = str(settings[flag])
    return card


def _fingerprint(content) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def differences(own: dict[str, str], others: list[dict[str, str]]) -> list[str]:
    """Where ``own`` differs from what most others have, one text a field, with both values."""
    found = []
    for name, value in own.items():
        theirs = Counter(card[name] for card in others if name in card).most_common(1)
        if theirs and theirs[0][0] != value:
            found.append(f"{name} is {value} here and {printable(theirs[0][0], MAX_VALUE_LENGTH)} in the run")
    return found


def read_card(content: object) -> dict[str, str] | None:
    """What another peer has published, or None if that is no card."""
    try:
        card = json.loads(content) if isinstance(content, str) and len(content) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        return None
    is_flat = isinstance(card, dict) and all(isinstance(value, str) for value in card.values())
    return card if is_flat else None


class RunCard(threading.Thread):
    """Publishes this peer's card under its key as long as it lives, and compares it with those of others.

    Those of ``initial_peers``, whom this peer has chosen and whose ids nobody else can have, count for all.
    """

    def __init__(
        self, dht: hivemind.DHT, run_id: str, owner: bytes, card: dict[str, str], *, initial_peers: Sequence[str] = ()
    ):
        super().__init__(name="run card", daemon=True)
        self.dht, self.key, self.owner, self.card = dht, f"{run_id}_card", owner, card
        self.trusted = {address.rsplit("/p2p/", 1)[-1] for address in initial_peers}
        self.stop = threading.Event()

    def join_run(self) -> None:
        """Compare, then publish from now on. Raises ValueError, naming the fields, if the run has another card."""
        found = differences(self.card, self.read_others())
        if found:
            more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
            raise ValueError(
                f"this peer does not fit the run: {'; '.join(found[:MAX_NAMED])}{more}. Start it with the run's own "
                "configuration, or another --run_id"
            )
        self.publish()
        self.start()

    def run(self) -> None:
        said = False
        while not self.stop.wait(PUBLISH_SECONDS):
            try:
                self.publish()
                found = differences(self.card, self.read_others())
            except Exception as error:  # the DHT may be about to end
                logger.debug("could not publish the run card: %r", error)
                continue
            if found and not said:  # two peers that started at the same moment did not see each other's cards
                logger.warning("other peers of this run differ from this one: %s", "; ".join(found[:MAX_NAMED]))
                said = True

    def publish(self) -> None:
        self.dht.store(
            self.key,
            subkey=self.owner,
            value=json.dumps(self.card),
            expiration_time=get_dht_time() + EXPIRE_SECONDS,
            return_future=True,
        ).result(ANSWER_SECONDS)

    def read_others(self) -> list[dict[str, str]]:
        """The cards of the initial peers, or, if there are none, of all others; whatever is no card is left out."""
        found = self.dht.get(self.key, latest=True, return_future=True).result(ANSWER_SECONDS)
        cards = {}
        for owner, entry in found.value.items() if found is not None and isinstance(found.value, dict) else ():
            if owner != self.owner and (card := read_card(entry.value)) is not None:
                cards[owner] = card
        trusted = [card for owner, card in cards.items() if name_of(owner) in self.trusted]
        return trusted or list(cards.values())
