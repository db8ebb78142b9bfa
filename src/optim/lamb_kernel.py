"""One pass over the 8-bit statistics of LAMB, compiled by numba: decode, update, encode, with no large temporaries.

About eight times faster than the same arithmetic through bitsandbytes, which spends most of its time searching codes
(benchmarks/lamb_step.py). The code books are those of bitsandbytes (dynamic tree quantisation, arXiv 1511.04561): a
decade of magnitude i holds ``first_items * 2^i`` evenly spaced values, each the middle of its interval, so the code
follows from arithmetic instead of a search.

Deliberate differences from bitsandbytes 0.50, whose CPU code picks a neighbour of the nearest code quite often: first
moments get the nearest code. Second moments get the code whose interval holds them, which rounds up between the last
value of a decade and the first of the next, and never the code of zero unless they are zero: a second moment that is
too small blows up the update. With the code of zero, ``m / (sqrt(v) + eps)`` would become ``m / eps`` at the next step
and dominate the whole tensor. Measured nearer to float32 statistics than nearest codes for both moments.
"""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from src.compiled import compiled

BLOCK_SIZE = 4096
NUM_DECADES = 7
MIN_BLOCKS_PER_THREAD = 64  # starting a thread for less does not pay
TINY = np.float32(1e-37)  # below, the inverse may overflow
# Every input is finite (the optimizer checks), so that sums and maxima may be reordered into vector registers.
FAST_MATH = {"nnan", "ninf", "nsz", "contract", "reassoc"}


def _decades(first_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each decade of a code book: smallest magnitude, scale and offset of its line, and last code.

    Codes of magnitudes count from 0 (zero); ``floor(scale * magnitude + offset)``, at most the last code, is the
    nearest code. The last entry is magnitude 1, a decade with a single value.
    """
    items = first_items * 2 ** np.arange(NUM_DECADES)
    low = 10.0 ** np.arange(-NUM_DECADES, 0)
    width = 9 * low / items  # of the interval a code stands for, whose middle is its value
    first_code = 1 + first_items * (2 ** np.arange(NUM_DECADES) - 1)
    scale, offset = 1 / width, first_code - low / width
    smallest = low + np.concatenate([[0], width[:-1]])  # halfway between the values on both sides of the border
    last_code = first_code + items - 1
    return (
        np.append(smallest, 1 - width[-1] / 4).astype(np.float32),
        np.append(scale, 0).astype(np.float32),
        np.append(offset, last_code[-1] + 1).astype(np.float32),
        np.append(last_code, last_code[-1] + 1).astype(np.int32),
    )


SMALLEST_1, SCALE_1, OFFSET_1, LAST_1 = _decades(first_items=1)  # signed book: codes -127 ... 128 around index 127
_, SCALE_2, OFFSET_2, _ = _decades(first_items=2)  # unsigned book: codes 0 ... 255
OFFSET_2[NUM_DECADES - 1] += np.float32(5e-5)  # the largest value of a block is 1 within rounding and must get code 255
ZERO_1 = 127
HALF_OF_FIRST_1 = np.float32(2.75e-7)  # half the smallest non-zero value of the signed book
SIGN_BIT_OFF = np.int32(0x7FFFFFFF)


@numba.njit(inline="always", fastmath=FAST_MATH)
def _encode_signed(value, inverse_absmax):
    magnitude = abs(value) * inverse_absmax
    scale, offset, last = SCALE_1[0], OFFSET_1[0], LAST_1[0]
    for i in range(1, 8):
        if magnitude >= SMALLEST_1[i]:
            scale, offset, last = SCALE_1[i], OFFSET_1[i], LAST_1[i]
    code = min(np.int32(scale * magnitude + offset), last)
    if magnitude < HALF_OF_FIRST_1:
        code = np.int32(0)
    return np.uint8(ZERO_1 + code if value >= 0 else ZERO_1 - min(code, np.int32(127)))


@numba.njit(inline="always", fastmath=FAST_MATH)
def _encode_unsigned(value, inverse_absmax):
    # The lines of the decades meet at the borders and become flatter: the lowest one is the one of the decade.
    magnitude = value * inverse_absmax
    code = SCALE_2[0] * magnitude + OFFSET_2[0]
    for i in range(1, 7):
        code = min(code, SCALE_2[i] * magnitude + OFFSET_2[i])
    return np.uint8(max(np.int32(code), np.int32(1)) if value > 0 else np.int32(0))


@compiled(nogil=True, fastmath=FAST_MATH)
def _largest_magnitude(values):
    """Through integers, whose maxima the compiler turns into vector instructions; floats without a sign order alike."""
    bits = values.view(np.int32)
    largest = np.zeros(1, np.int32)
    for i in range(bits.size):
        largest[0] = max(largest[0], np.int32(bits[i] & SIGN_BIT_OFF))  # numba would widen to 64 bits
    return largest.view(np.float32)[0]


@compiled(nogil=True, fastmath=FAST_MATH, error_model="numpy")
def update_blocks(arrays, scalars, squares, first_block, last_block):
    """Update the blocks ``first_block <= i < last_block`` of one tensor.

    Writes ``m / (sqrt(v) + eps) + weight_decay * param`` into ``update`` (which may be ``grad`` itself), the new
    statistics into codes and absmax, and the sums of squares of ``update`` and ``param`` into ``squares[i]``.

    Many short loops, because the compiler gives up vectorising one that touches many arrays which might overlap, or
    that looks up a table; and slices, because it gives up on an index like start + i, which might be negative.
    """
    codes1, absmax1, codes2, absmax2, book1, book2, grad, param, update = arrays
    grad_scale, beta1, new1, beta2, new2, eps, weight_decay = scalars
    moments1, moments2 = np.empty(BLOCK_SIZE, np.float32), np.empty(BLOCK_SIZE, np.float32)
    table1, table2 = np.empty(256, np.float32), np.empty(256, np.float32)
    for block in range(first_block, last_block):
        start, stop = block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, grad.size)
        c1, c2, g, p, u = (
            codes1[start:stop],
            codes2[start:stop],
            grad[start:stop],
            param[start:stop],
            update[start:stop],
        )
        m, v = moments1[: stop - start], moments2[: stop - start]
        for code in range(256):
            table1[code] = book1[code] * absmax1[block] * beta1
            table2[code] = book2[code] * absmax2[block] * beta2
        for i in range(m.size):
            m[i] = table1[c1[i]]
        for i in range(v.size):
            v[i] = table2[c2[i]]
        for i in range(g.size):
            scaled = g[i] * grad_scale
            m[i] += new1 * scaled
            v[i] += new2 * scaled * scaled
        sum_update = sum_param = np.float32(0)
        for i in range(m.size):
            delta = m[i] / (np.sqrt(v[i]) + eps) + weight_decay * p[i]
            u[i] = delta
            sum_update += delta * delta
            sum_param += p[i] * p[i]
        squares[block, 0], squares[block, 1] = sum_update, sum_param
        absmax1[block], absmax2[block] = _largest_magnitude(m), _largest_magnitude(v)
        inverse1 = np.float32(1) / absmax1[block] if absmax1[block] > TINY else np.float32(0)
        inverse2 = np.float32(1) / absmax2[block] if absmax2[block] > TINY else np.float32(0)
        for i in range(m.size):
            c1[i] = _encode_signed(m[i], inverse1)
        for i in range(v.size):
            c2[i] = _encode_unsigned(v[i], inverse2)


def update_tensor(
    arrays: tuple[np.ndarray, ...], options: tuple[float, float, float, float, float], *, num_threads: int
) -> tuple[float, float]:
    """Run :func:`update_blocks` over a tensor; returns the norms of the update and of the parameter.

    ``arrays``, all flat: codes1, absmax1, codes2, absmax2, book1, book2, grad, param, update. ``options``: grad_scale,
    beta1, beta2, eps, weight_decay. The result does not depend on the number of threads. They live for this call
    only: a pool kept for later would not survive a fork.
    """
    num_blocks = arrays[1].size
    squares = np.empty((num_blocks, 2), np.float64)
    grad_scale, beta1, beta2, eps, weight_decay = options
    # 1 - beta in double precision: 1 - float32(0.999) would be off by 1e-5 of itself
    scalars = tuple(map(np.float32, (grad_scale, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay)))
    num_threads = max(1, min(num_threads, num_blocks // MIN_BLOCKS_PER_THREAD))
    borders = [num_blocks * i // num_threads for i in range(num_threads + 1)]

    def update_range(first_block: int, last_block: int) -> None:
        update_blocks(arrays, scalars, squares, first_block, last_block)

    if num_threads == 1:
        update_range(0, num_blocks)
    else:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="lamb") as pool:
            list(pool.map(update_range, borders[:-1], borders[1:]))
    update_norm, param_norm = np.sqrt(squares.sum(axis=0))
    return float(update_norm), float(param_norm)


def compile_kernel() -> None:
    """Compile :func:`update_blocks`, or load it from numba's cache, so that the first step does not have to."""
    codes, values = np.zeros(BLOCK_SIZE, np.uint8), np.zeros(BLOCK_SIZE, np.float32)
    arrays = codes, values[:1], codes, values[:1], values, values, values, values, values
    update_tensor(arrays, (1.0, 0.0, 0.0, 1.0, 0.0), num_threads=1)
