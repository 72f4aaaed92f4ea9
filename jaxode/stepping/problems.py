"""One solve, or many that go in step: how a function of one solve is applied to what a loop carries.

What is written for one solve serves many: `each` of a function is the function itself, or its
`jax.vmap` over lanes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.method import LANES


class Problems(NamedTuple):
    """What solves have of their own, an argument of every function here; and what they share.

    Both are parts of (integrator, field, ss), ss the output times: the leaves that belong to the other
    are None. With `axis` = None there is one solve; else arrays have the lanes along this axis: the
    last one, so that the components of small systems are rows, or the first.
    """

    shared: PyTree
    axis: Any = None

    def each(self, fn: Callable) -> Callable:
        """(own, ...) -> fn(integrator, field, ss, ...) of every solve."""
        one = lambda own, *args: fn(*eqx.combine(own, self.shared), *args)
        return one if self.axis is None else jax.vmap(one, self.axis, self.axis, axis_name=LANES)

    def vmap(self, fn: Callable) -> Callable:
        """fn of what solves have of their own alone."""
        return fn if self.axis is None else jax.vmap(fn, self.axis, self.axis)

    def slopes(self, own, y: PyTree, s) -> PyTree:
        """f of every solve."""
        return self.each(lambda integrator, f, ss, y, s: f(y, s))(own, y, s)

    def spread(self, h, like: Array) -> Array:
        """A number of each solve, so that it multiplies an array of states."""
        h = lax.convert_element_type(h, like.dtype)
        if self.axis is None:
            return h
        ones = (1,) * (like.ndim - 1)
        return h.reshape((*ones, -1) if self.axis else (-1, *ones))

    def moved(self, y: PyTree, h, k: PyTree) -> PyTree:
        """y + h k."""
        return jax.tree.map(lambda y, k: tree.moved(y, self.spread(h, k) * k), y, k)

    def polynomial(self, y: PyTree, theta, d: list[PyTree]) -> PyTree:
        """`tree.polynomial`, where each solve has a theta of its own."""
        many = lambda w, x: lax.mul(jnp.broadcast_to(self.spread(w, x), x.shape), x)
        return tree.polynomial(y, theta, d, tree.scale if self.axis is None else many)

    @property
    def row_axis(self) -> int:
        """The axis of what each solve has several of, in arrays of all of them."""
        return 1 if self.axis == 0 else 0

    def put(self, rows, xs: PyTree, rooms: PyTree, by_lane: bool) -> PyTree:
        """The arrays with xs in a row of every solve; `by_lane` writes one after another, as suits one call."""
        axis = self.axis
        if axis is None:
            return tree.put_where(True, rows, xs, rooms)
        lanes = jnp.arange(len(rows), dtype=rows.dtype)
        if not by_lane:
            at = (rows, ..., lanes) if axis else (lanes, rows)
            put = lambda x, room: room.at[at].set(jnp.moveaxis(x, axis, 0), unique_indices=True)
            return jax.tree.map(put, xs, rooms)

        def lane(j, rooms):
            row = lax.convert_element_type(rows[j], j.dtype)

            def put(x, room):
                x = lax.dynamic_slice_in_dim(x, j, 1, axis % x.ndim)
                x = jnp.expand_dims(x, self.row_axis)
                zero = [jnp.zeros_like(j)] * (room.ndim - 2)
                at = (row, *zero, j) if axis else (j, row, *zero)
                return lax.dynamic_update_slice(room, x, at)

            return jax.tree.map(put, xs, rooms)

        return lax.fori_loop(0, len(lanes), lane, rooms)

    def of(self, own) -> tuple[Any, Any, Any]:
        """(integrator, field, ss), with lanes in what is a solve's own."""
        return eqx.combine(own, self.shared)


def pullback(problems: Problems, own, mask, fn: Callable, moving, constant=()):
    """`jax.vjp` of fn(problems, own, *moving, *constant): in the differentiated leaves of the
    field, those that solves share as sums over them, and in `moving`."""
    shared = problems.shared
    x_own, rest_own = eqx.partition(own[1], mask)
    x_shared, rest_shared = eqx.partition(shared[1], mask)

    def of(x_own, x_shared, *moving):
        mine = own[0], eqx.combine(x_own, rest_own), own[2]
        others = shared[0], eqx.combine(x_shared, rest_shared), shared[2]
        return fn(problems._replace(shared=others), mine, *moving, *constant)

    out, vjp = jax.vjp(of, x_own, x_shared, *moving)

    def back(w):
        own_bar, shared_bar, *rest = vjp(w)
        return eqx.combine(own_bar, shared_bar), *rest

    return out, back


def one(integrator, f, ss) -> tuple[Problems, PyTree]:
    """One solve, and what is its own: everything."""
    own = integrator, f, ss
    return Problems(jax.tree.map(lambda _: None, own)), own


def end_of(ss) -> Array:
    """Where a solve ends."""
    return lax.stop_gradient(ss[-1])
