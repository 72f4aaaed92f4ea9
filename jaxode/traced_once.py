"""Functions that need not be traced again: plain ones, as long as all that they read is what it was.

Tracing a small function takes ten times as long as solving its equation: of a call outside of `jit` it was
nearly all. JAX takes a function that it has traced for the same, whatever has become of what it reads. Here it
is the same if its code is, and all that this can reach: numbers, strings, arrays of JAX (which do not change),
small arrays of NumPy (by their values), modules and functions of JAX, NumPy and Python, and functions of which
all this is true again. One that reads or writes anything else, or calls what has a state, is traced in every
call.
"""

import builtins
import dis
import functools
import sys
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from jaxode.kernels.traces import Identity

LIBRARIES = set("builtins cmath jax jaxlib jaxode math numpy operator".split())
# Names by which a function reads what is not to be seen here, or changes; or does what it is to do again.
WITH_STATE = set(
    """
    config delattr eval exec getattr globals input locals open print random setattr vars
    callback io_callback pure_callback datetime64
    load loadtxt fromfile fromregex genfromtxt memmap lib geterr geterrcall seterr errstate
    get_printoptions set_printoptions printoptions
    """.split()
)
A_JITTED = jax.jit(lambda: None)  # has the attributes that JAX gives to all of them
MOST = 32  # functions that are kept
# How much one of them may read, in arrays and strings, and else.
BYTES, VALUES, FUNCTIONS = 2**16, 1000, 64


class Unknown(Exception):
    """Something is read of which it cannot be said whether it will be the same."""


class Tracing(threading.local):
    """What this thread traces: a function, and what is kept of it, if anything is."""

    function: Any = None
    kept: Any = None


TRACING = Tracing()


class Kept:
    """What is kept of functions that read the same: what JAX has traced, and what was made of it."""

    def __init__(self):
        self.again = True  # whether it is to be used
        # The function of the call for which it is traced, not that of the first one: that may have changed.
        self.jitted = jax.jit(lambda *given: TRACING.function(*given))
        self.results: dict = {}

    def result(self, key, make: Callable):
        """make(*key), kept of a few keys: those of other shapes."""
        found = self.results.get(key)
        if found is None:
            found = make(*key)
            self.results = {**dict(list(self.results.items())[-15:]), key: found}
        return found


def once(function: Callable, given: tuple, reads: PyTree, passed: PyTree, make: Callable) -> tuple:
    """The jaxpr of a function of arrays like `given`, and what `make` makes of it and of the structure of what
    it returns: those of an earlier call, if all of `reads` is, and reads, what it did then.

    `passed` is what the user's function is called with.
    """
    kept = kept_of(reads, passed)
    if kept is None or not kept.again:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*given)
        return closed, make(closed.jaxpr, jax.tree.structure(out))
    around = TRACING.function, TRACING.kept  # of a solve that func is a part of
    TRACING.function, TRACING.kept = function, kept
    try:
        traced = kept.jitted.trace(*given)
    finally:
        TRACING.function, TRACING.kept = around
    closed = traced.jaxpr
    return closed, kept.result((closed.jaxpr, jax.tree.structure(traced.out_info)), make)


def not_again() -> None:
    """Said by what is traced: it is to be traced in every call, for what it does besides."""
    if TRACING.kept is not None:
        TRACING.kept.again = False


def kept_of(reads: PyTree, passed: PyTree) -> Kept | None:
    """What is kept of functions that read the same; None if it is not known what they read."""
    try:
        if not plain(passed):
            return None
        leaves, structure = jax.tree.flatten(reads)
        key = structure, Reader().key(tuple(leaves))
    except Exception:  # `Unknown`, or what an object of the user's raises when it is looked at
        return None
    return of_key(key)


@functools.lru_cache(MOST)
def of_key(key: Hashable) -> Kept:
    return Kept()


def plain(x: PyTree) -> bool:
    """Whether its containers are those of Python, which have no methods of the user's."""
    if type(x) in (list, tuple):
        return all(map(plain, x))
    if type(x) is dict:
        return all(type(key) is str for key in x) and all(map(plain, x.values()))
    return x is None or jax.tree_util.all_leaves([x])


class Reader:
    """Goes through all that values can reach: what was found of each is equal only for what does the same."""

    def __init__(self):
        self.functions: dict[Callable, int] = {}  # that it has come to, numbered
        self.bytes = self.values = 0
        self.arrays = self.writes = False  # whether any of NumPy are read, and anything is written

    def key(self, value: Any) -> Hashable:
        """What there is to know of a value; `Unknown` if that is not all."""
        kind = type(value)
        self.count(1, len(value) if kind in (str, bytes) else 0)
        if value is None or kind in (bool, int, str, bytes, type(Ellipsis)):
            return kind, value
        if kind in (float, complex):
            return kind, repr(value)  # of -0.0 and of nan, too
        if kind in (tuple, slice):
            parts = value if kind is tuple else (value.start, value.stop, value.step)
            return kind, tuple(map(self.key, parts))
        if kind is np.ndarray or isinstance(value, np.generic | jax.Array):
            return self.of_array(value)
        if kind is functools.partial and not vars(value):
            return kind, self.key(value.func), self.key(value.args), self.of_names(value.keywords)
        if kind is types.FunctionType:
            return self.of_function(value)
        if of_library(value):
            return Identity(value)
        if kind is type(A_JITTED) and vars(value).keys() <= vars(A_JITTED).keys():
            return Identity(value), self.key(value.__wrapped__)
        raise Unknown

    def count(self, values: int, size: int) -> None:
        self.values, self.bytes = self.values + values, self.bytes + size
        if self.values > VALUES or self.bytes > BYTES:
            raise Unknown

    def of_array(self, value) -> Hashable:
        if isinstance(value, Tracer):
            raise Unknown
        self.count(0, value.nbytes)
        if isinstance(value, jax.Array):
            return Identity(value)
        if value.dtype.hasobject or not value.dtype.isbuiltin:  # or of several fields
            raise Unknown
        self.arrays = True
        return type(value), value.dtype, value.shape, value.flags.num, value.tobytes()

    def of_function(self, func: types.FunctionType) -> Hashable:
        """Its code, what it has closed over, its defaults, and the globals that it names."""
        if func in self.functions:
            return types.FunctionType, self.functions[func]
        if func.__closure__ is None and of_library(func):
            return Identity(func)
        self.functions[func] = len(self.functions)
        names, writes = names_in(func.__code__)
        self.writes = self.writes or writes
        held, there = func.__globals__, vars(builtins)
        if names is None or vars(func).keys() - {"__wrapped__"} or type(held) is not dict:
            raise Unknown
        if len(self.functions) > FUNCTIONS:
            raise Unknown
        cells = tuple(cell.cell_contents for cell in func.__closure__ or ())
        read = {name: held.get(name, there.get(name, held)) for name in names}
        found = (
            func.__code__, self.key(cells), self.key(func.__defaults__),
            self.of_names(func.__kwdefaults__ or {}),
            self.of_names({name: value for name, value in read.items() if value is not held}),
        )  # fmt: skip
        if self.arrays and self.writes:  # perhaps into one of them
            raise Unknown
        return found

    def of_names(self, values: dict) -> Hashable:
        return tuple((name, self.key(value)) for name, value in sorted(values.items()))


def of_library(value) -> bool:
    """Whether this is a module of JAX, NumPy or Python, or a function or class that is found there under its
    name: it has no state, and reads nothing of the user's."""
    if isinstance(value, types.ModuleType):
        name = value.__name__
        return stateless(name) and sys.modules.get(name) is value
    module = "numpy" if isinstance(value, np.ufunc) else getattr(value, "__module__", None)
    name = getattr(value, "__name__", None)
    if not (isinstance(module, str) and isinstance(name, str) and stateless(module)):
        return False
    return name not in WITH_STATE and getattr(sys.modules.get(module), name, None) is value


def stateless(module: str) -> bool:
    parts = module.split(".")
    return parts[0] in LIBRARIES and WITH_STATE.isdisjoint(parts)


@functools.lru_cache(1024)
def names_in(code: types.CodeType) -> tuple[frozenset | None, bool]:
    """The names of globals, and of attributes, in the code of a function and of those inside of it: None if
    it imports modules, sets what is not its own, or reads what has a state. And whether it writes into
    anything."""
    writes = False
    for op in dis.get_instructions(code):
        outside = op.opname in ("STORE_DEREF", "DELETE_DEREF") and op.argval in code.co_freevars
        if outside or op.opname in ("IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR"):
            return None, True
        writes = writes or op.opname == "STORE_SUBSCR"
    found = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names, inner_writes = names_in(inner)
            if names is None:
                return None, True
            found, writes = found | names, writes or inner_writes
    if found & WITH_STATE or any(name.startswith("__") for name in found):
        return None, True
    return frozenset(found), writes
