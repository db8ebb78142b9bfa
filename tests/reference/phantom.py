"""A trainer that exists in the DHT only: its progress is reported and renewed, but it never comes to a round."""

import threading

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time

from src.access.membership import Identity
from src.swarm.dht import fetch_progress


class PhantomTrainer(threading.Thread):
    """Reports a few samples of the others' epoch until ``stop`` is set: of the second one on, and no later ones unless
    it ``follows``."""

    def __init__(self, dht, identity: Identity, run_id: str, *, stop: threading.Event, follows: bool = True):
        super().__init__(name="phantom", daemon=True)
        self.dht, self.run_id, self.stop, self.follows = dht, run_id, stop, follows
        self.owner = RSASignatureValidator(identity.private_key).local_public_key

    def run(self) -> None:
        epoch = 0
        while not self.stop.wait(0.3):
            if self.follows or epoch == 0:
                epoch = max((record.epoch for record in fetch_progress(self.dht, self.run_id).values()), default=0)
            record = {"peer_id": self.dht.peer_id.to_bytes(), "epoch": epoch, "samples_accumulated": 2,
                      "samples_per_second": 0.1, "time": get_dht_time(), "client_mode": False}  # fmt: skip
            self.dht.store(f"{self.run_id}_progress", record, get_dht_time() + 30, subkey=self.owner)
