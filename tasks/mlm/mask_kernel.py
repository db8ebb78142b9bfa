"""The loops of whole-word masking, compiled by numba: over a hundred times faster than the same loops in Python.

A batch is a flat run of tokens; `ends` says where each instance (or row) of it ends. Random numbers come from
SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), started from one seed per batch:
one draw takes about a nanosecond, where numpy's generator needs 16 inside of compiled code. Plain loops over single
elements, because assignments of slices make the compilation several times longer.
"""

import numba
import numpy as np

from src.compiled import compiled

INSIDE, START, BORDER, UNKNOWN = range(4)  # kinds of tokens: in a word, at its start, between words, of no known text
MASKED_SHARE, CHANGED_SHARE = 0.8, 0.1  # of the chosen tokens: become the mask token, a random one; the rest stays
MASKED_LIMIT, CHANGED_LIMIT = round(MASKED_SHARE * 2**30), round((MASKED_SHARE + CHANGED_SHARE) * 2**30)
INCREMENT = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR, SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# With uint64 on one side only, numba would compute in float64.
SHIFT_27, SHIFT_30, SHIFT_31, SHIFT_32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


@numba.njit(nogil=True)
def draw_below(state, limit):
    """A random integer from 0 to limit - 1 (limit below 2**31); advances `state`, uint64 [1]."""
    state[0] += INCREMENT
    bits = state[0]
    bits = (bits ^ (bits >> SHIFT_30)) * FIRST_FACTOR
    bits = (bits ^ (bits >> SHIFT_27)) * SECOND_FACTOR
    bits ^= bits >> SHIFT_31
    return np.int64(((bits >> SHIFT_32) * np.uint64(limit)) >> SHIFT_32)


@numba.njit(nogil=True)
def find_words(ids, begin, end, kinds, begins, sizes):
    """Write where the words between two positions begin and how many tokens they have; returns their number.

    A word begins at a START token, or at any other after a BORDER. One that holds an UNKNOWN token is left out. Also
    returns the number of tokens that are INSIDE or START.
    """
    num_runs, num_known, has_unknown, after_border = 0, 0, False, True
    for position in range(begin, end):  # without a branch, since which token starts a word is hard to predict
        kind = kinds[ids[position]]
        begins[num_runs] = position
        num_runs += (kind == START) | (kind == BORDER) | after_border
        num_known += kind < BORDER
        has_unknown |= kind == UNKNOWN
        after_border = kind == BORDER
    begins[num_runs] = end
    num_words = 0
    for run in range(num_runs):
        first, last = begins[run], begins[run + 1]
        is_word = kinds[ids[first]] != BORDER
        if has_unknown:
            for position in range(first, last):
                is_word &= kinds[ids[position]] != UNKNOWN
        if is_word:
            begins[num_words], sizes[num_words] = first, last - first
            num_words += 1
    return num_words, num_known


@numba.njit(nogil=True)
def swap(begins, sizes, first, second):
    begins[first], begins[second] = begins[second], begins[first]
    sizes[first], sizes[second] = sizes[second], sizes[first]


@numba.njit(nogil=True)
def choose_words(begins, sizes, num_words, budget, state):
    """Visit the words in random order and bring those that fit what is left of the budget to the front.

    Where none fits, that is the shortest one. Returns how many they are.
    """
    num_chosen, left, shortest = 0, budget, 0
    for visit in range(num_words):
        swap(begins, sizes, visit, visit + draw_below(state, num_words - visit))
        size = sizes[visit]
        if size <= left:
            left -= size
            swap(begins, sizes, visit, num_chosen)
            num_chosen += 1
            if left == 0:
                break
        elif size < sizes[shortest]:
            shortest = visit
    if num_chosen == 0 and num_words > 0:
        swap(begins, sizes, shortest, 0)
        return 1
    return num_chosen


@compiled(nogil=True)
def choose_tokens(ids, ends, kinds, probability, state, labels):
    """Write the ids of the tokens to predict to `labels`: words within round(probability * known tokens), or 1."""
    begin, longest = 0, 0
    for end in ends:
        longest = max(longest, end - begin)
        begin = end
    begins, sizes = np.empty(longest + 1, np.int32), np.empty(longest + 1, np.int32)
    begin = 0
    for end in ends:
        num_words, num_known = find_words(ids, begin, end, kinds, begins, sizes)
        budget = max(1, round(probability * num_known))
        for word in range(choose_words(begins, sizes, num_words, budget, state)):
            for position in range(begins[word], begins[word] + sizes[word]):
                labels[position] = ids[position]
        begin = end


@compiled(nogil=True)
def hide(ids, labels, mask_token_id, ordinary_ids, state):
    """Replace the ids that have a label: most by the mask token, some by a random one, some stay."""
    for position in range(len(ids)):
        if labels[position] < 0:
            continue
        draw = draw_below(state, 2**30)
        if draw < MASKED_LIMIT:
            ids[position] = mask_token_id
        elif draw < CHANGED_LIMIT:
            ids[position] = ordinary_ids[draw_below(state, len(ordinary_ids))]


@compiled(nogil=True)
def pad_rows(values, ends, filler, padded):
    """Copy rows laid end to end to int64 [rows, width], each one followed by `filler`."""
    begin = 0
    for row in range(len(ends)):
        end = ends[row]
        for column in range(end - begin):
            padded[row, column] = values[begin + column]
        for column in range(end - begin, padded.shape[1]):
            padded[row, column] = filler
        begin = end
