"""What it costs to write a part of a round in 16, 8 or 4 bits, and to read it again; and what is lost on the way.

    python -m benchmarks.quantization        # seconds; one thread

The part has as many values as travel together in 8 bits; a peer writes and reads each value
about once a round.
"""

import argparse
import sys

import torch
from hivemind.compression import CompressionInfo

from benchmarks.measure import interleave, number
from src.swarm.compression import gradient_compression, parameter_compression, read_tensor

NUM_VALUES, ROUNDS = 2**19, 7


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    values = torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(0))
    info = CompressionInfo.from_tensor(values)
    ways = {"16": parameter_compression(), "8": gradient_compression(8), "4": gradient_compression(4)}
    packed = {bits: way.compress(values, info) for bits, way in ways.items()}
    sides = {}
    for bits, way in ways.items():
        sides[f"write {bits}"] = lambda way=way: way.compress(values, info)
        sides[f"read {bits}"] = lambda message=packed[bits]: read_tensor(message)
    timings = interleave(sides, rounds=ROUNDS)
    print("| bits | bytes a value | written, ns a value | read, ns a value | error of normal values |")
    print("| --- | --- | --- | --- | --- |")
    for bits, message in packed.items():
        written, read = (1e9 * timings[f"{what} {bits}"].median / NUM_VALUES for what in ("write", "read"))
        error = float((read_tensor(message) - values).norm() / values.norm())
        size = len(message.buffer) / NUM_VALUES
        print(f"| {bits} | {size:.4g} | {number(written)} | {number(read)} | {error:.2%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
