"""The command that shows what training data look like."""

import re
from pathlib import Path

import pytest

from src.models.tokenizer import load_tokenizer
from tasks.mlm import inspect_data
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

REPOSITORY = Path(__file__).resolve().parents[3]
TOKENIZER_PATH = str(REPOSITORY / "demo" / "tokenizer")


def test_inspect_data_prints_instances_and_figures(capsys):
    arguments = ["--tokenizer_path", TOKENIZER_PATH, "--max_sequence_length", "64", "--num_instances", "3"]
    assert inspect_data.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n[CLS] ") == 3 and "[MASK]{" in printed

    def figure(pattern):
        return float(re.search(pattern, printed)[1])

    assert 14 < figure(r"mask rate: ([\d.]+)%") < 16
    assert 0 <= figure(r"padding: ([\d.]+)%") < 10
    shares = [figure(rf"{name} ([\d.]+)%") for name in ("in order", "swapped", "one sentence")]
    assert abs(sum(shares) - 100) < 0.2 and abs(shares[0] - shares[1]) < 15
    assert figure(r"unknown tokens: ([\d.]+)%") < 1 and figure(r"discarded text: ([\d.]+)%") < 1


def test_rendered_instance_shows_what_is_to_be_predicted():
    tokenizer = load_tokenizer(TOKENIZER_PATH)
    text = "Сегодня мы пойдём в школу, а завтра в театр."
    ids = tokenizer(text)["input_ids"]
    instance = {"input_ids": ids, "token_type_ids": [0] * len(ids), "sentence_order_label": -100}
    other = {"input_ids": ids * 2, "token_type_ids": [0] * len(ids) * 2, "sentence_order_label": -100}
    batch = DataCollatorForWholeWordMask(tokenizer, mlm_probability=0.4, seed=0)([instance, other])
    rendered = inspect_data.render_instance(tokenizer, {name: values[0] for name, values in batch.items()})
    assert "[MASK]{" in rendered and "<pad>" not in rendered
    unmasked = re.sub(r"(\[MASK\]|[^\s{}]*?)\{([^{}]*)\}", r"\2", rendered)
    assert unmasked.replace(" ", "") == f"[CLS]{text}[SEP]".replace(" ", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset_sources", "missing.txt"], "error: missing.txt: no such file"),
        (["--dataset_weights", "1", "2"], "error: 2 dataset weights for 1 dataset sources"),
        (["--max_sequence_length", "3"], "error: max_sequence_length 3 is below 8"),
        (["--batch_size", "0"], "error: --num_instances should be"),
        (["--tokenizer_path", "/missing"], "error: no tokenizer '/missing'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert inspect_data.main(["--tokenizer_path", TOKENIZER_PATH, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and not captured.out


def test_documents_that_are_left_out_are_counted(tmp_path, capsys):
    texts = ['{"text": "Утром мы пошли в лес за грибами. Потом был чай."}'] * 30
    (tmp_path / "a.jsonl").write_text("\n".join([*texts, '{"text": 1}', '{"text": null}', *texts]))
    arguments = ["--dataset_sources", str(tmp_path), "--max_sequence_length", "32", "--num_instances", "0"]
    assert inspect_data.main(arguments) == 0
    assert re.search(
        r"left out: 2 documents that cannot be read, the first .*a\.jsonl, line 3[12]: field", capsys.readouterr().out
    )
