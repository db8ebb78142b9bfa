"""Uploads by the real client to a stand-in of the hub that refuses, breaks off or falls silent at each step."""

import json

import pytest
from huggingface_hub import HfApi, close_session, constants

from src.models.hub import give_up_on_silence
from tests.auxiliary.test_auxiliary import entries, make_uploader
from tests.reference.hub import TOKEN, start_hub

CREATE, SEND, COMMIT = "POST /api/repos/create", "PUT /lfs-put", "POST .*/commit/"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with start_hub(tmp_path) as server:
        give_up_on_silence(1.0)
        yield server
        close_session()
        give_up_on_silence()


@pytest.fixture
def uploader(tmp_path, hub):
    """Its checkpoint of epoch 7 is to go to a repository that does not exist yet."""
    uploader = make_uploader(tmp_path, HfApi(endpoint=hub.address, token=TOKEN))
    uploader.repo_id = "me/run"
    uploader.store.update(timeout=60.0)
    return uploader


def files_of_run(hub) -> dict[str, bytes]:
    (*_, last) = json.loads((hub.root / "repos.json").read_text())["models/me/run"]["commits"]
    assert last["title"] == "Epoch 7"
    return {name: (hub.root / "blobs" / blob).read_bytes() for name, blob in last["files"].items()}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (f"403 {CREATE}", "403: Forbidden: you don't have the right to access this; take a token that is allowed to"),
        (f"403 {COMMIT}", "403: Forbidden"),
        (f"hang:20 {CREATE}", "does not answer: nothing moved for 1 s"),
        (f"hang:20 {SEND}", "does not answer: nothing moved for 1 s"),
        (f"hang:20 {COMMIT}", "does not answer: nothing moved for 1 s"),
    ],
)
def test_upload_that_fails_says_why_in_one_line_and_succeeds_when_the_hub_is_well_again(hub, uploader, fault, reason):
    hub.fail(fault)
    assert not uploader.upload() and uploader.is_behind
    (line,) = uploader.progress.stream.getvalue().splitlines()
    assert line.startswith("upload to me/run failed, will try again: ") and reason in line
    assert entries(uploader.store.path.parent) == {"checkpoint"}, "no temporary copy is left"
    hub.fail("ok")
    assert uploader.upload() and not uploader.is_behind
    assert uploader.progress.stream.getvalue().splitlines()[-1] == "uploaded epoch 7 to me/run"
    uploaded = files_of_run(hub)
    for path in uploader.store.path.iterdir():
        assert uploaded[path.name] == path.read_bytes(), path.name


def test_upload_over_a_slow_line_is_not_given_up(hub, uploader):
    size = (uploader.store.path / "model.safetensors").stat().st_size
    hub.fail(f"slow:{size // 3} {SEND}")  # three seconds, three times as long as a hub may be silent
    assert uploader.upload()
    assert uploader.progress.stream.getvalue().splitlines() == ["uploaded epoch 7 to me/run"]
    assert "model.safetensors" in files_of_run(hub)
