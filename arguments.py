"""Command-line options of run_trainer.py and run_aux_peer.py, and nothing else.

Every field is a flag. A line of the form ``@FILE`` on the command line reads more flags from that file (written as in a
shell, ``#`` starts a comment); flags that come later win.

``@demo/...`` and ``@recipes/...`` name files of this repository, wherever the program is started: flags to read if the
name ends in ``.args``, else a path, as in ``--model_config_path @recipes/small/config.json``.
"""

import argparse
import math
import re
import shlex
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from command_line import OneLineErrors

REPOSITORY = Path(__file__).resolve().parent
DEMO = REPOSITORY / "demo"
DEMO_CORPUS = str(DEMO / "corpus" / "*.txt")
OWN_FILE = re.compile(r"(--[\w-]+=)?@((?:demo|recipes)/.*)")
# What a run trains. Whoever starts one names it; whoever joins one is told by the run, see `src.swarm.take_up`.
WHAT_TO_TRAIN = ("model_config_path", "tokenizer_path", "dataset_sources")

CLIENT_MODES = {"auto": "auto", **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
                **dict.fromkeys(("false", "no", "f", "n", "0"), False)}  # fmt: skip

# Topics of --help, in this order.
WHO = "who takes part, and how they reach each other"
TEXT = "model, tokenizer and text"
MACHINE = "batches, memory and speed of this machine"
OPTIMIZER = "optimizer and its schedule (equal for all peers)"
AVERAGING = "averaging (equal for all peers)"
FILES = "files, metrics and backups"
SERVICE = "what an auxiliary peer does for the others"
TOPICS = (WHO, TEXT, MACHINE, OPTIMIZER, AVERAGING, FILES, SERVICE)
# Whom the value of a flag concerns. An auxiliary peer, which reads no data, need not have what trainers share.
PEERS, TRAINERS = "the same for all peers", "the same for all trainers"
RUN, LINE = "of the run, but peers may differ", "needed to join"
NAMED = "what a run's metrics and joining line name"
MINE, PRIVATE = "how this peer computes", "this machine, or the person who runs it"
SHARED, HANDED_OVER = (PEERS, TRAINERS), (PEERS, TRAINERS, RUN)
DESCRIPTION = (PEERS, TRAINERS, RUN, NAMED, MINE)


def option(default, help: str, *, topic: str = "", scope: str = PRIVATE, **kwargs):
    """A dataclass field that is a flag; all about the flag is said here. A list default is copied for each instance.

    ``topic``: where --help lists it; a flag without one is of Trainer, and fixed here. ``scope``: SHARED flags are in
    the run card, which peers compare; HANDED_OVER ones are what a run tells whoever joins it, and nothing else is taken
    from outside; those of the DESCRIPTION are in metrics and model cards.
    """
    metadata = {"help": help, "topic": topic, "scope": scope, **kwargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_positive(arguments, *names: str) -> None:
    """Raises ValueError for the first of these fields that is not a number above zero."""
    for name in names:
        if not 0 < getattr(arguments, name) < math.inf:
            raise ValueError(f"--{name} must be positive, not {getattr(arguments, name)}")


def check_range(arguments, low: float, high: float, *names: str) -> None:
    """Raises ValueError for the first of these fields that is not in [low, high)."""
    for name in names:
        if not low <= getattr(arguments, name) < high:
            limit = f"must be in [{low}, {high})" if high < math.inf else "must not be negative"
            raise ValueError(f"--{name} {getattr(arguments, name)}: {limit}")


@dataclass
class PeerArguments:
    """Who this peer is, whom it talks to, and which model the swarm trains."""

    run_id: str | None = option(
        None, "Name of the run: peers with the same name train together.", topic=WHO, scope=NAMED
    )
    initial_peers: list[str] = option(
        [],
        "Addresses of one or more peers of the run (as they print them); without any, a new swarm is started.",
        topic=WHO,
    )
    host_maddrs: list[str] = option(
        ["/ip4/0.0.0.0/tcp/0"],
        "Where to listen for other peers, e.g. /ip4/0.0.0.0/tcp/31337 (port 0: any free port).",
        topic=WHO,
    )
    announce_maddrs: list[str] = option(
        [],
        "Addresses to tell others, if they differ from host_maddrs (behind a router: its public address).",
        topic=WHO,
    )
    client_mode: str = option(
        "auto",
        "True, or without a value: never accept incoming connections, for peers behind a firewall or gone within the "
        "hour; others average for them. False: accept them. auto: let the initial peers find out whether they can "
        "connect to this trainer.",
        topic=WHO,
        nargs="?",
        const="True",
    )
    bandwidth: str | None = option(
        None,
        "The lower of download and upload speed, Mbit/s; used to share out the work. auto: measure it against an "
        "initial peer.",
        topic=WHO,
    )
    min_vector_size: int = option(
        4_000_000,
        "A peer that averages takes at least this many values (equal for all peers).",
        topic=AVERAGING,
        scope=PEERS,
    )
    identity_path: str | None = option(
        None,
        "File with this peer's private key, made if absent: keeps its address the same after a restart.",
        topic=WHO,
    )
    use_ipfs: bool = option(
        False, "Find initial_peers (then peer ids only) through the public IPFS network.", topic=WHO, scope=LINE
    )
    authorize: str | None = option(
        "False",
        "Token file for a private run, which its organiser has issued; the key it is for is read from identity_path, "
        "by default the file NAME.key beside NAME.token. False: an open run, anybody may join.",
        topic=WHO,
    )
    model_config_path: str | None = option(
        None, "Model configuration (.json file); whoever joins a run gets it from there.", topic=TEXT
    )
    tokenizer_path: str | None = option(
        None, "Directory or hub id of the tokenizer; whoever joins a run gets it from there.", topic=TEXT
    )
    cache_dir: str | None = option(None, "Where downloaded data sets and tokenizers are kept.", topic=TEXT)
    wandb_project: str | None = option(
        None,
        "Send metrics to this Weights & Biases project (WANDB_MODE=offline works).",
        topic=FILES,
    )
    tensorboard_dir: str | None = option(
        None, "Write metrics for TensorBoard there, too (needs its package).", topic=FILES
    )
    restart: bool = option(
        True,
        "Start again, at most five times an hour, when a process of this peer has died; False: end with code 75, for "
        "those who have systemd or the like.",
        topic=WHO,
    )
    check: bool = option(
        False,
        "Test this set-up (ports, peers, speed, clock, disk, memory, model, data), say what to do, and end.",
        topic=WHO,
    )

    def __post_init__(self):
        if not self.run_id:
            raise ValueError("--run_id is missing: peers with the same run_id train together; choose any name")
        if not all(character.isalnum() or character in "-_" for character in self.run_id):
            raise ValueError(f"--run_id {self.run_id!r}: only letters, digits, - and _ are allowed")
        if self.token_file is not None:
            if not Path(self.token_file).expanduser().is_file():
                raise ValueError(f"--authorize {self.authorize}: there is no such token file (an open run: False)")
            if self.identity_path is None:
                self.identity_path = str(Path(self.token_file).with_suffix(".key"))
        check_positive(self, "min_vector_size")
        self.client_mode = str(self.client_mode).lower()
        if self.client_mode not in CLIENT_MODES:
            raise ValueError(f"--client_mode {self.client_mode}: must be True, False or auto")
        self.client_mode = CLIENT_MODES[self.client_mode]
        if self.bandwidth is not None and self.bandwidth != "auto":
            try:
                self.bandwidth = float(self.bandwidth)
            except ValueError as error:
                raise ValueError(f"--bandwidth {self.bandwidth}: pass a number of Mbit/s, or auto") from error
            check_positive(self, "bandwidth")
        if self.bandwidth == "auto" and not self.initial_peers:
            raise ValueError("--bandwidth auto needs --initial_peers to measure against; pass a number of Mbit/s")

    @property
    def is_client(self) -> bool:
        """Whether nobody can connect to this peer; not as long as that is to be found out."""
        return self.client_mode is True

    @property
    def token_file(self) -> str | None:
        """The token of a private run; None for an open one."""
        return None if str(self.authorize).lower() in ("false", "none", "no", "0") else self.authorize


@dataclass
class TrainerPeerArguments(PeerArguments):
    """What only a trainer needs: data, backups, metrics."""

    dataset_sources: list[str] | None = option(
        None,
        "Text to train on: .txt, .jsonl, .jsonl.gz, .parquet files or globs, or Hugging Face data sets "
        "(name[:config][@commit]). Those named ORG/NAME[:config]@COMMIT are handed over to whoever joins without text.",
        topic=TEXT,
        scope=NAMED,
    )
    dataset_weights: list[float] | None = option(
        None, "How often each source is drawn from, in the same order; equal by default.", topic=TEXT, scope=NAMED
    )
    pack_sequences: bool = option(
        False,
        "Fill each row with several texts that do not see each other: next to no padding, at any --pad_to_multiple_of. "
        "per_device_train_batch_size then counts rows; samples are counted as before.",
        topic=TEXT,
        scope=MINE,
    )
    init_checkpoint: str | None = option(
        None,
        "Begin a run with the weights of a published state.pth, a backup or a stored checkpoint; for the first "
        "trainer, whoever joins gets them from the swarm.",
        topic=TEXT,
    )
    statistics_expiration: float = option(600.0, "Seconds for which reported metrics stay in the DHT.", topic=FILES)
    backup_every_epochs: int = option(
        10, "Write a backup of model and optimizer every so many epochs (and at exit).", topic=FILES
    )
    state_path: str | None = option(None, "The backup's file; by default OUTPUT_DIR/RUN_ID/backup.pth.", topic=FILES)
    wait_for_peers: int = option(
        1, "Start training when this many trainers, this one included, are present.", topic=WHO
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "statistics_expiration", "backup_every_epochs", "wait_for_peers")


@dataclass
class AuxiliaryPeerArguments(PeerArguments):
    """What only an auxiliary peer needs: checkpoints, uploads, help with averaging."""

    run_datasets: list[str] = option(
        [],
        "Hugging Face data sets (ORG/NAME[:config]@COMMIT) for trainers that join without --dataset_sources, for who "
        "starts a run; this peer reads none.",
        topic=TEXT,
    )
    refresh_period: float = option(10.0, "Seconds between two looks at the trainers' metrics.", topic=FILES)
    assist_in_averaging: bool = option(False, "Lend bandwidth to the trainers' averaging rounds.", topic=SERVICE)
    assist_refresh: float = option(
        1.0,
        "Seconds between two looks whether an averaging round is over and the next can be waited for.",
        topic=SERVICE,
    )
    store_checkpoints: bool = option(
        False, "Download the state from trainers and store it as checkpoint directories.", topic=SERVICE
    )
    save_checkpoint_epoch_interval: int = option(5, "Epochs between two checkpoints.", topic=SERVICE)
    keep_checkpoints: int = option(
        0,
        "Besides the newest, keep so many of the whole run in LOCAL_PATH-epochs, spread over it; "
        "uploaded ones are tagged epoch-N on the hub.",
        topic=SERVICE,
    )
    local_path: str | None = option(
        None, "The checkpoint's directory; by default OUTPUT_DIR/RUN_ID/checkpoint.", topic=SERVICE
    )
    upload_interval: float | None = option(
        None, "Seconds between two uploads of the newest checkpoint to repo_url.", topic=SERVICE
    )
    repo_url: str | None = option(
        None, "Repository on the Hugging Face hub (ORGANISATION/NAME) for uploads.", topic=SERVICE
    )
    eval_sources: list[str] = option(
        [],
        "Held-out text, written as --dataset_sources: each stored checkpoint is scored on it, beside the averaging.",
        topic=SERVICE,
    )
    eval_pairs: str | None = option(
        None,
        "Directory that holds RuBLiMP/PARADIGM.csv: each stored checkpoint is asked which sentences are grammatical.",
        topic=SERVICE,
    )
    eval_pairs_each: int = option(
        10,
        "Pairs of each paradigm for that, always the same ones. A pair takes as long as some 13 sequences of text.",
        topic=SERVICE,
    )
    report_interval: float = option(
        120.0, "Seconds between two writes of report.html, beside metrics.jsonl.", topic=FILES
    )
    eval_batches: int = option(
        16, "Batches of 32 sequences of 128 tokens on which a checkpoint is scored.", topic=SERVICE
    )
    eval_margin: float = option(
        0.1, "Say so when a checkpoint's held-out loss is more than this above the best one's, in nats.", topic=SERVICE
    )

    def __post_init__(self):
        super().__post_init__()
        if self.is_client:
            raise ValueError("--client_mode: an auxiliary peer must accept connections; open a port or run a trainer")
        check_positive(self, "refresh_period", "assist_refresh", "save_checkpoint_epoch_interval", "eval_batches",
                       "eval_pairs_each", "report_interval")  # fmt: skip
        check_range(self, 0, math.inf, "eval_margin", "keep_checkpoints")
        stored = {"keep_checkpoints": "kept", "eval_sources": "scored", "eval_pairs": "scored"}
        for flag, what in stored.items():
            if getattr(self, flag) and not self.store_checkpoints:
                raise ValueError(f"--{flag} needs --store_checkpoints: stored checkpoints are what is {what}")
        if self.upload_interval is not None:
            check_positive(self, "upload_interval")
        given = self.upload_interval is not None, self.repo_url is not None
        if any(given) and not (all(given) and self.store_checkpoints):
            raise ValueError("uploads need --store_checkpoints, --repo_url and --upload_interval together")
        if self.repo_url is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_url):
            raise ValueError(f"--repo_url {self.repo_url}: should be ORGANISATION/NAME, without the web address")


@dataclass
class CollaborationArguments:
    """How the swarm steps together; the first group must be equal on all peers."""

    target_batch_size: int = option(
        16384, "Samples of all peers together that make one epoch (one global step).", topic=OPTIMIZER, scope=PEERS
    )
    matchmaking_time: float = option(
        60.0,
        "Seconds that peers wait for each other at most; a round of averaging begins when all are there.",
        topic=AVERAGING,
        scope=PEERS,
    )
    next_chunk_timeout: float = option(
        60.0, "A peer that sends nothing for so many seconds is left out of the round.", topic=AVERAGING, scope=RUN
    )
    averaging_timeout: float = option(
        600.0, "Give up an averaging round after so many seconds.", topic=AVERAGING, scope=RUN
    )
    average_state_every: int = option(
        20,
        "Average parameters every so many epochs, and after epochs in which a trainer did not get all averaged "
        "gradients; else they stay equal.",
        topic=AVERAGING,
        scope=PEERS,
    )
    averaging_bits: int = option(
        8,
        "Bits of a value on its way to whoever averages it and back: 8, or 4 for slow links, with seven times the "
        "error (small tensors and parameters: 16).",
        topic=AVERAGING,
        scope=PEERS,
        choices=[8, 4],
    )
    robust_averaging: str | None = option(
        None,
        "clip: what lies far from the middle of a round, or always on one side of it, counts less (centered clipping); "
        "against a minority that lies, where all trainers read like text. By default the mean.",
        topic=AVERAGING,
        scope=PEERS,
        choices=["clip"],
    )
    local_batch_size: int = option(
        0,
        "Samples of a local step: each trainer steps by itself, and an epoch's end averages how far all have come; for "
        "slow connections, see docs/links.md. 0: gradients are averaged, and an epoch is one step.",
        topic=AVERAGING,
        scope=PEERS,
    )
    local_steps_after: int = option(
        0, "With --local_batch_size: first epochs without local steps.", topic=AVERAGING, scope=PEERS
    )
    outer_learning_rate: float = option(
        0.7, "With --local_batch_size: of the step that the average of an epoch makes.", topic=AVERAGING, scope=PEERS
    )
    outer_momentum: float = option(
        0.5, "With --local_batch_size: Nesterov momentum of that step.", topic=AVERAGING, scope=PEERS
    )
    offload_optimizer: bool = option(True, "Keep the optimizer's state and step on the CPU.", topic=MACHINE, scope=MINE)
    delay_optimizer_step: bool = option(
        True, "Run the optimizer in the background of the next epoch's first batches.", topic=AVERAGING, scope=RUN
    )
    delay_grad_averaging: bool = option(True, "Average gradients in the background, too.", topic=AVERAGING, scope=RUN)
    reuse_grad_buffers: bool = option(
        True,
        "Accumulate in the model's own gradient buffers: saves one copy of them.",
        topic=MACHINE,
        scope=MINE,
    )

    def __post_init__(self):
        check_positive(self, "target_batch_size", "matchmaking_time", "next_chunk_timeout", "average_state_every")
        if self.averaging_timeout <= 2 * self.next_chunk_timeout:
            raise ValueError(
                f"--averaging_timeout {self.averaging_timeout} must be longer than twice --next_chunk_timeout "
                f"{self.next_chunk_timeout}, or one silent peer fails the round for all"
            )
        if self.averaging_timeout <= self.matchmaking_time:
            raise ValueError(
                f"--averaging_timeout {self.averaging_timeout} must be longer than --matchmaking_time "
                f"{self.matchmaking_time}, which is part of it"
            )
        if self.delay_grad_averaging and not self.delay_optimizer_step:
            raise ValueError("--delay_grad_averaging needs --delay_optimizer_step")
        if self.delay_optimizer_step and not self.offload_optimizer:
            raise ValueError("--delay_optimizer_step needs --offload_optimizer")
        self._check_local_steps()

    def _check_local_steps(self) -> None:
        check_range(self, 0, math.inf, "local_batch_size", "local_steps_after")
        check_positive(self, "outer_learning_rate")
        check_range(self, 0, 1, "outer_momentum")
        if not self.local_batch_size:
            return
        if self.local_batch_size > self.target_batch_size:
            raise ValueError(
                f"--local_batch_size {self.local_batch_size} must not be more than --target_batch_size "
                f"{self.target_batch_size}, the samples of all trainers between two averagings"
            )
        if not self.offload_optimizer:
            raise ValueError("--local_batch_size needs --offload_optimizer, which holds the common parameters")
        if self.delay_optimizer_step and not self.delay_grad_averaging:
            raise ValueError(
                "--local_batch_size with --delay_optimizer_step needs --delay_grad_averaging, too: give both or none"
            )


@dataclass
class HFTrainerArguments(TrainingArguments):
    """Batch, optimizer and schedule. Inherited flags of transformers.TrainingArguments work too, but are not listed."""

    output_dir: str = option("outputs", "Metrics and backups go to OUTPUT_DIR/RUN_ID.", topic=FILES)
    per_device_train_batch_size: int = option(
        1, "Sequences in one forward pass on one device.", topic=MACHINE, scope=MINE
    )
    gradient_accumulation_steps: int = option(
        1,
        "Forward passes between two reports to the swarm; aim at 1 to 10 seconds.",
        topic=MACHINE,
        scope=MINE,
    )
    activation_memory: str | None = option(
        None,
        'What each layer keeps for the backward pass: "default" (fastest), "lean" or "checkpoint" (least); without it, '
        "the model configuration decides.",
        topic=MACHINE,
        scope=MINE,
        choices=["default", "lean", "checkpoint"],
    )
    cpu_kernels: str | None = option(
        None,
        'Matrix products and attention without a GPU: "measure" (the default) takes what is fastest on this machine, '
        'measured once and kept in the cache folder of the user; "torch" and "onednn" take those of one library.',
        topic=MACHINE,
        scope=MINE,
        choices=["measure", "torch", "onednn"],
    )
    gradient_checkpointing: bool = option(
        False, "The same as --activation_memory checkpoint.", topic=MACHINE, scope=MINE
    )
    fp16: bool = option(False, "Mixed precision with float16 (older GPUs).", topic=MACHINE, scope=MINE)
    bf16: bool = option(False, "Mixed precision with bfloat16 (newer GPUs and CPUs).", topic=MACHINE, scope=MINE)
    optimizer: str = option(
        "lamb",
        'What steps with the averaged gradients: "lamb", or "muon" for the large matrices and LAMB for the rest '
        "(docs/recipes.md).",
        topic=OPTIMIZER,
        scope=PEERS,
        choices=["lamb", "muon"],
    )
    learning_rate: float = option(
        2.5e-3, "Peak learning rate, of LAMB and of Muon alike.", topic=OPTIMIZER, scope=PEERS
    )
    min_learning_rate: float | None = option(
        None, "Floor of the learning rate; by default 2 %% of its peak.", topic=OPTIMIZER, scope=PEERS
    )
    num_zero_lr_steps: int = option(
        50, "First epochs with a learning rate of zero, in which statistics warm up.", topic=OPTIMIZER, scope=PEERS
    )
    total_steps: int = option(
        15_625, "Stop at this epoch; the learning rate falls linearly until then.", topic=OPTIMIZER, scope=PEERS
    )
    warmup_steps: int = option(3_125, "Epochs in which the learning rate rises.", topic=OPTIMIZER, scope=PEERS)
    schedule: str = option(
        "linear",
        'After the warm-up: "linear", the rate falls from there on, or "wsd", it stays at its peak until the last '
        "decay_steps epochs.",
        topic=OPTIMIZER,
        scope=PEERS,
        choices=["linear", "wsd"],
    )
    decay_steps: int | None = option(
        None,
        "Epochs in which the rate falls under --schedule wsd; by default a fifth of total_steps.",
        topic=OPTIMIZER,
        scope=PEERS,
    )
    adam_beta1: float = option(0.9, "Decay of LAMB's first moment.", topic=OPTIMIZER, scope=PEERS)
    adam_beta2: float = option(0.95, "Decay of LAMB's second moment.", topic=OPTIMIZER, scope=PEERS)
    adam_epsilon: float = option(1e-6, "Added to the root of the second moment.", topic=OPTIMIZER, scope=PEERS)
    weight_decay: float = option(0.01, "Weight decay, not applied to biases and norms.", topic=OPTIMIZER, scope=PEERS)
    max_grad_norm: float = option(
        1.0, "Averaged gradients are clipped to this norm in the optimizer.", topic=OPTIMIZER, scope=PEERS
    )
    clamp_value: float = option(
        1e9, "Upper limit of the parameter norm in LAMB's trust ratio.", topic=OPTIMIZER, scope=PEERS
    )
    min_8bit_size: int = option(
        2**20, "Parameters with fewer values keep 32-bit statistics.", topic=OPTIMIZER, scope=PEERS
    )
    max_sequence_length: int = option(2048, "Longest training sequence, in tokens.", topic=TEXT, scope=TRAINERS)
    initial_sequence_length: int | None = option(256, "Longest sequence at the start.", topic=TEXT, scope=TRAINERS)
    sequence_length_warmup_steps: int = option(
        7_000, "Epochs in which the sequence length grows to its maximum.", topic=TEXT, scope=TRAINERS
    )
    pad_to_multiple_of: int = option(
        128, "Sequence lengths are rounded up to a multiple of this.", topic=TEXT, scope=TRAINERS
    )
    mlm_probability: float = option(
        0.15,
        "Share of the tokens that are to be predicted (held-out text: always 0.15).",
        topic=TEXT,
        scope=TRAINERS,
    )
    final_mlm_probability: float | None = option(
        None, "That share at the last epoch, on a line from the first; by default the same.", topic=TEXT, scope=TRAINERS
    )
    sentence_order: bool = option(
        True,
        "Train on two stretches of a text and whether they are in order, besides. False: on one stretch, and on masked "
        "words alone; pooler and order head stay as they are.",
        topic=TEXT,
        scope=PEERS,
    )
    seed: int = option(
        0,
        "Seed of the initial parameters: must be equal on all peers that start a run together.",
        topic=TEXT,
        scope=RUN,
    )
    max_steps: int = option(10**18, "Stop this trainer after so many local steps.", topic=MACHINE)
    dataloader_num_workers: int = option(0, "Processes that prepare data beside the trainer.", topic=MACHINE)
    ddp_timeout: int = option(10**7, argparse.SUPPRESS)  # other ranks wait while rank 0 waits for the swarm
    logging_steps: float = option(10**9, argparse.SUPPRESS)
    logging_nan_inf_filter: bool = option(False, argparse.SUPPRESS)
    save_strategy: str = option("no", argparse.SUPPRESS)
    disable_tqdm: bool | None = option(True, argparse.SUPPRESS)
    remove_unused_columns: bool | None = option(False, argparse.SUPPRESS)
    optim: str = option("adamw_torch", argparse.SUPPRESS)

    def __post_init__(self):
        if self.activation_checkpointing is None:  # the newer name of the same option
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing:
            if self.activation_memory not in (None, "checkpoint"):
                raise ValueError(f"--gradient_checkpointing contradicts --activation_memory {self.activation_memory}")
            self.activation_memory = "checkpoint"
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()  # otherwise --bf16 is refused without a GPU
        super().__post_init__()
        self.check_ranges()

    def check_ranges(self) -> None:
        """Raises ValueError for a value that is impossible, or contradicts another one."""
        check_positive(self, "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
                       "total_steps", "max_steps", "max_sequence_length", "pad_to_multiple_of", "adam_epsilon",
                       "max_grad_norm", "clamp_value")  # fmt: skip
        check_range(self, 0, 1, "adam_beta1", "adam_beta2")
        check_range(self, 0, math.inf, "weight_decay", "num_zero_lr_steps", "sequence_length_warmup_steps",
                    "min_8bit_size", "dataloader_num_workers")  # fmt: skip
        check_range(self, 0, 2**32, "seed")  # what numpy takes
        if self.min_learning_rate is not None and not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"--min_learning_rate {self.min_learning_rate} must lie between 0 and --learning_rate "
                f"{self.learning_rate}"
            )
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps} must lie between 0 and --total_steps {self.total_steps}"
            )
        self._check_decay()
        for name in ("mlm_probability", "final_mlm_probability"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"--{name} {value} must lie between 0 and 1: 0.15 hides every seventh token")
        if self.initial_sequence_length is not None and not (
            0 < self.initial_sequence_length <= self.max_sequence_length
        ):
            raise ValueError(
                f"--initial_sequence_length {self.initial_sequence_length} must lie between 1 and "
                f"--max_sequence_length {self.max_sequence_length}"
            )

    def _check_decay(self) -> None:
        if self.decay_steps is None:
            return
        if self.schedule != "wsd":
            raise ValueError(f"--decay_steps {self.decay_steps} needs --schedule wsd: linear falls after the warm-up")
        after_warmup = self.total_steps - self.warmup_steps
        if not 0 < self.decay_steps <= after_warmup:
            raise ValueError(
                f"--decay_steps {self.decay_steps} must lie between 1 and the {after_warmup} epochs that --total_steps "
                "leaves after --warmup_steps"
            )


KINDS = (PeerArguments, TrainerPeerArguments, AuxiliaryPeerArguments, CollaborationArguments, HFTrainerArguments)
FLAGS = {name: kind.__dataclass_fields__[name] for kind in KINDS for name in kind.__annotations__}
TYPES = {name: kind for one in KINDS for name, kind in one.__annotations__.items()}  # a parser changes those of fields


def shared_flags(*, trainer: bool) -> tuple[str, ...]:
    """The flags whose values a peer of a run must have in common with the others."""
    scopes = SHARED if trainer else (PEERS,)
    return tuple(name for name, flag in FLAGS.items() if flag.metadata["scope"] in scopes)


def run_settings(peer: PeerArguments, collaboration: CollaborationArguments, training: HFTrainerArguments) -> dict:
    """{flag: value} of what a run was made with, for its metrics file and model card; no addresses, no keys."""
    described = [name for name, flag in FLAGS.items() if flag.metadata["scope"] in DESCRIPTION]
    groups = (peer, collaboration, training)
    return {name: getattr(group, name) for name in described for group in groups if hasattr(group, name)}


def handed_over_flags() -> tuple[str, ...]:
    """The flags that a run may tell whoever joins it: neither paths and addresses nor what is a peer's own choice."""
    return tuple(name for name, flag in FLAGS.items() if flag.metadata["scope"] in HANDED_OVER)


def check_handed_over(flags: dict) -> None:
    """Raises ValueError for the first of some flags from outside that is unknown, none that is handed over, not of the
    flag's type, or out of its range."""
    for name, value in flags.items():
        if name not in FLAGS:
            raise ValueError(f"--{name[:50]!r} is no flag of this version; update it, or ask the run which one to take")
        if name not in handed_over_flags():
            raise ValueError(f"--{name} is for each peer to choose, and not taken from outside")
        if not _has_type(value, TYPES[name]):
            raise ValueError(f"--{name} {str(value)[:50]!r} is of the wrong type")
        choices = FLAGS[name].metadata.get("choices", ())
        if type(value) is str and value not in choices:
            raise ValueError(f"--{name} {str(value)[:50]!r} is none of {', '.join(choices)}")
    named = argparse.Namespace(**{"min_vector_size": 1, "max_sequence_length": 1, "pad_to_multiple_of": 1, **flags})
    check_positive(named, "min_vector_size")
    check_range(named, 1, 2**24, "max_sequence_length", "pad_to_multiple_of")
    check_range(named, 0, 10**6, *flags.keys() & {"matchmaking_time", "next_chunk_timeout", "averaging_timeout"})
    CollaborationArguments(**{name: flags[name] for name in flags if name in CollaborationArguments.__annotations__})
    schedule = object.__new__(HFTrainerArguments)  # an ordinary one looks for devices, and for other processes
    vars(schedule).update(flags)
    schedule.check_ranges()


def _has_type(value: object, kind: object) -> bool:
    """``kind``: of a field that is a number, a word or a switch, or may be None."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None:
        return type(None) in kinds
    if bool in kinds:
        return type(value) is bool
    if type(value) is str:
        return str in kinds
    if type(value) is int:
        return abs(value) < 2**63 and not {int, float}.isdisjoint(kinds)
    return float in kinds and type(value) is float and math.isfinite(value)


def joining_arguments(peer: PeerArguments, addresses: list[str], *, asks_for_text: bool) -> list[str]:
    """The arguments with which another machine joins: the run hands over all the rest, but for text of one's own
    where it names no data sets (``asks_for_text``)."""
    text = "@demo/corpus/*.txt" if getattr(peer, "dataset_sources", None) == [DEMO_CORPUS] else "YOUR_TEXT"
    return [
        *("--run_id", peer.run_id, *(["--use_ipfs"] if peer.use_ipfs else [])),
        *(["--dataset_sources", text] if asks_for_text else []),
        *("--initial_peers", *addresses),
    ]


def names_flags(word: str) -> bool:
    """Whether this word of a command line is a file of flags to be read."""
    return word.startswith("@") and (word.endswith(".args") or not OWN_FILE.fullmatch(word))


class ArgumentParser(OneLineErrors, HfArgumentParser):
    """Parser over dataclasses with ``@FILE`` arguments; inherited transformers flags work but are not listed."""

    def __init__(self, *dataclass_types, **kwargs):
        usage = "%(prog)s [@FILE] --run_id RUN_ID [flags]"
        super().__init__(dataclass_types, allow_abbrev=False, usage=usage, **kwargs)
        inherited = set(TrainingArguments.__dataclass_fields__) - set(HFTrainerArguments.__annotations__)
        for action in self._actions:
            if action.dest.removeprefix("no_") in inherited:
                action.help = argparse.SUPPRESS
        self._list_by_topic()

    def add_argument(self, *names, topic: str = "", scope: str = "", **kwargs):
        """HfArgumentParser passes on all that `option` says of a flag; argparse knows only its own words."""
        return super().add_argument(*names, **kwargs)

    def _list_by_topic(self) -> None:
        """Move the flags of each topic from the one long list of argparse to a group of their own."""
        topic_of = {name: flag.metadata["topic"] for name, flag in FLAGS.items()}
        groups = {topic: self.add_argument_group(topic) for topic in [*TOPICS, "more"]}
        for action in list(self._optionals._group_actions):
            if action.help != argparse.SUPPRESS and action.dest != "help":
                # --no_X, which HfArgumentParser makes for each X that is on by default, has the destination of X
                group = groups[topic_of.get(action.dest.removeprefix("no_"), "more")]
                self._optionals._group_actions.remove(action)
                group._group_actions.append(action)
        places = {name: place for place, name in enumerate(FLAGS)}
        for group in groups.values():
            group._group_actions.sort(key=lambda action: places.get(action.dest.removeprefix("no_"), len(places)))

    def parse(self, argv: list[str]) -> tuple:
        """Dataclass instances in the order of the types; wrong flags and values end the program with code 2."""
        words = self.read_files(argv)
        try:
            *instances, unknown = self.parse_args_into_dataclasses(
                args=words, look_for_args_file=False, return_remaining_strings=True
            )
        except ValueError as error:
            self.error(str(error).splitlines()[0])
        if unknown:
            self.refuse_unknown(unknown)
        self.refuse_combinations({name: value for one in instances for name, value in vars(one).items()})
        return tuple(instances)

    def refuse_combinations(self, values: dict) -> None:
        """Of flags of different groups, each of which cannot know the other."""
        if values.get("local_batch_size") and values.get("optimizer") == "muon":
            self.error("--local_batch_size works with --optimizer lamb only, the inner steps of muon are not built yet")

    def parse_run(self, words: list[str]) -> tuple:
        """As `parse`, when all that the run hands over stands among the words."""
        instances = self.parse(words)
        self.require_own_run(instances[0], asked=True)
        return instances

    def parse_first(self, words: list[str]) -> tuple[object, dict]:
        """An instance of the first type alone, and {flag: value} of all that stands in the words, defaults left out."""
        given = argparse.Namespace(**{action.dest: argparse.SUPPRESS for action in self._actions})
        given, unknown = self.parse_known_args(words, given)
        if unknown:
            self.refuse_unknown(unknown)
        given = {name: value for name, value in vars(given).items() if value is not argparse.SUPPRESS}
        kind = self.dataclass_types[0]
        try:
            return kind(**{name: given[name] for name in given if name in kind.__dataclass_fields__}), given
        except ValueError as error:
            self.error(str(error).splitlines()[0])

    def require_own_run(self, peer: PeerArguments, *, asked: bool = False) -> None:
        """Ends the program if nobody has told this peer what to train: the demo is for those who ask.

        ``asked``: what the run hands over is here already; without it, whoever joins may still be told.
        """
        missing = [name for name in WHAT_TO_TRAIN if getattr(peer, name, "") is None]
        if not missing or (peer.initial_peers and not asked):
            return
        role = "trainer" if isinstance(peer, TrainerPeerArguments) else "aux"
        advice = [] if missing == ["dataset_sources"] else [f"take a recipe (@recipes/small/{role}.args)"]
        advice += ["name your text (--dataset_sources 'texts/*.txt')"] if "dataset_sources" in missing else []
        why = "is started here (no --initial_peers)"
        if peer.initial_peers:
            why = "has no peer that hands over its settings"
        self.error(
            f"run {peer.run_id} {why}, but --{', --'.join(missing)} {'is' if len(missing) == 1 else 'are'} not given: "
            f"{' and '.join(advice)}, see docs/recipes.md; or train the demo's with @demo/{role}.args"
        )

    def read_files(self, words: list[str], within: tuple[Path, ...] = ()) -> list[str]:
        """The words with each ``@FILE`` replaced by what it holds."""
        found = []
        for word in words:
            own = OWN_FILE.fullmatch(word)
            if not (own or word.startswith("@")):
                found.append(word)
                continue
            if not names_flags(word):
                found.append(f"{own[1] or ''}{REPOSITORY / own[2]}")
                continue
            path = REPOSITORY / own[2] if own else Path(word[1:])
            if path in within:
                self.error(f"{word}: this file of flags names itself")
            try:
                text = path.read_text(encoding="utf-8-sig")  # Windows editors begin it with a byte order mark
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8 text"
                self.error(f"{word}: cannot read this file of flags ({reason})")
            if "\0" in text:
                self.error(f"{word}: cannot read this file of flags (it holds NUL bytes, as UTF-16 text does: save it "
                           "as UTF-8)")  # fmt: skip
            for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut a path that holds U+2028
                try:
                    inner = shlex.split(line, comments=True)
                except ValueError as error:
                    self.error(f"{word}, line {number}: {error}")
                found += self.read_files(inner, (*within, path))
        return found
