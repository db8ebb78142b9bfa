"""Real tokens per CPU second of a whole trainer: text in, updated parameters out.

    python -m benchmarks.whole_trainer [--device cuda]

Three sides by turns, same text, tokenizer, sizes, sequence length, sequences in a step and threads. Tokens are counted
where the model takes them, without padding: batches that a loader makes ahead and throws away do not count.

- ours: the data, collator, model and LAMB of run_trainer.py in transformers' Trainer (without the swarm's processes)
- original: its pipeline restated in `benchmarks/reference`: sentences tokenised twice, chunks of one sentence dropped,
  batches of neighbours in the text padded to the full length, mask loop, its lean layers (11 units, attention core
  checkpointed), logits at all positions, whole-tensor LAMB. In its favour: a plain loop instead of a Trainer, and the
  matrix products of our layers in its feed-forward layers.
- HF: AlbertForPreTraining as it comes (sdpa, gelu_new, no dropout), Trainer with its fused AdamW, and
  DataCollatorForLanguageModeling on the texts put end to end: no padding, and no time spent on pairs of segments

Two texts: long documents (the corpus as it is) and, without HF, short ones: the corpus cut into pieces of log-normal
lengths with a median of 1,200 characters. About three minutes.

On a GPU: real tokens per second, without the original, which is restated for a CPU; larger batches under bf16 autocast
where the GPU has it; many forward passes in a step, as in a run, with LAMB in main memory, as there.
"""

import itertools
import logging
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.data_pipeline import cut_short_documents, write_documents
from benchmarks.measure import Row, Timing, interleave, options, report
from benchmarks.reference.collator import WholeWordMaskLoop
from benchmarks.reference.instances import make_instances
from benchmarks.reference.lean_layers import original_encoder
from benchmarks.reference.whole_tensor_lamb import WholeTensorLAMB8Bit
from src.models import LeanAlbertConfig, LeanAlbertForPreTraining, load_tokenizer
from src.models.transformer import drop_idle_mask
from src.optim.lamb import CPULAMB8Bit
from src.optim.parameter_groups import parameter_groups
from tasks.mlm.data import make_training_dataset
from tasks.mlm.sources import iterate_documents
from tasks.mlm.whole_word_mask import DataCollatorForWholeWordMask

REPOSITORY = Path(__file__).resolve().parent.parent
CORPUS = REPOSITORY.parent / "shared" / "data" / "corpus_ru" / "train.jsonl.gz"
DEMO = REPOSITORY / "demo"
MICRO_BATCH, MICRO_STEPS = 4, 2  # sequences in a forward pass, forward passes in a step
GPU_BATCH, GPU_STEPS = 32, 32  # the same; in a run, too, some thousand sequences make a step
TARGETS = {"original": ">= 2.5", "HF": ">= 1.35"}
PACKED = "ours, packed"  # on short documents, beside "ours", whose batches hold instances of similar lengths
LAMB = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-6, "max_grad_norm": 1.0}
SIZES = {
    "vocab_size": 50_000,  # what a real run has; the demo's tokenizer uses 4,000 of them
    "embedding_size": 128,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 512,
}


class TokenCount:
    """Counts the tokens, without padding, that a model is given."""

    def __init__(self, model: torch.nn.Module):
        self.counted = torch.zeros((), dtype=torch.long)
        model.register_forward_pre_hook(self.add, with_kwargs=True)

    @property
    def tokens(self) -> int:
        """Until now; waits for the device, which `add` does not."""
        return int(self.counted)

    def add(self, model, args, inputs) -> None:
        mask = inputs.get("attention_mask")
        more = inputs["input_ids"].numel() if mask is None else mask.sum()
        self.counted = self.counted.to(inputs["input_ids"].device) + more


class Stream(IterableDataset):
    """Goes on where the last reader stopped."""

    def __init__(self, items: Iterator):
        self.items = items

    def __iter__(self):
        return self.items


class StepByStep(TrainerCallback):
    """A training run that makes one step for each call and waits between them, in a thread of its own.

    A run for each step would take up to half a second to set Trainer up, of which a step of a real run knows nothing.
    """

    def __init__(self, trainer: Trainer):
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)
        self.trainer, self.thread = trainer, threading.Thread(target=self._train, daemon=True)
        self.wanted, self.made, self.is_ended = threading.Semaphore(0), threading.Semaphore(0), False
        self.failure: BaseException | None = None

    def _train(self) -> None:
        torch.set_num_threads(1)
        try:
            self.wanted.acquire()
            self.trainer.train()
        except BaseException as error:
            self.failure = error
        self.made.release()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.made.release()
        self.wanted.acquire()
        control.should_training_stop = self.is_ended

    def __call__(self) -> None:
        if not self.thread.is_alive():
            self.thread.start()
        self.wanted.release()
        self.made.acquire()
        if self.failure is not None:
            raise self.failure

    def end(self) -> None:
        self.is_ended = True
        self.wanted.release()
        self.thread.join()


class PlainLoop:
    """The original's steps."""

    def __init__(self, batches: Iterator[dict], model: torch.nn.Module, lamb: WholeTensorLAMB8Bit):
        self.batches, self.model, self.lamb = batches, model, lamb

    def __call__(self) -> None:
        for _ in range(MICRO_STEPS):
            (self.model(**next(self.batches)).loss / MICRO_STEPS).backward()
        self.lamb.step()
        self.model.zero_grad()

    def end(self) -> None:
        """Nothing runs between the steps."""


class OffloadedLamb(CPULAMB8Bit):
    """Steps on copies in main memory, as peers do: gradients come from the device, new parameters go back to it."""

    def __init__(self, groups: list[dict], **options):
        self.pairs = []  # of a parameter and its copy
        for group in groups:
            copies = [torch.nn.Parameter(parameter.detach().cpu().clone()) for parameter in group["params"]]
            self.pairs += zip(group["params"], copies, strict=True)
            group["params"] = copies
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter, copy in self.pairs:
            copy.grad = parameter.grad.cpu()
        super().step()
        for parameter, copy in self.pairs:
            parameter.copy_(copy)


class OurTrainer(Trainer):
    """As CollaborativeTrainer: a plain loader, no mask that hides nothing, and LAMB does the clipping."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator)

    def _prepare_inputs(self, inputs: dict) -> dict:
        return super()._prepare_inputs(drop_idle_mask(inputs))

    def _clip_grad_norm(self, model) -> None:
        """LAMB clips."""

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        """Not needed."""


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    flags = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    length = 64 if flags.quick else 512
    sizes = {**SIZES, "vocab_size": 4000, "hidden_size": 64, "num_attention_heads": 1} if flags.quick else SIZES
    tokenizer = load_tokenizer(str(DEMO / "tokenizer"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(folder, flags.device)
        case = "1 thread" if flags.device == "cpu" else "GPU, bf16" if arguments["bf16"] else "GPU, fp32"
        for text, files in find_texts(Path(folder)).items():
            sides = {}
            makers = {"ours": ours} if flags.device == "cuda" else {"ours": ours, "original": original}
            # put end to end, texts are all alike to HF: short ones would tell nothing more about it
            makers |= {"HF": hugging_face} if text == "long" else {PACKED: partial(ours, pack_sequences=True)}
            for name, make in makers.items():
                torch.manual_seed(0)
                sides[name] = CountedSide(*make(sizes, tokenizer, files, length, arguments))
            timings = interleave(
                sides,
                rounds=2 if text == "long" and not flags.quick else 1,
                clock=time.process_time if flags.device == "cpu" else time.perf_counter,
                seconds=70 if flags.device == "cpu" else 30,
            )
            tokens = {name: side.tokens for name, side in sides.items()}
            unit = "CPU second" if flags.device == "cpu" else "second"
            rows += make_rows(timings, tokens, f"length {length}, {text} documents, {case}", per=unit)
    sequences = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    notes = [f"Text: {'corpus_ru' if CORPUS.exists() else 'demo/corpus'}; {sequences} sequences a step."]
    report("whole_trainer", "Whole trainer, one peer", rows, notes, flags.results)
    return 0


def trainer_arguments(folder: str, device: str) -> dict:
    on_cpu = device == "cpu"
    return {
        "output_dir": folder,
        "max_steps": 10**6,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": MICRO_BATCH if on_cpu else GPU_BATCH,
        "gradient_accumulation_steps": MICRO_STEPS if on_cpu else GPU_STEPS,
        "use_cpu": on_cpu,
        "bf16": not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_steps": 10**9,
    }


def find_texts(folder: Path) -> dict[str, list[str]]:
    """Files of long and of short documents, the latter written to ``folder``."""
    files = [str(CORPUS)] if CORPUS.exists() else sorted(map(str, (DEMO / "corpus").glob("*.txt")))
    texts = [text for name in files for text in iterate_documents(name)]
    return {"long": files, "short": [write_documents(folder / "short.txt", cut_short_documents(texts[:200], 2000))]}


class CountedSide:
    """A side that notes how many tokens each of its runs took."""

    def __init__(self, run, count: TokenCount):
        self.run, self.count, self.tokens = run, count, []

    def __call__(self):
        before = self.count.tokens
        self.run()
        self.tokens.append(self.count.tokens - before)


def make_rows(timings: dict[str, Timing], tokens: dict[str, list[int]], case: str, *, per: str) -> list[Row]:
    """Tokens over seconds, both summed over the rounds: the token counts of single steps differ."""
    speed = {name: sum(tokens[name][-len(t.samples) :]) / sum(t.samples) for name, t in timings.items()}
    claim, unit = f"whole trainer: real tokens per {per}", "tokens/s"
    rows = [
        Row(claim, case, "ours", speed["ours"], unit, speed["ours"] / speed[peer], target, None, peer)
        for peer, target in TARGETS.items()
        if peer in speed
    ]
    if PACKED in speed:
        rows.append(Row(claim, case, PACKED, speed[PACKED], unit, speed[PACKED] / speed["ours"], None, None, "ours"))
    return rows + [Row(claim, case, name, speed[name], unit) for name in TARGETS if name in speed]


def lean_model(sizes: dict, *, sparse_prediction: bool) -> LeanAlbertForPreTraining:
    config = LeanAlbertConfig(**sizes, share_large_matrices=1, sparse_prediction=sparse_prediction)
    return LeanAlbertForPreTraining(config).train()


def ours(sizes, tokenizer, files, length, arguments, *, pack_sequences=False):
    dataset = make_training_dataset(
        tokenizer,
        sources=files,
        shuffle_seed=0,
        max_sequence_length=length,
        batch_size=arguments["per_device_train_batch_size"],
        pack_sequences=pack_sequences,
    )
    collator = DataCollatorForWholeWordMask(tokenizer, pad_to_multiple_of=8, seed=0)
    model = lean_model(sizes, sparse_prediction=True)
    kind = CPULAMB8Bit if arguments["use_cpu"] else OffloadedLamb
    lamb = kind(parameter_groups(model, 0.01), kernel="auto", reuse_grad_buffers=True, **LAMB)
    schedule = torch.optim.lr_scheduler.LambdaLR(lamb, lambda step: 1.0)
    trainer = OurTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Stream(iter(dataset)),
        data_collator=collator,
        optimizers=(lamb, schedule),
    )
    return StepByStep(trainer), TokenCount(model)


def original(sizes, tokenizer, files, length, arguments):
    instances = make_instances(documents(files), tokenizer, max_sequence_length=length, generator=random.Random(0))
    collator = WholeWordMaskLoop(tokenizer, width=length)
    batches = iter(DataLoader(Stream(instances), batch_size=MICRO_BATCH, collate_fn=collator))
    model = lean_model(sizes, sparse_prediction=False)
    transformer = model.albert.transformer
    transformer.forward = lambda states, mask, **options: (original_encoder(transformer, states, mask), None)
    lamb = WholeTensorLAMB8Bit(model.parameters(), weight_decay=0.01, **LAMB)
    return PlainLoop(batches, model, lamb), TokenCount(model)


def hugging_face(sizes, tokenizer, files, length, arguments):
    config = AlbertConfig(
        **sizes, num_hidden_groups=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    model = AlbertForPreTraining(config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Stream(concatenated(documents(files), tokenizer, length)),
        data_collator=collator,
    )
    return StepByStep(trainer), TokenCount(model)


def concatenated(texts: Iterator[str], tokenizer, length: int) -> Iterator[dict]:
    """Pieces of exactly ``length`` tokens of the texts, put end to end and tokenised a hundred at a time."""
    tokens: list[int] = []
    while batch := list(itertools.islice(texts, 100)):
        for ids in tokenizer(batch)["input_ids"]:
            tokens += ids
        whole = len(tokens) // length * length
        for start in range(0, whole, length):
            yield {"input_ids": tokens[start : start + length], "sentence_order_label": start // length % 2}
        tokens = tokens[whole:]


def documents(files: list[str]) -> Iterator[str]:
    """The texts of the files, again and again."""
    while True:
        for name in files:
            yield from iterate_documents(name)


if __name__ == "__main__":
    sys.exit(main())
