"""How many bytes training a model takes, and the largest batch for a budget.

python -m src.models.memory CONFIG --batch-size 8 --length 512 --budget 16
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .albert import LeanAlbertForPreTraining
from .config import LeanAlbertConfig
from .linear_cross_entropy import ROWS_AT_ONCE
from .recompute import LEVELS
from .shared_linear import SharedMatrix, dense_matrices
from .weight_of_pass import ROWS_GATHERED

MUON_8BIT, MUON_32BIT = 1 + 4 / 4096, 4  # the same of the matrices that Muon has, which keeps one moment
LAMB_8BIT, LAMB_32BIT = 2 + 8 / 4096, 8  # bytes per parameter: two codes and a scale for each 4096 of them; two floats
MUON_COLUMNS = 1024  # of a matrix that are multiplied at once
MIN_8BIT_SIZE = 2**20  # smaller parameters keep 32-bit statistics (the trainer's --min_8bit_size)
# What all processes of a peer share out besides: Python, torch, hivemind, the tokenizer (`benchmarks.published_size`).
TRAINER_LIBRARIES, AUXILIARY_LIBRARIES = 0.9e9, 0.7e9


@dataclass(frozen=True)
class Memory:
    """Bytes. `optimizer` is memory of the CPU where the optimizer is offloaded (the trainer's default)."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept for backward by all layers
    workspace: int  # what one layer's backward needs on top of what is kept
    logits: int
    step: int = 0  # that a step of the optimizer holds besides, where its state is
    products: int = 0  # and where it multiplies matrices: on the GPU, if there is one

    @property
    def device(self) -> int:
        """All but the optimizer: the head runs when all activations are kept, a layer's backward after it."""
        return self.parameters + self.gradients + self.activations + max(self.workspace, self.logits)

    @property
    def total(self) -> int:
        return self.device + self.optimizer


@dataclass(frozen=True)
class PeerMemory:
    """Bytes of main memory of all processes of a swarm's peer without a GPU, what they share counted once."""

    at_rest: int  # between two batches
    batch: int  # on top of that, while it computes
    taken: int  # on top of that, while it takes another peer's state; not while it computes
    gradients: int = 0  # part of what it holds at rest that is not there before its first batch

    @property
    def joining(self) -> int:
        """While it starts."""
        return self.at_rest - self.gradients + self.taken

    @property
    def peak(self) -> int:
        """While it computes, or takes a state again because it fell behind."""
        return self.at_rest + max(self.batch, self.taken)


def block_bytes(config, *, bf16=False, level=None):
    """Bytes that a block keeps for backward, for each token. Residuals stay fp32 under bf16 autocast."""
    level = level or config.activation_memory
    narrow = 2 if bf16 else 4
    hidden = config.hidden_size
    if level == "checkpoint" or (level == "lean" and config.attention_probs_dropout_prob):
        return 4 * hidden
    log_sum_exp = 4 * config.num_attention_heads
    adapters = config.adapter_dim + config.lowrank_dim
    if level == "lean":
        return 4 * hidden + narrow * hidden + log_sum_exp + narrow * adapters
    kept = 2 * 4 * hidden  # the inputs of both sub-layers
    kept += narrow * 4 * hidden  # queries, keys, values; attended values
    kept += narrow * config.intermediate_size * (2 if config.hidden_act_gated else 1)
    kept += narrow * 4 * adapters
    if config.sandwich_norm:
        kept += 2 * (narrow * hidden + 8)
    if config.hidden_dropout_prob:
        kept += 2 * 4 * hidden
    return kept + log_sum_exp


def workspace_bytes(config, *, bf16=False):
    """Bytes for each token that the backward pass of one block holds on top of what is kept, at its peak.

    The peak is where the feed-forward layer's activation is differentiated: its output (and the activated half of
    gating), the gradients of its output and input, and the gradient of the block's output.
    """
    narrow = 2 if bf16 else 4
    repeated = 0
    if config.activation_memory != "default":
        repeated = block_bytes(config, bf16=bf16, level="default") - block_bytes(config, bf16=bf16)
        if block_bytes(config, bf16=bf16) > 4 * config.hidden_size:  # "lean": queries, keys, values come later
            repeated -= narrow * 3 * config.hidden_size
    if config.activation_memory == "checkpoint" and config.sparse_prediction:
        repeated += 8 * config.hidden_size  # the last block, beside what it gathers for the positions with a loss
    return repeated + narrow * config.intermediate_size * (6 if config.hidden_act_gated else 3) + 4 * config.hidden_size


def gathered_bytes(config, num_tokens, *, bf16=False):
    """Bytes of the inputs and output gradients that matrices of several layers gather for one product."""
    if num_tokens >= ROWS_GATHERED or config.block_size:
        return 0
    gate = 2 if config.hidden_act_gated else 1
    features = 8 * config.hidden_size + (1 + gate) * config.intermediate_size  # in and out, of all four matrices
    num_blocks = config.num_hidden_layers * config.num_inner_groups
    rows = num_tokens * min(num_blocks, -(-ROWS_GATHERED // max(1, num_tokens)))
    return (2 if bf16 else 4) * rows * features


def logits_bytes(config, num_tokens, *, masked_share=0.15):
    """Bytes of the masked-LM loss at its peak: logits and probabilities, and the decoder's gradient."""
    if not config.sparse_prediction:
        return 3 * 4 * num_tokens * config.vocab_size
    rows = min(ROWS_AT_ONCE, int(masked_share * num_tokens))
    return 4 * config.vocab_size * (2 * rows + config.embedding_size)


def optimizer_bytes(model, *, min_8bit_size, optimizer):
    """Bytes of an optimizer's state, of what a step holds besides, and of Muon's products at their peak.

    A step of Muon holds the momentum that follows, and a part of a matrix with two square ones of its shorter side.
    """
    parts = dense_matrices(model) if optimizer == "muon" else {}
    state = step = products = 0
    for parameter in model.parameters():
        size = parameter.numel()
        if parameter not in parts:
            state += size * (LAMB_8BIT if size >= min_8bit_size else LAMB_32BIT)
            continue
        momentum = size * (MUON_8BIT if size >= min_8bit_size else MUON_32BIT)
        state, step = state + momentum, step + momentum
        side = min(parameter.shape[0] // parts[parameter], parameter.shape[1])
        products = max(products, 4 * (size // parts[parameter] + 2 * side**2 + MUON_COLUMNS * side))
    return int(state), int(step), products


def predict_memory(config, *, batch_size, length, bf16=False, min_8bit_size=MIN_8BIT_SIZE, optimizer="lamb"):
    """A `Memory` of pretraining with the given batch; parameters and gradients are fp32, as in the trainer.

    Attention dropout without "lean" or "checkpoint" keeps all probabilities on CPU, which is not counted.
    """
    with torch.device("meta"):
        model = LeanAlbertForPreTraining(config)
    matrices = {module.weight for module in model.modules() if isinstance(module, SharedMatrix)}
    matrix_parameters = sum(weight.numel() for weight in matrices)
    count = sum(parameter.numel() for parameter in model.parameters())
    state, step, products = optimizer_bytes(model, min_8bit_size=min_8bit_size, optimizer=optimizer)
    num_tokens = batch_size * length
    num_blocks = config.num_hidden_layers * config.num_inner_groups
    narrow_matrices = 2 * matrix_parameters if bf16 else 0
    embeddings = 4 * 2 * config.embedding_size  # their sum, and that normalised
    return Memory(
        parameters=4 * count,
        gradients=4 * count,
        optimizer=state,
        activations=num_tokens * (num_blocks * block_bytes(config, bf16=bf16) + embeddings) + narrow_matrices,
        workspace=num_tokens * workspace_bytes(config, bf16=bf16) + gathered_bytes(config, num_tokens, bf16=bf16),
        logits=logits_bytes(config, num_tokens),
        step=step,
        products=products,
    )


def peer_memory(memory, *, trains=True):
    """A `PeerMemory` from the `Memory` of its batches; an auxiliary peer computes none, and has no gradients.

    Averaging needs a copy of the parameters and one of the gradients, which offloaded LAMB works on. A round holds some
    copies of the largest tensor besides, for a moment: at published size 1.3 to 1.8 GB, no more than ``taken``.
    """
    at_rest = 3 * memory.parameters + memory.optimizer
    if not trains:  # a state comes in place; before that, hivemind makes gradients that are not needed
        return PeerMemory(at_rest=int(at_rest + AUXILIARY_LIBRARIES), batch=0, taken=memory.parameters)
    return PeerMemory(
        at_rest=int(at_rest + memory.gradients + memory.step + memory.products + TRAINER_LIBRARIES),
        batch=memory.device - memory.parameters - memory.gradients,
        taken=memory.parameters + memory.optimizer,
        gradients=memory.gradients,
    )


def largest_batch(config, *, length, budget, **options):
    """The largest batch size whose `Memory.device` fits into `budget` bytes; 0 if none does."""

    def fits(batch_size):
        return predict_memory(config, batch_size=batch_size, length=length, **options).device <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def positive(kind):
    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m src.models.memory", description="Predict the memory of training.")
    parser.add_argument("config", help="model configuration (.json)")
    parser.add_argument("--batch-size", type=positive(int), required=True, help="sequences in one forward pass")
    parser.add_argument("--length", type=positive(int), required=True, help="tokens of a sequence")
    parser.add_argument("--budget", type=positive(float), help="GB of the device: also print the largest batch for it")
    parser.add_argument("--activation-memory", choices=LEVELS, help="instead of what the configuration says")
    parser.add_argument("--bf16", action="store_true", help="mixed precision with bfloat16")
    parser.add_argument("--all-logits", action="store_true", help="logits at all positions (the trainer: masked ones)")
    arguments = parser.parse_args(argv)
    try:
        config = LeanAlbertConfig.from_dict(json.loads(Path(arguments.config).read_text(encoding="utf-8-sig")))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError, AttributeError) as error:
        parser.exit(2, f"python -m src.models.memory: error: {arguments.config}: {error}\n")
    config.sparse_prediction = not arguments.all_logits
    if arguments.activation_memory:
        config.activation_memory = arguments.activation_memory
    return config, arguments


def main(argv=None):
    config, arguments = parse_arguments(argv)
    options = {"length": arguments.length, "bf16": arguments.bf16}
    memory = predict_memory(config, batch_size=arguments.batch_size, **options)
    print(f"batch {arguments.batch_size} x {arguments.length} tokens, activation_memory={config.activation_memory}")
    for name, note in (
        ("parameters", ""),
        ("gradients", ""),
        ("activations", "kept for the backward pass"),
        ("workspace", "of one layer's backward pass; not at the same time as"),
        ("logits", "of the masked-LM loss"),
        ("device", "sum, with the larger of the last two"),
        ("optimizer", "8-bit LAMB; on the CPU where it is offloaded"),
        ("total", ""),
    ):
        print(f"{name:>12} {getattr(memory, name) / 1e9:10.3f} GB  {note}".rstrip())
    for name, trains in (("trainer", True), ("auxiliary", False)):
        peer = peer_memory(memory, trains=trains)
        most = f"{peer.joining / 1e9:.3f} GB while it joins, {peer.peak / 1e9:.3f} GB at most"
        note = f"at rest, {most}: all processes of a peer without a GPU"
        print(f"{name:>12} {peer.at_rest / 1e9:10.3f} GB  {note}")
    if arguments.budget is not None:
        batch_size = largest_batch(config, budget=arguments.budget * 1e9, **options)
        print(f"largest batch for {arguments.budget:g} GB: {batch_size} sequences of {arguments.length} tokens")


if __name__ == "__main__":
    main()
