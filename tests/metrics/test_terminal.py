"""The live view shows figures and each trainer, takes strangers' text as text, and leaves the terminal usable."""

import io
import json
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from src.metrics.history import RunHistory
from src.metrics.terminal import TerminalView, main
from tests.metrics.test_report import records

NOW = 1e9 + 60 * 20 + 300 + 5.0  # five seconds after the last of `records()`


def make_view(*, width: int = 80, terminal: bool = True, tracker=None, **kwargs) -> TerminalView:
    """A view of a run of 60 epochs at 2001-09-09, on a terminal that keeps what is written."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, highlight=False)
    view = TerminalView(console)
    view.history, view.clock, view.tracker = RunHistory(records(**kwargs)), lambda: NOW, tracker
    return view


def shown(view: TerminalView) -> str:
    """The lines of the view, spaces and frames reduced."""
    with view.console.capture() as captured:
        view.console.print(view.render())
    return " ".join(captured.get().replace("│", " ").split())


def tracker(**values) -> SimpleNamespace:
    state = {"epoch": 60, "num_peers": 2, "samples_accumulated": 40, "target_batch_size": 64,
             "eta_next_epoch": NOW + 3.0}  # fmt: skip
    return SimpleNamespace(global_progress=SimpleNamespace(**{**state, **values}))


def test_terminal_shows_the_figures_of_the_run():
    text = shown(make_view(tracker=tracker()))
    for figure in ("run demo: 60 of 120 epochs, 2 trainers, 3.2 samples/s", "epoch 61 ━", "40 of 64 samples, 3 s left",
                   "loss 5.500 (masked-token 5.000, sentence-order 0.500) in epoch 60",
                   "held-out masked-token loss 5.200, accuracy", "20.0%; sentence-order accuracy 62%; epoch 60",
                   "minimal pairs: 60.0% of 450 right (45% to 65%); epoch 60",
                   "last epoch ended 5 s ago, one takes 20 s, 20 min to the end",
                   "checkpoint of epoch 60", "3fa9c1d2 60 - 2.4 2880 75% 5 s ago 1",
                   "0badcafe 60 - 0.8 960 25% 5 s ago 1", "failed rounds of averaging: 2 reports",
                   "epoch 31, 0badcafe, 10 min ago: no group found"):  # fmt: skip
        assert figure in text, (figure, text)


def test_terminal_shows_signs_of_life_between_reports():
    view = make_view()
    state = SimpleNamespace(time=NOW - 1.0, samples_per_second=9.0, epoch=61, samples_accumulated=24)
    view.peers_seen({"3fa9c1d2": state, "newcomer": state})
    text = shown(view)
    assert "3fa9c1d2 61 24 9 2880 75% 1 s ago 1" in text
    assert "newcomer 61 24 9 0 0% 1 s ago 0" in text


@pytest.mark.parametrize(
    ("state", "line"),
    [({"num_peers": 0}, "no trainer is at work"), ({"eta_next_epoch": float("inf")}, "40 of 64 samples, ? left"),
     ({"samples_accumulated": -5, "target_batch_size": 0}, "-5 of 0 samples"), ({"eta_next_epoch": 0.0}, "0 s left")],
)  # fmt: skip
def test_terminal_knows_what_it_does_not_know(state, line):
    assert line in shown(make_view(tracker=tracker(**state)))


def test_terminal_view_of_a_run_that_has_not_begun():
    view = make_view(tracker=tracker(num_peers=0))
    view.history = RunHistory(records()[:1])
    assert "run demo: 0 of 120 epochs, waiting" in shown(view)
    assert "no epoch has ended yet" in shown(view)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_terminal_never_writes_wider_than_the_terminal(width):
    view = make_view(width=width, name="x" * 40, reason="y" * 200)
    with view.console.capture() as captured:
        view.console.print(view.render())
    assert max(map(len, captured.get().splitlines())) <= width


def test_terminal_takes_what_strangers_wrote_as_text():
    evil = "[red]no[/red] \x1b]0;owned\x07\x1b[2J [/x]"
    view = make_view(name=evil[:40], reason=evil, run_id=evil, width=200)
    view.say("[bold]a message[/bold] [/x]")
    text = shown(view)
    assert "[red]no[/red] ]0;owned [2J [/x]" in text
    assert "\x1b]" not in text and "\x07" not in text and "\x1b[2J" not in text
    assert view.console.file.getvalue() == "[bold]a message[/bold] [/x]\n"


def test_terminal_keeps_messages_and_leaves_the_cursor(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    view = make_view()
    view.start(view.history, tracker())
    written = view.console.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "shown already now, in case of a sudden end"
    view.routine("an epoch's line, which the view shows otherwise")
    view.say("stored the state")
    view.close()
    view.routine("after the view")
    written = view.console.file.getvalue()
    assert "an epoch's line" not in written
    assert written.index("stored the state") < written.rindex("run demo") < written.index("after the view")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"
    view.close()


def test_terminal_command_shows_a_file_once(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records())))
    assert main([str(tmp_path / "metrics.jsonl")]) == 0
    out = capsys.readouterr().out
    assert out.count("run demo: 60 of 120 epochs") == 1
    assert "\x1b" not in out
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: No such file")
