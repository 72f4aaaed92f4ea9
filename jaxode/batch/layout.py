"""How what many solves have of their own lies in memory, and how it is moved: by lane, or all at once."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree


def to_lanes(xs: PyTree, axis: int) -> PyTree:
    """Arrays with lanes along their first axis, with lanes where they belong."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), xs)


def from_lanes(xs: PyTree, axis: int) -> PyTree:
    """And back."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs)


def column(xs: PyTree, i, axis: int) -> PyTree:
    """What belongs to lane i."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, axis % x.ndim, False), xs)


def put_column(i, new: PyTree, xs: PyTree, axis: int) -> PyTree:
    """The arrays with this in lane i."""
    put = lambda n, x: lax.dynamic_update_index_in_dim(x, n, i, axis % x.ndim)
    return jax.tree.map(put, new, xs)


def columns(xs: PyTree, start, size: int, axis: int) -> PyTree:
    """Some lanes next to each other."""
    part = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis % x.ndim)
    return jax.tree.map(part, xs)


def put_columns(start, new: PyTree, xs: PyTree, axis: int) -> PyTree:
    """The arrays with these in some lanes next to each other."""
    put = lambda n, x: lax.dynamic_update_slice_in_dim(x, n, start, axis % x.ndim)
    return jax.tree.map(put, new, xs)


class Packing:
    """What lanes have of their own as one array for each dtype, so that it is moved all at once.

    Lanes are rows. Numbers of float32 are the bits that they are, together with those of int32.
    """

    @staticmethod
    def stored(dtype):
        """The dtype of the array that such numbers are in."""
        return jnp.dtype(jnp.int32) if dtype == jnp.float32 else dtype

    def pack(self, xs):
        """The arrays, and what `open` needs."""
        leaves, structure = jax.tree.flatten(xs)
        groups = {}
        for leaf in leaves:
            dtype = self.stored(leaf.dtype)
            groups.setdefault(dtype, []).append(as_bits(leaf.reshape(len(leaf), -1), dtype))
        shapes = [(leaf.dtype, leaf.shape[1:]) for leaf in leaves]
        return [jnp.concatenate(group, 1) for group in groups.values()], (structure, shapes)

    def open(self, packed, structure):
        """And back."""
        structure, shapes = structure
        arrays = {array.dtype: array for array in packed}
        at, leaves = dict.fromkeys(arrays, 0), []
        for dtype, shape in shapes:
            stored = self.stored(dtype)
            end = at[stored] + math.prod(shape)
            leaf = lax.slice_in_dim(arrays[stored], at[stored], end, axis=1)
            leaves.append(as_bits(leaf, dtype).reshape(-1, *shape))
            at[stored] = end
        return jax.tree.unflatten(structure, leaves)

    def part(self, packed, start, size: int):
        return [lax.dynamic_slice_in_dim(x, start, size, 0) for x in packed]

    def take(self, packed, i):
        return [jnp.take(x, i, axis=0, mode="clip") for x in packed]

    def put(self, packed, i, new):
        """New values at places i; those out of range are dropped."""
        put = partial(dict, mode="drop", unique_indices=True)
        return [x.at[i].set(n, **put()) for x, n in zip(packed, new)]

    def where(self, chosen, packed, others):
        return [jnp.where(chosen[:, None], x, y) for x, y in zip(packed, others)]


def as_bits(x, dtype):
    """The same bits, as numbers of another dtype."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
