"""Who may join a private run: make keys, issue tokens, list them, take them back. Works offline; there is no server.

The organiser's files lie in access/RUN_ID: organiser.key (keep it safe: whoever has it can let anybody in),
issued.jsonl and, after the first revocation, revoked.txt.

  python -m src.training.access init RUN_ID                            organiser: once a run
  python -m src.training.access key ivan.key                           member: prints the public key to send
  python -m src.training.access issue RUN_ID ivan "ssh-rsa AAAA..."    organiser: access/RUN_ID/ivan.token to send back
  python run_trainer.py ... --authorize ivan.token                     member: ivan.key lies beside it
"""

import argparse
import json
import sys
import time
from pathlib import Path

from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from src.training.auth import (
    REVOCATIONS_FILE,
    create_key,
    fingerprint,
    load_key,
    public_key_of,
    sign_revocations,
    sign_token,
    write_token_file,
)

DAY = 86_400.0


class Office:
    """The organiser's directory of one run."""

    def __init__(self, directory: Path, run_id: str):
        self.run_id, self.directory = run_id, directory / run_id
        self.key_file, self.ledger = self.directory / "organiser.key", self.directory / "issued.jsonl"
        self.revocations_file = self.directory / REVOCATIONS_FILE

    def key(self) -> RSAPrivateKey:
        if not self.key_file.exists():
            raise ValueError(f"{self.key_file} does not exist; begin with: init {self.run_id}")
        return load_key(self.key_file)

    def issued(self) -> list[dict]:
        lines = self.ledger.read_text(encoding="utf-8").splitlines() if self.ledger.exists() else []
        return [json.loads(line) for line in lines]

    def revoked(self) -> tuple[int, set[str]]:
        """Serial number and fingerprints of the newest list."""
        if not self.revocations_file.exists():
            return 0, set()
        _, _, serial, fingerprints = json.loads(self.revocations_file.read_bytes().partition(b"\n")[2])
        return serial, set(fingerprints)

    def issue(self, name: str, public_key: bytes | None, days: float) -> Path:
        """Write NAME.token, and NAME.key as well if there is no public key; returns the token's path."""
        if not name or not all(character.isalnum() or character in "-_." for character in name):
            raise ValueError(f"the name {name!r} may hold letters, digits, -, _ and . only: it names a file")
        if not days > 0:
            raise ValueError(f"--days {days:g} must be positive")
        organiser = self.key()
        if public_key is None:
            key_file = self.directory / f"{name}.key"
            public_key = public_key_of(load_key(key_file) if key_file.exists() else create_key(key_file))
        expires = time.time() + days * DAY
        token = sign_token(organiser, run_id=self.run_id, name=name, public_key=public_key, expires=expires)
        record = {"name": name, "fingerprint": fingerprint(public_key), "issued": time.time(), "expires": expires}
        with self.ledger.open("a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(record, ensure_ascii=False) + "\n")
        path = self.directory / f"{name}.token"
        write_token_file(path, token, organiser.get_public_key())
        return path

    def revoke(self, names: list[str]) -> int:
        """Shut out all keys that were issued to these names; returns how many are shut out in all."""
        known = {record["name"] for record in self.issued()}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"no token was issued to {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        serial, fingerprints = self.revoked()
        fingerprints |= {record["fingerprint"] for record in self.issued() if record["name"] in names}
        signed = sign_revocations(self.key(), run_id=self.run_id, serial=serial + 1, fingerprints=sorted(fingerprints))
        aside = self.revocations_file.with_suffix(".part")
        aside.write_bytes(signed)
        aside.replace(self.revocations_file)
        return len(fingerprints)

    def table(self) -> list[str]:
        """One line a token, the newest of each name."""
        _, revoked = self.revoked()
        newest = {record["name"]: record for record in self.issued()}
        lines = [f"{'name':<20} {'state':<8} {'until':<17} key"]
        for name, record in sorted(newest.items()):
            state = "valid" if record["expires"] > time.time() else "expired"
            state = "revoked" if record["fingerprint"] in revoked else state
            until = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["expires"]))
            lines.append(f"{name:<20} {state:<8} {until:<17} {record['fingerprint'][:16]}")
        return lines


def read_public_key(text: str) -> bytes:
    """A public key as text, or the file that holds it; without the comment that may follow."""
    if not text.startswith("ssh-rsa "):
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"{text!r} is neither a public key (ssh-rsa AAAA...) nor a file with one")
        text = path.read_text(encoding="utf-8-sig")
    try:
        return RSAPublicKey.from_bytes(" ".join(text.split()[:2]).encode()).to_bytes()
    except Exception as error:
        raise ValueError(f"{text[:40]!r}... is not a complete RSA public key") from error


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.training.access", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("access"), help="where the organiser's files lie")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="make the organiser's key of a run").add_argument("run_id")
    commands.add_parser("key", help="make a key and print its public part").add_argument("file", type=Path)
    issue = commands.add_parser("issue", help="sign a token; again for the same name: renew it")
    issue.add_argument("run_id")
    issue.add_argument("name", help="for whom; also names the file")
    issue.add_argument("public_key", nargs="?", help="as text or a file; without it a key is made as well")
    issue.add_argument("--days", type=float, default=30.0, help="how long the token is valid (default 30)")
    commands.add_parser("list", help="all names, until when, and whether revoked").add_argument("run_id")
    revoke = commands.add_parser("revoke", help="shut members out")
    revoke.add_argument("run_id")
    revoke.add_argument("names", nargs="+", metavar="name")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "key":
        key = create_key(arguments.file)
        print(public_key_of(key).decode())
        return
    office = Office(arguments.directory, arguments.run_id)
    if arguments.command == "init":
        create_key(office.key_file)
        print(f"made {office.key_file}: keep it safe, and make a copy")
    elif arguments.command == "issue":
        key = read_public_key(arguments.public_key) if arguments.public_key else None
        path = office.issue(arguments.name, key, arguments.days)
        files = path if key is not None else f"{path} and {path.with_suffix('.key')} (secret)"
        print(f"for {arguments.name}: {files}\nuse: --authorize {path}")
    elif arguments.command == "list":
        print("\n".join(office.table()))
    elif arguments.command == "revoke":
        count = office.revoke(arguments.names)
        print(
            f"{office.revocations_file}: {count} keys shut out. Copy it beside the token of any running member; "
            "within a minute all members know"
        )


def main(argv: list[str] | None = None) -> int:
    try:
        run(make_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"access: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
