"""When block-sparse butterfly matrices pay: time and parameters against the dense matrix, forward + backward.

A matrix of n x n blocks keeps (1 + log2 n) / n of them; the products are small and their results must be gathered, so
fewer operations are not less time everywhere.
"""

import time

import torch

from benchmarks.measure import Row, interleave, options, ratio, report
from src.models.butterfly import ButterflyMatrix
from src.models.shared_linear import SharedMatrix


def make_step(matrix, num_rows):
    torch.nn.init.normal_(matrix.weight, std=0.02)
    inputs = torch.randn(num_rows, matrix.in_features, requires_grad=True)

    def step():
        matrix.zero_grad(set_to_none=True)
        matrix.multiply(inputs, None, prepare=torch.tanh).sum().backward()

    return step


def main():
    arguments = options(__doc__).parse_args()
    sizes = (256,) if arguments.quick else (512, 2048)
    rows = []
    for size in sizes:
        for block_size in (32, 64, 128):
            matrices = {"dense": SharedMatrix(size, size)}
            matrices["butterfly"] = ButterflyMatrix(size, size, block_size=block_size)
            runs = {name: make_step(matrix, 512) for name, matrix in matrices.items()}
            timings = interleave(runs, rounds=2 if arguments.quick else 5, clock=time.process_time, seconds=4)
            case = f"{size} x {size}, blocks of {block_size}, 512 rows"
            share = matrices["butterfly"].weight.numel() / size**2
            rows.append(Row("parameters", case, "butterfly", share, "of the dense matrix", peer="dense"))
            for name, timing in timings.items():
                rows.append(Row("time", case, name, timing.median, "s", ratio(timing, timings["dense"]), peer="dense"))
    pays = [row.case for row in rows if row.side == "butterfly" and row.ratio is not None and row.ratio < 1]
    notes = [
        "Process CPU seconds, the median of rounds that run by turns.",
        "Faster than dense here: " + ("; ".join(pays) if pays else "nowhere") + ".",
    ]
    report("butterfly", "Block-sparse butterfly matrices against dense ones", rows, notes, arguments.results)


if __name__ == "__main__":
    main()
