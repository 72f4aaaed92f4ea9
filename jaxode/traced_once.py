"""Functions that need not be traced again: plain ones, as long as all that they read is what it was.

Tracing a small function takes ten times as long as solving its equation: of a call outside of `jit` it was
nearly all. JAX takes a function that it has traced for the same, whatever has become of what it reads. Here it
is the same if its code is, and all that this can reach: numbers, strings, arrays of JAX (which do not change),
small arrays of NumPy (by their values), modules and functions of JAX, NumPy and Python, and functions of which
all this is true again. One that reads anything else, or calls what has a state, is traced in every call.
"""

import dis
import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from jaxode.kernels.traces import Identity

LIBRARIES = {*"builtins cmath jax jaxlib jaxode math numpy operator".split()}
# Names by which a function reads what is not to be seen here, or changes.
WITH_STATE = {*"__import__ config eval exec globals input locals open random vars".split()}
JITTED = type(jax.jit(len))
MOST = 32  # functions that are kept
BYTES, FUNCTIONS = 2**16, 64  # how much in arrays, and how many others, one may read


class Unknown(Exception):
    """Something is read of which it cannot be said whether it will be the same."""


class Reads:
    """What a function reads, to be compared; and how it is made ready to be traced."""

    def __init__(self, key: Hashable, make: Callable):
        self.key, self.make = key, make

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Reads) and self.key == other.key


def once(given: PyTree, static: PyTree, make: Callable) -> tuple:
    """(trace, result): `trace(*given)` is the jaxpr of a function of these arguments, and the shapes of what it
    returns; `result` makes of the first and of the structure of the second what is wanted.

    `make()` gives the function and `result`. Where all of `static` is and reads what it did in an earlier call,
    both are those of that call, and what they have found is kept. `given` is what the function is called with.
    """
    try:
        if not plain(given):
            raise Unknown
        leaves, structure = jax.tree.flatten(static)
        key = structure, Reader().key(tuple(leaves))
    except Unknown:
        function, result = make()
        return jax.make_jaxpr(function, return_shape=True), result
    return kept(Reads(key, make))


@functools.lru_cache(MOST)
def kept(reads: Reads) -> tuple:
    function, result = reads.make()
    again = jax.jit(function)

    def trace(*given):
        found = again.trace(*given)
        return found.jaxpr, found.out_info

    return trace, functools.lru_cache(16)(result)


def plain(x: PyTree) -> bool:
    """Whether its containers are those of Python, which have no methods of the user's."""
    if type(x) in (list, tuple):
        return all(map(plain, x))
    if type(x) is dict:
        return all(map(plain, x.values()))
    return x is None or jax.tree_util.all_leaves([x])


class Reader:
    """Goes through all that values can reach: what was found of each is equal only for what does the same."""

    def __init__(self):
        self.functions: dict[Callable, int] = {}  # that it has come to, numbered
        self.bytes = 0

    def key(self, value: Any) -> Hashable:
        """What there is to know of a value; `Unknown` if that is not all."""
        kind = type(value)
        if value is None or kind in (bool, int, str, bytes, type(Ellipsis)):
            return kind, value
        if kind in (float, complex):
            return kind, repr(value)  # of -0.0 and of nan, too
        if kind in (tuple, slice):
            parts = value if kind is tuple else (value.start, value.stop, value.step)
            return kind, tuple(map(self.key, parts))
        if isinstance(value, np.generic | np.ndarray | jax.Array):
            return self.of_array(value)
        if kind is functools.partial:
            return kind, self.key(value.func), self.key(value.args), self.of_names(value.keywords)
        if kind is types.FunctionType:
            return self.of_function(value)
        if of_library(value):
            return Identity(value)
        if kind is JITTED:
            return Identity(value), self.key(value.__wrapped__)
        raise Unknown

    def of_array(self, value) -> Hashable:
        if isinstance(value, Tracer):
            raise Unknown
        self.bytes += value.nbytes
        if self.bytes > BYTES or value.dtype == object:
            raise Unknown
        if isinstance(value, jax.Array):
            return Identity(value)
        return type(value), value.dtype.str, value.shape, value.tobytes()

    def of_function(self, func: types.FunctionType) -> Hashable:
        """Its code, what it has closed over, its defaults, and the globals that it names."""
        if func in self.functions:
            return types.FunctionType, self.functions[func]
        if func.__closure__ is None and of_library(func):
            return Identity(func)
        self.functions[func] = len(self.functions)
        names = names_in(func.__code__)
        if names is None or set(vars(func)) - {"__wrapped__"} or len(self.functions) > FUNCTIONS:
            raise Unknown
        try:
            cells = tuple(cell.cell_contents for cell in func.__closure__ or ())
        except ValueError:  # one that has no content yet
            raise Unknown from None
        held = func.__globals__
        return (
            func.__code__, self.key(cells), self.key(func.__defaults__),
            self.of_names(func.__kwdefaults__ or {}),
            self.of_names({name: held[name] for name in names if name in held}),
        )  # fmt: skip

    def of_names(self, values: dict) -> Hashable:
        return tuple((name, self.key(value)) for name, value in sorted(values.items()))


def of_library(value) -> bool:
    """Whether this is a module, function or class of JAX, NumPy or Python: it has no state, and reads nothing
    of the user's."""
    if isinstance(value, np.ufunc):
        return True
    if isinstance(value, types.ModuleType):
        name = value.__name__
    elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        name = value.__module__
    else:  # such as jax.nn.relu; its class has a module, too, which says nothing of what it holds
        name = getattr(value, "__dict__", {}).get("__module__")
    parts = (name or "").split(".")
    return parts[0] in LIBRARIES and WITH_STATE.isdisjoint(parts)


@functools.lru_cache(1024)
def names_in(code: types.CodeType) -> frozenset | None:
    """The names of globals, and of attributes, in the code of a function and of those inside of it; None if it
    imports modules, sets globals, or reads what has a state."""
    if any(op.opname in ("IMPORT_NAME", "STORE_GLOBAL") for op in dis.get_instructions(code)):
        return None
    found = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names = names_in(inner)
            if names is None:
                return None
            found |= names
    return None if found & WITH_STATE else frozenset(found)
