"""One pass over the 8-bit statistics of LAMB, compiled by numba: decode, update, encode, with no large temporaries.

About six times faster than the same arithmetic through bitsandbytes, which spends most of its time searching codes.
The code books are those of bitsandbytes (dynamic tree quantisation, arXiv 1511.04561): a decade of magnitude i holds
``first_items * 2^i`` evenly spaced values, so the nearest code follows from arithmetic instead of a search.

Two deliberate differences from bitsandbytes 0.50, whose CPU code picks a neighbour of the nearest code quite often:
the nearest code is taken, except that a second moment above zero never gets the code of zero. With that code,
``m / (sqrt(v) + eps)`` would become ``m / eps`` at the next step and dominate the update of the whole tensor.
"""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

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
SMALLEST_2, SCALE_2, OFFSET_2, LAST_2 = _decades(first_items=2)  # unsigned book: codes 0 ... 255
ZERO_1 = 127
HALF_OF_FIRST_1 = np.float32(2.75e-7)  # half the smallest non-zero value of the signed book


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
    magnitude = value * inverse_absmax
    scale, offset, last = SCALE_2[0], OFFSET_2[0], LAST_2[0]
    for i in range(1, 8):
        if magnitude >= SMALLEST_2[i]:
            scale, offset, last = SCALE_2[i], OFFSET_2[i], LAST_2[i]
    code = max(min(np.int32(scale * magnitude + offset), last), np.int32(1))
    return np.uint8(code if value > 0 else np.int32(0))


@numba.njit(nogil=True, cache=True, fastmath=FAST_MATH, error_model="numpy")
def update_blocks(arrays, scalars, squares, first_block, last_block):
    """Update the blocks ``first_block <= i < last_block`` of one tensor.

    Writes ``m / (sqrt(v) + eps) + weight_decay * param`` into ``update`` (which may be ``grad`` itself), the new
    statistics into codes and absmax, and the sums of squares of ``update`` and ``param`` into ``squares[i]``.
    """
    codes1, absmax1, codes2, absmax2, book1, book2, grad, param, update = arrays
    grad_scale, beta1, new1, beta2, new2, eps, weight_decay = scalars
    moments1, moments2 = np.empty(BLOCK_SIZE, np.float32), np.empty(BLOCK_SIZE, np.float32)
    table1, table2 = np.empty(256, np.float32), np.empty(256, np.float32)
    for block in range(first_block, last_block):
        start = block * BLOCK_SIZE
        size = min(BLOCK_SIZE, grad.size - start)
        # Slices, because the compiler does not vectorise over indices like start + i, which might be negative.
        block_codes1, block_codes2 = codes1[start : start + size], codes2[start : start + size]
        block_grad, block_param = grad[start : start + size], param[start : start + size]
        block_update = update[start : start + size]
        for code in range(256):
            table1[code] = book1[code] * absmax1[block] * beta1
            table2[code] = book2[code] * absmax2[block] * beta2
        largest1 = largest2 = sum_update = sum_param = np.float32(0)
        for i in range(size):
            g, p = block_grad[i] * grad_scale, block_param[i]
            m = table1[block_codes1[i]] + new1 * g
            v = table2[block_codes2[i]] + new2 * g * g
            moments1[i], moments2[i] = m, v
            largest1, largest2 = max(largest1, abs(m)), max(largest2, v)
            delta = m / (np.sqrt(v) + eps) + weight_decay * p
            block_update[i] = delta
            sum_update += delta * delta
            sum_param += p * p
        squares[block, 0], squares[block, 1] = sum_update, sum_param
        absmax1[block], absmax2[block] = largest1, largest2
        inverse1 = np.float32(1) / largest1 if largest1 > TINY else np.float32(0)
        inverse2 = np.float32(1) / largest2 if largest2 > TINY else np.float32(0)
        for i in range(size):
            block_codes1[i] = _encode_signed(moments1[i], inverse1)
        for i in range(size):
            block_codes2[i] = _encode_unsigned(moments2[i], inverse2)


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
