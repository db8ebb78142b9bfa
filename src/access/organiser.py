"""Who may join a private run: make keys, issue tokens, list them, take them back. Works offline; there is no server.

The organiser's files lie in access/RUN_ID: organiser.key (keep it safe: whoever has it can let anybody in),
issued.jsonl and, after the first revocation, revoked.txt; settings, once they are signed.

  python -m src.access init RUN_ID                            organiser: once a run
  python -m src.access key ivan.key                           member: prints the public key to send
  python -m src.access sign RUN_ID @recipes/base/swarm.args   organiser: access/RUN_ID/settings, the run's settings
  python -m src.access issue RUN_ID ivan "ssh-rsa AAAA..."    organiser: access/RUN_ID/ivan.token to send back
  python run_trainer.py ... --authorize ivan.token                     member: ivan.key lies beside it
"""

import argparse
import base64
import json
import os
import sys
import time
from pathlib import Path

from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from src.access.keys import create_key, fingerprint, load_key, public_key_of
from src.access.tokens import REVOCATIONS_FILE, sign_revocations, sign_token, write_token_file
from src.files import write_atomically

DAY = 86_400.0
MIN_DAYS, MAX_DAYS = 0.001, 36_500
END_OF_TIME = 253_402_000_000.0  # the end of the year 9999, the last that has a date
MAX_NAME_LENGTH = 100


class Office:
    """The organiser's directory of one run."""

    def __init__(self, directory: Path, run_id: str):
        if not run_id or not all(character.isalnum() or character in "-_" for character in run_id):
            raise ValueError(f"the run's name {run_id!r} may hold letters, digits, - and _ only, as --run_id")
        self.run_id, self.directory = run_id, directory / run_id
        self.key_file, self.ledger = self.directory / "organiser.key", self.directory / "issued.jsonl"
        self.revocations_file = self.directory / REVOCATIONS_FILE
        self.damaged_lines: set[int] = set()

    def key(self) -> RSAPrivateKey:
        if not self.key_file.exists():
            raise ValueError(f"{self.key_file} does not exist; begin with: init {self.run_id}")
        return load_key(self.key_file)

    def issued(self) -> list[dict]:
        """The ledger's records. Lines that a crash or an editor has damaged are left out, with a notice each."""
        if not self.ledger.exists():
            return []
        records = []
        for number, line in enumerate(self.ledger.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
            record = read_record(line)
            if record is not None:
                records.append(record)
            elif line.strip() and number not in self.damaged_lines:
                self.damaged_lines.add(number)
                notice = "is damaged and left out; a token that it told of can still be revoked by the name of its file"
                print(f"access: {self.ledger}:{number} {notice}", file=sys.stderr)
        return records

    def revoked(self) -> tuple[int, set[str]]:
        """Serial number and fingerprints of the newest list."""
        if not self.revocations_file.exists():
            return 0, set()
        try:
            _, _, serial, fingerprints = json.loads(self.revocations_file.read_bytes().partition(b"\n")[2])
            return int(serial), set(map(str, fingerprints))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.revocations_file} is damaged: take a copy from beside a member's token, or the members will "
                "not believe the next list"
            ) from error

    def issue(self, name: str, public_key: bytes | None, days: float) -> Path:
        """Write NAME.token, and NAME.key as well if there is no public key; returns the token's path."""
        if not name or not all(character.isalnum() or character in "-_." for character in name):
            raise ValueError(f"the name {name!r} may hold letters, digits, -, _ and . only: it names a file")
        if name == "organiser" or len(name) > MAX_NAME_LENGTH:
            reason = "is that of the organiser's own key" if name == "organiser" else "is too long for a file"
            raise ValueError(f"the name {name[:MAX_NAME_LENGTH]!r} {reason}; choose another one")
        if not MIN_DAYS <= days <= MAX_DAYS:
            raise ValueError(f"--days {days:g} must be a number from {MIN_DAYS:g} (a minute and a half) to {MAX_DAYS}")
        organiser = self.key()
        if public_key is None:
            key_file = self.directory / f"{name}.key"
            public_key = public_key_of(load_key(key_file) if key_file.exists() else create_key(key_file))
        expires = time.time() + days * DAY
        token = sign_token(organiser, run_id=self.run_id, name=name, public_key=public_key, expires=expires)
        record = {"name": name, "fingerprint": fingerprint(public_key), "issued": time.time(), "expires": expires}
        self._enter(record)
        path = self.directory / f"{name}.token"
        write_token_file(path, token, organiser.get_public_key())
        return path

    def _enter(self, record: dict) -> None:
        """Add a line to the ledger, on disk before there is a token; one that a crash has cut off is ended first."""
        with self.ledger.open("a+b") as ledger:
            ledger.seek(0)
            is_whole = ledger.read()[-1:] in (b"", b"\n")
            ledger.write((b"" if is_whole else b"\n") + json.dumps(record, ensure_ascii=False).encode() + b"\n")
            ledger.flush()
            os.fsync(ledger.fileno())

    def revoke(self, names: list[str]) -> int:
        """Shut out all keys that were issued to these names; returns how many are shut out in all."""
        issued = self.issued()
        issued += [record for name in names if (record := self._read_token(name)) is not None]
        known = {record["name"] for record in issued}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"no token was issued to {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        serial, fingerprints = self.revoked()
        fingerprints |= {record["fingerprint"] for record in issued if record["name"] in names}
        signed = sign_revocations(self.key(), run_id=self.run_id, serial=serial + 1, fingerprints=sorted(fingerprints))
        write_atomically(self.revocations_file, signed)
        return len(fingerprints)

    def _read_token(self, name: str) -> dict | None:
        """What NAME.token says, which is still there when the ledger's line has been damaged."""
        try:
            content = json.loads((self.directory / f"{name}.token").read_text(encoding="utf-8"))
            token = AccessToken.FromString(base64.b64decode(content["token"]))
        except Exception:  # not there, or damaged itself, in one of a dozen ways
            return None
        return {"name": name, "fingerprint": fingerprint(token.public_key)}

    def table(self) -> list[str]:
        """One line a token, the newest of each name."""
        _, revoked = self.revoked()
        newest = {record["name"]: record for record in self.issued()}
        lines = [f"{'name':<20} {'state':<8} {'until':<17} key"]
        for name, record in sorted(newest.items()):
            state = "valid" if record["expires"] > time.time() else "expired"
            state = "revoked" if record["fingerprint"] in revoked else state
            until = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(record["expires"], END_OF_TIME)))
            lines.append(f"{name:<20} {state:<8} {until:<17} {record['fingerprint'][:16]}")
        return lines


def read_record(line: str) -> dict | None:
    """A line of the ledger with all that it must have, else None."""
    try:
        record = json.loads(line)
        known = {"name": record["name"], "fingerprint": record["fingerprint"], "expires": float(record["expires"])}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    is_text = isinstance(known["name"], str) and isinstance(known["fingerprint"], str)
    return known if is_text and known["expires"] > 0 else None


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
        prog="python -m src.access", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("access"), help="where the organiser's files lie")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="make the organiser's key of a run").add_argument("run_id")
    commands.add_parser("key", help="make a key and print its public part").add_argument("file", type=Path)
    sign = commands.add_parser(
        "sign", help="sign the run's settings: what follows are flags of run_trainer.py, or files of them (@FILE)"
    )
    sign.add_argument("run_id")
    sign.add_argument("flags", nargs=argparse.REMAINDER)
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
    elif arguments.command == "sign":
        from src.access.settings import sign_settings  # loads torch, which the others do without

        folder = sign_settings(office.key(), arguments.run_id, arguments.flags, office.directory)
        print(f"{folder}: put a copy of this folder beside the token of each peer that begins the run")
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
