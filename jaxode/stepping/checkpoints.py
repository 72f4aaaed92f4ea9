"""Some states of a solve stored, the others computed again: what a backward pass goes over.

A tape holds the states at about sqrt(max_steps) places, whatever the number of steps: when it is
full, every other one is dropped. Going back, the states between two of them are rebuilt.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree

# 64 states stored and 64 rebuilt serve 4,096 steps at the price of one more forward pass.
SEGMENT = 64
# More states than that are stored while they are small, up to so many bytes or states: in a `lax.scan`
# every solve has a tape of its own. With twice as much a gradient of 200 short solves took a half more,
# and one of a single solve of 300 steps a tenth less.
NEAR, STORED, FAR = 16 * 1024, 256, 128 * 1024


class Tape(NamedTuple):
    """Where each step began, and the states at some of these places.

    Row i of `pairs` (y and memory) is the state after i 2^level steps (a last row takes what is not
    stored); `grid[n]` is where step n began, `grid[steps]` where the last one ended. With events `due`
    says which of them each step makes the change of; a step does not say that of the next one.
    """

    pairs: PyTree
    grid: Array
    level: Array
    steps: Array
    due: Array | None = None

    def write(self, n, pair, s1) -> "Tape":
        """State n, where a trial step begins, and where it ends. A rejected one is written over.

        State n belongs into row n / 2^level, rounded up: the last state written into a row is the one
        that falls on it, and the others cost no test.
        """
        row = (n + (1 << self.level) - 1) >> self.level
        grid = lax.dynamic_update_index_in_dim(self.grid, lax.stop_gradient(s1), n + 1, 0)
        due = None if self.due is None else tree.put(n, due_of(pair), self.due)
        return self._replace(pairs=tree.put(row, pair, self.pairs), grid=grid, due=due)

    def run(self, turns, unfinished, body, state) -> Any:
        """`turns`, which is `lax.while_loop` or like it, over (state, rows, tape); whenever the tape is full,
        every other row is dropped."""
        if slots(self) >= len(self.grid) - 1:
            return turns(unfinished, body, state)

        def room_left(state):
            return state[0].accepted < (slots(state[-1]) << state[-1].level)

        def until_full(state):
            state = *state[:-1], thin(state[-1], ~room_left(state))
            return turns(lambda state: unfinished(state) & room_left(state), body, state)

        return lax.while_loop(unfinished, until_full, state)


def empty(max_steps: int, pair, dtype) -> Tape:
    """Room for as many states, or for more while they are small; and for those rebuilt of a segment."""
    size = tree.size_in_bytes(pair)
    stored = max(segment(max_steps), NEAR // size, min(STORED, FAR // size))
    rows = min(stored + segment(max_steps), max_steps)
    zero = jnp.zeros((), jnp.int32)
    grid = jnp.zeros(max_steps + 1, dtype)
    due = due_of(pair)
    due = None if due is None else tree.rooms(due, max_steps + 1)
    return Tape(pairs=tree.rooms(pair, rows + 1), grid=grid, level=zero, steps=zero, due=due)


def due_of(pair):
    """Which events are due in a step that begins so; None without events."""
    return getattr(pair[1], "due", None)


def with_due(pair, due):
    """A pair whose next step makes these changes."""
    return pair if due is None else (pair[0], pair[1]._replace(due=due))


def segment(max_steps: int) -> int:
    """How many states a backward pass rebuilds at a time: sqrt(max_steps), at most 64."""
    return max(1, min(SEGMENT, math.isqrt(max_steps - 1) + 1))


def slots(tape: Tape) -> int:
    """How many states are stored: all, or as many as leaves room for a segment to be rebuilt."""
    rows, most = len(jax.tree.leaves(tape.pairs)[0]) - 1, len(tape.grid) - 1
    return most if rows >= most else rows - segment(most)


def thin(tape: Tape, full) -> Tape:
    """Keep every other row, in place, if the tape is full."""
    half = jnp.where(full, slots(tape) // 2 + slots(tape) % 2, 0)

    def move(carry):
        i, pairs = carry
        return i + 1, tree.put(i, tree.row(pairs, 2 * i), pairs)

    _, pairs = lax.while_loop(lambda carry: carry[0] < half, move, (0 * half, tape.pairs))
    return tape._replace(pairs=pairs, level=tape.level + full.astype(jnp.int32))


def backwards(max_steps: int, tape: Tape, again, visit, carry):
    """visit(carry, n, y_n, memory_n) for n = steps - 1, ..., 0.

    The states between two rows of the tape are rebuilt, by `again(s, y, memory, h)`, which is a step,
    into its last rows: so they are read from one place, whether they were stored or not.
    """
    stored, rooms = slots(tape), tape.pairs
    if stored >= max_steps:

        def back(state):
            n, carry = state[0] - 1, state[1]
            return n, visit(carry, n, *tree.row(rooms, n))

        return lax.while_loop(lambda state: state[0] > 0, back, (tape.steps, carry))[1]

    all_there = tape.level == 0
    length = jnp.where(all_there, stored, jnp.minimum(1 << tape.level, segment(max_steps)))
    base = jnp.where(all_there, 0, stored + 1)  # state n is in row n - start + base

    def one_segment(state):
        end, carry, rooms = state
        start = (end - 1) // length * length

        def rebuild(state):
            n, pair, rooms = state
            # Before start: written over.
            rooms = tree.put(jnp.maximum(n - start, 0) + base, pair, rooms)
            s, s1 = tree.row(tape.grid, n), tree.row(tape.grid, n + 1)
            due = None if tape.due is None else tree.row(tape.due, n + 1)
            return n + 1, with_due(again(s, *pair, s1 - s), due), rooms

        row = start >> tape.level
        first = jnp.where(all_there, end - 1, row << tape.level)
        begin = first, tree.row(rooms, row), rooms
        _, pair, rooms = lax.while_loop(lambda st: st[0] < end - 1, rebuild, begin)
        last = jnp.where(all_there, stored, end - 1 - start + base)  # row `stored` is never read
        rooms = tree.put(last, pair, rooms)

        def back(state):
            n, carry = state[0] - 1, state[1]
            return n, visit(carry, n, *tree.row(rooms, n - start + base))

        _, carry = lax.while_loop(lambda state: state[0] > start, back, (end, carry))
        return start, carry, rooms

    state = (tape.steps, carry, rooms)
    return lax.while_loop(lambda state: state[0] > 0, one_segment, state)[1]
