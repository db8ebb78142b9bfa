"""Every documented flag with its default; argument files; contradictions and typing mistakes end with code 2."""

import dataclasses
from pathlib import Path

import pytest

from arguments import (
    DEMO,
    REPOSITORY,
    ArgumentParser,
    AuxiliaryPeerArguments,
    CollaborationArguments,
    HFTrainerArguments,
    TrainerPeerArguments,
    joining_arguments,
    run_settings,
)
from src.optim.schedules import learning_rate, sequence_length

PEER = {
    "run_id": None,
    "initial_peers": [],
    "host_maddrs": ["/ip4/0.0.0.0/tcp/0"],
    "announce_maddrs": [],
    "client_mode": "auto",
    "bandwidth": None,
    "min_vector_size": 4_000_000,
    "identity_path": None,
    "restart": True,
    "use_ipfs": False,
    "authorize": "False",
    "model_config_path": None,
    "tokenizer_path": None,
    "cache_dir": None,
    "wandb_project": None,
    "tensorboard_dir": None,
    "check": False,
}
DEFAULTS = {
    TrainerPeerArguments: {
        **PEER,
        "dataset_sources": None,
        "dataset_weights": None,
        "statistics_expiration": 600.0,
        "backup_every_epochs": 10,
        "state_path": None,
        "init_checkpoint": None,
        "wait_for_peers": 1,
        "pack_sequences": False,
    },
    AuxiliaryPeerArguments: {
        **PEER,
        "refresh_period": 10.0,
        "assist_in_averaging": False,
        "assist_refresh": 1.0,
        "store_checkpoints": False,
        "save_checkpoint_epoch_interval": 5,
        "local_path": None,
        "upload_interval": None,
        "repo_url": None,
        "eval_sources": [],
        "keep_checkpoints": 0,
        "eval_batches": 16,
        "eval_margin": 0.1,
        "eval_pairs": None,
        "eval_pairs_each": 10,
        "report_interval": 120.0,
        "run_datasets": [],
    },
    CollaborationArguments: {
        "target_batch_size": 16384,
        "matchmaking_time": 60.0,
        "next_chunk_timeout": 60.0,
        "averaging_timeout": 600.0,
        "average_state_every": 20,
        "averaging_bits": 8,
        "robust_averaging": None,
        "local_batch_size": 0,
        "local_steps_after": 0,
        "outer_learning_rate": 0.7,
        "outer_momentum": 0.5,
        "offload_optimizer": True,
        "delay_optimizer_step": True,
        "delay_grad_averaging": True,
        "reuse_grad_buffers": True,
    },
    HFTrainerArguments: {
        "output_dir": "outputs",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "activation_memory": None,
        "cpu_kernels": None,
        "gradient_checkpointing": False,
        "fp16": False,
        "bf16": False,
        "learning_rate": 2.5e-3,
        "min_learning_rate": None,
        "num_zero_lr_steps": 50,
        "total_steps": 15_625,
        "warmup_steps": 3_125,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "clamp_value": 1e9,
        "min_8bit_size": 2**20,
        "optimizer": "lamb",
        "schedule": "linear",
        "decay_steps": None,
        "mlm_probability": 0.15,
        "final_mlm_probability": None,
        "sentence_order": True,
        "max_sequence_length": 2048,
        "initial_sequence_length": 256,
        "sequence_length_warmup_steps": 7_000,
        "pad_to_multiple_of": 128,
        "seed": 0,
        "max_steps": 10**18,
        "dataloader_num_workers": 0,
    },
}
FLAGS = [(kind, name, default) for kind, table in DEFAULTS.items() for name, default in table.items()]


def parse(argv, kind=TrainerPeerArguments):
    """The three dataclass instances, as the scripts make them; ``argv`` is one string or a list."""
    argv = argv.split() if isinstance(argv, str) else argv
    return ArgumentParser(kind, CollaborationArguments, HFTrainerArguments, prog="script.py").parse(argv)


def refusal(argv, capsys, kind=TrainerPeerArguments) -> str:
    """What is printed when these arguments are refused with code 2."""
    with pytest.raises(SystemExit) as caught:
        parse(argv, kind)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def untouched():
    """What `--run_id a` alone gives, by dataclass."""
    aux = parse("--run_id a", AuxiliaryPeerArguments)[0]
    return {type(instance): instance for instance in (*parse("--run_id a"), aux)}


@pytest.mark.parametrize(("kind", "name", "default"), FLAGS, ids=[f"{k.__name__}.{n}" for k, n, _ in FLAGS])
def test_arguments_flag_has_the_documented_default(untouched, kind, name, default):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    declared = fields[name].default
    if declared is dataclasses.MISSING:
        declared = fields[name].default_factory()
    assert declared == default
    assert type(declared) is type(default)
    if name != "run_id":
        assert getattr(untouched[kind], name) == default


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_arguments_table_of_flags_is_complete(kind):
    own = {name for base in kind.__mro__ if base.__module__ == "arguments" for name in base.__annotations__}
    hidden = {"logging_steps", "logging_nan_inf_filter", "save_strategy", "disable_tqdm", "remove_unused_columns"}
    assert own - hidden - {"optim", "ddp_timeout"} == set(DEFAULTS[kind])


def test_arguments_lists_are_not_shared_between_instances():
    first, second = (TrainerPeerArguments(run_id="a") for _ in range(2))
    first.initial_peers.append("/ip4/10.0.0.1/tcp/1/p2p/Qm")
    assert second.initial_peers == []


def test_arguments_schedule_defaults_equal_those_of_the_pure_functions():
    training = HFTrainerArguments()
    for epoch in (0, 49, 50, 3124, 3125, 9000, 15_624, 15_625):
        assert learning_rate(epoch) == learning_rate(
            epoch, peak_learning_rate=training.learning_rate, min_learning_rate=training.min_learning_rate,
            warmup_steps=training.warmup_steps, total_steps=training.total_steps,
            num_zero_steps=training.num_zero_lr_steps,
        )  # fmt: skip
        assert sequence_length(epoch) == sequence_length(
            epoch, max_sequence_length=training.max_sequence_length,
            initial_sequence_length=training.initial_sequence_length,
            sequence_length_warmup_steps=training.sequence_length_warmup_steps,
            pad_to_multiple_of=training.pad_to_multiple_of,
        )  # fmt: skip


# -- the original guide's commands ------------------------------------------------------------------------------------

ADDRESS = "/ip4/203.0.113.5/tcp/12345/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"


def test_arguments_of_the_original_trainer_command_parse():
    peer, _, training = parse(
        "--run_id my-exp --host_maddrs /ip4/0.0.0.0/tcp/31337 --announce_maddrs /ip4/203.0.113.9/tcp/31337 "
        f"--initial_peers {ADDRESS} {ADDRESS} --bandwidth 100 "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --client_mode --gradient_checkpointing"
    )
    assert (peer.run_id, peer.bandwidth, peer.client_mode) == ("my-exp", 100.0, True)
    assert peer.host_maddrs == ["/ip4/0.0.0.0/tcp/31337"]
    assert peer.announce_maddrs == ["/ip4/203.0.113.9/tcp/31337"]
    assert peer.initial_peers == [ADDRESS, ADDRESS]
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 1)
    assert training.gradient_checkpointing


@pytest.mark.parametrize("flag", ["fp16", "bf16"])
def test_arguments_mixed_precision_flags_need_no_value(flag):
    assert getattr(parse(f"--run_id a --{flag}")[2], flag) is True


def test_arguments_of_the_original_auxiliary_command_parse():
    peer, *_ = parse(
        "--run_id my-exp --host_maddrs /ip4/0.0.0.0/tcp/12345 --announce_maddrs /ip4/203.0.113.9/tcp/12345 "
        "--wandb_project my-exp --store_checkpoints --upload_interval 43200 --repo_url org/my-exp "
        f"--assist_in_averaging --bandwidth 100 --initial_peers {ADDRESS} --authorize False",
        AuxiliaryPeerArguments,
    )
    assert peer.store_checkpoints and peer.assist_in_averaging
    assert (peer.upload_interval, peer.repo_url, peer.wandb_project) == (43200.0, "org/my-exp", "my-exp")


def test_arguments_gradient_checkpointing_reaches_transformers_under_its_newer_name():
    assert parse("--run_id a --gradient_checkpointing")[2].activation_checkpointing is True
    assert not parse("--run_id a")[2].activation_checkpointing
    assert parse("--run_id a --activation_checkpointing True")[2].activation_checkpointing is True


def test_arguments_gradient_checkpointing_is_a_level_of_activation_memory(capsys):
    assert parse("--run_id a --gradient_checkpointing")[2].activation_memory == "checkpoint"
    assert parse("--run_id a --gradient_checkpointing --activation_memory checkpoint")[2].gradient_checkpointing
    assert parse("--run_id a --activation_memory lean")[2].activation_memory == "lean"
    assert "--activation_memory lean" in refusal("--run_id a --gradient_checkpointing --activation_memory lean", capsys)
    assert "--activation_memory" in refusal("--run_id a --activation_memory leaner", capsys)


def test_arguments_delayed_modes_can_be_switched_off():
    collaboration = parse("--run_id a --no_delay_grad_averaging --no-delay-optimizer-step --offload_optimizer False")[1]
    assert not collaboration.delay_grad_averaging
    assert not collaboration.delay_optimizer_step
    assert not collaboration.offload_optimizer
    assert collaboration.reuse_grad_buffers


def test_arguments_inherited_from_transformers_work():
    assert parse("--run_id a --dataloader_drop_last True")[2].dataloader_drop_last is True


# -- argument files ---------------------------------------------------------------------------------------------------


def test_arguments_file_holds_comments_quotes_and_other_files(tmp_path):
    inner, outer = tmp_path / "inner.args", tmp_path / "outer.args"
    inner.write_text("# shared settings\n\n--run_id inner --learning_rate 1e-3  # a comment behind flags\n")
    outer.write_text(f"@{inner}\n--learning_rate 2e-3\n--state_path \"a file.pth\" --cache_dir 'b c'\n")
    peer, _, training = parse([f"@{outer}"])
    assert (peer.run_id, training.learning_rate) == ("inner", 2e-3)
    assert (peer.state_path, peer.cache_dir) == ("a file.pth", "b c")


def test_arguments_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "notepad.args"
    path.write_bytes("\ufeff--run_id r\r\n--cache_dir 'a\u2028\x0cb'\r\n".encode())
    peer, _, _ = parse([f"@{path}"])
    assert (peer.run_id, peer.cache_dir) == ("r", "a\u2028\x0cb")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_arguments_file_in_another_encoding_is_refused(tmp_path, capsys, encoding):
    path = tmp_path / "powershell.args"
    path.write_bytes("--run_id r\n".encode(encoding))
    with pytest.raises(SystemExit) as caught:
        parse([f"@{path}"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "powershell.args" in error and "UTF-8" in error and error.count("\n") == 1


def test_arguments_on_the_command_line_override_a_file_before_them():
    peer, collaboration, training = parse("@demo/trainer.args --learning_rate 1e-4 --run_id other --dataset_sources x")
    assert (peer.run_id, training.learning_rate, peer.dataset_sources) == ("other", 1e-4, ["x"])
    assert collaboration == parse("@demo/swarm.args")[1], "demo/trainer.args names demo/swarm.args"


@pytest.mark.parametrize(
    ("file", "kind"), [("trainer.args", TrainerPeerArguments), ("aux.args", AuxiliaryPeerArguments)]
)
def test_arguments_of_the_demo_are_found_from_any_folder(tmp_path, monkeypatch, file, kind):
    monkeypatch.chdir(tmp_path)
    assert parse(f"@demo/{file}", kind)[0].run_id == "demo"


def test_arguments_paths_of_the_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peer, *_ = parse(
        "--run_id a --model_config_path @recipes/small/config.json --tokenizer_path=@demo/tokenizer "
        "--dataset_sources mine.txt @demo/corpus/*.txt"
    )
    assert peer.model_config_path == str(REPOSITORY / "recipes" / "small" / "config.json")
    assert (peer.tokenizer_path, peer.dataset_sources) == (
        str(DEMO / "tokenizer"), ["mine.txt", str(DEMO / "corpus" / "*.txt")]
    )  # fmt: skip
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.args").write_text("--run_id mine\n")
    assert parse("@./demo/mine.args")[0].run_id == "mine", "a folder of that name in the working directory"


@pytest.mark.parametrize("words", [["@recipes/small/none.args"], ["@demo/nothing.args"]])
def test_arguments_file_of_the_repository_that_does_not_exist_is_named(capsys, words):
    assert f"{words[0]}: cannot read this file of flags" in refusal(words, capsys)


# -- a run of one's own -----------------------------------------------------------------------------------------------


def require(command, kind, prog="script.py", **options):
    parser = ArgumentParser(kind, CollaborationArguments, HFTrainerArguments, prog=prog)
    peer = parser.parse(command.split())[0]
    parser.require_own_run(peer, **options)
    return peer


MODEL_AND_TOKENIZER = "--model_config_path c.json --tokenizer_path t"
OWN_RUNS = [
    (TrainerPeerArguments, "", "--model_config_path, --tokenizer_path, --dataset_sources are not given"),
    (TrainerPeerArguments, MODEL_AND_TOKENIZER, "--dataset_sources is not given: name your text (--dataset_sources"),
    (TrainerPeerArguments, "--dataset_sources x", "take a recipe (@recipes/small/trainer.args), see docs/recipes.md"),
    (TrainerPeerArguments, "@recipes/small/trainer.args", "--dataset_sources is not given: name your text"),
    (AuxiliaryPeerArguments, "--check", "--model_config_path, --tokenizer_path are not given: take a recipe"),
    (AuxiliaryPeerArguments, "--model_config_path c.json", "--tokenizer_path is not given"),
]


@pytest.mark.parametrize(("kind", "command", "complaint"), OWN_RUNS)
def test_arguments_run_of_ones_own_is_never_the_demo_in_silence(capsys, kind, command, complaint):
    with pytest.raises(SystemExit) as caught:
        require(f"{command} --run_id my-exp", kind)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.count("\n") == 1
    assert "run my-exp is started here" in printed and complaint in printed
    with pytest.raises(SystemExit):  # and nobody handed anything over
        require(f"{command} --run_id my-exp --initial_peers {ADDRESS}", kind, asked=True)
    require(f"{command} --run_id my-exp --initial_peers {ADDRESS}", kind)  # before anybody is asked
    assert "run my-exp has no peer that hands over its settings, but --" in capsys.readouterr().err
    assert f"@demo/{'trainer' if kind is TrainerPeerArguments else 'aux'}.args" in printed


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        (TrainerPeerArguments, f"{MODEL_AND_TOKENIZER} --dataset_sources x"),
        (TrainerPeerArguments, "@recipes/base/trainer.args --dataset_sources x"),
        (TrainerPeerArguments, "@demo/trainer.args"),
        (AuxiliaryPeerArguments, "@demo/aux.args"),
        (AuxiliaryPeerArguments, "@demo/swarm.args"),
        (AuxiliaryPeerArguments, "@recipes/small/aux.args"),
    ],
)
def test_arguments_run_with_a_model_a_tokenizer_and_a_text_may_start(kind, command):
    peer = require(f"{command} --run_id my-exp", kind)
    assert None not in (peer.run_id, peer.model_config_path, peer.tokenizer_path, getattr(peer, "dataset_sources", ()))


def test_arguments_of_all_demo_peers_agree_on_what_the_swarm_shares():
    trainer, aux = parse("@demo/trainer.args"), parse("@demo/aux.args", AuxiliaryPeerArguments)
    assert trainer[1] == aux[1]
    assert trainer[0].min_vector_size == aux[0].min_vector_size
    for name in ("learning_rate", "total_steps", "warmup_steps", "num_zero_lr_steps", "min_8bit_size", "seed"):
        assert getattr(trainer[2], name) == getattr(aux[2], name), name


# -- refusals ---------------------------------------------------------------------------------------------------------

NOTHING_OFFLOADED = "--no_offload_optimizer --no_delay_optimizer_step --no_delay_grad_averaging"
CONTRADICTIONS = {
    "--target_batch_size 1": "--run_id is missing",
    "--run_id": "expected one argument",
    "--run_id my/exp": "--run_id 'my/exp'",
    "--run_id a --target_batch_size 0": "--target_batch_size must be positive, not 0",
    "--run_id a --matchmaking_time -1": "--matchmaking_time must be positive",
    "--run_id a --next_chunk_timeout 0": "--next_chunk_timeout must be positive",
    "--run_id a --average_state_every 0": "--average_state_every must be positive",
    "--run_id a --local_batch_size -1": "--local_batch_size -1: must not be negative",
    "--run_id a --local_batch_size 20000": "--local_batch_size 20000 must not be more than --target_batch_size 16384",
    f"--run_id a --local_batch_size 8 {NOTHING_OFFLOADED}": "--local_batch_size needs --offload_optimizer",
    "--run_id a --local_batch_size 8 --no_delay_grad_averaging": "--local_batch_size with --delay_optimizer_step needs",
    "--run_id a --local_batch_size 8 --optimizer muon": "--local_batch_size works with --optimizer lamb only",
    "--run_id a --local_steps_after -1": "--local_steps_after -1: must not be negative",
    "--run_id a --outer_learning_rate 0": "--outer_learning_rate must be positive",
    "--run_id a --outer_momentum 1": "--outer_momentum 1.0: must be in [0, 1)",
    "--run_id a --matchmaking_time 200 --averaging_timeout 200": "--averaging_timeout 200.0 must be longer than --matc",
    "--run_id a --averaging_timeout 120": "--averaging_timeout 120.0 must be longer than twice --next_chunk_timeout",
    "--run_id a --no_delay_optimizer_step": "--delay_grad_averaging needs --delay_optimizer_step",
    "--run_id a --no_offload_optimizer": "--delay_optimizer_step needs --offload_optimizer",
    "--run_id a --authorize True": "--authorize True",
    "--run_id a --bandwidth 0": "--bandwidth must be positive",
    "--run_id a --bandwidth nan": "--bandwidth must be positive",
    "--run_id a --bandwidth fast": "--bandwidth fast: pass a number of Mbit/s, or auto",
    "--run_id a --bandwidth auto": "--bandwidth auto needs --initial_peers",
    "--run_id a --backup_every_epochs 0": "--backup_every_epochs must be positive",
    "--run_id a --statistics_expiration 0": "--statistics_expiration must be positive",
    "--run_id a --per_device_train_batch_size 0": "--per_device_train_batch_size must be positive",
    "--run_id a --gradient_accumulation_steps 0": "--gradient_accumulation_steps",
    "--run_id a --learning_rate 0": "--learning_rate must be positive",
    "--run_id a --learning_rate 1e-3 --min_learning_rate 1e-2": "--min_learning_rate 0.01 must lie between 0 and --lea",
    "--run_id a --total_steps 100": "--warmup_steps 3125 must lie between 0 and --total_steps 100",
    "--run_id a --max_sequence_length 128": "--initial_sequence_length 256 must lie between 1 and --max_sequence_len",
    "--run_id a --pad_to_multiple_of 0": "--pad_to_multiple_of must be positive",
    "--run_id a --max_steps 0": "--max_steps must be positive",
    "--run_id a --fp16 --bf16": "fp16 and bf16",
    "--run_id a --bogus 3": "unknown arguments: --bogus 3",
    "--run_id a --learning 1e-3": "unknown arguments: --learning 1e-3",
    "--run_id a --learning_rate much": "--learning_rate",
    "@missing.args": "missing.args",
}
AUXILIARY_CONTRADICTIONS = {
    "--run_id a --client_mode": "--client_mode",
    "--run_id a --store_checkpoints --repo_url a/b": "--upload_interval",
    "--run_id a --store_checkpoints --upload_interval 60": "--repo_url",
    "--run_id a --repo_url a/b --upload_interval 60": "--store_checkpoints",
    "--run_id a --store_checkpoints --repo_url a/b --upload_interval 0": "--upload_interval must be positive",
    "--run_id a --refresh_period 0": "--refresh_period must be positive",
    "--run_id a --assist_refresh 0": "--assist_refresh must be positive",
    "--run_id a --save_checkpoint_epoch_interval 0": "--save_checkpoint_epoch_interval must be positive",
    "--run_id a --eval_pairs data": "--eval_pairs needs --store_checkpoints",
    "--run_id a --eval_sources a.txt": "--eval_sources needs --store_checkpoints",
    "--run_id a --eval_pairs_each 0": "--eval_pairs_each must be positive",
    "--run_id a --eval_margin -1": "--eval_margin -1.0: must not be negative",
    "--run_id a --dataset_sources x": "unknown arguments: --dataset_sources x",
}


@pytest.mark.parametrize(("command", "complaint"), CONTRADICTIONS.items())
def test_arguments_that_contradict_are_refused_by_name(capsys, command, complaint):
    printed = refusal(command, capsys)
    assert printed.startswith("script.py: error: ")
    assert complaint in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("command", "complaint"), AUXILIARY_CONTRADICTIONS.items())
def test_arguments_of_an_auxiliary_that_contradict_are_refused_by_name(capsys, command, complaint):
    assert complaint in refusal(command, capsys, AuxiliaryPeerArguments)


def test_arguments_of_the_demo_name_files_that_exist():
    peer = parse("@demo/trainer.args")[0]
    assert Path(peer.model_config_path).is_file()
    assert (Path(peer.tokenizer_path) / "tokenizer.json").is_file()
    assert peer.dataset_sources == [str(DEMO / "corpus" / "*.txt")] and list(DEMO.glob("corpus/*.txt"))


def test_arguments_of_a_run_are_kept_without_addresses_and_paths_of_the_machine():
    command = f"--run_id a --initial_peers {ADDRESS} --identity_path key.pem --cache_dir c --learning_rate 1e-3"
    command += " --dataset_sources a.txt"
    settings = run_settings(*parse(command))
    assert (settings["run_id"], settings["learning_rate"], settings["target_batch_size"]) == ("a", 1e-3, 16384)
    assert settings["dataset_sources"] == ["a.txt"]
    assert not {"initial_peers", "identity_path", "cache_dir", "output_dir", "host_maddrs"} & settings.keys()
    assert "dataset_sources" not in run_settings(*parse("--run_id a", AuxiliaryPeerArguments))


JOIN_AT = ["/ip4/203.0.113.5/tcp/1/p2p/Qm", "/ip4/127.0.0.1/tcp/1/p2p/Qm"]


@pytest.mark.parametrize(
    ("own", "asks_for_text", "line"),
    [
        ("@demo/trainer.args", True, "--run_id demo --dataset_sources @demo/corpus/*.txt"),
        ("--run_id a --learning_rate 1e-3 --dataset_sources /x", True, "--run_id a --dataset_sources YOUR_TEXT"),
        ("--run_id a --dataset_sources me/x --output_dir /tmp/x --identity_path k", False, "--run_id a"),
        ("--run-id a --use_ipfs --authorize False --client_mode", False, "--run_id a --use_ipfs"),
    ],
)  # fmt: skip
def test_line_for_others_has_what_they_need_and_nothing_of_this_person(own, asks_for_text, line):
    peer = parse(own)[0]
    expected = [*line.split(), "--initial_peers", *JOIN_AT]
    assert joining_arguments(peer, JOIN_AT, asks_for_text=asks_for_text) == expected


def test_line_for_others_of_an_auxiliary_peer_asks_for_text():
    peer = parse("@demo/aux.args", AuxiliaryPeerArguments)[0]
    assert joining_arguments(peer, JOIN_AT[:1], asks_for_text=True)[:4] == [
        "--run_id", "demo", "--dataset_sources", "YOUR_TEXT"
    ]  # fmt: skip


def test_flags_by_hand_are_told_from_defaults(tmp_path):
    file = tmp_path / "my.args"
    file.write_text("@demo/swarm.args\n--run-id mine --learning_rate=1e-3 --no_restart\n")
    parser = ArgumentParser(TrainerPeerArguments, CollaborationArguments, HFTrainerArguments, prog="script.py")
    words = parser.read_files([f"@{file}", "--bf16", "--dataset_sources", "a", "b"])
    peer, given = parser.parse_first(words)
    assert (peer.run_id, peer.restart, peer.dataset_sources) == ("mine", False, ["a", "b"])
    assert (given["learning_rate"], given["bf16"], given["restart"], given["total_steps"]) == (1e-3, True, False, 100)
    assert not {"fp16", "seed", "output_dir", "initial_peers", "dataset_weights"} & given.keys()
    with pytest.raises(SystemExit):
        parser.parse_first(["--run_id", "a", "--learning_rat", "1"])
    with pytest.raises(SystemExit):
        parser.parse_first([])
