"""The auxiliary peer keeps one complete checkpoint, scores and uploads it, and survives a broken network."""

import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi

from src import LeanAlbertForMaskedLM, LeanAlbertForPreTraining, files, load_tokenizer
from src.auxiliary import uploader as uploader_module
from src.auxiliary.assistant import AveragingAssistant
from src.auxiliary.checkpoints import CheckpointNotice, CheckpointStore, thinned
from src.auxiliary.evaluator import Evaluator
from src.auxiliary.uploader import Uploader, make_public
from src.metrics.console import Progress
from src.metrics.journal import Journal, read_journal
from src.metrics.records import Round
from src.swarm.dht import fetch_checkpoint_epochs
from src.version import VERSION
from tests.reference.fake_swarm import FakeDHT, FakeOptimizer, tiny_model
from tests.reference.full_disk import file_size_limit

# -- checkpoints ------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Saves a file, and can be told to fail at it."""

    fail = False

    def save_pretrained(self, folder):
        if self.fail:
            raise OSError("No space left on device")
        (folder / "tokenizer.json").write_text("{}")


def make_store(folder, *, every_epochs=5, **options):
    """A store whose peers are at epoch 7; their parameters are all 0.25."""
    model = tiny_model()
    model.config.sparse_prediction = True
    optimizer = FakeOptimizer(model, epoch=3)
    averager = optimizer.state_averager
    averager.epoch_of_peers, averager.timeouts = 7, []

    @torch.no_grad()
    def download(timeout):
        averager.timeouts.append(timeout)
        if averager.epoch_of_peers is not None:
            for parameter in optimizer.parameters:
                parameter.fill_(0.25)
            averager.local_epoch = averager.epoch_of_peers

    averager.load_state_from_peers = download
    return CheckpointStore(folder / "run" / "checkpoint", model, Tokenizer(), optimizer, run_id="run",
                           every_epochs=every_epochs, **options)  # fmt: skip


def entries(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checkpoint_opens_with_from_pretrained_and_gives_logits_everywhere(tmp_path):
    store = make_store(tmp_path)
    assert store.update(timeout=60.0) == 7
    for kind in (LeanAlbertForPreTraining, LeanAlbertForMaskedLM):
        model, info = kind.from_pretrained(store.path, output_loading_info=True)
        assert model.config.sparse_prediction is False
        assert not info["missing_keys"]
    assert model.config.vocab_size == 300
    for name, parameter in LeanAlbertForPreTraining.from_pretrained(store.path).named_parameters():
        assert bool((parameter == 0.25).all()), name
    assert entries(store.path.parent) == {"checkpoint"}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_checkpoint_may_be_read_by_whoever_may_read_new_files(tmp_path, umask):
    store = make_store(tmp_path)
    before = os.umask(umask)
    try:
        store.update(timeout=60.0)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in store.path.iterdir()} == dict.fromkeys(
        entries(store.path), 0o666 & ~umask
    )


def test_checkpoint_says_its_epoch_and_the_store_goes_on_from_it_after_a_restart(tmp_path):
    make_store(tmp_path).update(timeout=60.0)
    store = make_store(tmp_path, every_epochs=5)
    assert json.loads((store.path / "checkpoint.json").read_text()) == {
        "run_id": "run", "epoch": 7, "version": VERSION,
    }  # fmt: skip
    assert store.last_epoch == 7
    assert [store.is_due(epoch) for epoch in (7, 11, 12)] == [False, False, True]
    assert store.snapshot(tmp_path / "upload") == 7
    LeanAlbertForPreTraining.from_pretrained(store.path)


def test_checkpoint_is_never_replaced_by_an_older_state(tmp_path):
    make_store(tmp_path).update(timeout=60.0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint").iterdir()}
    store = make_store(tmp_path)
    store.optimizer.state_averager.epoch_of_peers = 5
    assert store.update(timeout=60.0) == 5
    assert store.last_epoch == 7
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before


def test_checkpoint_that_does_not_say_its_epoch_is_replaced_by_the_first_new_one(tmp_path):
    store = make_store(tmp_path)
    store.update(timeout=60.0)
    (store.path / "checkpoint.json").unlink()  # as earlier versions wrote it
    store = make_store(tmp_path)
    assert store.last_epoch == 0 and not store.snapshot(tmp_path / "upload")
    assert store.update(timeout=60.0) == 7
    assert store.last_epoch == 7


@pytest.mark.parametrize(
    ("content", "complaint"),
    [('{"run_id": "another", "epoch": 40}', "holds the model of run 'another', epoch 40; choose another directory"),
     ("{", "cannot read"), ("[]", "cannot read"), ('{"run_id": "run"}', "cannot read"),
     ('{"run_id": "run", "epoch": "7"}', "names the epoch '7'"), ('{"run_id": "run", "epoch": -1}', "names the epoch")],
)  # fmt: skip
def test_checkpoint_of_another_run_or_of_no_clear_origin_is_an_error_of_one_line(tmp_path, content, complaint):
    store = make_store(tmp_path)
    store.update(timeout=60.0)
    (store.path / "checkpoint.json").write_text(content)
    with pytest.raises(ValueError, match=complaint) as error:
        make_store(tmp_path)
    assert "--local_path" in str(error.value) and "\n" not in str(error.value)


def test_checkpoint_is_still_there_after_a_kill_in_the_middle_of_a_swap(tmp_path):
    store = make_store(tmp_path)
    store.update(timeout=60.0)
    store.path.rename(store.path.with_name(".checkpoint.old"))
    assert make_store(tmp_path).last_epoch == 7
    assert entries(store.path.parent) == {"checkpoint"}


def test_notice_tells_the_trainers_what_is_stored_and_what_is_new(tmp_path):
    store, dht, stop = make_store(tmp_path), FakeDHT(), threading.Event()
    notice = CheckpointNotice(store, dht, "run", b"key", stop=stop)
    notice.start()
    try:
        wait_until(lambda: fetch_checkpoint_epochs(dht, "run") == {b"key": 0})
        store.update(timeout=60.0)
        wait_until(lambda: fetch_checkpoint_epochs(dht, "run") == {b"key": 7}, timeout=2.0)
    finally:
        stop.set()
        notice.join(10.0)
    assert not notice.is_alive()


def wait_until(condition, *, timeout=10.0) -> None:
    give_up_at = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_checkpoint_holds_the_tokenizer(tmp_path):
    from arguments import DEMO

    store = make_store(tmp_path)
    store.tokenizer = load_tokenizer(DEMO / "tokenizer")
    store.update(timeout=60.0)
    text = "Проверка, ёлка."
    assert load_tokenizer(store.path)(text) == store.tokenizer(text)


def test_checkpoint_on_a_full_disk_raises_the_reason_and_leaves_the_previous_one(tmp_path):
    store = make_store(tmp_path)
    assert store.update(timeout=60.0) == 7
    store.optimizer.state_averager.epoch_of_peers = 9
    with file_size_limit(10_000), pytest.raises(OSError, match="File too large"):
        store.update(timeout=60.0)
    assert store.last_epoch == 7 and entries(store.path.parent) == {"checkpoint"}
    LeanAlbertForPreTraining.from_pretrained(store.path)
    assert store.update(timeout=60.0) == 9


def test_checkpoint_is_due_every_so_many_epochs(tmp_path):
    store = make_store(tmp_path, every_epochs=5)
    assert [store.is_due(epoch) for epoch in (4, 5)] == [False, True]
    store.update(timeout=60.0)  # epoch 7
    assert [store.is_due(epoch) for epoch in (7, 11, 12)] == [False, False, True]


def test_checkpoint_update_leaves_the_assistant_in_the_newer_epoch(tmp_path):
    store = make_store(tmp_path)
    store.optimizer.state_averager.local_epoch = 9
    store.update(timeout=60.0)
    assert store.optimizer.local_epoch == 9
    assert store.last_epoch == 7


def test_checkpoint_swap_shows_a_complete_directory_at_every_step(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    store.update(timeout=60.0)
    store.optimizer.state_averager.epoch_of_peers = 8
    complete, seen = entries(store.path), []
    folder = store.path.parent

    def watched(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.append([p.name for p in folder.iterdir() if entries(p) == complete and p.suffix != ".part"])
            return result

        return call

    monkeypatch.setattr(files.shutil, "rmtree", watched(files.shutil.rmtree))
    monkeypatch.setattr(files, "exchange", watched(files.exchange))
    store.model.save_pretrained = watched(store.model.save_pretrained)
    store.update(timeout=60.0)
    assert len(seen) >= 5
    assert all(seen), seen
    assert seen[-1] == ["checkpoint"]


def test_checkpoint_that_cannot_be_written_leaves_the_previous_one(tmp_path):
    store = make_store(tmp_path)
    store.update(timeout=60.0)
    before = {path.name: path.read_bytes() for path in store.path.iterdir()}
    store.optimizer.state_averager.epoch_of_peers, store.tokenizer.fail = 8, True
    with pytest.raises(OSError, match="No space left"):
        store.update(timeout=60.0)
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    assert store.last_epoch == 7
    store.tokenizer.fail = False
    assert store.update(timeout=60.0) == 8
    assert entries(store.path.parent) == {"checkpoint"}


@pytest.mark.parametrize(("trouble", "complaint"), [("nobody", "no trainer shares its state yet"),
                                                    ("silence", "no answer within 60 s"),
                                                    ("damage", "parameters are not finite")])  # fmt: skip
def test_checkpoint_is_not_replaced_when_the_download_fails(tmp_path, trouble, complaint):
    store = make_store(tmp_path)
    store.update(timeout=60.0)
    averager = store.optimizer.state_averager
    download = averager.load_state_from_peers

    def fail(timeout):
        if trouble == "silence":
            raise TimeoutError
        download(timeout)
        with torch.no_grad():
            store.optimizer.parameters[0].view(-1)[3] = float("nan")

    averager.epoch_of_peers = None if trouble == "nobody" else 8
    if trouble != "nobody":
        averager.load_state_from_peers = fail
    before = {path.name: path.read_bytes() for path in store.path.iterdir()}
    with pytest.raises(ValueError, match=complaint):
        store.update(timeout=60.0)
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    assert store.optimizer.local_epoch >= 7


def test_checkpoint_snapshot_is_not_changed_by_the_next_checkpoint(tmp_path):
    store = make_store(tmp_path)
    assert not store.snapshot(tmp_path / "early")
    store.update(timeout=60.0)
    assert store.snapshot(tmp_path / "upload")
    before = {path.name: path.read_bytes() for path in (tmp_path / "upload").iterdir()}
    assert set(before) == entries(store.path)
    assert os.path.samefile(tmp_path / "upload" / "config.json", store.path / "config.json")
    store.optimizer.state_averager.epoch_of_peers = 8
    (store.path / "config.json").stat()
    store.update(timeout=60.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "upload").iterdir()} == before


# -- uploads ----------------------------------------------------------------------------------------------------------


class FakeHub:
    """Like HfApi; the first ``failures`` uploads fail. ``uploads``: (commit message, file names) of the others."""

    def __init__(self, failures=0):
        self.failures, self.uploads, self.done = failures, [], threading.Event()

    def list_repo_files(self, repo_id):
        return [".gitattributes"]

    def create_repo(self, repo_id, *, exist_ok):
        assert (repo_id, exist_ok) == ("org/name", True)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the hub is away\nand a long story about it")
        self.uploads.append((commit_message, set(os.listdir(folder_path))))
        self.done.set()


def make_uploader(folder, hub, *, interval=0.01, **options):
    store = make_store(folder, **options)
    stop, progress = threading.Event(), Progress(io.StringIO())
    return Uploader(store, "org/name", hub, prepare=lambda folder, epoch: None, interval=interval, progress=progress,
                    stop=stop)  # fmt: skip


def test_uploader_sends_each_checkpoint_once(tmp_path):
    uploader = make_uploader(tmp_path, FakeHub())
    assert uploader.upload(), "nothing to send is no failure"
    uploader.store.update(timeout=60.0)
    assert uploader.upload()
    assert uploader.upload()
    assert uploader.api.uploads == [("Epoch 7", entries(uploader.store.path))]
    uploader.store.optimizer.state_averager.epoch_of_peers = 12
    uploader.store.update(timeout=60.0)
    assert uploader.upload()
    assert [message for message, _ in uploader.api.uploads] == ["Epoch 7", "Epoch 12"]
    assert entries(uploader.store.path.parent) == {"checkpoint"}, "no temporary copy is left"


def test_uploader_tries_again_after_failures_and_reports_them(tmp_path):
    uploader = make_uploader(tmp_path, FakeHub(failures=2))
    uploader.store.update(timeout=60.0)
    uploader.start()
    assert uploader.api.done.wait(10.0)
    uploader.stop.set()
    uploader.join(10.0)
    assert not uploader.is_alive()
    lines = uploader.progress.stream.getvalue().splitlines()
    failed = "upload to org/name failed, will try again: the hub is away"
    assert lines == [failed, failed, "uploaded epoch 7 to org/name"]
    assert entries(uploader.store.path.parent) == {"checkpoint"}


@pytest.mark.parametrize(("interval", "after_success", "after_failure"), [(43_200.0, 43_200.0, 60.0), (5.0, 5.0, 5.0)])
def test_uploader_waits_less_after_a_failure(tmp_path, interval, after_success, after_failure):
    uploader = make_uploader(tmp_path, FakeHub(failures=1), interval=interval)
    uploader.store.update(timeout=60.0)
    waits = []
    uploader._is_stopped_within = lambda seconds: waits.append(seconds) or len(waits) > 2
    uploader.run()
    assert waits == [interval, after_failure, after_success]


def test_uploader_sends_what_is_new_when_the_peer_is_stopped(tmp_path):
    uploader = make_uploader(tmp_path, FakeHub(), interval=43_200.0)
    uploader.store.update(timeout=60.0)
    uploader.start()
    uploader.stop.set()
    uploader.join(10.0)
    assert not uploader.is_alive()
    assert [message for message, _ in uploader.api.uploads] == ["Epoch 7"]
    assert uploader.progress.stream.getvalue().splitlines() == [
        "uploading epoch 7 to org/name before leaving", "uploaded epoch 7 to org/name",
    ]  # fmt: skip
    uploader.say_what_is_missing()
    assert len(uploader.progress.stream.getvalue().splitlines()) == 2, "nothing is missing"


def test_uploader_that_fails_at_the_end_says_where_the_checkpoint_is(tmp_path):
    uploader = make_uploader(tmp_path, FakeHub(failures=1), interval=43_200.0)
    uploader.store.update(timeout=60.0)
    uploader.stop.set()
    uploader.run()
    last = uploader.progress.stream.getvalue().splitlines()[-1]
    assert last == f"upload to org/name failed, epoch 7 is in {uploader.store.path} only: the hub is away"


def test_uploader_that_has_no_time_left_says_so(tmp_path):
    hub, goes_on = FakeHub(), threading.Event()
    uploader = make_uploader(tmp_path, hub, interval=43_200.0)
    hub.upload_folder = lambda **kwargs: goes_on.wait(30.0)
    uploader.store.update(timeout=60.0)
    uploader.start()
    uploader.stop.set()
    try:
        uploader.join(0.5)
        uploader.say_what_is_missing()
    finally:
        goes_on.set()
        uploader.join(10.0)
    assert "no time left: epoch 7 is not uploaded to org/name; it is in" in uploader.progress.stream.getvalue()


def test_uploader_gives_up_an_attempt_that_does_not_end_and_makes_another(tmp_path, monkeypatch):
    monkeypatch.setattr(uploader_module, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(uploader_module, "SLOW_UPLINK", 1e12)
    hub, goes_on = FakeHub(), threading.Event()
    uploader, upload_folder = make_uploader(tmp_path, hub), hub.upload_folder
    uploader.store.update(timeout=60.0)
    hub.upload_folder = lambda **kwargs: goes_on.wait(30.0)
    try:
        assert not uploader.upload()
        hub.upload_folder = upload_folder
        assert uploader.upload() and not uploader.is_behind
    finally:
        goes_on.set()
    failed = "upload to org/name failed, will try again: not finished within 0 s"
    assert uploader.progress.stream.getvalue().splitlines() == [failed, "uploaded epoch 7 to org/name"]


def test_uploader_mentions_once_what_the_repository_holds_besides(tmp_path):
    uploader = make_uploader(tmp_path, FakeHub())
    uploader.api.list_repo_files = lambda repo_id: [".gitattributes", "config.json", "README.md", "old.bin"]
    for epoch in (7, 12):
        uploader.store.optimizer.state_averager.epoch_of_peers = epoch
        uploader.store.update(timeout=60.0)
        assert uploader.upload()
    assert uploader.progress.stream.getvalue().splitlines() == [
        "org/name holds other files, which stay there: README.md, old.bin",
        "org/name holds a README.md, which is replaced; its history keeps it",
        "uploaded epoch 7 to org/name", "uploaded epoch 12 to org/name",
    ]  # fmt: skip


@pytest.mark.timeout(200)
def test_upload_opens_without_this_repository_and_has_a_card_while_the_checkpoint_stays_as_it_is(tmp_path):
    from arguments import DEMO

    store = make_store(tmp_path)
    store.tokenizer = load_tokenizer(DEMO / "tokenizer")
    store.update(timeout=60.0)
    before = {path.name: path.read_bytes() for path in store.path.iterdir()}
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "start", "arguments": {"seed": 3}}\ntorn\n{"event": "swarm_epoch", "epoch": 7, "mlm_loss": 6.5}\n'
    )
    epoch = store.snapshot(tmp_path / "upload")
    make_public(tmp_path / "upload", epoch, store=store, name="org/name", metrics=tmp_path / "metrics.jsonl")
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    assert os.path.samefile(tmp_path / "upload" / "model.safetensors", store.path / "model.safetensors")
    card = (tmp_path / "upload" / "README.md").read_text()
    assert "epoch 7 of the run `run`" in card and "| 7 | 6.500 |" in card and 'name = "org/name"' in card
    assert (tmp_path / "upload" / "learning_curve.svg").is_file()
    program = (
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        "model = AutoModelForMaskedLM.from_pretrained('upload', trust_remote_code=True)\n"
        "print(model.config.vocab_size, *AutoTokenizer.from_pretrained('upload', trust_remote_code=True)('Ёж').keys())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, env=environment, capture_output=True,
                            text=True, timeout=180)  # fmt: skip
    assert result.stdout == "300 input_ids token_type_ids attention_mask\n", result.stderr[-2000:]


def test_uploader_in_a_hurry_does_not_wait_for_its_interval(tmp_path):
    uploader = make_uploader(tmp_path, FakeHub(failures=1), interval=43_200.0)
    uploader.store.update(timeout=60.0)
    uploader.start()
    try:
        uploader.hurry()
        wait_until(lambda: uploader.tried_epoch == 7)
        assert uploader.is_behind and uploader.api.uploads == []
        uploader.hurry()
        assert uploader.api.done.wait(10.0)
    finally:
        uploader.stop.set()
        uploader.join(10.0)
    assert not uploader.is_behind


def test_uploader_survives_errors_that_say_nothing_and_files_that_vanish(tmp_path, monkeypatch):
    uploader = make_uploader(tmp_path, FakeHub())
    uploader.store.update(timeout=60.0)
    monkeypatch.setattr(uploader.api, "create_repo", lambda *args, **kwargs: (_ for _ in ()).throw(KeyError()))
    assert not uploader.upload()
    monkeypatch.setattr(uploader.store, "snapshot", lambda folder: (_ for _ in ()).throw(FileNotFoundError("gone")))
    assert not uploader.upload()
    assert "KeyError()" in uploader.progress.stream.getvalue()
    assert "gone" in uploader.progress.stream.getvalue()


def test_uploader_does_not_hold_up_checkpoints_or_the_end_of_the_program(tmp_path):
    hub, store_again = FakeHub(), threading.Event()
    uploader = make_uploader(tmp_path, hub)
    started = threading.Event()
    hub.upload_folder = lambda **kwargs: started.set() or store_again.wait(30.0)
    uploader.store.update(timeout=60.0)
    uploader.start()
    try:
        assert started.wait(10.0)
        uploader.store.optimizer.state_averager.epoch_of_peers = 12
        assert uploader.store.update(timeout=60.0) == 12, "while the upload hangs"
        assert uploader.daemon
    finally:
        store_again.set()
        uploader.stop.set()
        uploader.join(10.0)


# -- checkpoints that are kept -----------------------------------------------------------------------------------------


def store_epochs(store, epochs):
    for epoch in epochs:
        store.optimizer.state_averager.epoch_of_peers = epoch
        store.update(timeout=60.0)


def test_kept_checkpoints_are_spread_over_the_run_and_open_as_the_newest_does(tmp_path):
    store = make_store(tmp_path, keep=3)
    store_epochs(store, [2, 4, 6, 8, 10])
    kept = store.path.with_name("checkpoint-epochs")
    assert entries(store.path.parent) == {"checkpoint", "checkpoint-epochs"}
    assert entries(kept) == {"epoch-2", "epoch-6", "epoch-10"}
    newest, weights = kept / "epoch-10", "model.safetensors"
    assert (newest / weights).samefile(store.path / weights), "the newest takes no space of its own"
    LeanAlbertForPreTraining.from_pretrained(kept / "epoch-2")
    again = make_store(tmp_path, keep=2)  # a peer that is started again, which is to keep fewer
    store_epochs(again, [12])
    assert entries(kept) == {"epoch-2", "epoch-12"}


@pytest.mark.parametrize(("keep", "num_epochs"), [(1, 9), (2, 9), (5, 60), (10, 100)])
def test_thinning_out_keeps_the_first_and_the_newest_and_leaves_no_large_gap(keep, num_epochs):
    kept = []
    for epoch in range(1, num_epochs + 1):
        kept = thinned([*kept, epoch], keep)
    assert len(kept) == keep and kept[-1] == num_epochs
    if keep > 1:
        gaps = [after - before for before, after in itertools.pairwise(kept)]
        assert kept[0] == 1 and max(gaps) <= 3 * (num_epochs - 1) / (keep - 1)


def test_nothing_of_others_is_taken_for_a_kept_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoint-epochs" / "thesis").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint-epochs holds thesis"):
        make_store(tmp_path, keep=2)
    make_store(tmp_path)


def test_checkpoint_that_cannot_be_kept_is_stored_all_the_same(tmp_path, monkeypatch, caplog):
    store = make_store(tmp_path, keep=2)
    monkeypatch.setattr(os, "link", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no space left")))
    store_epochs(store, [7])
    assert store.last_epoch == 7 and "epoch 7 is stored, but cannot be kept" in caplog.text


def test_uploads_of_kept_checkpoints_are_tagged_and_a_tag_that_fails_is_said(tmp_path):
    api = create_autospec(HfApi, instance=True)
    api.upload_folder.return_value.oid, api.list_repo_files.return_value = "abc123", []
    uploader = make_uploader(tmp_path, api, keep=2)
    store_epochs(uploader.store, [7])
    assert uploader.upload()
    api.create_tag.assert_called_once_with("org/name", tag="epoch-7", revision="abc123", exist_ok=True)
    assert uploader.progress.stream.getvalue().splitlines() == ["uploaded epoch 7 to org/name"]
    api.create_tag.side_effect = ConnectionError("the hub is away")
    store_epochs(uploader.store, [8])
    assert uploader.upload() and not uploader.is_behind
    assert "epoch 8 is uploaded as revision abc123, but could not be tagged" in uploader.progress.stream.getvalue()
    untagged = make_uploader(tmp_path / "other", api)
    store_epochs(untagged.store, [7])
    assert untagged.upload() and api.create_tag.call_count == 2


# -- held-out scores --------------------------------------------------------------------------------------------------

SCORES = {"loss": 4.5, "accuracy": 0.25, "order_accuracy": 0.5}


def make_evaluator(folder, evaluate):
    progress, stop = Progress(io.StringIO()), threading.Event()
    journal = Journal(folder / "metrics.jsonl")
    return Evaluator(make_store(folder), evaluate, margin=0.1, journal=journal, progress=progress, stop=stop)


def test_evaluator_scores_each_checkpoint_once_beside_the_next_one(tmp_path):
    opened, evaluator = [], None

    def evaluate(folder):
        evaluator.store.optimizer.state_averager.epoch_of_peers = 12
        assert len(opened) or evaluator.store.update(timeout=60.0) == 12, "a new checkpoint while one is scored"
        opened.append(LeanAlbertForPreTraining.from_pretrained(folder).config.vocab_size)
        if len(opened) == 2:
            evaluator.stop.set()
        return SCORES

    evaluator = make_evaluator(tmp_path, evaluate)
    evaluator.store.update(timeout=60.0)
    scored, write = [], evaluator.journal.write
    evaluator.journal.write = lambda *args, **kwargs: scored.append(evaluator.scored_epoch) or write(*args, **kwargs)
    evaluator.start()
    evaluator.join(20.0)
    assert scored == [0, 7] and evaluator.scored_epoch == 12, "scored means that the scores are there"
    assert not evaluator.is_alive()
    records = read_journal(tmp_path / "metrics.jsonl")
    assert [(r["event"], r["epoch"], r["loss"], r["order_accuracy"]) for r in records] == [
        ("held_out", 7, 4.5, 0.5), ("held_out", 12, 4.5, 0.5),
    ]  # fmt: skip
    assert opened == [300, 300]
    line = "epoch 7 on held-out text: masked-token loss 4.500, accuracy 25.0%; sentence-order accuracy 50.0%"
    assert evaluator.progress.stream.getvalue().splitlines()[0] == line
    assert entries(evaluator.store.path.parent) == {"checkpoint", "checkpoint-best"}


def test_evaluator_says_nothing_of_an_order_that_is_not_trained(tmp_path):
    evaluator = make_evaluator(tmp_path, lambda folder: {**SCORES, "order_accuracy": None})
    evaluator.store.update(timeout=60.0)
    evaluator.score()
    line = "epoch 7 on held-out text: masked-token loss 4.500, accuracy 25.0%\n"
    assert evaluator.progress.stream.getvalue() == line


def test_evaluator_goes_on_after_an_error(tmp_path):
    evaluator = make_evaluator(tmp_path, lambda folder: (_ for _ in ()).throw(OSError("no space left")))
    evaluator.store.update(timeout=60.0)
    evaluator.score()
    assert evaluator.scored_epoch == 7, "it is not tried again and again"
    assert "no held-out scores for epoch 7: no space left" in evaluator.progress.stream.getvalue()
    assert read_journal(tmp_path / "metrics.jsonl") == []
    evaluator.store.optimizer.state_averager.epoch_of_peers, evaluator.evaluate = 12, lambda folder: SCORES
    evaluator.store.update(timeout=60.0)
    evaluator.score()
    assert [record["epoch"] for record in read_journal(tmp_path / "metrics.jsonl")] == [12]


PAIR_SCORES = {"accuracy": 0.625, "low": 0.5, "high": 0.75, "syntax": 0.7, "num_pairs": 380, "num_paradigms": 38}


def test_evaluator_tells_of_minimal_pairs_alone_or_with_held_out_text_and_one_does_not_cost_the_other(tmp_path):
    evaluator = make_evaluator(tmp_path, None)
    evaluator.judge_pairs = lambda folder: PAIR_SCORES if (folder / "config.json").is_file() else None
    evaluator.store.update(timeout=60.0)
    evaluator.score()
    (record,) = read_journal(tmp_path / "metrics.jsonl")
    assert (record["event"], record["epoch"]) == ("minimal_pairs", 7) and PAIR_SCORES.items() <= record.items()
    line = "epoch 7 on minimal pairs: 62.5% of 380 right (95 % interval 50.0% to 75.0%; chance 50 %)"
    assert evaluator.progress.stream.getvalue() == f"{line}\n"

    def fail(folder):
        raise OSError("no space left")

    evaluator.evaluate = fail
    evaluator.score()
    evaluator.evaluate, evaluator.judge_pairs = lambda folder: SCORES, fail
    evaluator.score()
    events = [record["event"] for record in read_journal(tmp_path / "metrics.jsonl")]
    assert events == ["minimal_pairs", "minimal_pairs", "held_out"]
    said = evaluator.progress.stream.getvalue()
    assert "no held-out scores for epoch 7: no space" in said and "no scores on minimal pairs for epoch 7: no s" in said


def score(evaluator, *, epoch: int, loss: float) -> str:
    """Stores and scores the state of an epoch; returns what was said about it, beside the scores."""
    evaluator.store.optimizer.state_averager.epoch_of_peers = epoch
    evaluator.evaluate = lambda folder: {**SCORES, "loss": loss}
    evaluator.store.every_epochs = 1
    evaluator.store.update(timeout=60.0)
    said = len(evaluator.progress.stream.getvalue())
    evaluator.score()
    return evaluator.progress.stream.getvalue()[said:].partition("\n")[2]


def kept_epoch(evaluator) -> int:
    LeanAlbertForPreTraining.from_pretrained(evaluator.best_path)
    return json.loads((evaluator.best_path / "checkpoint.json").read_text())["epoch"]


def test_evaluator_says_when_a_checkpoint_is_worse_than_the_best_and_keeps_that_one(tmp_path):
    evaluator = make_evaluator(tmp_path, None)
    assert score(evaluator, epoch=7, loss=4.5) == "" and kept_epoch(evaluator) == 7
    assert score(evaluator, epoch=8, loss=4.0) == "" and kept_epoch(evaluator) == 8
    assert score(evaluator, epoch=9, loss=4.1) == "", "no more than the margin"
    worse = score(evaluator, epoch=10, loss=4.25)
    kept = f"kept in {evaluator.best_path} (--eval_margin 0.1)"
    assert f"epoch 10 is 0.250 above the best, 4.000 at epoch 8, {kept}" in worse and kept_epoch(evaluator) == 8
    assert "epoch 11 is nan above the best" in score(evaluator, epoch=11, loss=float("nan"))
    # a peer that is started again knows what was best
    again = make_evaluator(tmp_path, None)
    assert "best, 4.000 at epoch 8" in score(again, epoch=12, loss=4.2)
    assert score(again, epoch=13, loss=3.9) == "" and kept_epoch(again) == 13


def test_evaluator_replaces_nobodys_directory(tmp_path):
    (tmp_path / "run" / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-best" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="checkpoint-best"):
        make_evaluator(tmp_path, None)


# -- help with averaging ----------------------------------------------------------------------------------------------


def make_assistant(folder, *, num_peers, epoch_of_peers):
    optimizer = FakeOptimizer(tiny_model())
    optimizer.tracker.global_progress.num_peers, optimizer.tracker.global_epoch = num_peers, epoch_of_peers
    optimizer.assist = lambda: optimizer.steps.append("assisted")
    journal = Journal(folder / "metrics.jsonl")
    return AveragingAssistant(optimizer, journal, period=0.01, stop=threading.Event())


@pytest.mark.parametrize(("num_peers", "assists"), [(2, 1), (1, 0), (0, 0)])
def test_assistant_helps_when_there_are_trainers_to_average(tmp_path, num_peers, assists):
    assistant = make_assistant(tmp_path, num_peers=num_peers, epoch_of_peers=5)
    assistant.optimizer.rounds = [Round("gradients", 1.0, 3, 1.0)]
    assistant.assist()
    assert len(assistant.optimizer.steps) == assists
    (record,) = read_journal(tmp_path / "metrics.jsonl")
    assert (record["event"], record["epoch"], record["kind"]) == ("round", 5, "gradients") and record["complete"]


def test_assistant_goes_on_after_an_error(tmp_path, caplog):
    assistant = make_assistant(tmp_path, num_peers=2, epoch_of_peers=5)
    calls = []

    def assist():
        calls.append("assist")
        if len(calls) == 1:
            raise RuntimeError("a round went wrong")
        assistant.stop.set()

    assistant.optimizer.assist = assist
    assistant.start()
    assistant.join(10.0)
    assert len(calls) == 2
    assert "a round went wrong" in caplog.text
