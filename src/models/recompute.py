"""How little a block keeps for the backward pass: tensors and whole functions that are computed again instead."""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .weight_of_pass import current_weights, using

# What a block keeps, in units of its input (hidden_size numbers per token), without gating, dropout and sandwich norm:
# "default" 10 (no matrix product is repeated), "lean" 2 (all but the attention core and the last product), "checkpoint"
# 1 (all but the last product). Where attention keeps its log-sum-exp, that is one more number per token and head.
LEVELS = ("default", "lean", "checkpoint")

ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_recomputing = ContextVar("recomputing", default=False)


def is_recomputing():
    """Whether a checkpointed function runs again in backward: what only its result depends on is read by nobody."""
    return not torch.compiler.is_compiling() and _recomputing.get()


def checkpointed(function, *inputs, draws_random_numbers=False, keep_attention=False):
    """function(*inputs), of which only the inputs are kept; the whole function runs again in backward.

    keep_attention: what scaled_dot_product_attention returns is kept as well, which works under torch.compile only
    (otherwise use `recomputed`, which costs no Python call per operation).
    """
    context = {}
    if not torch.compiler.is_compiling():  # a compiler accepts no such context and drops unused products by itself
        weights = current_weights()
        context = {"context_fn": lambda: (nullcontext(), WhileRecomputing(weights))}
    elif keep_attention:
        context = {"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)}
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws_random_numbers, **context)


class WhileRecomputing:
    """Context in which `is_recomputing()` holds, with the weights of the forward pass that is repeated; entered once
    for each backward pass over the function."""

    def __init__(self, weights):
        self.weights = weights

    def __enter__(self):
        self.token, self.use = _recomputing.set(True), using(self.weights)
        self.use.__enter__()

    def __exit__(self, *exception):
        self.use.__exit__(*exception)
        _recomputing.reset(self.token)


@contextmanager
def recomputed(tensor, function):
    """Operations inside keep neither `tensor` nor other views of its memory for backward: `function()`, which must
    return an equal view of equal memory, is called in backward (once for an operation, however many views it keeps).

    Works for every operation on every device, because it is autograd that asks what to keep; for instance for all
    kernels of scaled_dot_product_attention, whose results are kept while queries, keys and values are not.
    """
    keeper = RecomputedTensor(tensor, function)
    with saved_tensors_hooks(keeper.pack, keeper.unpack):
        yield


class RecomputedTensor:
    """The hooks of `recomputed`."""

    def __init__(self, tensor, function):
        self.storage_address = tensor.untyped_storage().data_ptr()
        self.function, self.weights = function, current_weights()
        self.autocast_options = get_autocast_options(tensor.device.type)
        self.num_kept = self.num_left = 0
        self.computed = None

    def pack(self, tensor):
        if tensor.untyped_storage().data_ptr() != self.storage_address:
            return tensor
        self.num_kept += 1
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, kept):
        if isinstance(kept, torch.Tensor):
            return kept
        if self.num_left == 0:
            with torch.no_grad(), torch.autocast(**self.autocast_options), using(self.weights):
                self.computed = self.function()
            self.num_left = self.num_kept
        view = self.computed.as_strided(*kept)
        self.num_left -= 1
        if self.num_left == 0:
            self.computed = None
        return view


def get_autocast_options(device_type):
    """Arguments of torch.autocast that repeat the current state."""
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
    }
