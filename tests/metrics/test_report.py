"""The report opens from a file without network or script, fits a phone, and shows what strangers wrote as text."""

import io
import json
import re
import shutil
import subprocess
import threading
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from src.metrics.console import Progress
from src.metrics.history import RunHistory
from src.metrics.journal import Journal
from src.metrics.report import POLICY, Reporter, main, make_report
from src.metrics.svg_chart import MAX_POINTS, Series, line_chart, nice_ticks, short_number, thin_out

ATTACK = "\"'><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def records(*, epochs: int = 60, name: str = "3fa9c1d2", reason: str = "no group found", run_id: str = "demo") -> list:
    """A run of two trainers with a stall and a failed round in its middle."""
    start = {"event": "start", "time": 1e9, "run_id": run_id, "role": "auxiliary peer", "total_steps": 2 * epochs}
    made = [start]
    for epoch in range(1, epochs + 1):
        time = 1e9 + 20 * epoch + (300 if epoch > epochs // 2 else 0)
        failed = int(epoch == epochs // 2 + 1)
        for peer, samples, computing, sent in ((name, 48, 0.93, 2e6), ("0badcafe", 16, None, 0)):
            made.append({"event": "peer", "time": time, "peer": peer, "epoch": epoch, "samples": samples,
                         "total_samples": epoch * samples, "samples_per_second": samples / 20,
                         "computing": computing, "bytes_sent": int(epoch * sent),
                         "bytes_received": int(epoch * sent / 2), "failed_rounds": failed,
                         "failure": reason if failed else ""})  # fmt: skip
        made.append({"event": "swarm_epoch", "time": time, "epoch": epoch, "loss": 8.5 - epoch / 20,
                     "mlm_loss": 8 - epoch / 20, "sop_loss": 0.5, "samples": 64, "samples_per_second": 3.2,
                     "alive_peers": 2, "failed_rounds": 2 * failed})  # fmt: skip
        if epoch % 10 == 0:
            made.append({"event": "checkpoint", "time": time, "epoch": epoch})
            made.append({"event": "held_out", "time": time, "epoch": epoch, "loss": 8.2 - epoch / 20,
                         "accuracy": epoch / 300, "order_accuracy": 0.625})  # fmt: skip
            made.append({"event": "minimal_pairs", "time": time, "epoch": epoch, "accuracy": 0.5 + epoch / 600,
                         "low": 0.45, "high": 0.65, "num_pairs": 450})  # fmt: skip
    return made


class Page(HTMLParser):
    """Tags with attributes, and the text, of a report."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def text_of(page: str) -> str:
    return " ".join(" ".join(Page(page).text).split())


def test_report_shows_the_figures_of_the_run():
    text = text_of(make_report(RunHistory(records())))
    for figure in ("Run demo", "60 epochs of 120", "5.000 masked-token loss", "5.200 on held-out text, epoch 60",
                   "20% of held-out tokens predicted", "60% of 450 minimal pairs right, epoch 60",
                   "2 trainers", "3.2 samples per second",
                   "20 min left at this pace", "newest checkpoint of epoch 60"):  # fmt: skip
        assert figure in text, figure
    assert "3fa9c1d2 75% 2880 2.4 60 now 93% 120 MB, 60 MB 0 1 0badcafe 25% 960 0.8 60 now 0 1" in text
    assert "320 s without progress before epoch 31 2001-09-09 01:56 UTC no group found" not in text  # 5 min: minutes
    assert "5 min without progress before epoch 31" in text
    assert "2 reports in all" in text


def test_report_draws_what_there_is_and_nothing_else():
    page = make_report(RunHistory(records()))
    titles = re.findall(r"<figcaption>([^<]+)", page)
    assert titles == ["Masked-token loss, nats", "Held-out text: accuracy",
                      "Minimal pairs: share right, with its 95 % interval", "Sentence-order loss, nats",
                      "Seconds per epoch", "Throughput, samples per second", "Trainers"]  # fmt: skip
    trainer = [{"event": "epoch", "time": 10.0, "epoch": 1, "mlm_loss": 4.0, "samples": 8, "num_peers": 1}]
    page = make_report(RunHistory(trainer))
    assert "Held-out" not in page and "Minimal pairs" not in page
    assert "None." in text_of(page)
    assert "this peer 100% 8 0 1 now 0" in text_of(page)
    assert "Run a run" in make_report(RunHistory([]))


def test_report_escapes_what_strangers_wrote():
    page = make_report(RunHistory(records(name=ATTACK, reason=ATTACK, run_id=ATTACK)))
    parsed = Page(page)
    assert {"script", "img", "iframe", "link", "object"}.isdisjoint({tag for tag, _ in parsed.tags})
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert "<script>document.title='owned'" in "".join(parsed.text), "shown as text"
    assert f'content="{POLICY}"' in page


def test_report_loads_nothing():
    page = make_report(RunHistory(records()), refresh_seconds=60)
    assert not re.search(r"https?:|src=|@import|url\(", page)
    assert '<meta http-equiv="refresh" content="60">' in page
    assert "refresh" not in make_report(RunHistory(records()))


def test_report_of_a_long_run_stays_small():
    page = make_report(RunHistory(records(epochs=6000)))
    assert len(page) < 120_000


def test_report_command(tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, records())))
    assert main([str(metrics)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text() == make_report(RunHistory(records()))
    assert main([str(tmp_path / "nothing"), "-o", str(tmp_path / "other.html")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nothing'}: No such file")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.html"}


def test_reporter_writes_now_and_then_and_at_the_end(tmp_path):
    journal, stop, report = Journal(tmp_path / "metrics.jsonl"), threading.Event(), tmp_path / "report.html"
    progress = Progress(io.StringIO())
    reporter = Reporter(journal.path, report, interval=0.01, progress=progress, stop=stop)
    reporter.start()
    for record in records():
        journal.write(**{key: value for key, value in record.items() if key != "time"})
    while not report.exists() or "60 epochs" not in text_of(report.read_text()):
        assert reporter.is_alive()
    assert 'http-equiv="refresh"' in report.read_text()
    stop.set()
    reporter.join(20.0)
    assert 'http-equiv="refresh"' not in report.read_text(), "the run is over"
    assert "no record of a run" in progress.stream.getvalue() or not progress.stream.getvalue()


def test_report_shows_the_memory_of_its_peer():
    uses = [{"event": "memory", "time": 1e9 + 100 * epoch, "epoch": epoch, "measure": "PSS", "main": 900.0 + epoch,
             "dht": 40.0, "p2pd": 30.0, "gradients": 200.0, "parameters": 210.0} for epoch in range(1, 9)]  # fmt: skip
    assert "Memory of this peer" not in make_report(RunHistory(records()))
    page = make_report(RunHistory([*records(), *uses]))
    for part in ("Memory of this peer, MB (PSS)", "main process", "averaging", "DHT and p2pd"):
        assert part in page, part
    attacked = make_report(RunHistory([*records(), {**uses[0], "measure": ATTACK, "main": "text"}]))
    assert "<script>" not in attacked and "Memory of this peer" in attacked


# -- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.1, 3.9, [2, 2.5, 3, 3.5, 4]), (5, 5, [2, 3, 4, 5, 6, 7, 8]), (0, 0, [-0.6, -0.4]),
     (-1e-7, 1e-7, [-1e-7, -5e-8, 0, 5e-8, 1e-7]), (1e6, 9e6, [0, 2e6, 4e6, 6e6, 8e6, 1e7])],
)  # fmt: skip
def test_chart_ticks_are_round_and_span_the_values(low, high, ticks):
    made = nice_ticks(low, high)
    assert made[: len(ticks)] == pytest.approx(ticks)
    assert made[0] <= low and made[-1] >= high
    assert len(made) <= 8


def test_chart_thins_out_to_means_of_neighbours():
    thin = thin_out([(x, float(x)) for x in range(3000)])
    assert len(thin) == MAX_POINTS
    assert thin[0] == (4.5, 4.5)
    assert thin_out([(0, None), (1, 2.0)] * 300)[0] == (0.5, 2.0)
    assert thin_out([(0, 1.0)]) == [(0, 1.0)]


def test_chart_breaks_the_line_where_a_value_is_missing():
    chart = line_chart("title", [Series("s", [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, 1.0)])], x_label="x")
    (path,) = re.findall(r' d="([^"]*)"', chart)
    assert [path.count(letter) for letter in "ML"] == [2, 2]
    assert line_chart("title", [Series("s", [(0, None)])], x_label="x") == ""


def test_chart_puts_points_where_the_axes_say():
    chart = line_chart("t", [Series("s", [(0, 0.0), (10, 10.0)], dots=True)], x_label="x")
    assert re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart) == [("42.0", "180.0"), ("348.0", "10.0")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (12.345, "12.3"),
        (999.6, "1e+03"),
        (1234.5, "1234"),
        (16384, "16.4k"),
        (3e6, "3M"),
        (2e9, "2G"),
    ],
)
def test_chart_numbers_are_short(value, text):
    assert short_number(value) == text


# -- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
const root = document.documentElement, far = [];
for (const e of document.body.querySelectorAll("*")) {
  if (e.getBoundingClientRect().right > innerWidth + 0.5) far.push(e.outerHTML.slice(0, 80));
  if (e.scrollWidth > e.clientWidth + 1 && e.tagName.match(/TD|TH|SECTION|DIV/)) far.push(e.outerHTML.slice(0, 80));
}
const measured = {inner: innerWidth, scroll: root.scrollWidth, far, title: document.title,
  font: Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
  paths: [...document.querySelectorAll("svg path")].filter(p => p.getBoundingClientRect().width > 200).length,
  background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color};
parent.document.documentElement.setAttribute("data-measured", JSON.stringify(measured));
</script></body>"""


def browse(page: Path, folder: Path, *options: str) -> str:
    """The document as Chromium sees it after loading."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={folder / 'profile'}", "--dump-dom", *options, page.as_uri()]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_fits_a_phone_in_chromium(tmp_path, scheme):
    long_reason = "/ip4/203.0.113.5/tcp/31337/p2p/" + "Q" * 120
    page = make_report(RunHistory(records(name="x" * 40, reason=long_reason, run_id="r" * 40)))
    page = page.replace(POLICY, "").replace("</body>", MEASURE)  # the policy would forbid the measuring script, too
    # a window cannot be as narrow as a phone, a frame can
    frame = f'<html><body><iframe width="375" height="812" style="border:0" srcdoc="{escape(page)}"></iframe></body>'
    (tmp_path / "frame.html").write_text(frame)
    wanted = "--blink-settings=preferredColorScheme=" + ("0" if scheme == "dark" else "1")
    document = browse(tmp_path / "frame.html", tmp_path, wanted)
    measured = json.loads(Page(document).tags[0][1]["data-measured"])
    assert measured["inner"] == 375
    assert measured["scroll"] <= 375, measured
    assert measured["far"] == []
    assert measured["font"] >= 9, "tick labels can be read"
    assert measured["paths"] >= 6
    background, color = (sum(map(int, re.findall(r"\d+", measured[name])[:3])) for name in ("background", "color"))
    assert (background < 150 and color > 600) if scheme == "dark" else (background > 600 and color < 150)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_report_policy_stops_scripts_in_chromium(tmp_path):
    page = make_report(RunHistory(records(reason=ATTACK)))
    assert "document.title" in page
    (tmp_path / "report.html").write_text(page.replace("</body>", "<script>document.title='owned'</script></body>"))
    assert "<title>demo: epoch 60</title>" in browse(tmp_path / "report.html", tmp_path)
