"""What all peers of a run must have in common: published by each, compared by whoever joins.

hivemind takes any peer whose tensors have the right shapes: another tokenizer or schedule would go unnoticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence

import hivemind
from hivemind.utils import get_dht_time

from arguments import shared_flags
from src.access.ownership import MAX_BYTES, name_of, names_in
from src.metrics.records import printable
from src.models import LeanAlbertConfig
from src.version import COMPATIBLE

logger = logging.getLogger(__name__)

# How values travel, how records are signed, and which remote calls there are; to be changed with any of them.
PROTOCOL = (
    "LeanALBERT 3: owned records; averages as they are; gradients in blocks from 65537 values, else float16; "
    "parameters float16"
)
PUBLISH_SECONDS, EXPIRE_SECONDS = 30.0, 150.0
ANSWER_SECONDS = 15.0  # the DHT's process may have ended: never wait for it for ever
MAX_NAMED, MAX_VALUE_LENGTH = 4, 80
# The fingerprint of the weights a run began with, for runs that did not begin with random ones. A card without it
# contradicts none: whoever joins without the flag gets the weights from the swarm, and names them from then on.
INITIAL_WEIGHTS = "--init_checkpoint"
OWN_OPTIONS = {"activation_memory", "sparse_prediction", "classifier_dropout_prob"}  # of the model: a peer's own affair


def make_run_card(config: LeanAlbertConfig, tokenizer, settings: dict, *, trainer: bool) -> dict[str, str]:
    """{field: value as text}; a field is ``model.OPTION``, ``--FLAG``, or a fingerprint.

    ``settings``: {flag: value}, of which those that a run has in common are taken; ``init_checkpoint``, if there, is
    a fingerprint.
    """
    card = {"protocol": PROTOCOL, "version": COMPATIBLE}
    for option in dataclasses.fields(LeanAlbertConfig):
        if option.name in LeanAlbertConfig.__annotations__ and option.name not in OWN_OPTIONS:
            card[f"model.{option.name}"] = str(getattr(config, option.name))
    card |= fingerprints_of(tokenizer)
    for flag in shared_flags(trainer=trainer):
        card[f"--{flag}"] = str(settings[flag])
    if settings.get("init_checkpoint"):
        card[INITIAL_WEIGHTS] = settings["init_checkpoint"]
    return card


def fingerprints_of(tokenizer) -> dict[str, str]:
    """A card's fields by which two tokenizers are told from each other."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for switch in ("padding", "truncation"):  # left on by whoever used the tokenizer last
        pipeline.pop(switch, None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {"vocabulary": _fingerprint(vocabulary), "tokenizer": _fingerprint(pipeline)}


def _fingerprint(content) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def differences(
    own: dict[str, str], others: list[dict[str, str]], *, trusted: Sequence[dict[str, str]] = ()
) -> list[str]:
    """Where ``own`` differs from what most others have, one text a field, with both values.

    Where ``trusted`` cards have a field, they count for all.
    """
    found = []
    for name, value in own.items():
        theirs = Counter(values_of(name, trusted) or values_of(name, others)).most_common(1)
        if theirs and theirs[0][0] != value:
            found.append(f"{name} is {value} here and {printable(theirs[0][0], MAX_VALUE_LENGTH)} in the run")
    return found


def values_of(name: str, cards: Sequence[dict[str, str]]) -> list[str]:
    """What cards have in a field, those that have it."""
    return [card[name] for card in cards if name in card]


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

    What those of ``initial_peers`` say, whom this peer has chosen and whose ids nobody else can have, counts for all.
    """

    def __init__(
        self, dht: hivemind.DHT, run_id: str, owner: bytes, card: dict[str, str], *, initial_peers: Sequence[str] = ()
    ):
        super().__init__(name="run card", daemon=True)
        self.dht, self.key, self.owner, self.card = dht, f"{run_id}_card", owner, card
        self.trusted = set(names_in(initial_peers))
        self.of_initial_peers: list[dict[str, str]] = []
        self.stop = threading.Event()

    @property
    def initial_weights(self) -> str | None:
        """The fingerprint of the weights the run began with, as far as this peer knows."""
        return self.card.get(INITIAL_WEIGHTS)

    def learn_initial_weights(self) -> str | None:
        """As `initial_weights`; a peer that does not know them takes what most others say."""
        if self.initial_weights is None:
            named = Counter(self._named_by_others())
            if named:
                self.card = {**self.card, INITIAL_WEIGHTS: named.most_common(1)[0][0]}
        return self.initial_weights

    def correct_initial_weights(self) -> bool:
        """Take back what nobody else of the run says that it began with; whether there was something to take back."""
        if self.initial_weights is None or self.initial_weights in self._named_by_others():
            return False
        self.card = {name: value for name, value in self.card.items() if name != INITIAL_WEIGHTS}
        with contextlib.suppress(Exception):  # else with the next renewal
            self.publish()
        return True

    def _named_by_others(self) -> list[str]:
        try:
            others = self.read_others()
        except Exception as error:  # as in `run`
            logger.debug("could not read the run's cards: %r", error)
            return []
        named = values_of(INITIAL_WEIGHTS, self.of_initial_peers) or values_of(INITIAL_WEIGHTS, others)
        return [value for value in named if re.fullmatch("[0-9a-f]{16}", value)]

    def join_run(self, *, trains: bool = False) -> None:
        """Compare, then publish from now on. Raises ValueError, naming the fields, if the run has another card.

        A peer that trains will have the weights of the run, and so names those it began with. Others do not: they may
        stay when all trainers have gone, and must not keep a new run from beginning with other weights.
        """
        found = self.differences()
        if found:
            more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
            raise ValueError(
                f"this peer does not fit the run: {'; '.join(found[:MAX_NAMED])}{more}. Start it with the run's own "
                "configuration, or another --run_id"
            )
        if trains:
            self.learn_initial_weights()
        self.publish()
        self.start()

    def run(self) -> None:
        said = False
        while not self.stop.wait(PUBLISH_SECONDS):
            try:
                self.publish()
                found = self.differences()
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

    def differences(self) -> list[str]:
        """Where this peer's card differs from the run's, see `differences`."""
        others = self.read_others()
        return differences(self.card, others, trusted=self.of_initial_peers)

    def read_others(self) -> list[dict[str, str]]:
        """The cards of all other peers; whatever is no card is left out."""
        found = self.dht.get(self.key, latest=True, return_future=True).result(ANSWER_SECONDS)
        cards = {}
        for owner, entry in found.value.items() if found is not None and isinstance(found.value, dict) else ():
            if owner != self.owner and (card := read_card(entry.value)) is not None:
                cards[owner] = card
        self.of_initial_peers = [card for owner, card in cards.items() if name_of(owner) in self.trusted]
        return list(cards.values())
