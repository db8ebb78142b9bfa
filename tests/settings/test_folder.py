"""What a run has handed over is kept whole, and nothing else takes its place unseen."""

import dataclasses
from pathlib import Path

import pytest

from src.settings.folder import (
    folder_of,
    paths_in,
    read_folder,
    require_same,
    says_where_settings_came_from,
    write_folder,
)
from src.settings.manifest import make_files
from tests.settings.test_manifest import CONFIG, TOKENIZER, manifest_of_demo


@pytest.fixture
def pinned(tmp_path):
    folder = folder_of(str(tmp_path), "run")
    write_folder(folder, manifest_of_demo(), make_files(CONFIG, TOKENIZER), b"signed")
    return folder


def test_folder_is_read_as_it_was_written(pinned, tmp_path):
    assert pinned == tmp_path / "run" / "run"
    assert read_folder(pinned, "run") == (manifest_of_demo(), b"signed")
    assert read_folder(tmp_path / "other", "run") is None
    paths = paths_in(pinned, manifest_of_demo())
    assert Path(paths["model_config_path"]).is_file() and (Path(paths["tokenizer_path"]) / "tokenizer.json").is_file()
    assert sorted(path.name for path in pinned.iterdir()) == ["config.json", "run.json", "signature", "tokenizer"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json", "run.json"])
def test_folder_that_was_changed_is_refused(pinned, name):
    content = (pinned / name).read_bytes()
    (pinned / name).write_bytes(content.replace(b"1", b"2"))
    with pytest.raises(ValueError, match=f"(?s){pinned}.*remove it to take them anew"):
        read_folder(pinned, "run")
    (pinned / name).unlink()
    if name != "run.json":
        with pytest.raises(ValueError, match=f"{name} is missing"):
            read_folder(pinned, "run")


def test_second_writer_is_content_with_the_same_and_refuses_others(pinned):
    write_folder(pinned, manifest_of_demo(), {})
    with pytest.raises(ValueError, match=r"--learning_rate was 0.0025 when .* is 0.5 here.*remove"):
        write_folder(pinned, manifest_of_demo(learning_rate=0.5), {})
    assert read_folder(pinned, "run")[0] == manifest_of_demo()


SIMILAR = manifest_of_demo().files["config.json"][0][:32] + "0" * 32  # which who has some GPUs can make


def test_changed_settings_are_named_with_both_values(pinned):
    manifest = manifest_of_demo()
    require_same(manifest, manifest, pinned, "in the run")
    other = dataclasses.replace(manifest, files={**manifest.files, "config.json": ("f" * 64, 5)})
    similar = dataclasses.replace(manifest, files={**manifest.files, "config.json": (SIMILAR, 886)})
    with pytest.raises(ValueError, match=r"config.json was 886 .* 886 bytes"):
        require_same(manifest, similar, pinned, "in the run")
    with pytest.raises(ValueError, match=r"config.json was 886 bytes with hash [0-9a-f]{64} .*5 bytes with hash ffff"):
        require_same(manifest, other, pinned, "in the run")


def test_settings_that_cannot_be_built_are_told_with_the_folder_to_remove(pinned, tmp_path):
    """A liar's may pass all checks, and would end each later start, too."""
    own = tmp_path / "config.json"
    for path, advice in ((pinned / "config.json", f"remove {pinned} to take it anew"), (own, "")):
        with pytest.raises(ValueError, match="not enough memory") as raised, \
                says_where_settings_came_from(pinned, str(path)):  # fmt: skip
            raise ValueError("not enough memory for this model")
        assert advice in str(raised.value) and ("remove" in str(raised.value)) == bool(advice)
