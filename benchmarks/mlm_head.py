"""Masked-LM loss of 4096 positions, 15 % of them masked, vocabulary 50257: time and memory, forward + backward.

Sides: logits at all positions, as in transformers; at masked positions only; and the loss that a LeanALBERT in training
computes, which holds 128 rows of logits. Memory is the growth of the peak of a process of its own.
`python -m benchmarks.mlm_head --device cuda` runs the same on a GPU.
"""

import multiprocessing
import re
from pathlib import Path

import torch

from benchmarks.measure import Row, clock_of, growth_rows, interleave, options, ratio, report
from src.models import LeanAlbertConfig
from src.models.albert import IGNORED_LABEL, MaskedLMHead, masked_lm_loss

ALL, MASKED, OURS = "logits at all positions", "logits at masked positions", "LeanALBERT in training"
TARGETS = {OURS: ("<= 0.12", "<= 160")}


def make_step(side, num_positions, vocab_size, device):
    """A function that runs forward and backward once."""
    torch.manual_seed(0)
    head = MaskedLMHead(LeanAlbertConfig(vocab_size=vocab_size, embedding_size=128, hidden_size=256)).to(device)
    head.train(side == OURS)
    head.decoder.weight.data.mul_(0.1)
    hidden_states = torch.randn(1, num_positions, 256, device=device, requires_grad=True)
    labels = torch.randint(vocab_size, (1, num_positions), device=device)
    labels[torch.rand(1, num_positions, device=device) >= 0.15] = IGNORED_LABEL

    def step():
        head.zero_grad(set_to_none=True)
        loss = masked_lm_loss(head, hidden_states, labels, sparse=side != ALL)[1]
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return step


def status(field):
    """MB that Linux says about this process: VmRSS is what it has now, VmHWM the most that it had."""
    return 1024e-6 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_megabytes(side, num_positions, vocab_size, device, answers):
    """Puts by how many MB one step raises the peak of memory; gradients of the parameters are counted in."""
    make_step(side, 256, 1000, device)()  # libraries allocate their workspaces
    step = make_step(side, num_positions, vocab_size, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        answers.put((torch.cuda.max_memory_allocated() - before) / 1e6)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status("VmRSS")
        step()
        answers.put(status("VmHWM") - before)


def time_rows(steps, case, clock):
    timings = interleave(steps, rounds=3, warmup=0, clock=clock, seconds=25)
    return [
        Row("time", case, side, timing.median, "s", ratio(timing, timings[ALL]), TARGETS.get(side, [None])[0], peer=ALL)
        for side, timing in timings.items()
    ]


def main():
    parser = options(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    device = arguments.device
    num_positions, vocab_size = (512, 5000) if arguments.quick else (4096, 50257)
    case = f"{num_positions} positions, vocabulary {vocab_size}"
    steps = {side: make_step(side, num_positions, vocab_size, device) for side in (ALL, MASKED, OURS)}
    losses = [step() for step in steps.values()]  # the warm-up, too
    if max(losses) - min(losses) > 1e-4 * losses[0]:
        raise SystemExit(f"the sides disagree about the loss: {losses}")
    rows = []
    threads = torch.get_num_threads()
    for number in sorted({1, threads}) if device == "cpu" else [threads]:
        torch.set_num_threads(number)
        rows += time_rows(steps, case if device != "cpu" else f"{case}, threads {number}", clock_of(device, number))
    processes = multiprocessing.get_context("spawn")
    started = []
    for side in steps:  # each has its own memory, so all can run at once
        answers = processes.Queue()
        process = processes.Process(target=peak_megabytes, args=(side, num_positions, vocab_size, device, answers))
        process.start()
        started.append((side, process, answers))
    for side, process, answers in started:
        megabytes = answers.get(timeout=300)
        process.join()
        rows.append(Row("extra memory", case, side, megabytes, "MB", target=TARGETS.get(side, [None] * 2)[1], peer=ALL))
    torch.set_num_threads(1)
    points = []
    for size in (1000, 4000) if arguments.quick else (8_000, 25_000, 50_000, 100_000):
        run = make_step(OURS, num_positions // 4, size, device)
        seconds = interleave({OURS: run}, rounds=3, clock=clock_of(device, 1))[OURS].low
        points.append((f"{num_positions // 4} positions, {size}", size, seconds, size))
    rows += growth_rows("growth with vocabulary", points, OURS)
    notes = [
        "One thread: CPU seconds; two threads and GPU: wall time. Medians over rounds that run by turns.",
        "Time should grow with the vocabulary as the number of operations does, which is in proportion to it.",
    ]
    report("mlm_head", "Masked-LM head, forward + backward", rows, notes, arguments.results)


if __name__ == "__main__":
    main()
