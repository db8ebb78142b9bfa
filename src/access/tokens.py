"""What the organiser of a private run signs: tokens, and the list of those that are revoked."""

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path

from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from src.files import write_atomically

EXPIRED, REVOKED = "has expired", "was revoked"
REVOCATIONS_FILE = "revoked.txt"  # looked for beside the token


def _signed_part(token: AccessToken) -> bytes:
    fields = ["LeanALBERT token", token.username, token.public_key.decode(errors="replace"), token.expiration_time]
    return json.dumps(fields).encode()


def sign_token(organiser: RSAPrivateKey, *, run_id: str, name: str, public_key: bytes, expires: float) -> AccessToken:
    """A token for the holder of ``public_key`` until ``expires`` (seconds since 1970)."""
    token = AccessToken(username=f"{run_id}/{name}", public_key=public_key, expiration_time=str(float(expires)))
    token.signature = organiser.sign(_signed_part(token))
    return token


def sign_revocations(organiser: RSAPrivateKey, *, run_id: str, serial: int, fingerprints: list[str]) -> bytes:
    """The list of keys that are no longer welcome; of two lists the one with the higher serial number counts."""
    content = json.dumps(["LeanALBERT revocations", run_id, serial, sorted(fingerprints)]).encode()
    return organiser.sign(content) + b"\n" + content


@dataclass(frozen=True)
class Revocations:
    """A verified list, as ``signed`` by the organiser."""

    serial: int = 0
    fingerprints: frozenset[str] = frozenset()
    signed: bytes = b""


def read_revocations(signed: bytes, *, run_id: str, organiser: RSAPublicKey) -> Revocations | None:
    """None if this is no list of the run's organiser."""
    signature, _, content = signed.partition(b"\n")
    if not organiser.verify(content, signature):
        return None
    kind, of_run, serial, fingerprints = json.loads(content)
    if kind != "LeanALBERT revocations" or of_run != run_id:
        return None
    return Revocations(serial, frozenset(fingerprints), signed)


def write_token_file(path: Path, token: AccessToken, organiser: RSAPublicKey) -> None:
    """A token with the public key of its organiser, which members trust."""
    content = {
        "issued_to": token.username,
        "expires": time.strftime("%Y-%m-%d %H:%M", time.localtime(float(token.expiration_time))),
        "token": base64.b64encode(token.SerializeToString()).decode(),
        "organiser": organiser.to_bytes().decode(),
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
