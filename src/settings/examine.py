"""Parse a configuration and a tokenizer that came from outside, first in a process with limits of time and memory.

``python -m src.settings.examine FOLDER`` reads the files of a run and prints what a model of them takes, or what is
wrong with them. Nothing in them is executed or unpickled; but a parser may be led to take hours, gigabytes, or to end
its process, and then it is this one.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from src.models.memory import predict_memory
from src.models.tokenizer import is_of_own_family, load_exactly, read_json
from src.process.memory import available_memory
from src.settings.manifest import CONFIG_FILE, TOKENIZER, read_config

REPOSITORY = Path(__file__).resolve().parents[2]
CPU_SECONDS, PATIENCE_SECONDS = 60, 900.0  # of the parsers; of everything, on a machine that is busy with other things
MEMORY_BYTES = 2**32  # of address space, beside what the libraries take
MAX_REASON = 200
SAMPLE = "Съешь же ещё этих мягких французских булок, да выпей чаю. A lazy dog! 12,345 ёжиков."


def examine(folder: Path, *, cpu_seconds: int = CPU_SECONDS) -> int:
    """Bytes that the parameters of the model and the optimizer's statistics take.

    Raises ValueError, with what is wrong, if the files in a folder are none that this machine can train with."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "src.settings.examine", str(Path(folder).absolute()), str(cpu_seconds)]
    try:
        result = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"its files could not be parsed within {PATIENCE_SECONDS:.0f} s") from error
    if result.returncode == -signal.SIGXCPU:
        raise ValueError(f"parsing its files takes more than {cpu_seconds} s")
    try:
        answer = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise ValueError(f"the process that parsed its files has ended with code {result.returncode}") from error
    if "error" in answer:
        raise ValueError(answer["error"])
    if answer["needed"] > available_memory():
        raise ValueError(
            f"its model needs {answer['needed'] / 1e9:.1f} GB at the least, this machine has "
            f"{available_memory() / 1e9:.1f} GB free"
        )
    return answer["needed"]


def limit_this_process(cpu_seconds: int) -> None:
    """What libraries have taken so far does not count."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def parse(folder: Path) -> int:
    """What `examine` returns. Raises an error of any kind."""
    config = read_config((folder / CONFIG_FILE).read_bytes())
    memory = predict_memory(config, batch_size=0, length=0)
    directory = folder / TOKENIZER
    if directory.exists():
        if not is_of_own_family(directory):
            raise ValueError("its tokenizer is not of a kind that is handed over")
        tokenizer = load_exactly(directory, read_json(directory / "tokenizer_config.json"))
        num_tokens, largest = len(tokenizer), max(tokenizer.get_vocab().values(), default=0)
        if max(num_tokens, largest + 1) > config.vocab_size:
            raise ValueError(
                f"its tokenizer has {num_tokens} tokens, ids up to {largest}, its model {config.vocab_size}"
            )
        if not all(token.isprintable() and len(token) <= MAX_REASON for token in tokenizer.all_special_tokens):
            raise ValueError("its tokenizer has a special token that cannot be printed in a line")
        tokenizer(SAMPLE, SAMPLE)
    return memory.parameters + memory.optimizer


def reason_of(error: BaseException, folder: Path) -> str:
    """In one line that can be printed; without the place, which concerns nobody."""
    lines = str(error).replace(f"{folder}/", "").strip().splitlines() or [type(error).__name__]
    return "".join(letter if letter.isprintable() else "?" for letter in lines[0])[:MAX_REASON]


def main(folder: str, cpu_seconds: str) -> None:
    limit_this_process(int(cpu_seconds))
    try:
        answer = {"needed": parse(Path(folder))}
    except BaseException as error:  # the Rust library's panics are no Exceptions
        answer = {"error": reason_of(error, Path(folder))}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # the limits hold for the interpreter's end, too


if __name__ == "__main__":
    main(*sys.argv[1:])
