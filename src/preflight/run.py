"""Is this machine ready to join the run? `--check` tests all that usually goes wrong and says what to do about it.

Each check gives one line; the last line is the verdict.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from arguments import FLAGS, PeerArguments
from src.preflight.check import FAILED, WARNING, Check, attempt
from src.preflight.machine import (
    Workload,
    check_disk,
    check_identity,
    check_memory,
    check_open_files,
    check_shared_memory,
)
from src.preflight.network import Seen, check_network, without_new_key
from src.preflight.plan import Plan
from src.settings.folder import folder_of
from src.swarm.join import Entry, UnfitSettingsError, enter

FULL_VOCABULARY = 0.9  # of the model's; sizes are rounded up for the sake of the hardware


def run_checks(  # noqa: PLR0913 (what the two programs differ in)
    peer: PeerArguments,
    *,
    output_dir: str,
    device: torch.device,
    workload: Workload,
    build_model: Callable[[], tuple],
    make_card: Callable[[object, object], dict[str, str]],
    read_data: Callable[[object], object] | None,
    check_uploads: Callable[[], Check] | None = None,
    plan: Callable[[tuple, object, Seen, bool], Plan] | None = None,
    fastest: float = 0.0,
    say: Callable[[str], None],
) -> int:
    """All checks, each one's lines as soon as they are known, then the verdict. Returns the exit code, 0 or 2.

    ``build_model()`` gives model and tokenizer, ``make_card(config, tokenizer)`` the run card, ``read_data(tokenizer)``
    reads a first instance; the first and the last raise ValueError. ``check_uploads()`` is for who uploads.
    ``plan(built, data, seen, fits)``: of what these have returned, and whether a batch fits into memory. ``fastest``:
    samples a second that are believed of a trainer.
    """
    checks: list[Check] = []

    def report(check: Check) -> None:
        checks.append(check)
        say(check.lines())

    report(check_open_files())
    report(check_identity(peer.identity_path))
    model_check, built = attempt("model and tokenizer", build_model, describe_model)
    report(model_check)
    if built is not None:
        for check in warn_of_vocabulary(*built):
            report(check)
        for check in check_memory(built[0].config, workload, device):
            report(check)
        report(check_shared_memory(built[0], local_steps=workload.local_steps))
        kept = getattr(peer, "keep_checkpoints", 0)  # an auxiliary peer's
        report(check_disk(Path(output_dir), workload.predict(built[0].config), num_kept=kept))
    if check_uploads is not None:
        report(check_uploads())
    card = None if built is None else make_card(built[0].config, built[1])
    # before data are read: hivemind's processes come before other threads
    seen = check_network(peer, report, card, fastest=fastest)
    data = None
    if built is not None and read_data is not None:
        read, data = attempt("data", lambda: read_data(built[1]), lambda _: "the first instance was read")
        report(read)
    if built is not None and plan is not None:
        fits = not any(check.state == FAILED and "memory" in check.name for check in checks)
        made = plan(built, data, seen, fits)
        say("\n".join(["what the run will take:", *made.lines()]))
        for warning in made.warnings:
            report(warning)
    return verdict(checks, say)


@contextlib.contextmanager
def settings_for_check(
    peer: PeerArguments, given: dict, *, reads_text: bool, say: Callable[[str], None]
) -> Iterator[Entry | None]:
    """What the run hands over, which is not kept; None, with the verdict said, if this peer cannot take it.

    Where no peer can be reached the flags count, or what was kept when this peer was in the run: the other checks tell
    the reason.
    """
    kept = folder_of(given.get("output_dir", FLAGS["output_dir"].default), peer.run_id)
    with tempfile.TemporaryDirectory() as aside:
        folder = kept if kept.exists() else Path(aside) / kept.name
        probe = without_new_key(peer)
        try:
            try:
                entry = enter(probe, given, folder=folder, reads_text=reads_text, say=say)
            except UnfitSettingsError:
                raise
            except (ValueError, OSError):  # of the network, or of the key
                probe.initial_peers, probe.authorize = [], "False"
                entry = enter(probe, given, folder=folder, reads_text=reads_text, say=say)
            entry.leave()
        except UnfitSettingsError as error:
            entry, found = None, Check("settings of the run", FAILED, str(error))
            say(found.lines())
            verdict([found], say)
        yield entry


def describe_model(built: tuple) -> str:
    model, tokenizer = built
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(tokenizer)} tokens"


def warn_of_vocabulary(model, tokenizer) -> list[Check]:
    room = model.config.vocab_size
    if len(tokenizer) >= FULL_VOCABULARY * room:
        return []
    found = f"the model has room for {room} tokens, the tokenizer knows {len(tokenizer)}: the rest is never learned"
    fix = f"lower vocab_size to {len(tokenizer)} in the model's configuration, or train a larger tokenizer"
    return [Check("vocabulary", WARNING, found, f"{fix}, before the run begins")]


def verdict(checks: Sequence[Check], say: Callable[[str], None]) -> int:
    failed = [check for check in checks if check.state == FAILED]
    warnings = sum(check.state == WARNING for check in checks)
    more = f", {warnings} warnings" if warnings else ""
    if failed:
        names = "; ".join(check.name for check in failed)
        say(f"NOT READY: {len(failed)} of {len(checks)} checks failed{more}: {names}")
        return 2
    say(f"READY: {len(checks)} checks passed{more}")
    return 0
