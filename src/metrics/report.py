"""A run in one HTML file that opens anywhere: `python -m src.metrics.report METRICS.jsonl [-o report.html]`.

The file needs no server, account or network, and runs no script. Whatever strangers wrote into it is escaped text.
"""

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from src.console import counted, format_bytes, format_seconds
from src.files import write_atomically
from src.metrics.history import Failure, Peer, RunHistory, read_history
from src.metrics.records import END_OF_TIME
from src.metrics.svg_chart import Series, line_chart, short_number

LAST_MOMENT = END_OF_TIME - 1.0
SHOWN_PEERS, SHOWN_FAILURES, SHOWN_STALLS, SHOWN_MARKS = 50, 30, 20, 60

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #5b6570; --line: #dfe3e8;
  --c1: #2563eb; --c2: #d9480f; --c3: #0f8a5f; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --page: #101418; --card: #1a2026; --text: #e8ecf0; --soft: #9aa6b2;
  --line: #2d363f; --c1: #79a8ff; --c2: #ffa066; --c3: #4fd1a0; --bad: #ff8080; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1080px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 4px 0; } h2 { font-size: 1.05rem; margin: 0 0 8px; }
p { margin: 4px 0; } .soft, small, footer { color: var(--soft); } small { font-size: .82em; font-weight: 400; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 10px; margin: 14px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 10px; }
.tile, figure, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0;
  padding: 10px 12px; min-width: 0; }
section { margin-top: 10px; } .tile b { display: block; font-size: 1.35rem; font-weight: 650; line-height: 1.25; }
figcaption { font-weight: 600; margin-bottom: 4px; } figcaption small { display: block; }
figcaption span { margin-right: 12px; white-space: nowrap; } figcaption i { display: inline-block; width: 12px;
  height: 3px; margin-right: 5px; vertical-align: middle; border-radius: 2px; }
.k1 { background: var(--c1); } .k2 { background: var(--c2); } .k3 { background: var(--c3); }
.kmark { background: var(--bad); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .grid { stroke: var(--line); }
path { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .mark { stroke: var(--bad); stroke-dasharray: 2 3; }
.s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.d1 { fill: var(--c1); } .d2 { fill: var(--c2); } .d3 { fill: var(--c3); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 6px; text-align: right; border-top: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .82em; border-top: 0; white-space: normal;
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; white-space: normal;
  min-width: 5.2em; }
.bar { display: block; height: 5px; border-radius: 3px; background: var(--line); margin-top: 4px; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--c1); }
.bad { color: var(--bad); } ul { list-style: none; margin: 0; padding: 0; }
li { padding: 6px 0; border-top: 1px solid var(--line); }
li:first-child { border-top: 0; } footer { margin: 14px 2px; font-size: .85em; }
@media (max-width: 520px) { body { padding: 10px; font-size: 14px; } table { font-size: 13px; }
  th, td { padding: 5px 3px; } .wide { display: none; } }
"""
# nothing from outside and no script, whatever gets into the text
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"


def share(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def tiles(history: RunHistory) -> str:
    """The figures one looks for first."""
    last, seconds, shown = history.last_epoch, history.epoch_seconds(), []
    if last is not None:
        of = f" of {history.total_epochs}" if history.total_epochs else ""
        shown.append((f"{last.epoch}", f"epochs{of}"))
        loss = "—" if last.mlm_loss is None else f"{last.mlm_loss:.3f}"
        shown.append((loss, "masked-token loss"))
    if history.held_out:
        score = history.held_out[-1]
        shown.append((f"{score.loss:.3f}", f"on held-out text, epoch {score.epoch}"))
        shown.append((share(score.accuracy), "of held-out tokens predicted"))
    if history.pairs:
        score = history.pairs[-1]
        shown.append((share(score.accuracy), f"of {score.num_pairs} minimal pairs right, epoch {score.epoch}"))
    if last is not None:
        shown.append((f"{last.num_peers}", "trainer" if last.num_peers == 1 else "trainers"))
        shown.append((short_number(last.samples_per_second), "samples per second"))
        if history.total_epochs > last.epoch and seconds is not None:
            left = (history.total_epochs - last.epoch) * seconds
            shown.append(
                (format_seconds(left), f"left at this pace, until {clock(min(last.time + left, LAST_MOMENT))}")
            )
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><small>{escape(label)}</small></div>' for value, label in shown
    )


def charts(history: RunHistory) -> str:
    """Learning curve, held-out scores, pace, throughput, trainers over time."""
    epochs, held_out = list(history.epochs.values()), history.held_out
    failed: dict[int, list[Failure]] = {}
    for failure in history.failures:
        failed.setdefault(failure.epoch, []).append(failure)
    marks = [(epoch, f"epoch {epoch}: {failures[0].reason}") for epoch, failures in failed.items()][-SHOWN_MARKS:]
    learning = [Series("training", [(e.epoch, e.mlm_loss) for e in epochs])]
    if held_out:
        learning.append(Series("held-out", [(score.epoch, score.loss) for score in held_out], dots=True))
    unit, divisor = time_unit(history.last_time - history.first_time)
    hours = [(e.time - history.first_time) / divisor for e in epochs]
    durations = history.epoch_durations()
    orders = [(score.epoch, score.order_accuracy) for score in held_out if score.order_accuracy is not None]
    drawn = [
        line_chart("Masked-token loss, nats", learning, x_label="epoch", marks=marks),
        line_chart(
            "Held-out text: accuracy",
            [
                Series("masked tokens", [(score.epoch, score.accuracy) for score in held_out], dots=True),
                *([Series("sentence order", orders, dots=True)] if orders else []),
            ],
            x_label="epoch",
            from_zero=True,
            format_y=lambda value: f"{value:.3g}" if value < 0.01 else f"{value:.0%}",
        ),
        line_chart(
            "Minimal pairs: share right, with its 95 % interval",
            [
                Series("right", [(score.epoch, score.accuracy) for score in history.pairs], dots=True),
                Series("low", [(score.epoch, score.low) for score in history.pairs]),
                Series("high", [(score.epoch, score.high) for score in history.pairs]),
            ],
            x_label="epoch",
            format_y=lambda value: f"{value:.0%}",
        ),
        line_chart("Sentence-order loss, nats", [Series("training", [(e.epoch, e.sop_loss) for e in epochs])],
                   x_label="epoch"),
        line_chart("Seconds per epoch",
                   [Series("all", [((after.time - history.first_time) / divisor, took) for after, took in durations])],
                   x_label=unit, from_zero=True),
        line_chart("Throughput, samples per second",
                   [Series("all trainers", list(zip(hours, (e.samples_per_second for e in epochs), strict=True)))],
                   x_label=unit, from_zero=True),
        line_chart("Trainers",
                   [Series("reported", list(zip(hours, (e.num_peers for e in epochs), strict=True)), steps=True)],
                   x_label=unit, from_zero=True),
        memory_chart(history, unit, divisor),
    ]  # fmt: skip
    return "".join(drawn)


def memory_chart(history: RunHistory, unit: str, divisor: float) -> str:
    """Of the peer that has written the file, not of others."""
    uses = [((time - history.first_time) / divisor, use) for time, use in history.memory]
    measures = " or ".join(sorted({use.measure for _, use in uses}))
    parts = {
        "main process": [(moment, use.main) for moment, use in uses],
        "averaging": [(moment, use.gradients + use.parameters) for moment, use in uses],
        "DHT and p2pd": [(moment, use.dht + use.p2pd) for moment, use in uses],
    }
    series = [Series(name, points) for name, points in parts.items()]
    return line_chart(f"Memory of this peer, MB ({measures})", series, x_label=unit, from_zero=True)


def time_unit(seconds: float) -> tuple[str, float]:
    """What to count a run's time in, and how many seconds that is."""
    for limit, unit, divisor in ((7200, "minutes", 60.0), (3 * 86_400, "hours", 3600.0)):
        if seconds < limit:
            return unit, divisor
    return "days", 86_400.0


def contributions(history: RunHistory) -> str:
    """Who did how much of the work, and with what trouble."""
    ranked = history.shares()
    rows = []
    for peer, part in ranked[:SHOWN_PEERS]:
        ago = history.last_time - peer.last_seen
        seen = "now" if ago < 1 else f"{format_seconds(ago)} ago"
        failed = f'<span class="bad">{peer.failed_rounds}</span>' if peer.failed_rounds else "0"
        rows.append(
            f"<tr><td>{escape(peer.name)}</td><td>{share(part)}<span class='bar'>"
            f"<i style='width:{100 * part:.1f}%'></i></span></td><td>{short_number(peer.samples)}</td>"
            f"<td>{short_number(peer.samples_per_second)}</td><td class='wide'>{peer.epoch}</td>"
            f"<td>{escape(seen)}</td><td class='wide'>{'' if peer.computing is None else share(peer.computing)}</td>"
            f"<td class='wide'>{traffic(peer)}</td><td>{peer.lone_epochs}</td><td>{failed}</td></tr>"
        )
    more = f"<p class='soft'>and {len(ranked) - SHOWN_PEERS} more</p>" if len(ranked) > SHOWN_PEERS else ""
    head = "<th>trainer</th><th>share</th><th>samples</th><th>per s</th><th class='wide'>epoch</th><th>last seen</th>"
    head += "<th class='wide' title='share of its time in which it did not wait for the swarm'>computing</th>"
    head += "<th class='wide' title='in rounds of averaging'>sent, received</th>"
    head += "<th>epochs alone</th><th>failed rounds</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"


def traffic(peer: Peer) -> str:
    """Empty for a trainer that does not say, as earlier versions do not."""
    known = peer.bytes_sent or peer.bytes_received
    return f"{format_bytes(peer.bytes_sent)}, {format_bytes(peer.bytes_received)}" if known else ""


def troubles(history: RunHistory) -> str:
    """Stalls with what was reported in them, then the newest failures."""
    stalls = history.stalls()
    parts = []
    if stalls:
        items = "".join(
            f"<li><b>{format_seconds(stall.seconds)}</b> without progress before epoch {stall.epoch} "
            f"<small>{clock(stall.time)}</small>{''.join(f'<br>{escape(reason)}' for reason in stall.reasons)}</li>"
            for stall in stalls[-SHOWN_STALLS:][::-1]
        )
        parts.append(f"<section><h2>Stalls <small>{len(stalls)} in all</small></h2><ul>{items}</ul></section>")
    if history.failures:
        newest = list(history.failures)[-SHOWN_FAILURES:][::-1]
        items = "".join(
            f"<li>epoch {failure.epoch}, <b>{escape(failure.who)}</b> <small>{clock(failure.time)}</small>"
            f"<br>{escape(failure.reason)}</li>"
            for failure in newest
        )
        count = counted(history.num_failures, "report") + " in all"
        parts.append(f"<section><h2>Failed rounds of averaging <small>{count}</small></h2><ul>{items}</ul></section>")
    if not parts:
        parts.append("<section><h2>Stalls and failed rounds</h2><p>None.</p></section>")
    return "".join(parts)


def make_report(history: RunHistory, *, refresh_seconds: float | None = None) -> str:
    """The whole page; with ``refresh_seconds`` an open browser loads it again that often, while the run goes on."""
    name = history.run_id or "a run"
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds:.0f}">' if refresh_seconds else ""
    when = f"{clock(history.first_time)} to {clock(history.last_time)}"
    lasted = format_seconds(history.last_time - history.first_time)
    checkpoint = f", newest checkpoint of epoch {history.last_checkpoint}" if history.last_checkpoint else ""
    seen_by = f" seen by its {escape(history.role)}" if history.role else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>{escape(name)}: epoch {history.last_epoch.epoch if history.last_epoch else 0}</title>
<style>{STYLE}</style></head>
<body><header><h1>Run {escape(name)}</h1>
<p class="soft">{when} ({lasted}){checkpoint}</p></header>
<main><div class="tiles">{tiles(history)}</div>
<div class="charts">{charts(history)}</div>
<section><h2>Contributions <small>{len(history.peers)} in all</small></h2>{contributions(history)}</section>
{troubles(history)}</main>
<footer>The run{seen_by}. Times are those of its records; "ago" counts back from the newest one.
Made from metrics.jsonl by <code>python -m src.metrics.report</code>.</footer></body></html>
"""


def write_report(metrics: Path, report: Path, *, refresh_seconds: float | None = None) -> None:
    """Raises ValueError if ``metrics`` is no run's file, OSError if the report cannot be written."""
    page = make_report(read_history(metrics), refresh_seconds=refresh_seconds).encode("utf-8", errors="replace")
    write_atomically(report, page)


class Reporter(threading.Thread):
    """Writes the report of a running peer every ``interval`` seconds, and a last time when it is stopped."""

    def __init__(self, metrics: Path, report: Path, *, interval: float, progress, stop):
        super().__init__(name="reporter", daemon=True)
        self.metrics, self.report, self.interval = metrics, report, interval
        self.progress, self.stop = progress, stop

    def run(self) -> None:
        while not self.stop.wait(self.interval):
            self.write()
        self._write(refresh_seconds=None)

    def write(self) -> None:
        """Now; an open browser loads it again when the next one is due."""
        self._write(refresh_seconds=self.interval)

    def _write(self, *, refresh_seconds: float | None) -> None:
        try:
            write_report(self.metrics, self.report, refresh_seconds=refresh_seconds)
        except (ValueError, OSError) as error:
            self.progress.say(f"no report written, will try again: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m src.metrics.report", description=__doc__.partition("\n\n")[0])
    parser.add_argument("metrics", type=Path, help="a trainer's or auxiliary peer's metrics.jsonl")
    parser.add_argument("-o", "--output", type=Path, help="default: report.html beside the metrics file")
    options = parser.parse_args(arguments)
    report = options.output or options.metrics.with_name("report.html")
    try:
        write_report(options.metrics, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
