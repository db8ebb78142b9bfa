"""A weight that several layers of one forward pass use: cast once, and its gradient summed in one place.

Autograd would cast the weight for each use, and make each use's gradient in the narrow type, cast it to the weight's
and add it to the sum: three more passes over memory as large as the weight (Megatron-LM's "gradient accumulation
fusion" removes them, too, but writes to `.grad`; here `torch.autograd.grad` and hooks see the sum).
"""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch.autograd.function import once_differentiable

from .products import linear_product

ROWS_GATHERED = 512  # of inputs and of gradients: with fewer, a product waits for memory rather than computes
ROWS_AT_ONCE = 256  # of a weight, on CPU: what is added to the sum is in the caches still
LARGEST_TURNED = 2**22  # numbers of a weight whose gradient may be summed the other way round: it is copied at the end
_current = ContextVar("weights of the forward pass", default=None)


class GradientSum:
    """What the uses of one weight have added to its gradient in the backward pass that is going on, in fp32 at least.

    Rows of few tokens are kept until the next layers' make one product of them: the sum over layers is one over more
    rows. A backward pass that does not ask for the weight's gradient leaves its part behind, and so does one that
    fails: the next one (another graph task, in autograd's words) begins anew.
    """

    def __init__(self):
        self._forget()

    def add(self, grad_rows, input_rows):
        """Adds grad_rows.T @ input_rows; [rows, out_features] and [rows, in_features], of one type."""
        if self.task != torch._C._current_graph_task_id():
            self._forget()
            self.task = torch._C._current_graph_task_id()
        if len(grad_rows) >= ROWS_GATHERED:
            self._add_product(grad_rows, input_rows)
            return
        self.gathered.append((grad_rows, input_rows))
        if sum(len(rows) for rows, _ in self.gathered) >= ROWS_GATHERED:
            self._add_gathered()

    def take(self):
        """The sum, which is then forgotten; None if nothing has been added in this backward pass."""
        if self.task != torch._C._current_graph_task_id():
            self._forget()
        if self.gathered:
            self._add_gathered()
        total = self.total
        if total is not None and self.is_turned:
            total = total.t().contiguous()
        self._forget()
        return total

    def _add_gathered(self):
        columns = zip(*self.gathered, strict=True)
        grad_rows, input_rows = (rows[0] if len(rows) == 1 else torch.cat(rows) for rows in columns)
        self.gathered = []
        self._add_product(grad_rows, input_rows)

    def _add_product(self, grad_rows, input_rows):
        if self.total is None:
            self.is_turned = _is_better_turned(grad_rows, input_rows)
        operands = (input_rows, grad_rows) if self.is_turned else (grad_rows, input_rows)
        with torch.autocast(grad_rows.device.type, enabled=False):
            self.total = add_product(self.total, *operands)

    def _forget(self):
        self.task, self.total, self.gathered, self.is_turned = None, None, [], False


def _is_better_turned(grad_rows, input_rows):
    """Whether input_rows.T @ grad_rows is quicker: oneDNN wants the first fp32 operand as it lies, so the one with the
    fewer columns is the one to transpose."""
    num_numbers = grad_rows.shape[1] * input_rows.shape[1]
    is_fp32 = grad_rows.device.type == "cpu" and grad_rows.dtype == torch.float32
    return is_fp32 and input_rows.shape[1] < grad_rows.shape[1] and num_numbers <= LARGEST_TURNED


def add_product(total, first_rows, second_rows):
    """total + first_rows.T @ second_rows, in place, where total (None: zeros) may be of a wider type than the rows."""
    dtype = torch.promote_types(first_rows.dtype, torch.float32)
    if total is None and dtype == first_rows.dtype:
        return linear_product(first_rows.t(), second_rows.t())
    if first_rows.is_cuda:
        wider = {} if dtype == first_rows.dtype else {"out_dtype": dtype}
        if total is None:
            return torch.mm(first_rows.t(), second_rows, **wider)
        return torch.addmm(total, first_rows.t(), second_rows, out=total, **wider)
    is_first = total is None
    if is_first:
        total = first_rows.new_empty(first_rows.shape[1], second_rows.shape[1], dtype=dtype)
    for part, some in zip(total.split(ROWS_AT_ONCE), first_rows.split(ROWS_AT_ONCE, dim=1), strict=True):
        some = some.contiguous() if some.dtype == torch.float32 else some  # torch transposes it much quicker then
        product = linear_product(some.t(), second_rows.t())
        part.copy_(product) if is_first else part.add_(product)
    return total


class WeightOfPass(torch.autograd.Function):
    """The weight in the type in which it is multiplied. Its gradient is what its uses have added to `gradient_sum`,
    and what autograd has found besides."""

    @staticmethod
    def forward(ctx, weight, dtype, gradient_sum):
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.gradient_sum = weight.dtype, gradient_sum
        return weight.view_as(weight) if weight.dtype == dtype else weight.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight):
        parts = [part for part in (ctx.gradient_sum.take(), grad_weight) if part is not None]
        return sum(parts[1:], parts[0]).to(ctx.dtype) if parts else None, None, None


class WeightsOfPass:
    """The weights that the layers of one forward pass have used so far, and the sums of their gradients."""

    def __init__(self):
        self.used = {}

    def find(self, owner):
        """Weight, as autocast wants it now, and gradient sum of a module with a `weight`."""
        key = owner, multiplied_dtype(owner.weight)
        if key not in self.used:
            gradient_sum = GradientSum()
            self.used[key] = WeightOfPass.apply(owner.weight, key[1], gradient_sum), gradient_sum
        return self.used[key]


def multiplied_dtype(weight):
    device_type = weight.device.type
    cast = torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if cast else weight.dtype


def weight_in_use(owner):
    """The weight of a module and where to add its gradient: None outside of a forward pass, where autograd does it."""
    weights = current_weights()
    return (owner.weight, None) if weights is None else weights.find(owner)


def current_weights():
    """For `using`, in a function that runs again in backward."""
    return None if torch.compiler.is_compiling() else _current.get()


@contextmanager
def using(weights):
    token = _current.set(weights)
    try:
        yield
    finally:
        _current.reset(token)


def forward_pass():
    """Context in which the layers share their weights' casts and gradient sums; nothing where nothing is gained."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return using(WeightsOfPass())
