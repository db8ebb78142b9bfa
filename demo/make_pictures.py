"""Make docs/terminal.png and docs/report.png: a demo swarm's auxiliary peer in a terminal, and the report it leaves.

    python demo/make_pictures.py [--metrics outputs/demo-.../demo/aux/metrics.jsonl]

Trains for some minutes, or takes the file of a run that there is already. Needs Chromium (`apt-get install chromium`),
which turns both into pictures.
"""

import argparse
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

COLUMNS, ROWS = 104, 40
MAX_BYTES = 150_000


class TerminalPeer:
    """A script in a terminal of its own (a pty); what it writes there is kept."""

    def __init__(self, script: str, arguments: list[str]):
        self.written, (self.terminal, inner) = b"", pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments], cwd=REPOSITORY, stdin=inner, stdout=inner, stderr=inner,
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )  # fmt: skip
        os.close(inner)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.written += os.read(self.terminal, 65536)
            except OSError:  # the other end is closed
                return

    def text(self) -> str:
        return self.written.decode("utf-8", errors="replace").replace("\r\n", "\n")

    def wait_for(self, pattern: str, seconds: float) -> re.Match:
        give_up_at = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text())):
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"no {pattern!r} in:\n{self.text()[-3000:]}")
            time.sleep(0.2)
        return match

    def stop(self) -> str:
        """Ask the peer to leave; returns all it has written."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.reader.join(5)
        return self.text()


def train(directory: Path, epochs: int) -> str:
    """Run a swarm until the auxiliary peer has seen so many epochs; returns what stood in its terminal."""
    from src.metrics.history import read_history
    from src.process.local_swarm import LocalSwarm

    shared = ["--output_dir", str(directory)]
    held_out = ["--eval_sources", str(REPOSITORY / "demo" / "heldout.txt"), "--eval_batches", "2"]
    own = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--save_checkpoint_epoch_interval", "5"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    auxiliary = TerminalPeer("run_aux_peer.py", ["@demo/aux.args", *held_out, *shared, *own])
    try:
        with LocalSwarm(environment=threads) as swarm:
            swarm.initial_peers = [auxiliary.wait_for(r"--initial_peers (/ip4/127\S+)", 600).group(1)]
            trainer = ["@demo/trainer.args", *shared, "--wait_for_peers", "2"]
            peers = [swarm.start(f"trainer {number}", "run_trainer.py", trainer) for number in (1, 2)]
            metrics = directory / "demo" / "aux" / "metrics.jsonl"
            while (last := read_history(metrics).last_epoch) is None or last.epoch < epochs:
                if any(peer.process.poll() is not None for peer in peers):
                    raise RuntimeError("a trainer ended; its output stands above")
                time.sleep(1.0)
            return auxiliary.stop()
    finally:
        auxiliary.stop()


def last_view(terminal: str) -> str:
    """The view as it was left on the screen."""
    start = terminal.rindex("╭", 0, terminal.rindex("  run "))  # before it stand colours and movements of the cursor
    return "\x1b[34m" + terminal[start : terminal.index("leaving the swarm", start)].rstrip()


def screenshot(page: Path, picture: Path, width: int, height: int) -> None:
    """A picture of a page; colours are rounded, and rows cut, until the file is small enough for a repository."""
    import matplotlib.image
    import numpy as np

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise RuntimeError("needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
             f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    pixels = (255 * matplotlib.image.imread(picture)[..., :3]).round().astype(np.uint8)
    for step in (1, 8, 16, 32):
        rounded = np.minimum(255, (pixels.astype(np.int64) + step // 2) // step * step).astype(np.uint8)
        matplotlib.image.imsave(picture, rounded, pil_kwargs={"optimize": True})
        if picture.stat().st_size < MAX_BYTES:
            return
    raise RuntimeError(f"{picture} has {picture.stat().st_size} bytes; make it smaller")


def view_of(metrics: Path):
    """What `python -m src.metrics.terminal` showed when the last record was written."""
    from src.metrics.history import read_history
    from src.metrics.terminal import TerminalView

    view = TerminalView()
    view.history = read_history(metrics)
    view.clock = lambda: view.history.last_time
    return view.render()


def draw_terminal(view, picture: Path, title: str) -> None:
    from rich.console import Console
    from rich.text import Text

    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(view, soft_wrap=isinstance(view, Text))
    image = console.export_svg(title=title)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', image).groups())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "terminal.html"
        page.write_text(f"<body style='margin:0;background:#fff'>{image}</body>", encoding="utf-8")
        screenshot(page, picture, round(width), round(height))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "docs", help="where the pictures go (docs)")
    parser.add_argument("--metrics", type=Path, help="an auxiliary peer's metrics.jsonl (default: train)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs to train (default: 40)")
    options = parser.parse_args()
    from rich.text import Text

    from src.metrics.report import write_report

    options.output_dir.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        if options.metrics is None:
            view = Text.from_ansi(last_view(train(Path(folder), options.epochs)))
            draw_terminal(view, options.output_dir / "terminal.png", "python run_aux_peer.py @demo/aux.args")
        else:
            view, title = view_of(options.metrics), "python -m src.metrics.terminal metrics.jsonl"
            draw_terminal(view, options.output_dir / "terminal.png", title)
        write_report(options.metrics or Path(folder) / "demo" / "aux" / "metrics.jsonl", report)
        screenshot(report, options.output_dir / "report.png", 1100, 1010)
    print(f"made {options.output_dir / 'terminal.png'} and {options.output_dir / 'report.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
