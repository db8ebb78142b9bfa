"""The encoder against transformers' ALBERT and the original's lean layers: bytes, products, time of a training step.

One block of each, the same sizes, data type and threads, turn by turn in one process. ALBERT has no rotary positions
and normalises after each sub-layer; everything else is the same amount of work.
`python -m benchmarks.encoder --device cuda` runs the same on a GPU.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from transformers import AlbertConfig
from transformers.models.albert.modeling_albert import AlbertTransformer

from benchmarks.kept_bytes import kept_bytes
from benchmarks.measure import Row, Timing, clock_of, growth_rows, interleave, options, ratio, report
from benchmarks.reference.lean_layers import original_encoder
from src.models import LeanAlbertConfig
from src.models.attention_core import BLOCKS, HEAD_SCORES_AT_ONCE, HEADS, KERNELS
from src.models.products import by_onednn
from src.models.transformer import LeanTransformer

PEER, ORIGINAL = "transformers ALBERT, sdpa", "original's lean layers"
LEVELS = ("default", "lean", "checkpoint")
HEAD_SIZE = 64
GPU_TOKENS = 8192  # in a step: with fewer, a GPU waits for its next instructions
FLOOR = "floor"  # the products alone by the faster library, and the attention core alone by the faster kernel
CASES = ((512, 512), (1024, 512), (2048, 512), (512, 2048), (1024, 2048))  # hidden, length
SHARE_OF_ALBERT, SHARE_OF_FLOOR = 0.85, 1.10
NEAR_FLOOR = 1.3  # where ALBERT itself is under it, ours may be SHARE_OF_FLOOR instead
IN_BF16 = {  # shared matrices: (hidden, length) -> layers, target over the floor
    (2048, 256): (4, "<= 1.15"),
    (4096, 128): (4, "<= 1.25"),
    (4096, 512): (2, "<= 1.12"),
}
UNITS = {"default": "<= 10", "lean": "<= 3", "checkpoint": "<= 1"}


def make_albert(hidden_size, device):
    config = AlbertConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_hidden_layers=1,
        embedding_size=hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return AlbertTransformer(config).to(device).train()


def make_lean(hidden_size, device, level="default", *, num_layers=1):
    """The same block `num_layers` times."""
    config = LeanAlbertConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_hidden_layers=num_layers,
        num_hidden_groups=1,
        activation_memory=level,
    )
    transformer = LeanTransformer(config).to(device).train()
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    return transformer


def make_sides(hidden_size, device, names):
    """{name: (encoder function, its module)}"""
    sides = {}
    for name in names:
        if name == PEER:
            module = make_albert(hidden_size, device)
            sides[name] = (lambda inputs, module=module: module(inputs).last_hidden_state), module
        elif name == ORIGINAL:
            module = make_lean(hidden_size, device)
            sides[name] = partial(original_encoder, module), module
        else:
            module = make_lean(hidden_size, device, name)
            sides[name] = partial(encode, module), module
    return sides


def train_step(encoder, module, inputs, *, autocast=False):
    module.zero_grad(set_to_none=True)
    device_type = inputs.device.type
    with torch.autocast(device_type, torch.bfloat16) if autocast else nullcontext():
        outputs = encoder(inputs)
    outputs.sum().backward()
    if device_type == "cuda":
        torch.cuda.synchronize()


def model_flops(hidden_size, length):
    """As `block_flops`, of what the mathematics needs: nothing is computed twice."""
    return 3 * (2 * 12 * hidden_size**2 + 4 * length * hidden_size)


def block_flops(hidden_size, length, side):
    """Multiplications and additions of the matrix products, forward + backward, for each token of one block."""
    products = 2 * 12 * hidden_size**2  # forward: 3 + 1 + 4 + 4 matrices of hidden_size x hidden_size
    core = 4 * length * hidden_size  # forward: scores and weighted values
    core_backward = 10 * length * hidden_size  # scores again, and two products for each of the two
    repeated = {"lean": products * 8 / 12, "checkpoint": products * 8 / 12 + core}.get(side, 0)
    if side == ORIGINAL:
        return 3 * products + core + 3 * core  # keeps no scores: forward twice, backward of two products
    return 3 * products + core + core_backward + repeated


def byte_rows(device):
    inputs = torch.randn(1, 512, 512, device=device)
    rows, measured = [], {}
    for layers in (1, 2):
        for name, (encoder, module) in make_sides(512, device, (PEER, ORIGINAL, *LEVELS)).items():
            stack = getattr(module, "albert_layer_groups", None) or module.layer_groups
            if layers == 2:  # the same block twice: what the second one adds is the cost of a block
                stack = stack[0].albert_layers if name == PEER else stack
                stack.append(stack[0])
                module.num_hidden_layers = layers
            num_bytes = kept_bytes(partial(encoder, inputs), module.parameters())
            measured[name, layers] = num_bytes / (inputs.numel() * 4)
    for name in (PEER, ORIGINAL, *LEVELS):
        units = round(measured[name, 2] - measured[name, 1], 3)
        rows.append(
            Row(
                "bytes kept for backward",
                "per token and layer",
                name,
                units,
                "units of 4 * hidden",
                target=UNITS.get(name),
                peer=PEER,
            )
        )
    return rows


def floor_parts(hidden_size, batch, length, dtype, device, *, num_layers=1):
    """{what: {how: function}} of a training step without all that is neither a product nor the attention core: the
    products that every level needs, those that "lean" computes again, and the core."""
    rows, num_heads = batch * length, hidden_size // HEAD_SIZE
    operands = [
        [torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (outer, inner), (rows, outer))]
        for outer, inner in ((3 * hidden_size, hidden_size), (hidden_size, hidden_size), (4 * hidden_size, hidden_size),
                             (hidden_size, 4 * hidden_size))
    ]  # fmt: skip

    def products(product):
        for _ in range(num_layers):
            for inputs, weight, gradients in operands:
                product(inputs, weight)
                product(gradients, weight.t())
                product(gradients.t(), inputs.t())

    def repeated(product):
        for _ in range(num_layers):
            for inputs, weight, _ in operands[:3]:
                product(inputs, weight)

    query, gradient = torch.randn(2, batch, length, num_heads, HEAD_SIZE, device=device).to(dtype).transpose(2, 3)
    key, value = torch.randn(2, batch, num_heads, length, HEAD_SIZE, device=device).to(dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def core(kernel):
        for _ in range(num_layers):
            torch.autograd.grad(kernel(*leaves), leaves, gradient)

    libraries = {"torch": F.linear}
    kernels = {"torch": F.scaled_dot_product_attention}
    if device == "cpu":
        libraries |= {"oneDNN": by_onednn} if dtype == torch.float32 else {}
        kernels[BLOCKS] = lambda *states: KERNELS[BLOCKS].apply(*states, None)
        if length**2 <= HEAD_SCORES_AT_ONCE:
            kernels[HEADS] = lambda *states: KERNELS[HEADS].apply(*states, None)
    return {
        "products": {name: partial(products, product) for name, product in libraries.items()},
        "products again": {name: partial(repeated, product) for name, product in libraries.items()},
        "core": {name: partial(core, kernel) for name, kernel in kernels.items()},
    }


def sum_floor(parts, timings, whats):
    """Seconds of each round: of every part the way that is fastest in the median."""
    fastest = [min((timings[what, how] for how in parts[what]), key=lambda timing: timing.median) for what in whats]
    return Timing(tuple(map(sum, zip(*(timing.samples for timing in fastest), strict=True))))


def time_rows(hidden_size, length, *, device, rounds, claim, names, autocast=False, compiled=False, targets=None):  # noqa: PLR0913 (what a case consists of)
    batch = 1 if device == "cpu" else max(1, GPU_TOKENS // length)
    inputs = torch.randn(batch, length, hidden_size, device=device)
    sides = make_sides(hidden_size, device, names)
    if compiled:
        sides = {name: (torch.compile(encoder), module) for name, (encoder, module) in sides.items()}
    runs = {name: partial(train_step, *side, inputs, autocast=autocast) for name, side in sides.items()}
    parts = {}
    if not compiled:
        parts = floor_parts(hidden_size, batch, length, torch.bfloat16 if autocast else torch.float32, device)
        runs |= {(what, how): run for what, ways in parts.items() for how, run in ways.items()}
    timings = interleave(runs, rounds=rounds, clock=clock_of(device, torch.get_num_threads()), seconds=26)
    case = f"hidden {hidden_size}, length {length}"
    case += f", threads {torch.get_num_threads()}" if device == "cpu" else f", batch {batch}"
    return [
        row for name in names
        for row in side_rows(claim, case, name, timings, parts, target=(targets or {}).get(name))
    ]  # fmt: skip


def side_rows(claim, case, name, timings, parts, *, target):
    """A side against ALBERT, and against its floor."""
    timing, relative = timings[name], ratio(timings[name], timings[PEER])
    if not parts or name not in (PEER, "default", "lean"):
        return [Row(claim, case, name, timing.median, "s", relative, target, peer=PEER)]
    floor = sum_floor(parts, timings, ("products", "core", *(["products again"] if name == "lean" else [])))
    over_floor = ratio(timing, floor)
    met = None
    if target is not None:
        plain_floor = sum_floor(parts, timings, ("products", "core"))
        way_out = ratio(timings[PEER], plain_floor) < NEAR_FLOOR and over_floor <= SHARE_OF_FLOOR
        met = relative <= float(target.split()[1]) or way_out
    # one layer by itself casts its weights for one use; layers that share them have targets of their own, `IN_BF16`
    limit = None if target is None or "bf16" in claim else f"<= {SHARE_OF_FLOOR}"
    return [
        Row(claim, case, name, timing.median, "s", relative, target, met, PEER, floor.median),
        Row(f"{claim}, over the floor", case, name, timing.median, "s", over_floor, limit, None, FLOOR, floor.median),
    ]


def encode(module, inputs):
    return module(inputs)[0]


def wide_rows(*, rounds):
    """Wide layers that share their matrices, few tokens, bf16: ours against the floor."""
    rows = []
    for (hidden_size, length), (num_layers, target) in IN_BF16.items():
        module = make_lean(hidden_size, "cpu", num_layers=num_layers)
        inputs = torch.randn(1, length, hidden_size)
        parts = floor_parts(hidden_size, 1, length, torch.bfloat16, "cpu", num_layers=num_layers)
        del parts["products again"]
        encoder = partial(encode, module)
        runs = {"default": partial(train_step, encoder, module, inputs, autocast=True)}
        runs |= {(what, how): run for what, ways in parts.items() for how, run in ways.items()}
        clock = clock_of("cpu", torch.get_num_threads())
        timings = interleave(runs, rounds=rounds, clock=clock, seconds=40)
        floor = sum_floor(parts, timings, ("products", "core"))
        case = f"hidden {hidden_size}, {length} tokens, {num_layers} layers, threads {torch.get_num_threads()}"
        over_floor = ratio(timings["default"], floor)
        claim, seconds = "time, bf16 autocast, shared matrices, over the floor", timings["default"].median
        rows.append(Row(claim, case, "default", seconds, "s", over_floor, target, None, FLOOR, floor.median))
    return rows


def flop_rows():
    return [
        Row("matrix products", f"hidden {hidden_size}, length {length}", name,
            block_flops(hidden_size, length, name) / 1e6, "MFLOP/token",
            block_flops(hidden_size, length, name) / block_flops(hidden_size, length, PEER), peer=PEER)
        for hidden_size, length in CASES
        for name in (PEER, ORIGINAL, *LEVELS)
    ]  # fmt: skip


def measure_growth(sizes, *, device, what):
    points = []
    for size in sizes:
        hidden_size, length = (256, size) if what == "length" else (size, 128)
        side = make_sides(hidden_size, device, ("default",))["default"]
        inputs = torch.randn(1, length, hidden_size, device=device)
        run = partial(train_step, *side, inputs)
        timings = interleave({"default": run}, rounds=2, clock=clock_of(device, 1), seconds=5)
        flops = length * block_flops(hidden_size, length, "default")
        points.append((f"{what} {size}", size, timings["default"].low, flops))
    return growth_rows(f"growth with {what}", points, "default")


def computes_in_bf16(device):
    """Whether the processor has instructions for it; without them torch takes some twenty times as long as in fp32."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def main():
    parser = options(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    threads = torch.get_num_threads()
    timed = partial(time_rows, device=device, rounds=2 if quick else 3 if device == "cpu" else 20)
    rows = byte_rows(device) + flop_rows()
    targets = dict.fromkeys(("default", "lean"), f"<= {SHARE_OF_ALBERT}")
    in_bf16 = ((512, 512),) if quick else ((512, 512), (1024, 512)) if computes_in_bf16(device) else ((512, 128),)
    for number in sorted({1, threads}) if device == "cpu" else [threads]:
        torch.set_num_threads(number)
        for hidden_size, length in CASES[:1] if quick else CASES:
            if (hidden_size, length) == CASES[-1] and device == "cpu" and number > 1:  # takes long
                continue
            all_sides = (hidden_size, length) == CASES[0] and number == 1
            names = (PEER, ORIGINAL, *LEVELS) if all_sides or device != "cpu" else (PEER, "default", "lean")
            rows += timed(hidden_size, length, claim="time, fp32", names=names, targets=targets)
        for hidden_size, length in in_bf16 if number == 1 or computes_in_bf16(device) else ():
            names = (PEER, "default", "lean")
            claim = "time, bf16 autocast"
            rows += timed(hidden_size, length, claim=claim, names=names, autocast=True, targets={"default": "<= 0.9"})
        if device == "cpu" and computes_in_bf16(device) and not quick:
            rows += wide_rows(rounds=2)
    torch.set_num_threads(1)
    if not arguments.no_compile:
        no_worse = {"default": "<= 1"}
        rows += timed(512, 512, claim="time, torch.compile", names=(PEER, "default"), compiled=True, targets=no_worse)
    if device == "cpu":  # small sizes take a GPU as long as its instructions take to arrive
        lengths = (128, 512) if quick else (128, 256, 512, 1024, 2048, 4096)
        sizes = (256, 512) if quick else (256, 512, 1024, 2048)
        rows += measure_growth(lengths, device=device, what="length")
        rows += measure_growth(sizes, device=device, what="hidden")
    notes = [
        "One thread: CPU seconds; two threads and GPU: wall time. Medians over rounds that run by turns.",
        "Expected exponents are those of the multiplications and additions.",
        "torch's attention kernel keeps one number per head and token, its log-sum-exp: 1/64 unit at head size 64.",
    ]
    if not computes_in_bf16(device):
        notes.append("This processor has no instructions for bf16, so that was measured in one small case only.")
    report("encoder", "Encoder, forward + backward of one block", rows, notes, arguments.results)


if __name__ == "__main__":
    main()
