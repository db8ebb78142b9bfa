"""Bad input of every kind for the four scripts: code 2, one line that says what, where and what to do, nothing changed.

Each case is one row of the tables below. A script runs in a fork of a program that has imported the libraries already,
in a folder of its own that holds the case's files.
"""

import gzip
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from src import LeanAlbertConfig, LeanAlbertForPreTraining

REPOSITORY = Path(__file__).resolve().parents[1]
PEER_ID = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
UNREACHABLE = f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}"
TOKENIZER = REPOSITORY / "demo" / "tokenizer"
SMALL = (
    "--target_batch_size 8 --matchmaking_time 1 --averaging_timeout 5 --next_chunk_timeout 2 "
    "--max_sequence_length 64 --initial_sequence_length 64 --pad_to_multiple_of 8 --model_config_path small.json "
    "--tokenizer_path @demo/tokenizer "
)
TEXT = "--dataset_sources @demo/corpus/*.txt "
MODEL = {
    "model_type": "lean_albert", "vocab_size": 4000, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
EARLIER = "outputs/r/{}/metrics.jsonl"
CYRILLIC = "Привет, мир. " * 50


@dataclass
class Case:
    """Arguments as in a shell, words that the line must hold, files by name (text, bytes, what writes them, or None:
    one of the usual files is missing)."""

    script: str
    name: str
    arguments: str
    words: tuple[str, ...]
    files: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.script.partition('.')[0]}: {self.name}"


def model(**options) -> dict:
    """A model configuration as the file config.json."""
    return {"config.json": json.dumps({**MODEL, **options})}


def saved(content) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def shortened(write: Callable[[Path], None], length: int) -> Callable[[Path], None]:
    def write_part(path):
        write(path)
        path.write_bytes(path.read_bytes()[:length])

    return write_part


def tokenizer_without(*roles: str) -> dict:
    """The demo's tokenizer in ./tokenizer, whose pipeline does not know the [MASK] or other tokens."""
    pipeline = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    pipeline["added_tokens"] = [token for token in pipeline["added_tokens"] if token["content"] not in roles]
    pipeline["model"]["vocab"] = [
        [f"{piece}x" if piece in roles else piece, score] for piece, score in pipeline["model"]["vocab"]
    ]
    return {"tokenizer/tokenizer.json": json.dumps(pipeline, ensure_ascii=False)}


BACKUP = {"model": {"x": torch.zeros(1000)}, "optimizer": {}, "scheduler": {}, "epoch": 1}
FOREIGN = {**BACKUP, "model": {"albert.foreign.weight": torch.zeros(3)}}
INITIAL = "--run_id r --init_checkpoint"
CONFIG = "--run_id r --model_config_path config.json"
SOURCE = "--run_id r --dataset_sources"


def trainer_cases() -> list[Case]:
    rows = [
        # command line
        ("no run id", "", ("--run_id is missing", "choose any name")),
        ("run id with a slash", "--run_id a/b", ("--run_id 'a/b'", "only letters, digits")),
        ("unknown flag", "--run_id r --learning_rat 1", ("--learning_rat 1", "did you mean --learning_rate")),
        ("unknown switch", "--run_id r --clientmode", ("--clientmode", "did you mean --client_mode")),
        ("no number", "--run_id r --learning_rate much", ("--learning_rate", "'much'")),
        ("infinite number", "--run_id r --learning_rate inf", ("--learning_rate must be positive", "not inf")),
        ("not a number", "--run_id r --target_batch_size nan", ("--target_batch_size", "'nan'")),
        ("half a sample", "--run_id r --per_device_train_batch_size 1.5", ("--per_device_train_batch_size", "'1.5'")),
        ("two precisions", "--run_id r --fp16 --bf16", ("fp16", "bf16")),
        ("long warm-up", "--run_id r --total_steps 10", ("--warmup_steps 3125", "--total_steps 10")),
        ("short timeout", "--run_id r --averaging_timeout 4", ("--averaging_timeout 4.0", "--next_chunk_timeout 2.0")),
        ("no trainers to wait for", "--run_id r --wait_for_peers 0", ("--wait_for_peers must be positive",)),
        ("no vector", "--run_id r --min_vector_size 0", ("--min_vector_size must be positive",)),
        ("negative seed", "--run_id r --seed -1", ("--seed -1", "[0, ")),
        ("negative workers", "--run_id r --dataloader_num_workers -1", ("--dataloader_num_workers -1",)),
        ("momentum above 1", "--run_id r --adam_beta2 1.5", ("--adam_beta2 1.5", "[0, 1)")),
        ("negative decay", "--run_id r --weight_decay -1", ("--weight_decay -1.0", "not be negative")),
        ("no clamp", "--run_id r --clamp_value 0", ("--clamp_value must be positive",)),
        ("file of flags missing", "@missing.args", ("@missing.args", "No such file")),
        ("file of flags is a folder", "@.", ("@.", "directory")),
        ("file of flags names itself", "@loop.args", ("@loop.args", "names itself"), {"loop.args": "@loop.args"}),
        ("file of flags with an open quote", "@open.args", ("@open.args, line 2", "quotation"),
         {"open.args": "--run_id r\n--cache_dir 'x\n"}),
        ("file of flags in another encoding", "@w.args", ("@w.args", "UTF-8"), {"w.args": CYRILLIC.encode("cp1251")}),
        ("sequences without room for words", "--run_id r --max_sequence_length 2 --initial_sequence_length 2",
         ("max_sequence_length 2", "below")),
        # model
        ("no configuration", "--run_id r --model_config_path no.json", ("--model_config_path", "no.json", "no file")),
        ("configuration is a folder", "--run_id r --model_config_path .", ("--model_config_path", "no file")),
        ("configuration is not JSON", CONFIG, ("--model_config_path", "config.json", "line 1"), {"config.json": "{,"}),
        ("configuration is a list", CONFIG, ("--model_config_path", "config.json", "JSON object"),
         {"config.json": "[]"}),
        ("configuration in another encoding", CONFIG, ("--model_config_path", "config.json"),
         {"config.json": CYRILLIC.encode("cp1251")}),
        ("heads do not divide", CONFIG, ("config.json", "num_attention_heads=3", "hidden_size (32)"),
         model(num_attention_heads=3)),
        ("size in words", CONFIG, ("config.json", "hidden_size='big'", "must be"), model(hidden_size="big")),
        ("size is null", CONFIG, ("config.json", "intermediate_size=None", "must be"), model(intermediate_size=None)),
        ("unknown activation", CONFIG, ("config.json", "hidden_act='geluu'"), model(hidden_act="geluu")),
        ("misspelled option", CONFIG, ("config.json", "num_hidden_layer", "did you mean num_hidden_layers"),
         model(num_hidden_layer=3)),
        ("configuration of another family", CONFIG, ("config.json", "model_type", "'bert'"), model(model_type="bert")),
        ("no memory for the model", CONFIG, ("config.json", "memory"), model(hidden_size=2**21, num_attention_heads=2)),
        ("vocabulary too small", CONFIG, ("4000 tokens", "vocab_size", "100"), model(vocab_size=100)),
        ("sequences beyond the positions", CONFIG, ("--max_sequence_length 64", "24"),
         model(position_embedding_type="absolute", max_position_embeddings=24)),
        # tokenizer
        ("no tokenizer", "--run_id r --tokenizer_path ./none", ("tokenizer", "./none", "no such directory")),
        ("tokenizer is a file", "--run_id r --tokenizer_path t.json", ("t.json is a file", "pass the directory"),
         {"t.json": "{}"}),
        ("no vocabulary", "--run_id r --tokenizer_path .", ("no tokenizer in '.'", "tokenizer.json")),
        ("damaged tokenizer", "--run_id r --tokenizer_path t", ("tokenizer.json", "does not describe a tokenizer"),
         {"t/tokenizer.json": '{"version"'}),
        ("damaged special tokens", "--run_id r --tokenizer_path t", ("special_tokens_map.json", "not valid JSON"),
         {"t/special_tokens_map.json": "{", "t/tokenizer.json": (TOKENIZER / "tokenizer.json").read_bytes()}),
        ("tokenizer without a mask", "--run_id r --tokenizer_path tokenizer", ("tokenizer", "mask_token"),
         tokenizer_without("[MASK]")),
        ("tokenizer of the hub without network", "--run_id r --tokenizer_path nobody/nothing",
         ("nobody/nothing", "could not be fetched")),
        # text
        ("no text file", f"{SOURCE} none.txt", ("none.txt", "no such file")),
        ("no file matches", f"{SOURCE} 'none*.txt'", ("none*.txt", "no file matches")),
        ("empty text", f"{SOURCE} e.txt", ("e.txt", "no text"), {"e.txt": "\n\n"}),
        ("text in another encoding", f"{SOURCE} w.txt", ("w.txt", "not UTF-8"), {"w.txt": CYRILLIC.encode("cp1251")}),
        ("unknown kind of file", f"{SOURCE} a.docx", ("a.docx", "cannot read this kind"), {"a.docx": "x"}),
        ("damaged JSON line", f"{SOURCE} a.jsonl", ("a.jsonl, line 1", "not valid JSON"), {"a.jsonl": '{"text": "а\n'}),
        ("no field text", f"{SOURCE} a.jsonl", ("a.jsonl, line 1", 'no field "text"', "body"),
         {"a.jsonl": '{"body": "а"}\n'}),
        ("truncated archive", f"{SOURCE} a.jsonl.gz", ("a.jsonl.gz", "not a complete gzip file"),
         {"a.jsonl.gz": gzip.compress(b'{"text": "abc"}\n' * 99)[:-20]}),
        ("not a parquet file", f"{SOURCE} a.parquet", ("a.parquet", "not a parquet file"), {"a.parquet": "x" * 99}),
        ("data set of the hub without network", f"{SOURCE} nobody/nothing:ru",
         ("nobody/nothing:ru", "no local file", "HF_ENDPOINT")),
        ("two weights for one source", f"{SOURCE} a.txt --dataset_weights 1 2", ("2 dataset weights", "1 dataset so"),
         {"a.txt": CYRILLIC}),
        ("negative weight", f"{SOURCE} a.txt --dataset_weights -1", ("dataset weights", "negative"),
         {"a.txt": CYRILLIC}),
        # backups
        ("truncated backup", "--run_id r --state_path s.pth", ("--state_path", "s.pth", "truncated"),
         {"s.pth": shortened(saved(BACKUP), 2000)}),
        ("backup of another model", "--run_id r --state_path s.pth",
         ("s.pth", "albert.embeddings.word_embeddings.weight", "albert.foreign.weight"), {"s.pth": saved(FOREIGN)}),
        ("no backup", "--run_id r --state_path s.pth", ("--state_path", "s.pth", "lacks"), {"s.pth": saved({"a": 1})}),
        ("backup is text", "--run_id r --state_path s.pth", ("--state_path", "s.pth", "not a backup"),
         {"s.pth": CYRILLIC}),
        ("backup is a folder", "--run_id r --state_path d", ("--state_path", "d", "directory"), {"d/x": ""}),
        # the weights a run begins with
        ("no initial checkpoint", f"{INITIAL} none.pth", ("--init_checkpoint none.pth", "no such file")),
        ("truncated initial checkpoint", f"{INITIAL} s.pth", ("--init_checkpoint s.pth", "truncated"),
         {"s.pth": shortened(saved(BACKUP), 2000)}),
        ("initial checkpoint of another model", f"{INITIAL} s.pth",
         ("--init_checkpoint s.pth: ", "missing: albert.emb", "unexpected: albert.foreign.weight"),
         {"s.pth": saved(FOREIGN)}),
        ("initial checkpoint is text", f"{INITIAL} s.pth", ("--init_checkpoint s.pth: not a",), {"s.pth": CYRILLIC}),
        ("initial checkpoint is some folder", f"{INITIAL} d", ("--init_checkpoint d: no model.safeten",), {"d/x": ""}),
        ("damaged initial checkpoint", f"{INITIAL} d", ("--init_checkpoint d: ", "not a complete safetensors file"),
         {"d/model.safetensors": "x"}),
        # addresses and this machine
        ("address without protocol", "--run_id r --initial_peers 203.0.113.5:31337",
         ("--initial_peers", "203.0.113.5:31337", "multiaddress")),
        ("address without peer id", "--run_id r --initial_peers /ip4/203.0.113.5/tcp/1", ("--initial_peers", "/p2p/")),
        ("address with a wrong peer id", "--run_id r --initial_peers /ip4/203.0.113.5/tcp/1/p2p/me",
         ("--initial_peers", "/p2p/me")),
        ("nobody at the address", f"--run_id r --initial_peers {UNREACHABLE}", ("cannot reach", UNREACHABLE)),
        ("no such host address", "--run_id r --host_maddrs /ip4/999.0.0.1/tcp/0", ("--host_maddrs", "999.0.0.1")),
        ("no such port", "--run_id r --host_maddrs /ip4/127.0.0.1/tcp/99999", ("--host_maddrs", "99999")),
        ("address of another machine", "--run_id r --host_maddrs /ip4/203.0.113.1/tcp/0",
         ("--host_maddrs", "203.0.113.1", "this machine")),
        ("announced address", "--run_id r --announce_maddrs 1.2.3.4", ("--announce_maddrs", "'1.2.3.4'")),
        ("port taken", "--run_id r --host_maddrs TAKEN", ("--host_maddrs", "TAKEN", "taken")),
        ("no identity", "--run_id r --identity_path key.pem", ("--identity_path", "key.pem"), {"key.pem": CYRILLIC}),
        ("identity is a folder", "--run_id r --identity_path d", ("--identity_path", "d"), {"d/x": ""}),
        ("output is a file", "--run_id r --output_dir o", ("--output_dir", "o/r"), {"o": ""}),
        ("output cannot be made", "--run_id r --output_dir /proc/none", ("--output_dir", "/proc/none")),
    ]  # fmt: skip
    return [
        Case("run_trainer.py", name, SMALL + TEXT + arguments, words, *rest) for name, arguments, words, *rest in rows
    ]


def auxiliary_cases() -> list[Case]:
    uploads = "--run_id r --store_checkpoints --upload_interval 60 --repo_url"
    rows = [
        ("client mode", "--run_id r --client_mode", ("--client_mode", "open a port")),
        ("upload without interval", "--run_id r --store_checkpoints --repo_url a/b", ("--upload_interval",)),
        ("repository as a web address", f"{uploads} https://huggingface.co/a/b", ("--repo_url", "ORGANISATION/NAME")),
        ("upload without a token", f"{uploads} a/b", ("--repo_url a/b: ", "HF_")),
        ("no refreshing", "--run_id r --refresh_period 0", ("--refresh_period must be positive",)),
        ("flag of a trainer", "--run_id r --dataset_sources x", ("unknown arguments: --dataset_sources x",)),
        ("misspelled flag", "--run_id r --store_checkpoint", ("did you mean --store_checkpoints",)),
        ("no configuration", "--run_id r --model_config_path no.json", ("--model_config_path", "no.json")),
        ("no tokenizer", "--run_id r --tokenizer_path ./none", ("./none", "no such directory")),
        ("address", "--run_id r --initial_peers 203.0.113.5:31337", ("--initial_peers", "203.0.113.5:31337")),
        ("checkpoint over somebody's files", "--run_id r --store_checkpoints --local_path mine",
         ("--local_path", "mine", "thesis.txt"), {"mine/thesis.txt": "ten years"}),
        ("checkpoint of another run", "--run_id r --store_checkpoints --local_path mine",
         ("--local_path", "mine", "run 'other', epoch 7"), {"mine/checkpoint.json": '{"run_id": "other", "epoch": 7}'}),
        ("checkpoint is a file", "--run_id r --store_checkpoints --local_path mine", ("--local_path", "mine"),
         {"mine": ""}),
        ("no held-out text", "--run_id r --store_checkpoints --eval_sources none.txt", ("none.txt", "no such file")),
        ("no pairs", "--run_id r --store_checkpoints --eval_pairs none", ("none", "no such directory")),
    ]  # fmt: skip
    return [Case("run_aux_peer.py", name, SMALL + arguments, words, *rest) for name, arguments, words, *rest in rows]


def own_run_cases() -> list[Case]:
    """Who starts a run says what it trains."""
    rows = [
        ("run_trainer.py", "own run of nothing", "--run_id r", ("--model_config_path", "@recipes/small/trainer")),
        ("run_trainer.py", "own run without text", "@recipes/base/trainer.args --run_id r --check",
         ("run r", "--dataset_sources", "@demo/trainer.args")),
        ("run_trainer.py", "recipe without a tokenizer", "@recipes/base/trainer.args --run_id r --dataset_sources x",
         ("--tokenizer_path", "./tokenizer", "no such directory", "tasks.mlm.train_tokenizer", "--vocab_size 50000")),
        ("run_trainer.py", "joining with a recipe whose tokenizer is not here, and nobody to ask",
         f"@recipes/base/trainer.args --run_id r --dataset_sources x --initial_peers {UNREACHABLE}",
         ("--initial_peers: cannot reach",)),
        ("run_aux_peer.py", "own run of nothing", "--run_id r --check", ("--tokenizer_path", "@recipes/small/aux")),
    ]  # fmt: skip
    return [Case(*row) for row in rows]


RECORDS = [
    {"premise": "Кот спит.", "hypothesis": "Кот есть.", "label": label, "idx": number}
    for number, label in enumerate(["entailment", "not_entailment"] * 3)
]


def lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


TERRA = {f"data/TERRa/{split}.jsonl": lines(RECORDS) for split in ("train", "val", "test")}


def broken(split: str, text: str) -> dict:
    return {**TERRA, f"data/TERRa/{split}.jsonl": text}


def tiny_checkpoint() -> dict:
    """What an auxiliary peer stores, as the files ck/..."""
    with tempfile.TemporaryDirectory() as folder:
        LeanAlbertForPreTraining(LeanAlbertConfig(**MODEL)).save_pretrained(folder)
        files = [*Path(folder).iterdir(), TOKENIZER / "tokenizer.json", TOKENIZER / "special_tokens_map.json"]
        return {f"ck/{file.name}": file.read_bytes() for file in files}


def finetuning_cases() -> list[Case]:
    given = {**TERRA, **tiny_checkpoint()}
    state = {"state.pth": saved({"model": {}}), "config.json": json.dumps(MODEL)}
    rows = [
        ("no task", "-c ck", ("--task",)),
        ("misspelled required flag", "--tsk TERRa -c ck", ("--task", "instead of --tsk")),
        ("unknown task", "-t cola -c ck", ("unknown task 'cola'", "RuCoLA")),
        ("misspelled flag", "-t TERRa -c ck --batchsize 3", ("--batchsize", "did you mean --batch-size")),
        ("flag with underscores", "-t TERRa -c ck --num_seeds 3", ("--num_seeds", "did you mean --num-seeds")),
        ("no number", "-t TERRa -c ck --batch-size many", ("--batch-size", "'many'")),
        ("unknown precision", "-t TERRa -c ck --precision fp8", ("--precision", "fp8", "bf16")),
        ("no rows in a batch", "-t TERRa -c ck --batch-size 0", ("--batch-size 0", "at least 1")),
        ("no seeds", "-t TERRa -c ck --num-seeds 0", ("--num-seeds 0", "at least 1")),
        ("dropout of everything", "-t TERRa -c ck --dropout 1", ("--dropout 1.0", "[0, 1)")),
        ("negative learning rate", "-t TERRa -c ck --learning-rate -1", ("--learning-rate -1.0",)),
        ("no room for words", "-t TERRa -c ck --max-length 2", ("--max-length 2", "at least 8")),
        ("two models", "-t TERRa -c ck -m x", ("-m x", "-c ck", "one of them")),
        ("fp16 without a GPU", "-t TERRa -c ck --precision fp16", ("--precision fp16", "GPU"), {},
         {"CUDA_VISIBLE_DEVICES": ""}),
        ("no data", "-t TERRa -c ck -d none", ("none", "no such directory", "--data-dir")),
        ("no folder of a task", "-t all -c ck -d ck", ("-t all", "no folder of a task")),
        ("no dev set", "-t TERRa -c ck", ("val.jsonl", "no such file"), {"data/TERRa/val.jsonl": None}),
        ("empty training set", "-t TERRa -c ck", ("train.jsonl", "no records"), broken("train", "")),
        ("field missing", "-t TERRa -c ck", ("train.jsonl:1", "missing field"), broken("train", '{"idx": 1}\n')),
        ("unknown label", "-t TERRa -c ck", ("train.jsonl:1", "unknown label"),
         broken("train", lines([{**RECORDS[0], "label": "maybe"}]))),
        ("same number twice", "-t TERRa -c ck", ("train.jsonl:2", "duplicate idx 0"),
         broken("train", lines(RECORDS[:1] * 2))),
        ("cut off data", "-t TERRa -c ck", ("train.jsonl:6", "cut off"), broken("train", lines(RECORDS)[:-5])),
        ("data in another encoding", "-t TERRa -c ck", ("train.jsonl", "UTF-8"),
         broken("train", lines(RECORDS).encode("cp1251"))),
        ("no checkpoint", "-t TERRa -c none", ("-c none", "no such file or directory")),
        ("no checkpoint anywhere", "-t TERRa", ("no model to fine-tune", "-c CHECKPOINT")),
        ("folder without configuration", "-t TERRa -c ck", ("ck", "no config.json"), {"ck/config.json": None}),
        ("folder without weights", "-t TERRa -c ck", ("ck", "no weights"), {"ck/model.safetensors": None}),
        ("folder without tokenizer", "-t TERRa -c ck", ("no tokenizer in 'ck'",),
         {"ck/tokenizer.json": None, "ck/special_tokens_map.json": None}),
        ("damaged configuration", "-t TERRa -c ck", ("ck", "config"), {"ck/config.json": "{"}),
        ("weights cut off", "-t TERRa -c ck", ("model.safetensors", "not a complete safetensors"),
         {"ck/model.safetensors": given["ck/model.safetensors"][:-999]}),
        ("state cut off", "-t TERRa -c s.pth", ("s.pth", "not a complete PyTorch checkpoint"),
         {"s.pth": shortened(saved({"x": torch.zeros(1000)}), 900)}),
        ("state of nothing", "-t TERRa -c state.pth --tokenizer ck", ("state.pth does not fit", "missing: embeddings"),
         state),
        ("no such configuration", "-t TERRa -c state.pth --tokenizer ck --model-config no.json", ("no.json", "no such"),
         state),
        ("model of the hub without network", "-t TERRa -m nobody/nothing", ("nobody/nothing",)),
        ("damaged ledger", "-t TERRa -c ck", ("runs.jsonl:1", "not a row of the ledger"),
         {"runs/runs.jsonl": "what\n"}),
        ("results over a file", "-t TERRa -c ck --output-dir o", ("--output-dir", "o"), {"o": ""}),
        ("predictions over a file", "-t TERRa -c ck --predictions-dir p", ("--predictions-dir", "p"), {"p": ""}),
    ]  # fmt: skip
    cases = []
    for name, arguments, words, *rest in rows:
        files, environment = [*rest, {}, {}][:2]
        data = "" if "-d " in arguments else " -d data"
        cases.append(Case("finetune_mlm.py", name, arguments + data, words, {**given, **files}, environment))
    return cases


LIDIRUS = {"data/LiDiRus/LiDiRus.jsonl": lines(
    {"sentence1": "Кот спит.", "sentence2": "Кот есть.", "label": "entailment", "idx": 0, "knowledge": "",
     "lexical-semantics": "", "logic": "", "predicate-argument-structure": ""} for _ in range(1)
)}  # fmt: skip


def prediction_cases() -> list[Case]:
    run = {"task": "TERRa", "model": "m", "source": "s", "key": "k", "seed": 0, "dev": {"accuracy": 1.0},
           "arguments": {"max_length": 64, "batch_size": 2, "precision": "fp32", "dropout": 0.1},
           "directory": "m"}  # fmt: skip
    rows = [
        ("no data", "-d none", ("none", "no such directory")),
        ("misspelled flag", "-d data --modelname x", ("--modelname", "did you mean --model-name")),
        ("no run", "-d data", ("no TERRa run", "runs.jsonl", "python finetune_mlm.py -t TERRa")),
        ("no run of the model", "-d data -m m", ("no TERRa run of m", "python finetune_mlm.py -t TERRa")),
        ("damaged ledger", "-d data", ("runs.jsonl:1", "not a row"), {"runs/runs.jsonl": "{}\n"}),
        (
            "run has gone",
            "-d data",
            ("runs/m", "not the directory of a finished run"),
            {"runs/runs.jsonl": lines([run])},
        ),
        ("damaged run", "-d data -m m", ("m/run.json",), {"m/run.json": "{"}),
        ("run of another task", "-d data -m m", ("m", "RCB"), {"m/run.json": json.dumps({**run, "task": "RCB"})}),
        ("run without weights", "-d data -m m", ("m",), {"m/run.json": json.dumps(run)}),
        ("predictions over a file", "-d data --predictions-dir p", ("--predictions-dir p", "file"), {"p": ""}),
        ("damaged data", "-d data", ("LiDiRus.jsonl:1", "not valid JSON"), {"data/LiDiRus/LiDiRus.jsonl": "what\n"}),
    ]
    return [
        Case("predict_on_lidirus.py", name, arguments, words, {**LIDIRUS, **(rest[0] if rest else {})})
        for name, arguments, words, *rest in rows
    ]


CASES = [*own_run_cases(), *trainer_cases(), *auxiliary_cases(), *finetuning_cases(), *prediction_cases()]


def prepare(case: Case, folder: Path, address: str) -> list[str]:
    """Write the case's files; returns its arguments."""
    folder.mkdir(parents=True)
    if case.script.startswith("run_"):
        (folder / "small.json").write_text(json.dumps(MODEL), encoding="utf-8")
        for role in ("trainer", "aux"):  # of an earlier start
            (folder / EARLIER.format(role)).parent.mkdir(parents=True)
            (folder / EARLIER.format(role)).write_text('{"event": "start", "time": 1e9, "run_id": "r"}\n')
    for name, content in case.files.items():
        if content is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [address if word == "TAKEN" else word for word in shlex.split(case.arguments)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """{id: (code, stdout, stderr, files before, files after)}, the taken address, and the folder of all cases."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [call["case"] for call in calls if isinstance(call.get("case"), Case)]  # those that -k has left
    root = tmp_path_factory.mktemp("bad input")
    environment = {"OMP_NUM_THREADS": "1", "BAD_INPUT_TEST": str(root), "PYTHONPATH": str(REPOSITORY),
                   "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf")}  # fmt: skip
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        folders = {case.id: root / str(number) / "here" for number, case in enumerate(cases)}
        before = {}

        def run(case: Case) -> tuple[int, str, str]:
            arguments = prepare(case, folders[case.id], address)
            before[case.id] = contents(folders[case.id])
            with subprocess.Popen(
                [sys.executable, str(REPOSITORY / case.script), *arguments], cwd=folders[case.id], text=True,
                env={**os.environ, **environment, **case.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ) as program:  # fmt: skip
                try:
                    out, err = program.communicate(timeout=180)
                except subprocess.TimeoutExpired:  # the input was accepted: the program works, or hangs
                    program.terminate()
                    out, err = program.communicate()
            return program.returncode, out, err

        with ThreadPoolExecutor(4) as pool:
            done = dict(zip(folders, pool.map(run, cases), strict=True))
    found = {}
    for key, folder in folders.items():
        found[key] = *done[key], before[key], contents(folder)
    return found, address, root


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_input_is_told_in_one_line(outcomes, case):
    code, out, err, before, after = outcomes[0][case.id]
    assert code == 2, err
    assert err.startswith(f"{case.script}: error: ")
    assert err.count("\n") == 1 and err.endswith("\n"), err
    for word in case.words:
        assert word.replace("TAKEN", outcomes[1]) in err
    assert "others join" not in out and "listens on" not in out
    assert {name: after.get(name) for name in before} == before, "a file was changed"
    locks = {"outputs/r/trainer/.lock", "outputs/r/aux/.lock"} if case.script.startswith("run_") else set()
    assert {name for name in after if name not in before} <= locks, "a file was left"


@pytest.mark.timeout(1000)
def test_bad_input_leaves_no_process_behind(outcomes):
    marker, left = str(outcomes[2]), []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BAD_INPUT_TEST") == marker and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.cmdline())
        except psutil.Error:
            continue
    assert left == []


def test_bad_input_covers_every_script():
    assert len(CASES) >= 60
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.script for case in CASES} == {path.name for path in REPOSITORY.glob("*.py")} - {
        "arguments.py",
        "command_line.py",
    }
