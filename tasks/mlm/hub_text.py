"""Streamed data sets of the Hugging Face hub, which may be in trouble for a while."""

import copy
import itertools
import logging
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from src.models.hub import explain_hub_error, give_up_on_silence
from tasks.mlm.text_errors import LeftOut, TextError, first_line
from tasks.mlm.text_files import parse_value

logger = logging.getLogger(__name__)


MAX_SKIPPED_DOCUMENTS = 10_000  # of a streamed dataset that has but one shard
HUB_PATIENCE_SECONDS = 600.0  # how long a hub that does not answer is asked again
MAX_HUB_WAIT_SECONDS = 30.0
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(@(?P<commit>[0-9a-f]{40}))?")


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if it has one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: the server is in trouble or the connection broke, but it did not refuse."""
    from huggingface_hub.utils import httpx

    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 425, 429)
    while error is not None:
        is_aiohttp = type(error).__module__.startswith("aiohttp")  # its errors have no common base that is not its own
        if is_aiohttp or isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return True
        error = error.__cause__ or error.__context__
    return False


class Patience:
    """Waits, longer each time, while a server does not answer; says so once, and gives up after a while."""

    def __init__(self, name: str):
        self.name = name
        self._began: float | None = None
        self._wait = 1.0

    def succeeded(self) -> None:
        if self._began is not None:
            logger.warning("%s: the hub answers again", self.name)
            self._began, self._wait = None, 1.0

    def wait(self, error: Exception) -> None:
        """Raises TextError when there is no use in waiting (any more)."""
        now = time.monotonic()
        if not may_pass(error):
            raise TextError(
                f"{self.name}: the hub refused or sent something unreadable ({reason_of(error)})"
            ) from error
        if self._began is None:
            self._began = now
            logger.warning(
                "%s: the hub does not answer (%s); trying again for %.0f minutes",
                self.name,
                reason_of(error),
                HUB_PATIENCE_SECONDS / 60,
            )
        elif now - self._began > HUB_PATIENCE_SECONDS:
            raise TextError(
                f"{self.name}: the hub has not answered for {now - self._began:.0f} s ({reason_of(error)})"
            ) from error
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, MAX_HUB_WAIT_SECONDS)


def reason_of(error: BaseException) -> str:
    """What an error says, short: the first line that is not a number of the hub's own; addresses may be very long."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    status = status_of(error)
    kind = type(error).__name__ if status is None else f"HTTP {status}"
    return f"{kind}: {lines[0].partition(' (Request ID')[0].strip()}"[:200] if lines else kind


class HubDataset:
    """Documents in the column "text" of a Hugging Face dataset's split "train", streamed."""

    def __init__(self, name: str, dataset):
        self.name = name
        self.left_out = LeftOut(name)
        self.dataset = dataset
        if dataset.features is not None and "text" not in dataset.features:
            raise ValueError(f'{name}: no column "text" (found: {", ".join(dataset.features)[:80]})')

    def read(self, *, seed: int | None, worker: int, num_workers: int, position) -> Iterator[tuple[str, dict]]:
        """(document, position after it) of one pass, in an order of the dataset's own shards given by the seed.

        A dataset of a single shard begins at one of its first MAX_SKIPPED_DOCUMENTS instead, and wraps around. While
        the hub does not answer, this waits and then goes on where it was. TextError when it refuses.
        """
        patience = Patience(self.name)
        while True:
            try:
                for text, new_position in self._read(seed, worker, num_workers, position):
                    patience.succeeded()
                    position = new_position
                    yield text, position
                return
            except TextError:
                raise
            except Exception as error:  # the library lets errors of every kind through: network, hub, parser
                patience.wait(error)

    def _read(self, seed: int | None, worker: int, num_workers: int, position) -> Iterator[tuple[str, dict]]:
        num_skipped = (
            random.Random(seed).randrange(MAX_SKIPPED_DOCUMENTS)
            if seed is not None and self.dataset.num_shards == 1
            else 0
        )
        position = position or {"pass": 0, "number": num_skipped, "dataset": None}
        for current_pass in range(position["pass"], 2 if num_skipped else 1):
            dataset, number = self._open_pass(seed, num_skipped, current_pass)
            if current_pass == position["pass"] and position["dataset"] is not None:
                number = position["number"]
                dataset.load_state_dict(position["dataset"])
            # .iter, not iter(): the latter deals the shards out to DataLoader workers itself and may leave some none
            for batch in dataset.iter(batch_size=1):
                if current_pass and number == num_skipped:
                    return
                if "text" not in batch:
                    raise TextError(f'{self.name}: no column "text" (found: {", ".join(batch)[:80]})')
                number += 1
                if (number - 1) % num_workers != worker:
                    continue
                text = self._parse(number - 1, batch["text"][0])
                if text.strip():
                    yield text, {"pass": current_pass, "number": number, "dataset": dataset.state_dict()}

    def _parse(self, number: int, value) -> str:
        self.left_out.num_read += 1
        try:
            return parse_value(number, value)
        except ValueError as error:
            self.left_out.add((number,), str(error), f"{self.name}, document {number}".__str__)
            return ""

    def _open_pass(self, seed: int | None, num_skipped: int, current_pass: int):
        """The dataset, in the first pass without the skipped documents, and the number of its first document."""
        if num_skipped and current_pass == 0:
            return self.dataset.skip(num_skipped), num_skipped
        from huggingface_hub import HfFileSystem

        # copy.copy shares a dataset's whole state, __setstate__ sees to that. What is not to be copied is the cache of
        # connections that it holds: each thread and process has its own there, and copying adds them while it copies.
        connections = HfFileSystem._cache
        dataset = copy.deepcopy(self.dataset, {id(connections): connections})
        if seed is not None:
            dataset.set_epoch(seed % 2**31 + 1)  # an epoch other than 0 shuffles the shards, and no example is buffered
        return dataset, 0


def require_own_files(data_files: Mapping[str, Sequence[str]] | None, name: str, commit: str) -> None:
    """Raises ValueError if a data set is anything but files of its own at that commit.

    Its page may name any others: some of this machine, which are nobody's business, or of an address where they change.
    Without the hub, the library would take another version of it from its cache (``data_files`` is None).
    """
    if not data_files:
        raise ValueError(f"its files at commit {commit} are not to be had")
    for file in itertools.chain.from_iterable(data_files.values()):
        if not file.rpartition("::")[2].startswith(f"hf://datasets/{name}@{commit}/"):
            raise ValueError(f"it names a file that is not its own: {file[:100]!r}")


def load_hub_dataset(source: str) -> HubDataset:
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise ValueError(
            f"{source!r}: no such file, and not a Hugging Face dataset either (name, name:config, name:config@commit)"
        )
    if match["commit"] and Path(match["name"]).exists():  # the library would read that; others may have named it
        raise ValueError(f"{source}: there is a local {match['name']} here, not that commit; start this elsewhere")
    import datasets

    give_up_on_silence()
    try:
        builder = datasets.load_dataset_builder(match["name"], match["config"], revision=match["commit"])
        if match["commit"]:
            require_own_files(builder.config.data_files, match["name"], match["commit"])
        dataset = builder.as_streaming_dataset(split="train")
    except Exception as error:  # the library lets errors of every kind through: network, hub, script, parser
        if configurations := re.search(r"available configs: \[(.*?)\]", str(error)):
            names = ", ".join(f"{match['name']}:{name.strip(' ')[1:-1]}" for name in configurations[1].split(","))
            raise ValueError(f"{source}: has several configurations; pass one of them: {names}") from error
        if status_of(error) is not None or may_pass(error):  # it is the hub: the library's own words hide what it said
            reason, advice = explain_hub_error(error)
            raise ValueError(
                f"{source}: no local file, and the hub does not give such a dataset ({reason}); {advice}"
            ) from error
        reason = first_line(error)
        raise ValueError(f"{source}: neither a local file nor a Hugging Face dataset that loads ({reason})") from error
    return HubDataset(source, dataset)
