"""The encoder against transformers' ALBERT and the original's lean layers: bytes, products, time of a training step.

One block of each, the same sizes, data type and threads, turn by turn in one process. ALBERT has no rotary positions
and normalises after each sub-layer; everything else is the same amount of work.
`python -m benchmarks.encoder --device cuda` runs the same on a GPU.
"""

from contextlib import nullcontext
from functools import partial

import torch
from transformers import AlbertConfig
from transformers.models.albert.modeling_albert import AlbertTransformer

from benchmarks.kept_bytes import kept_bytes
from benchmarks.measure import Row, clock_of, growth_rows, interleave, options, ratio, report
from benchmarks.reference.lean_layers import original_encoder
from src.models import LeanAlbertConfig
from src.models.products import onednn_is_faster
from src.models.transformer import LeanTransformer

PEER, ORIGINAL = "transformers ALBERT, sdpa", "original's lean layers"
LEVELS = ("default", "lean", "checkpoint")
HEAD_SIZE = 64
GPU_TOKENS = 8192  # in a step: with fewer, a GPU waits for its next instructions
TARGETS = {  # (hidden, length) -> level -> what the issue of this comparison asks for
    (512, 512): {"default": "<= 0.9", "lean": "<= 1.05"},
    (1024, 512): {"default": "<= 0.95", "lean": "<= 1.15"},
    (512, 2048): {"default": "<= 0.72", "lean": "<= 0.78"},
    (1024, 2048): {"default": "<= 0.72", "lean": "<= 0.78"},
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


def make_lean(hidden_size, device, level="default"):
    config = LeanAlbertConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_hidden_layers=1,
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
            sides[name] = (lambda inputs, module=module: module(inputs)[0]), module
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


def time_rows(hidden_size, length, *, device, rounds, claim, names, autocast=False, compiled=False, targets=None):  # noqa: PLR0913 (what a case consists of)
    batch = 1 if device == "cpu" else max(1, GPU_TOKENS // length)
    inputs = torch.randn(batch, length, hidden_size, device=device)
    sides = make_sides(hidden_size, device, names)
    if compiled:
        sides = {name: (torch.compile(encoder), module) for name, (encoder, module) in sides.items()}
    runs = {name: partial(train_step, *side, inputs, autocast=autocast) for name, side in sides.items()}
    timings = interleave(runs, rounds=rounds, clock=clock_of(device, torch.get_num_threads()), seconds=26)
    case = f"hidden {hidden_size}, length {length}"
    case += f", threads {torch.get_num_threads()}" if device == "cpu" else f", batch {batch}"
    return [
        Row(claim, case, name, timing.median, "s", ratio(timing, timings[PEER]), (targets or {}).get(name), peer=PEER)
        for name, timing in timings.items()
    ]


def flop_rows():
    return [
        Row("matrix products", f"hidden {hidden_size}, length {length}", name,
            block_flops(hidden_size, length, name) / 1e6, "MFLOP/token",
            block_flops(hidden_size, length, name) / block_flops(hidden_size, length, PEER), peer=PEER)
        for hidden_size, length in TARGETS
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
    cases = {(512, 512): TARGETS[512, 512]} if quick else TARGETS
    timed = partial(time_rows, device=device, rounds=2 if quick else 3 if device == "cpu" else 20)
    rows = byte_rows(device) + flop_rows()
    no_worse = {"default": "<= 1"}
    in_bf16 = ((512, 512),) if quick else ((512, 512), (1024, 512)) if computes_in_bf16(device) else ((512, 128),)
    for number in sorted({1, threads}) if device == "cpu" else [threads]:
        torch.set_num_threads(number)
        for (hidden_size, length), targets in cases.items():
            # The largest takes long: by one thread of a fast processor, no side without a target.
            largest = (hidden_size, length) == (1024, 2048)
            if largest and device == "cpu" and (number > 1 or not onednn_is_faster()):
                continue
            names = (PEER, *targets) if device == "cpu" and (largest or number > 1) else (PEER, ORIGINAL, *LEVELS)
            rows += timed(hidden_size, length, claim="time, fp32", names=names, targets=targets)
        for hidden_size, length in in_bf16 if number == 1 or computes_in_bf16(device) else ():
            names = (PEER, "default", "lean")
            claim = "time, bf16 autocast"
            rows += timed(hidden_size, length, claim=claim, names=names, autocast=True, targets=no_worse)
    torch.set_num_threads(1)
    if not arguments.no_compile:
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
