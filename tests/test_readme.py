"""What README and docs show works: commands are run where they need nothing, else read by the program they call.

Nothing in a ```bash block may pass unnoticed: a command is run here (RUN), only read by its program (PARSED, with the
reason), found in the Makefile (make), or named in ELSEWHERE with the reason. Commands within sentences are read, too;
Python blocks are executed.
"""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import command_line
from arguments import (
    ArgumentParser,
    AuxiliaryPeerArguments,
    CollaborationArguments,
    HFTrainerArguments,
    TrainerPeerArguments,
)
from src import LeanAlbertConfig, LeanAlbertForPreTraining
from src.access.keys import load_key, public_key_of

REPOSITORY = Path(__file__).resolve().parents[1]
# In the order in which their commands are run; later ones build on what earlier ones made.
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md")), REPOSITORY / "CONTRIBUTING.md"]
SHELL_LANGUAGES, OUTPUT_LANGUAGES = ("bash", "sh", "shell"), ("", "text", "json")
PEERS = {"run_trainer.py": TrainerPeerArguments, "run_aux_peer.py": AuxiliaryPeerArguments}
# Run, in the pages' order, in a folder that holds `stand_ins`; --push is only tried.
RUN = {"tasks.mlm.train_tokenizer", "tasks.mlm.inspect_data", "src.export", "src.models.memory",
       "src.access", "src.metrics.report", "src.metrics.terminal", "src.preflight"}  # fmt: skip
# Commands whose program reads its command line and goes no further here, and why.
PARSED = {
    "run_trainer.py": "works until it is stopped; tests/swarm/test_join.py",
    "run_aux_peer.py": "works until it is stopped; tests/swarm/test_join.py",
    "finetune_mlm.py": "needs the benchmarks' data; tests/tasks/test_finetune_scripts.py",
    "predict_on_lidirus.py": "needs the benchmarks' data; tests/tasks/test_finetune_scripts.py",
    "tasks.submission": "needs predictions of all tasks; tests/tasks/test_submission.py",
    "tasks.rublimp": "needs the benchmark's data; tests/tasks/rublimp/test_experiment.py",
    "tasks.overlap": "needs the benchmarks' data; tests/tasks/test_overlap.py",
    "tasks.training_texts": "needs the benchmarks' data; tests/tasks/test_training_texts.py",
    "benchmarks.run_curve": "needs the records of a run; tests/benchmarks/test_run_curve.py",
    "demo/run_demo.py": "takes minutes", "demo/make_pictures.py": "takes minutes",
    "benchmarks.run_all": "takes minutes", "benchmarks.swarm_on_corpus": "takes minutes",
    "benchmarks.swarm_faults": "takes minutes", "benchmarks.collator": "takes minutes",
    "benchmarks.rublimp_speed": "takes minutes",
    "benchmarks.data_pipeline": "takes minutes", "benchmarks.links": "needs root", "benchmarks.soak": "takes hours",
    "benchmarks.gpu": "needs a GPU; tests/benchmarks/test_gpu.py", "benchmarks.local_steps": "takes minutes",
    "benchmarks.attention": "takes minutes", "benchmarks.encoder": "takes minutes",
    "benchmarks.published_size": "takes half an hour and 20 GB", "benchmarks.recipes": "takes hours",
    "benchmarks.robust_averaging": "takes minutes; tests/benchmarks/test_robust_averaging.py",
    "benchmarks.quantization": "measures; tests/swarm/test_compression.py",
}  # fmt: skip
# First words of commands that are neither run nor parsed here, and why.
ELSEWHERE = {
    "wget": "downloads", "curl": "downloads", "git": "downloads", "pip": "installs", "apt": "installs",
    "sudo": "installs", "source": "activates the environment", "python -m pip": "installs", "tmux": "opens a terminal",
    "python -m venv": "installs", "python -m pytest": "this is it", "ruff": "CI runs it", "mkdir": "of the shell",
    "cd": "of the shell", "cp": "of the shell", "export": "of the shell, see STAND_INS", "for": "of the shell",
    "do": "of the shell", "done": "of the shell", "hf": "talks to the hub", "nvidia-smi": "needs a GPU",
    "jupyter": "tests/test_notebooks.py",
    "xdg-open": "opens a browser", "torchrun": "needs several devices, see tests/trainer/test_local_workers.py",
}  # fmt: skip
# Variables that a reader sets; a value for each, with which commands must parse.
STAND_INS = {
    "MY_IP": "203.0.113.9", "PORT": "31337", "BANDWIDTH": "100",
    "INITIAL_PEERS": "/ip4/203.0.113.5/tcp/12345/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC",
}  # fmt: skip
TOO_LARGE = {"50000": "4000", "32000": "4000", "10000": "4000"}  # pieces, for the texts of `stand_ins`
NEEDS_NETWORK = re.compile(r"yandex/RuLeanALBERT[\"']|hf_hub_download|snapshot_download")


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks; those inside lists lose the list's indentation."""
    blocks, start = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.fullmatch(r"( *)```+ *(\w*)", line)
        if fence and start is None:
            start, indent, language, lines = number, len(fence[1]), fence[2], []
        elif fence:
            blocks.append(Block(page.name, language, start, "\n".join(lines)))
            start = None
        elif start is not None:
            lines.append(line[indent:])
    assert start is None, f"{page.name}:{start}: the block is never closed"
    return blocks


def split_commands(text: str) -> list[list[str]]:
    """The words of every command: lines joined at backslashes, comments dropped, cut at && || | ; and newlines."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\([^)]*\)", "SUBSTITUTED", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                commands += [command] if command else []
                command = []
            else:
                command.append(word)
    return commands


def normalise(words: list[str]) -> list[str]:
    """Without VARIABLE=value before the command; the environment's own python, pip and ruff by their plain names."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if words and words[0] in ("python3", "python", ".venv/bin/python", "/usr/bin/env"):
        words = ["python", *words[1:]]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def substitute(word: str) -> str:
    if word == "ssh-rsa AAAA...":
        return public_key_of(load_key(Path("ivan.key"))).decode()
    word = TOO_LARGE.get(word, word)

    def value(match):
        name = match[1] or match[2]
        assert name in STAND_INS, f"a page uses ${name}: add a value for it to STAND_INS"
        return STAND_INS[name]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, word)


def is_elsewhere(words: list[str]) -> bool:
    return any(words[: len(known.split())] == known.split() for known in ELSEWHERE)


class Parsed(Exception):
    """The program has understood its command line; it need not go on."""


def parse_with_its_program(target: str, words: list[str], monkeypatch) -> None:
    """Start a program or module of this repository, up to the moment when its command line has been parsed."""
    if target in PEERS:
        parser = ArgumentParser(PEERS[target], CollaborationArguments, HFTrainerArguments, prog=target)
        parser.require_own_run(parser.parse(words or ["@demo/trainer.args"])[0])
        return
    for kind in (argparse.ArgumentParser, command_line.ArgumentParser):

        def parse_and_stop(parser, args=None, namespace=None, *, original=kind.parse_args):
            original(parser, args, namespace)
            raise Parsed

        monkeypatch.setattr(kind, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [target, *words])
    with pytest.raises(Parsed):
        if target.endswith(".py"):
            runpy.run_path(str(REPOSITORY / target), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
COMMANDS = [
    (block.where, words)
    for block in BLOCKS
    if block.language in SHELL_LANGUAGES
    for words in map(normalise, split_commands(block.text))
    if words
]
TESTED = [command for command in COMMANDS if not is_elsewhere(command[1])]
WITHIN_SENTENCES = [
    (f"{page.name}:{number}", normalise(shlex.split(code)))
    for page in PAGES
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    for code in re.findall(r"`(python [^`]*)`", line)
]
PAGES_WITH_PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with small versions of what the pages' commands start from."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPOSITORY / "demo", folder / "demo")
    shutil.copytree(REPOSITORY / "demo" / "corpus", folder / "texts")
    for name in ("tokenizer", "my_tokenizer"):
        shutil.copytree(REPOSITORY / "demo" / "tokenizer", folder / name)
    config = LeanAlbertConfig(vocab_size=4000, embedding_size=16, hidden_size=32, num_hidden_layers=1,
                              num_attention_heads=2, intermediate_size=32)  # fmt: skip
    model = LeanAlbertForPreTraining(config)
    model.config.save_pretrained(folder)
    torch.save({"model": model.state_dict()}, folder / "state.pth")
    for run in ("demo", "my-exp", "RUN_ID"):
        checkpoint = folder / "outputs" / run / "aux" / "checkpoint"
        model.save_pretrained(checkpoint)
        shutil.copytree(folder / "tokenizer", checkpoint, dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
        for role in ("aux", "trainer"):
            metrics = folder / "outputs" / run / role / "metrics.jsonl"
            metrics.parent.mkdir(exist_ok=True)
            metrics.write_text(json.dumps({"event": "epoch", "time": 1e9, "epoch": 1, "mlm_loss": 8.0}) + "\n")
    return folder


@pytest.fixture(scope="module")
def ran(stand_ins) -> dict[tuple, tuple[int, str]]:
    """Exit code and output of each command that is run; they build on each other, so all are, in the pages' order.

    What two pages say is run once.
    """
    outcomes, done = {}, {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(stand_ins)
        for where, words in TESTED:
            if is_run(words):
                try:
                    arguments = tuple(found for word in words[1:] for found in expand(substitute(word)))
                    if arguments not in done:
                        done[arguments] = run_check(arguments) if "--check" in words else run_module(arguments)
                    outcomes[where, *words] = done[arguments]
                except Exception as error:  # this command's test fails for it, not those of all others
                    outcomes[where, *words] = 1, repr(error)
        with contextlib.suppress(OSError):  # what the organiser sends
            shutil.copy("access/my-exp/ivan.token", ".")
    return outcomes


def is_run(words: list[str]) -> bool:
    target, *arguments = words[2:] if words[1:2] == ["-m"] else words[1:] or [""]
    return target in RUN or (target in PEERS and arguments == ["--check"])


def run_check(words: tuple[str, ...]) -> tuple[int, str]:
    """A peer's --check, which starts processes, in a process of its own."""
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / words[0]), *words[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    return result.returncode, result.stdout


def run_module(words: tuple[str, ...]) -> tuple[int, str]:
    """``-m MODULE ARGUMENTS`` as if it had been started from a shell."""
    _, module, *arguments = words
    if "--push" in arguments:
        arguments.append("--dry-run")
    said, argv = io.StringIO(), sys.argv
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    return code, said.getvalue()


def parse_command(words: list[str], where: str, monkeypatch, capsys) -> None:
    target, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    assert target in PARSED or target in RUN, f"{where}: run it (RUN), or say in PARSED why it is only read"
    arguments = [found for word in arguments for found in expand(substitute(word))]
    source = REPOSITORY / (target if target.endswith(".py") else target.replace(".", "/"))
    assert source.with_suffix(".py").is_file() or (source / "__main__.py").is_file(), f"{where}: there is no {target}"
    try:
        parse_with_its_program(target, arguments, monkeypatch)
    except SystemExit:
        pytest.fail(f"{where}: {capsys.readouterr().err}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("block", "words"), TESTED, ids=[f"{at}: {' '.join(w)[:60]}" for at, w in TESTED])
def test_command_works(stand_ins, ran, monkeypatch, capsys, block, words):
    monkeypatch.chdir(stand_ins)
    where = f"block at {block}: {' '.join(words)!r}"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{where}: the Makefile has only {targets}"
        return
    assert words[0] == "python" and len(words) > 1, f"{where}: say in ELSEWHERE why this is not tested, or test it"
    if not is_run(words):
        parse_command(words, where, monkeypatch, capsys)
        return
    code, output = ran[block, *words]
    assert code == 0 and output, f"{where}: {output}"


@pytest.mark.parametrize(("place", "words"), WITHIN_SENTENCES, ids=[f"{at}: {w[1:3]}" for at, w in WITHIN_SENTENCES])
def test_command_within_a_sentence_is_understood(stand_ins, monkeypatch, capsys, place, words):
    monkeypatch.chdir(stand_ins)
    parse_command(words, f"{place}: {' '.join(words)!r}", monkeypatch, capsys)


@pytest.mark.timeout(600)
def test_commands_leave_what_they_promise(stand_ins, ran):
    made_files = (
        "my_tokenizer/tokenizer.json", "my-model/model.safetensors", "my-model/README.md",
        "outputs/demo/trainer/report.html", "access/my-exp/organiser.key", "access/my-exp/aux.token",
        "access/my-exp/aux.key", "ivan.key", "access/my-exp/ivan.token", "access/my-exp/revoked.txt",
    )  # fmt: skip
    for made in made_files:
        assert (stand_ins / made).stat().st_size > 0, made
    output = "\n".join(said for _, said in ran.values())
    assert "would send" in output and "largest batch for 4 GB" in output


def expand(word: str) -> list[str]:
    """What the shell makes of a pattern. Quoted ones have lost their quotes, but the programs expand those alike."""
    found = sorted(map(str, Path().glob(word))) if "*" in word and not word.startswith("/") else []
    return found or [word]


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON)
def test_python_of_a_page_runs(stand_ins, ran, monkeypatch, capsys, page):
    """The blocks of a page go on from each other, as one program."""
    monkeypatch.chdir(stand_ins)
    names = {"__name__": "page"}
    for block in BLOCKS:
        if (block.page, block.language) == (page, "python"):
            code = compile(block.text, block.where, "exec")
            if not NEEDS_NETWORK.search(block.text):  # else it compiles; the download is not tried here
                exec(code, names)


def test_blocks_are_of_known_languages():
    assert {block.language for block in BLOCKS} <= {*SHELL_LANGUAGES, *OUTPUT_LANGUAGES, "python"}
    for block in BLOCKS:
        if block.language in OUTPUT_LANGUAGES:
            commands = [
                line for line in block.text.splitlines() if re.match(r"(\.venv/bin/)?(python3?|make|pip) ", line)
            ]
            assert not commands, f"{block.where}: call this block ```bash, so that it is tested"
    assert len(TESTED) >= 40 and PAGES_WITH_PYTHON


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", link):
            continue
        target = page.parent / link if link else page
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append((link, heading))
    assert not broken


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_one_screen_to_success():
    assert (REPOSITORY / "README.md").stat().st_size <= 12_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("make demo    # a comment", [["make", "demo"]]),
        ("OMP_NUM_THREADS=1 .venv/bin/python -m pytest", [["python", "-m", "pytest"]]),
        ("python a \\\n --x 'b c' && ruff x | cat", [["python", "a", "--x", "b c"], ["ruff", "x"], ["cat"]]),
        ("export A=$(curl -s http://x) B=/ip4/1", [["export", "A=SUBSTITUTED", "B=/ip4/1"]]),
    ],
)  # fmt: skip
def test_commands_are_split_as_a_shell_does(text, expected):
    assert [normalise(words) for words in split_commands(text)] == expected
