"""More problems than lanes: a lane that is done takes the next problem.

`once(carry) -> carry` is a trial step of all lanes, carry = ((own, states), who, rows); `who` are the
numbers of the problems in the lanes, as many as there are problems where a lane has none.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxode.batch.layout import Packing, column, columns, put_column

ROUND = 8  # trial steps between two looks at which lanes are done


def all_at_once(unfinished, queue, once, rows, size: int):
    """A lane for every problem: how they ended, and the rows."""
    busy = lambda carry: jnp.any(unfinished(*carry[0]))
    start = queue, jnp.arange(size, dtype=jnp.int32), rows
    (_, ends), _, rows = lax.while_loop(busy, once, start)
    return ends, rows


def lane_by_lane(unfinished, queue, once, rows, size: int, width: int, axis: int):
    """The same with fewer lanes, inside of one call, where a lane is moved by itself."""
    few = max(1, width // 16)

    def idle(lanes, who):
        return ~unfinished(*lanes) & (who < size)

    def swap(carry):
        """A lane that is done gives its result, and takes a new problem."""
        lanes, who, rows, ends, head = carry
        j = jnp.argmax(idle(lanes, who)).astype(jnp.int32)
        old, there = column(lanes, j, axis), head < size
        ends = put_column(who[j], old[1], ends, axis)
        new = column(queue, jnp.minimum(head, size - 1), axis)
        lanes = put_column(j, jax.tree.map(partial(jnp.where, there), new, old), lanes, axis)
        who = lax.dynamic_update_index_in_dim(who, jnp.where(there, head, size), j, 0)
        return lanes, who, rows, ends, head + 1

    def refill(carry):
        return lax.while_loop(lambda carry: jnp.any(idle(*carry[:2])), swap, carry)

    def several(carry):
        """Whether enough lanes are done, or all that have a problem."""
        done = idle(*carry[:2])
        count, left = (jnp.sum(x, dtype=jnp.int32) for x in (done, carry[1] < size))
        return (count >= few) | ((count > 0) & (count == left))

    def attempt(carry):
        carry = lax.while_loop(several, refill, carry)  # turns at most once
        lanes, who, rows = once(carry[:3])
        return lanes, who, rows, *carry[3:]

    lanes = columns(queue, 0, width, axis)
    who = jnp.arange(width, dtype=jnp.int32)
    ends = jax.tree.map(jnp.zeros_like, queue[1])
    begin = lanes, who, rows, ends, jnp.asarray(width, jnp.int32)
    _, _, rows, ends, _ = lax.while_loop(lambda carry: jnp.any(carry[1] < size), attempt, begin)
    return ends, rows


def together(unfinished, queue, once, rows, size: int, width: int):
    """A lane for every problem, or fewer lanes where kernels have a price."""
    if width >= size:
        return all_at_once(unfinished, queue, once, rows, size)
    return in_rounds(unfinished, queue, once, rows, size, width)


def in_rounds(unfinished, queue, once, rows, size: int, width: int):
    """The same where kernels have a price: lanes are looked at after some trial steps, and moved together."""
    together = Packing()
    waiting, structure = together.pack(queue)

    def refill(head, carry):
        """Lanes that are done give their results, and take new problems."""
        held, who, ends, _ = carry
        idle = ~unfinished(*held) & (who < size)
        next_one = jnp.where(idle, jnp.minimum(head - 1 + counted(idle), size), size)
        old, _ = together.pack(held)
        new = together.where(next_one < size, together.take(waiting, next_one), old)
        ends = together.put(ends, jnp.where(idle, who, size), old)
        who = jnp.where(idle, next_one, who)
        return together.open(new, structure), who, ends, jnp.array(False)

    def attempts(carry):
        n, _, lanes = carry
        lanes = once(lanes)
        return n + 1, jnp.sum(unfinished(*lanes[0]), dtype=jnp.int32), lanes

    def several(carry):
        """Some attempts, and new problems if enough lanes are done; `live` lanes have one at all."""
        held, who, rows, head, live, ends = carry
        some = lambda carry: (carry[0] < ROUND) & (carry[1] > 0)
        begin = 0 * live, live, (held, who, rows)
        _, busy, (held, who, rows) = lax.while_loop(some, attempts, begin)
        done = live - busy
        ready = (16 * done >= width) | (busy == 0)
        begin = held, who, ends, ready
        held, who, ends, _ = lax.while_loop(lambda carry: carry[-1], partial(refill, head), begin)
        taken = jnp.clip(size - head, 0, done)
        head, live = head + jnp.where(ready, done, 0), live + jnp.where(ready, taken - done, 0)
        return held, who, rows, head, live, ends

    held = together.open(together.part(waiting, 0, width), structure)
    who, all_ = jnp.arange(width, dtype=jnp.int32), jnp.asarray(width, jnp.int32)
    carry = held, who, rows, all_, all_, jax.tree.map(jnp.zeros_like, waiting)
    *_, rows, _, _, ends = lax.while_loop(lambda carry: carry[4] > 0, several, carry)
    return together.open(ends, structure)[1], rows


def counted(flags):
    """How many of the flags are set, up to each: by two products, where XLA makes a cumsum of six kernels."""
    length = math.gcd(len(flags), 16)
    rows = flags.reshape(-1, length).astype(jnp.float32)
    times = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    within = times(rows, np.triu(np.ones((length, length), np.float32)))
    before = times(np.tril(np.ones((len(rows), len(rows)), np.float32), -1), within[:, -1:])
    return (within + before).reshape(-1).astype(jnp.int32)
