"""Tokens a second of a training step, forward and backward of a whole model, and what share of the device they use.

    python -m benchmarks.training_step --precision bf16 [--compile]

By turns, with the same sizes, tokens and labels (15 % of the positions):

- LeanALBERT, 12 layers that share their matrices, by what each layer keeps (`activation_memory`)
- transformers' AlbertForPreTraining of the same size (sdpa)
- transformers' ModernBertForMaskedLM with as many layers of as many products (sdpa): two of three layers attend to
  their neighbours only, the loss is computed at labelled positions only, matrices are not shared

Model FLOP utilisation is the rate of the multiplications and additions that the step needs (forward, and twice as much
backward; nothing repeated, the head at labelled positions only) over the highest rate that a large product of two
square matrices of the same type reached in this run.
"""

import contextlib
import dataclasses
import math
import signal
import time
from functools import partial

import torch
from transformers import AlbertConfig, AlbertForPreTraining

from benchmarks.encoder import HEAD_SIZE, LEVELS, PEER, model_flops
from benchmarks.measure import Row, clock_of, interleave, options, ratio, report
from src.models import LeanAlbertConfig, LeanAlbertForPreTraining

MODERN = "transformers ModernBERT, sdpa"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LABELLED = 0.15  # share of the positions
STEPS = 4  # in a run: a GPU is waited for after each run
MAX_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Size:
    hidden: int = 768
    layers: int = 12
    length: int = 512
    vocabulary: int = 50_048
    embedding: int = 128
    product: int = 8192  # rows and columns of the matrices whose product is the yardstick


QUICK = Size(hidden=64, layers=2, length=32, vocabulary=500, embedding=16, product=64)


def make_lean(size, level):
    config = LeanAlbertConfig(
        **shared_options(size),
        intermediate_size=4 * size.hidden,
        embedding_size=size.embedding,
        share_large_matrices=1,
        sparse_prediction=True,
        activation_memory=level,
    )
    return LeanAlbertForPreTraining(config)


def make_albert(size):
    config = AlbertConfig(
        **shared_options(size),
        intermediate_size=4 * size.hidden,
        embedding_size=size.embedding,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    return AlbertForPreTraining(config)


def make_modern(size):
    from transformers import ModernBertConfig, ModernBertForMaskedLM  # here: not every version has them

    config = ModernBertConfig(
        **shared_options(size),
        intermediate_size=8 * size.hidden // 3,  # three matrices of this size: as many products as ALBERT's two
        sparse_prediction=True,
        attn_implementation="sdpa",
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    return ModernBertForMaskedLM(config)


def shared_options(size):
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.hidden // HEAD_SIZE),
        "max_position_embeddings": size.length,
    }


MAKERS = {**{level: partial(make_lean, level=level) for level in LEVELS}, PEER: make_albert, MODERN: make_modern}
ORDER = ("default", PEER, "lean", MODERN, "checkpoint")  # where time is short, the last ones are left out


def step_flops(size, name, config):
    """Multiplications and additions that a token needs, forward and backward."""
    if name == MODERN:
        windows = {"sliding_attention": min(size.length, config.local_attention)}
        blocks = sum(model_flops(size.hidden, windows.get(kind, size.length)) for kind in config.layer_types)
        return blocks + head_flops(size.hidden, size.hidden, size.vocabulary)
    return size.layers * model_flops(size.hidden, size.length) + head_flops(
        size.hidden, size.embedding, size.vocabulary
    )


def head_flops(hidden, embedding, vocabulary):
    return LABELLED * 3 * 2 * (hidden * embedding + embedding * vocabulary)


def make_batch(size, batch_size, device):
    ids = torch.randint(1, size.vocabulary, (batch_size, size.length), device=device)
    labels = ids.clone()
    labels[torch.rand(ids.shape, device=device) >= LABELLED] = -100
    return {"input_ids": ids, "labels": labels}


def choose_batch_size(size, device):
    """A power of two for which half of the free memory is enough for ALBERT, which takes most, even in fp32."""
    if device == "cpu":
        return 2
    bytes_per_token = 28 * 4 * size.hidden * size.layers + 16 * size.vocabulary  # activations; logits and gradients
    fitting = torch.cuda.mem_get_info()[0] / 2 / (bytes_per_token * size.length)
    return min(MAX_BATCH, 2 ** int(math.log2(max(fitting, 1))))


class Side:
    """A model in training; each call makes some steps and waits for the device."""

    def __init__(self, name, size, batch, *, dtype, device, compiled):
        self.name, self.dtype, self.device = name, dtype, device
        torch.manual_seed(0)
        self.model = MAKERS[name](size).to(device).train()
        self.flops = step_flops(size, name, self.model.config)
        order = {} if name == MODERN else {"sentence_order_label": torch.zeros_like(batch["labels"][:, 0])}
        self.inputs = {**batch, **order}
        self.forward = torch.compile(self.model) if compiled else self.model

    def __call__(self, steps=STEPS):
        for _ in range(steps):
            self.model.zero_grad(set_to_none=True)
            with torch.autocast(self.device, self.dtype):
                loss = self.forward(**self.inputs).loss
            loss.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_megabytes(self):
        """By how much one step, gradients included, raises the peak of the device's memory."""
        self.model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self(steps=1)
        return (torch.cuda.max_memory_allocated() - before) / 1e6


@contextlib.contextmanager
def time_limit(give_up_at):
    """Raises TimeoutError inside at that moment, of `time.monotonic`."""

    def stop(number, frame):
        raise TimeoutError("no time left to make its first step")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(give_up_at - time.monotonic(), 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def make_sides(size, batch, *, give_up_at, **how):
    """The sides, each after its first step, for which it may be compiled; and of those left out, why."""
    sides, left_out = {}, []
    for name in ORDER:
        try:
            with time_limit(give_up_at):
                side = Side(name, size, batch, **how)
                side(steps=1)
            sides[name] = side
        except Exception as error:  # out of memory, no compiler, another version: the others can still be compared
            reason = (str(error).strip() or "?").splitlines()[0]
            left_out.append(f"{name} was left out: {type(error).__name__}: {reason}")
    return sides, left_out


def highest_rate(dtype, device, size):
    """Multiplications and additions a second of the product of two square matrices, at best."""
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply():
        for _ in range(STEPS):
            first @ second
        if device == "cuda":
            torch.cuda.synchronize()

    fastest = interleave({"product": multiply}, rounds=20, warmup=2, clock=time.perf_counter, seconds=20)["product"].low
    return STEPS * 2 * size**3 / fastest


def make_rows(claim, case, sides, timings, peak):
    rows = []
    for name, timing in timings.items():
        tokens = STEPS * sides[name].inputs["input_ids"].numel()
        faster = ratio(timings[PEER], timing) if PEER in timings else None
        utilisation = tokens * sides[name].flops / timing.median / peak
        rows += [
            Row(f"{claim}: speed", case, name, tokens / timing.median, "tokens/s", faster, peer=PEER),
            Row(f"{claim}: model FLOP utilisation", case, name, utilisation, "of the product's rate", peer=PEER),
        ]
        if sides[name].device == "cuda":
            megabytes = sides[name].peak_megabytes()
            rows.append(Row(f"{claim}: memory of a step", case, name, megabytes, "MB", peer=PEER))
    return rows


def main():
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script out")
    parser.add_argument("--precision", default="bf16", choices=DTYPES, help="type under autocast")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, a third of the layers")
    parser.add_argument("--seconds", type=float, default=300.0, help="what is not done by then is left out")
    arguments = parser.parse_args()
    began = time.monotonic()
    device, dtype, size = arguments.device, DTYPES[arguments.precision], QUICK if arguments.quick else Size()
    if arguments.compile:  # each layer is compiled anew
        size = dataclasses.replace(size, layers=max(1, size.layers // 3))
    peak = highest_rate(dtype, device, size.product)
    batch = make_batch(size, choose_batch_size(size, device), device)
    how = {"dtype": dtype, "device": device, "compiled": arguments.compile}
    sides, left_out = make_sides(size, batch, give_up_at=began + 0.7 * arguments.seconds, **how)
    left = max(1.0, arguments.seconds - (time.monotonic() - began))
    clock = clock_of(device, torch.get_num_threads())
    timings = interleave(sides, rounds=1 if arguments.quick else 10, clock=clock, seconds=left)
    claim = f"training step, {arguments.precision}" + (", torch.compile" if arguments.compile else "")
    shape = f"{len(batch['input_ids'])} x {size.length}"
    case = f"{size.layers} layers of {size.hidden}, {shape} tokens, {size.vocabulary} pieces"
    product = f"product of {size.product} x {size.product} matrices"
    rows = [Row(claim, product, "torch", peak / 1e12, "TFLOP/s"), *make_rows(claim, case, sides, timings, peak)]
    name = f"training_step_{arguments.precision}" + ("_compiled" if arguments.compile else "")
    notes = ["Ratios: speed over that of transformers' ALBERT. Medians over rounds that run by turns.", *left_out]
    report(name, "Whole training step, forward + backward", rows, notes, arguments.results)
    if left_out:
        raise SystemExit("; ".join(left_out))


if __name__ == "__main__":
    main()
