"""What attention and the last layer need not compute, and short sequences in bf16: `python -m benchmarks.attention`.

Packed rows by instance against the full square; the attention core of short sequences in bf16 against plain products
that keep all probabilities; a training step whose last layer ends where a loss is taken against one that computes it at
all positions. One thread, CPU seconds.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.encoder import computes_in_bf16
from benchmarks.measure import Row, interleave, options, ratio, report
from src.models import LeanAlbertConfig, LeanAlbertForPreTraining
from src.models.attention_core import Spans, attention_core
from src.models.rotary import split_and_rotate

SHORT = ((16, 4, 128, 64), (64, 4, 64, 32))  # batch, heads, length, head size
SMALL_MODEL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4,
               "num_hidden_groups": 1, "embedding_size": 128, "sparse_prediction": True}  # fmt: skip


def make_states(batch, num_heads, length, head_size, dtype):
    """Queries, keys and values laid out as in the model, and the gradient of what is attended."""
    states = split_and_rotate(torch.randn(batch, length, 3 * num_heads * head_size).to(dtype), num_heads)
    gradient = torch.randn(batch, length, num_heads, head_size).to(dtype).transpose(1, 2)
    return [state.detach().requires_grad_() for state in states], gradient


def forward_and_backward(attend, states, gradient):
    torch.autograd.grad(attend(*states), states, gradient)


def plain_products(query, key, value):
    return torch.softmax((query * query.shape[-1] ** -0.5) @ key.mT, dim=-1) @ value


def compare(claim, case, sides, *, target, rounds):
    """Rows of two sides, the second against the first."""
    timings = interleave(sides, rounds=rounds, seconds=15)
    peer, ours = timings
    relative = ratio(timings[ours], timings[peer])
    return [
        Row(claim, case, peer, 1e3 * timings[peer].median, "ms"),
        Row(claim, case, ours, 1e3 * timings[ours].median, "ms", relative, target, peer=peer),
    ]


def packed_rows(*, length, rounds):
    rows = []
    spans = Spans.of((torch.arange(length) * 4 // length)[None])
    for dtype in (torch.float32, torch.bfloat16) if computes_in_bf16("cpu") else (torch.float32,):
        states, gradient = make_states(1, 8, length, 64, dtype)
        by_instance = partial(attention_core, attention_mask=spans)
        sides = {
            "full square": partial(forward_and_backward, attention_core, states, gradient),
            "by instance": partial(forward_and_backward, by_instance, states, gradient),
        }
        case = f"rows of {length}, four instances each, {str(dtype).removeprefix('torch.')}"
        rows += compare("attention of packed rows: time", case, sides, target="<= 0.4", rounds=rounds)
    return rows


def short_rows(*, rounds):
    rows = []
    for batch, num_heads, length, head_size in SHORT:
        states, gradient = make_states(batch, num_heads, length, head_size, torch.bfloat16)
        sides = {
            name: partial(forward_and_backward, attend, states, gradient)
            for name, attend in (("plain products", plain_products), ("ours", attention_core))
        }
        kernel = partial(forward_and_backward, F.scaled_dot_product_attention, states, gradient)
        torch_kernel = interleave({"torch": kernel}, rounds=rounds)["torch"]
        case = f"{batch} x {num_heads} heads, length {length}, head size {head_size}"
        claim = "attention in bf16, short sequences: time"
        rows += compare(claim, case, sides, target="<= 1.1", rounds=rounds)
        rows.append(Row(claim, case, "torch's kernel", 1e3 * torch_kernel.median, "ms"))
    return rows


class SmallModel:
    """A training step on 16 sequences of 128 tokens, with the last layer at all positions or at few."""

    def __init__(self, vocab_size):
        self.model = LeanAlbertForPreTraining(LeanAlbertConfig(**SMALL_MODEL, vocab_size=vocab_size)).train()
        self.ids = torch.randint(5, vocab_size, (16, 128))
        self.labels = torch.where(torch.rand(self.ids.shape) < 0.15, self.ids, -100)

    def step(self, *, few):
        self.model._needs_few_positions = lambda labels, options: few
        self.model.zero_grad(set_to_none=True)
        order = torch.zeros(len(self.ids), dtype=torch.long)
        self.model(self.ids, labels=self.labels, sentence_order_label=order).loss.backward()


def last_layer_rows(*, rounds, vocab_size):
    model = SmallModel(vocab_size)
    sides = {
        "last layer at all positions": partial(model.step, few=False),
        "where a loss is taken": partial(model.step, few=True),
    }
    case = f"hidden 256, 4 layers, 16 x 128 tokens, vocabulary {vocab_size}, fp32"
    return compare("training step: time", case, sides, target="<= 0.92", rounds=rounds)


def main():
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(1)
    rounds = 2 if arguments.quick else 7
    rows = packed_rows(length=256 if arguments.quick else 2048, rounds=rounds)
    if computes_in_bf16("cpu"):
        rows += short_rows(rounds=rounds)
    rows += last_layer_rows(rounds=rounds, vocab_size=500 if arguments.quick else 8000)
    notes = ["One thread, CPU seconds. Plain products keep all probabilities for the backward pass."]
    report("attention", "Attention of packed and of short rows, and the last layer", rows, notes, arguments.results)


if __name__ == "__main__":
    main()
