"""The swarm in a terminal, redrawn in place: how far the epoch is, how well it learns, who does what, what failed.

The auxiliary peer shows it; `python -m src.metrics.terminal METRICS.jsonl` shows it for any run's file.
"""

import argparse
import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from src.console import counted, format_moment, format_seconds
from src.metrics.console import Progress
from src.metrics.history import RunHistory, read_history
from src.metrics.svg_chart import short_number

SHOWN_PEERS, SHOWN_FAILURES = 20, 3
AGES = ((15.0, "green"), (90.0, "yellow"), (float("inf"), "red"))  # seconds since a sign of life, and their colour


class TerminalView(Progress):
    """Messages scroll by above, as lines; below them stands the view, from `start` to `close`.

    It shows a `RunHistory` that the journal feeds, hivemind's progress within the epoch, and signs of life between
    two reports. Text of strangers is never taken for markup.
    """

    def __init__(self, console: Console | None = None):
        self.console = console if console is not None else Console(highlight=False)
        super().__init__(self.console.file)
        self.history, self.tracker, self._display = RunHistory(), None, None
        self._progress, self._lock, self.clock = {}, threading.Lock(), time.time

    def start(self, history: RunHistory, tracker) -> None:
        """Begin to draw. Threads are started here, so hivemind's processes must exist already."""
        self.history, self.tracker = history, tracker
        self._display = Live(console=self.console, get_renderable=self.render, refresh_per_second=2, transient=True)
        self._display.start()
        self.console.show_cursor(True)  # nobody would give it back if this program were killed
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)  # rich's, which prints above the view

    def close(self) -> None:
        """Stop drawing and leave the last state on the screen."""
        if self._display is not None:
            self._display.stop()
            self._display = None
            self.console.print(self.render())

    def say(self, message: str) -> None:
        self.console.print(Text(message), soft_wrap=True)

    def routine(self, message: str) -> None:
        if self._display is None:
            self.say(message)

    def update(self, epoch: int, tracker, total_epochs: int) -> None:
        """Nothing: the view draws it itself, see `start`."""

    def peers_seen(self, progress: dict) -> None:
        with self._lock:
            self._progress = progress

    def render(self) -> Group:
        """Everything that stands below the messages."""
        with self._lock:
            progress = dict(self._progress)
        now, history = self.clock(), self.history
        with history.lock:  # the journal's writers are other threads
            parts = [self._panel(history, now), self._peers(history, progress, now)]
            if history.failures:
                parts.append(self._failures(history, now))
        return Group(*parts)

    def _panel(self, history: RunHistory, now: float) -> Panel:
        last = history.last_epoch
        lines = [self._bar(now)] if self.tracker is not None else []
        if last is None:
            lines.append(Text("no epoch has ended yet", style="dim"))
        else:
            parts = {"loss": last.loss, "masked-token": last.mlm_loss, "sentence-order": last.sop_loss}
            if last.sop_loss is None and last.loss is not None:
                del parts["sentence-order"]  # not trained
            first, *rest = [
                f"{name} {'not finite' if value is None else f'{value:.3f}'}" for name, value in parts.items()
            ]
            lines.append(Text(f"{first}  ({', '.join(rest)}) in epoch {last.epoch}", style="bold"))
        if history.held_out:
            score = history.held_out[-1]
            order = "" if score.order_accuracy is None else f"; sentence-order accuracy {score.order_accuracy:.0%}"
            lines.append(Text(f"held-out masked-token loss {score.loss:.3f}, accuracy {score.accuracy:.1%}{order}; "
                              f"epoch {score.epoch}"))  # fmt: skip
        if history.pairs:
            score = history.pairs[-1]
            lines.append(Text(f"minimal pairs: {score.accuracy:.1%} of {score.num_pairs} right "
                              f"({score.low:.0%} to {score.high:.0%}); epoch {score.epoch}"))  # fmt: skip
        if last is not None:
            lines.append(Text(self._pace(history, last, now), style="dim"))
        of = f" of {history.total_epochs}" if history.total_epochs else ""
        pace = f"{short_number(last.samples_per_second)} samples/s" if last else ""
        peers = f"{counted(last.num_peers, 'trainer')}, {pace}" if last else "waiting"
        title = Text(f" run {history.run_id}: {last.epoch if last else 0}{of} epochs, {peers} ")
        return Panel(Group(*lines), title=title, title_align="left", border_style="blue")

    def _bar(self, now: float) -> Table:
        """How much of the coming epoch's batch is there."""
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        state = self.tracker.global_progress
        if state.num_peers == 0:
            row.add_row("no trainer is at work", "", "")
            return row
        eta = max(0.0, state.eta_next_epoch - now)
        left = format_seconds(eta) if eta < 1e9 else "?"
        bar = ProgressBar(total=max(1, state.target_batch_size), completed=max(0, state.samples_accumulated))
        samples = f"{state.samples_accumulated} of {state.target_batch_size} samples, {left} left"
        row.add_row(f"epoch {state.epoch + 1}", bar, samples)
        return row

    def _pace(self, history: RunHistory, last, now: float) -> str:
        seconds = history.epoch_seconds()
        parts = [f"last epoch ended {format_seconds(max(0.0, now - last.time))} ago"]
        if seconds is not None:
            parts.append(f"one takes {format_seconds(seconds)}")
            if history.total_epochs > last.epoch:
                left = (history.total_epochs - last.epoch) * seconds
                parts.append(f"{format_seconds(left)} to the end of the run, {format_moment(last.time + left)}")
        if history.last_checkpoint:
            parts.append(f"checkpoint of epoch {history.last_checkpoint}")
        return ", ".join(parts)

    def _peers(self, history: RunHistory, progress: dict, now: float) -> Table:
        """A row for each trainer that was seen: those that report now, and those that have worked before."""
        table = Table(box=None, expand=True, header_style="dim", padding=(0, 1))
        table.add_column("trainer", no_wrap=True)
        for name in ("epoch", "so far", "samples/s", "samples", "share", "last seen", "failed"):
            table.add_column(name, justify="right", no_wrap=True)
        ranked = history.shares()
        names = [peer.name for peer, _ in ranked] + [name for name in progress if name not in history.peers]
        shares = {peer.name: part for peer, part in ranked}
        for name in names[:SHOWN_PEERS]:
            peer, current = history.peers.get(name), progress.get(name)
            seen = max(peer.last_seen if peer else 0.0, current.time if current else 0.0)
            age = max(0.0, now - seen)
            rate = current.samples_per_second if current else peer.samples_per_second
            failed = peer.failed_rounds if peer else 0
            table.add_row(
                Text(name),
                str(current.epoch if current else peer.epoch),
                str(current.samples_accumulated) if current else "-",
                short_number(rate),
                short_number(peer.samples) if peer else "0",
                f"{shares.get(name, 0.0):.0%}",
                Text(
                    f"{format_seconds(age)} ago", style=next((colour for limit, colour in AGES if age < limit), "red")
                ),
                Text(str(failed), style="red" if failed else "dim"),
            )
        if len(names) > SHOWN_PEERS:
            table.add_row(f"and {len(names) - SHOWN_PEERS} more", *[""] * 7)
        return table

    def _failures(self, history: RunHistory, now: float) -> Panel:
        newest = list(history.failures)[-SHOWN_FAILURES:][::-1]
        lines = [Text(f"epoch {failure.epoch}, {failure.who}, {format_seconds(max(0.0, now - failure.time))} ago: "
                      f"{failure.reason}") for failure in newest]  # fmt: skip
        title = Text(f" failed rounds of averaging: {counted(history.num_failures, 'report')} ")
        return Panel(Group(*lines), title=title, title_align="left", border_style="red")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m src.metrics.terminal", description=__doc__.partition("\n\n")[0])
    parser.add_argument("metrics", type=Path, help="a trainer's or auxiliary peer's metrics.jsonl")
    parser.add_argument("--once", action="store_true", help="show the newest state and end (default: follow the file)")
    options = parser.parse_args(arguments)
    view = TerminalView()
    try:
        history = read_history(options.metrics)
        if options.once or not view.console.is_terminal:
            view.history = history
            view.console.print(view.render())
            return 0
        view.start(history, tracker=None)
        while True:
            time.sleep(2.0)
            view.history = read_history(options.metrics)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        view.close()


if __name__ == "__main__":
    sys.exit(main())
