"""The user's function as a jaxpr: a value that is equal to another when it does the same.

Here, and not elsewhere, jaxprs are compared. `jax.extend.core` is JAX's public interface to them.
"""

import functools
import itertools

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxode.kernels.writes import evaluate, one_equation, variables
from jaxode.methods.method import Parts

RULES = ("custom_jvp_call", "custom_vjp_call", "ruled")
REVERSE = ("custom_vjp_call", "solve", "solve_backsolve")  # no derivatives in forward mode
ORDERS = 2  # of derivatives that are compared: as many as `replay` has


class Trace:
    """A jaxpr with its constants taken out: a function that is equal to another when it does the same.

    Two Python functions with the same operations have equal traces, so that a new lambda or a
    rebuilt module does not compile again, and one function that has changed (a global that it reads
    was rebound) does. A custom derivative rule is compared by the derivatives that it gives, up to
    second ones. Where these cannot be traced, `origin` (what was traced: its structure and static
    parts) has to be equal as well.
    """

    def __init__(self, jaxpr: core.Jaxpr, out_tree, origin):
        self.jaxpr, self.out_tree = jaxpr, out_tree
        unknown = []
        key = fingerprint(jaxpr, unknown, ORDERS)
        self.key = (key, out_tree, frozen(origin, unknown, 0) if unknown else None)
        time = jaxpr.invars[-1]
        used = [x for eqn in jaxpr.eqns for x in eqn.invars] + jaxpr.outvars
        self.uses_time = any(x is time for x in used)

    @functools.cached_property
    def parts(self) -> list["Trace"]:
        """A trace of each part of dy/dt, where func is a pair of functions; else itself."""
        parts = jax.tree.unflatten(self.out_tree, self.jaxpr.outvars)
        if not isinstance(parts, Parts):
            return [self]

        def alone(part):
            outvars, out_tree = jax.tree.flatten(part)
            jaxpr = without_dead_code(self.jaxpr.replace(outvars=outvars))
            return Trace(jaxpr, out_tree, self.key)

        return list(map(alone, parts))

    def depends(self, outputs, inputs) -> bool:
        """Whether any of these leaves of dy/dt depends on any of these leaves of y."""
        y = self.jaxpr.invars[-1 - len(self.jaxpr.outvars) : -1]
        reached = {y[i] for i in inputs}
        for eqn in self.jaxpr.eqns:
            if not reached.isdisjoint(variables(eqn.invars)):
                reached |= set(eqn.outvars)
        return any(self.jaxpr.outvars[i] in reached for i in outputs)

    def __call__(self, leaves, y, t):
        out = self.call(leaves, jax.tree.leaves(y), t)
        return jax.tree.unflatten(self.out_tree, out)

    @functools.cached_property
    def call(self):
        """The jaxpr as a function, which JAX traces, and differentiates, once for all its calls."""

        @jax.jit
        def func(leaves, y, t):
            count = len(self.jaxpr.constvars)
            return evaluate(self.jaxpr, leaves[:count], [*leaves[count:], *y, t])

        return func

    @property
    def pushes(self) -> bool:
        """Whether it has derivatives in forward mode."""
        return not has(self.jaxpr, REVERSE)

    def like(self):
        """What it returns, as shapes."""
        shapes = [jax.ShapeDtypeStruct(*of_array(v.aval)) for v in self.jaxpr.outvars]
        return jax.tree.unflatten(self.out_tree, shapes)

    def needed(self, leaves) -> tuple["Trace", list]:
        """The same function of those leaves alone that it looks at, and these."""
        jaxpr, count = self.jaxpr, len(self.jaxpr.constvars)
        heads = [*jaxpr.constvars, *jaxpr.invars]
        used = {*variables(jaxpr.outvars), *(v for e in jaxpr.eqns for v in variables(e.invars))}
        kept = [i for i in range(len(leaves)) if heads[i] in used]
        consts, invars = (
            [heads[i] for i in kept if i < count],
            [heads[i] for i in kept if i >= count],
        )
        jaxpr = jaxpr.replace(constvars=consts, invars=[*invars, *heads[len(leaves) :]])
        return Trace(jaxpr, self.out_tree, self.key[2]), [leaves[i] for i in kept]

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Trace) and self.key == other.key


def of_array(aval) -> tuple:
    """Shape and dtype."""
    return aval.shape, aval.dtype


def has(jaxpr, names) -> bool:
    """Whether there is an equation of these primitives."""
    inner = lambda eqn: any(has(j, names) for j in core.jaxprs_in_params(eqn.params))
    return any(eqn.primitive.name in names or inner(eqn) for eqn in jaxpr.eqns)


@functools.lru_cache(4096)
def text_of(aval) -> str:
    """A kind of array in words: strings compare faster than what they describe, and are slow to make."""
    return str(aval)


def fingerprint(jaxpr, unknown: list, orders: int) -> tuple:
    """What a jaxpr does, as nested tuples that can be compared.

    Custom rules are compared by their derivatives of so many `orders`; those of which these cannot be
    traced are collected in `unknown`.
    """
    number = itertools.count()
    names = {}

    def name(atom):
        if isinstance(atom, core.Literal):
            return "literal", text_of(atom.aval), np.asarray(atom.val).tobytes()
        if atom in names:
            return names[atom]
        names[atom] = next(number)
        return names[atom], text_of(atom.aval)

    def parameters(eqn):
        if eqn.primitive.name not in RULES:
            return tuple((k, frozen(v, unknown, orders)) for k, v in sorted(eqn.params.items()))
        plain = core.ClosedJaxpr | core.Jaxpr | bool | int | str | tuple | list
        known = {k: v for k, v in eqn.params.items() if isinstance(v, plain)}
        rule = derivative(jaxpr, eqn, unknown, orders)
        return rule, tuple((k, frozen(v, unknown, orders)) for k, v in sorted(known.items()))

    heads = tuple(map(name, [*jaxpr.constvars, *jaxpr.invars]))
    equations = tuple(
        (
            eqn.primitive,
            tuple(map(name, eqn.invars)),
            tuple(map(name, eqn.outvars)),
            parameters(eqn),
        )
        for eqn in jaxpr.eqns
    )
    return heads, equations, tuple(map(name, jaxpr.outvars))


def derivative(jaxpr, eqn, unknown: list, orders: int):
    """The fingerprint of the derivative that a custom rule gives: of its vjp, which has all of it."""
    one, invars = one_equation(jaxpr, eqn)
    shapes = lambda xs: [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in xs]
    if not orders:
        return "rule"
    try:
        back = jax.make_jaxpr(lambda xs, ys_bar: jax.vjp(one, *xs)[1](ys_bar))
        closed = back(shapes(invars), shapes(eqn.outvars))
    except TypeError:  # integers among the results, too: they have no cotangents of their own dtype
        unknown.append(eqn)
        return "rule"
    consts = tuple(frozen(c, unknown, orders - 1) for c in closed.consts)
    return fingerprint(without_dead_code(closed.jaxpr), unknown, orders - 1), consts


def without_dead_code(jaxpr):
    """The jaxpr without operations that nothing uses: a rule that uses its own function's value has one."""
    used, alive = set(variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not used.isdisjoint(eqn.outvars):
            alive.append(eqn)
            used |= set(variables(eqn.invars))
    return jaxpr.replace(eqns=alive[::-1])


def frozen(value, unknown: list, orders: int):
    """A parameter of an equation, as something hashable that is equal only to what does the same."""
    again = functools.partial(frozen, unknown=unknown, orders=orders)
    if isinstance(value, core.ClosedJaxpr):
        return fingerprint(value.jaxpr, unknown, orders), tuple(map(again, value.consts))
    if isinstance(value, core.Jaxpr):
        return fingerprint(value, unknown, orders)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(again, value))
    if isinstance(value, dict):
        return tuple((key, again(item)) for key, item in sorted(value.items()))
    if isinstance(value, np.ndarray | np.generic) or (
        isinstance(value, jax.Array) and not isinstance(value, Tracer)
    ):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return str(value.dtype), again(jax.random.key_data(jax.numpy.asarray(value)))
        return str(value.dtype), value.shape, np.asarray(value).tobytes()
    try:
        hash(value)
    except TypeError:
        return Identity(value)
    return value


class Identity:
    """Equal to nothing but the same object, which it keeps alive."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return id(self.value)

    def __eq__(self, other):
        return isinstance(other, Identity) and self.value is other.value
