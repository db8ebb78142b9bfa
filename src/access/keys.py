"""A peer's RSA key: a file, a public part, a fingerprint."""

import hashlib
import os
from pathlib import Path

from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey


def create_key(path: Path) -> RSAPrivateKey:
    """A new key in hivemind's identity format. Raises ValueError if there is such a file."""
    if path.exists():
        raise ValueError(f"{path} exists; a key is never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_key(path, key := RSAPrivateKey())
    return key


def write_key(path: Path, key: RSAPrivateKey) -> None:
    """A file that nobody else may read, not even while it is written; as `P2P.generate_identity` makes it."""
    content = crypto_pb2.PrivateKey(key_type=crypto_pb2.RSA, data=key.to_bytes()).SerializeToString()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
        file.write(content)


def load_key(path: Path) -> RSAPrivateKey:
    """Raises ValueError if the file is no key, OSError if it cannot be read."""
    try:
        content = crypto_pb2.PrivateKey.FromString(path.read_bytes()).data
        key = RSAPrivateKey.__new__(RSAPrivateKey)
        key.__setstate__({"_private_key": content})
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no private key; make one: python -m src.access key FILE") from error
    return key


def public_key_of(key: RSAPrivateKey) -> bytes:
    return key.get_public_key().to_bytes()


def fingerprint(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()
