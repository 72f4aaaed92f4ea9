"""Where the answers of the stiff problems come from: `python -m bench.references [NAME ...] [--write]`.

Each is computed by a collocation method of order 17 at the Radau nodes, with residuals in extended
precision (numpy's longdouble, 64 bits of mantissa) and a step chosen by how fast the Legendre
coefficients of the solution decay. It shares nothing with jaxode but func itself, whose jaxpr is
evaluated by numpy, operation by operation. Each is computed twice, with 9 nodes and with 7 at
another tolerance; and by SciPy's Radau at rtol 1e-13 (SUNDIALS' IDA where there is a mass matrix),
and, where they are not too large, by our own rodas5p and kvaerno5 at 1e-12.

Printed are the digits in which two ways agree: of each number relative to it, at least to 1e-6 of
the problem's scale. `--write` puts the answers into jaxode/problems/ends.py.
"""

import argparse
import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.integrate import solve_ivp

import jaxode
from jaxode.methods import Banded
from jaxode.problems import problems

LONG = np.longdouble
BREAKS = {"brusselator_square": (1.1,), "medical_akzo": (5.0,)}  # where func jumps
# What the exact solution keeps, put back after each step: else rounding where numbers were large is seen
# where they are small.
KEPT = {"e5": lambda y: np.array([y[0], y[1], y[1] - y[3], y[3]])}
KEPT["e5_long"] = KEPT["e5"]
# Where collocation in Python would take hours, the answer is SciPy's Radau at this tolerance, checked by ours.
SLOW = {"medical_akzo": 1e-13, "brusselator_square": 1e-13}
# A million steps, too many for Python: ours at two tolerances, which agree in 10 digits, and in 9 with what
# the test set's own RADAU5 found: -0.0233905735849, -0.0073674854855, 0.2582956709291, -0.4064465721283, ...
LONGEST = ("ring_modulator",)
FILE = Path(jaxode.__file__).parent / "problems" / "ends.py"


# func in extended precision.

OPERATIONS = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "exp": np.exp,
    "sin": np.sin,
    "cos": np.cos,
    "sqrt": np.sqrt,
    "square": np.square,
    "ge": np.greater_equal,
    "le": np.less_equal,
    "lt": np.less,
    "gt": np.greater,
    "and": np.logical_and,
}
MOVES = (
    "broadcast_in_dim reshape slice squeeze transpose gather rev expand_dims dynamic_slice split"
).split()


def in_extended_precision(f, *like):
    """f as a function of numpy arrays in extended precision, by its jaxpr."""
    closed = jax.make_jaxpr(f)(*like)

    def function(*args):
        return evaluate(closed.jaxpr, closed.consts, [np.asarray(x) for x in args])[0]

    return function


def evaluate(jaxpr, consts, args):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(extended, consts), *args]))
    read = lambda v: extended(v.val) if hasattr(v, "val") else values[v]  # a literal has a value
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, one_operation(eqn, list(map(read, eqn.invars)))))
    return list(map(read, jaxpr.outvars))


def extended(x):
    x = np.asarray(x)
    return x.astype(LONG) if np.issubdtype(x.dtype, np.floating) else x


def one_operation(eqn, args):
    name, params = eqn.primitive.name, eqn.params
    if name in OPERATIONS:
        return [OPERATIONS[name](*args)]
    if name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
        inner = params["jaxpr" if "jaxpr" in params else "call_jaxpr"]
        return evaluate(inner.jaxpr, inner.consts, args)
    if name == "integer_pow":
        return [args[0] ** params["y"]]
    if name == "pow":
        return [np.power(args[0], extended(args[1]))]
    if name == "concatenate":
        return [np.concatenate(args, params["dimension"])]
    if name == "stack":
        return [np.stack(args, params["axis"])]
    if name == "unstack":
        return list(np.moveaxis(args[0], params["axis"], 0))
    if name == "select_n":
        return [np.where(args[0], args[2], args[1])]
    if name in ("convert_element_type", "copy", "stop_gradient", "copy_p"):
        kind = np.dtype(params.get("new_dtype", args[0].dtype))
        return [args[0].astype(LONG if np.issubdtype(kind, np.floating) else kind)]
    if name == "iota":
        return [np.asarray(eqn.primitive.bind(**params))]
    if name == "reduce_sum":
        return [np.sum(args[0], tuple(params["axes"]))]
    if name == "pad":
        low, high, _ = zip(*params["padding_config"])
        return [np.pad(args[0], list(zip(low, high)), constant_values=args[1])]
    if name in MOVES:  # of numbers, found by moving their places
        if (known := PLACES.get(id(eqn))) is None or known[0] is not eqn:
            places = np.arange(args[0].size, dtype=np.int32).reshape(args[0].shape)
            moved = eqn.primitive.bind(places, *args[1:], **params)
            moved = moved if eqn.primitive.multiple_results else [moved]
            PLACES[id(eqn)] = eqn, list(map(np.asarray, moved))
        return [args[0].reshape(-1)[m] for m in PLACES[id(eqn)][1]]
    raise NotImplementedError(f"{name} has no extended precision here: {eqn}")


PLACES = {}  # of the operations that move numbers, each found once: their indices are constants


# Collocation.


def radau_nodes(s):
    """Nodes in (0, 1], the last is 1: the zeros of P_s - P_(s-1), of [-1, 1], in extended precision."""
    coefficients = np.zeros(s + 1)
    coefficients[s], coefficients[s - 1] = 1, -1
    x = np.sort(np.polynomial.legendre.legroots(coefficients).real)[:-1].astype(LONG)
    values = lambda x: legendre(s, x)
    for _ in range(4):
        p, d = values(x)
        x = x - (p[s] - p[s - 1]) / (d[s] - d[s - 1])
    return (np.append(x, LONG(1)) + 1) / 2


def legendre(degree, x):
    """P_0 ... P_degree at x, and their derivatives."""
    p, d = [np.ones_like(x), x], [np.zeros_like(x), np.ones_like(x)]
    for k in range(1, degree):
        p.append(((2 * k + 1) * x * p[k] - k * p[k - 1]) / LONG(k + 1))
        d.append(((2 * k + 1) * (p[k] + x * d[k]) - k * d[k - 1]) / LONG(k + 1))
    return np.array(p), np.array(d)


def inverse(matrix):
    """Of a small matrix, in extended precision, by Newton's iteration from that in double."""
    x = np.linalg.inv(matrix.astype(float)).astype(LONG)
    for _ in range(4):
        x = x @ (2 * np.eye(len(x), dtype=LONG) - matrix @ x)
    return x


class Collocation:
    """s nodes: with z_i = y(t + c_i h) - y(t), mass (A^-1 z)_i = h f(y + z_i, t + c_i h).

    A^-1 differentiates the polynomial through 0 and the z_i. A step whose polynomial has Legendre
    coefficients that do not fall to the tolerance is repeated, shorter.
    """

    def __init__(self, s, tolerance):
        self.tolerance, self.s = tolerance, s
        self.c = radau_nodes(s)
        x = np.append(LONG(0), self.c) * 2 - 1
        p, d = legendre(s, x)
        self.to_legendre = inverse(p.T)  # values at 0 and the nodes -> coefficients
        self.differentiate = (2 * d.T @ self.to_legendre)[1:, 1:]

    def solve(self, f, jacobian, y, t, t1, mass, floor, h, kept=lambda y: y):
        """y(t1), and how many steps that took."""
        y, t, t1, count = np.asarray(y, LONG), LONG(t), LONG(t1), 0
        f = in_extended_precision(jax.vmap(f), jnp.zeros((self.s, len(y))), jnp.zeros(self.s))
        h, start, before = LONG(h), np.nextafter(t, t1), np.nextafter(t1, t)
        last = None
        while t < t1:
            h = t1 - t if t + h * LONG(1.001) >= t1 else h
            times = np.clip(t + self.c * h, start, before)
            guess = 0 if last is None else self.extended_guess(last, h)
            z = self.newton(
                f, jacobian(y.astype(float), float(times[0])), y, times, h, mass, guess, floor
            )
            size = np.inf
            if z is not None:
                top = np.abs(self.to_legendre[-2:, 1:] @ z).max(0)
                most = np.maximum(np.abs(y), np.abs(y + z).max(0))
                size = float(np.max(top / (most + floor))) / self.tolerance
            if size <= 1:
                y, t, last = kept(y + z[-1]), t + h, (z, h)
                count += 1
            factor = (
                0.25 if not np.isfinite(size) else 0.8 * max(size, 1e-30) ** (-1 / (self.s + 1))
            )
            h = h * LONG(min(max(factor, 0.2), 5.0))
            if h < 1e-25 * max(abs(t1), 1e-30):
                raise RuntimeError(f"no step is short enough at t = {t}")
        return y, count

    def extended_guess(self, last, h):
        """The polynomial of the step before, after its end; nothing where that is far."""
        z, h0 = last
        if h > 4 * h0:
            return 0
        p, _ = legendre(self.s, 2 * (1 + self.c * h / h0) - 1)
        return p.T @ (self.to_legendre[:, 1:] @ z) - z[-1]

    def newton(self, f, jacobian, y, times, h, mass, z, floor):
        """z, or None. The matrix is factored in double precision, the residual is not rounded to it."""
        s, n = self.s, len(y)
        matrix = np.kron(self.differentiate.astype(float), mass) - float(h) * np.kron(
            np.eye(s), jacobian
        )
        weighted = lambda z: z if np.all(mass == np.eye(n)) else z @ mass.T.astype(LONG)
        rows = 1 / np.abs(matrix).max(1)
        try:
            inverse = np.linalg.inv(matrix * rows[:, None])
        except np.linalg.LinAlgError:
            return None
        z, before = np.zeros((s, n), LONG) + z, np.inf
        for i in range(60):
            residual = weighted(self.differentiate @ z) - h * f(y + z, times)
            if not np.all(np.isfinite(residual)):
                return None
            residual = residual.reshape(-1) * rows
            norm = np.abs(residual).max()
            # By a double-precision matrix of a number near 1: its size may be below what float64 holds.
            change = -(inverse @ (residual / norm if norm else residual).astype(float)) * norm
            change = change.reshape(s, n)
            z = z + change
            size = float(np.max(np.abs(change) / (np.abs(y + z) + floor)))
            if size < 1e-17 or (size >= before and size < 1e-15):
                return z
            if i > 3 and size > 2 * before:
                return None
            before = size
        return None


def by_collocation(name, s=9, tolerance=1e-15):
    p = problems[name]
    if (
        p.y0.size > 20
    ):  # its steps are slow; the end of a step is of order 2 s - 1, and better than the rest
        s, tolerance = s - 2, 1e3 * tolerance
    # Sums of the equations, such that the algebraic ones have no derivative in them.
    swap, lower, mass = scipy.linalg.lu(np.eye(p.y0.size) if p.mass is None else p.mass)
    summed = np.linalg.inv(lower) @ swap.T
    f = lambda y, t: p.f(y, t, *p.args)
    if p.mass is not None:
        f = lambda y, t: jnp.sum(summed * p.f(y, t, *p.args), 1)
    jacobian = jax.jit(jax.jacfwd(f))
    method, y, ends = Collocation(s, tolerance), p.y0, [*BREAKS.get(name, ()), p.t1]
    numpy_jacobian = lambda y, t: np.asarray(jacobian(y, t))
    # An algebraic equation is kept to the last bit of the numbers in it, not of the smallest of them.
    total, floor = 0, 1e-6 * p.scale if p.mass is None else 1.0
    for t, t1 in zip([p.t0, *ends], ends):
        first, kept = 1e-8 * min(t1 - t, 1), KEPT.get(name, lambda y: y)
        y, count = method.solve(f, numpy_jacobian, y, t, t1, mass, floor, first, kept)
        total += count
    return y.astype(float), total


# Others.


def by_scipy(name, rtol=1e-13):
    p = problems[name]
    f = jax.jit(lambda t, y: p.f(y, t, *p.args))
    jac = jax.jit(lambda t, y: jax.jacfwd(lambda y: p.f(y, t, *p.args))(y))
    y, ends = p.y0, [*BREAKS.get(name, ()), p.t1]
    for t, t1 in zip([p.t0, *ends], ends):
        within = lambda t, t0=t, t1=t1: np.clip(t, np.nextafter(t0, t1), np.nextafter(t1, t0))
        y = solve_ivp(
            lambda t, y, within=within: np.asarray(f(within(t), y)), (t, t1), y, "Radau", rtol=rtol,
            atol=1e-13 * np.broadcast_to(p.scale, y.shape),
            jac=lambda t, y, within=within: np.asarray(jac(within(t), y)),
        ).y[:, -1]  # fmt: skip
    return y


def by_ida(name):
    """SUNDIALS' IDA, for a mass matrix: scikit-sundae."""
    from sksundae.ida import IDA

    p = problems[name]
    f = jax.jit(lambda t, y: p.f(y, t, *p.args))
    jac = jax.jit(lambda t, y: jax.jacfwd(lambda y: p.f(y, t, *p.args))(y))

    def residual(t, y, yp, res):
        res[:] = p.mass @ yp - np.asarray(f(t, y))

    def jacobian(t, y, yp, res, cj, out):
        out[:, :] = cj * p.mass - np.asarray(jac(t, y))

    slope = np.linalg.lstsq(p.mass, np.asarray(f(p.t0, p.y0)), rcond=None)[0]
    algebraic = np.flatnonzero(np.linalg.svd(p.mass)[1] < 1e-15) if name != "robertson_dae" else [2]
    solver = IDA(
        residual, rtol=1e-11, atol=1e-13 * float(p.scale.max()), jacfn=jacobian, max_num_steps=10**6,
        algebraic_idx=list(algebraic),
    )  # fmt: skip
    return solver.solve(np.array([p.t0, p.t1]), p.y0, slope).y[-1]


def by_jaxode(name, method, tolerance=1e-12):
    p = problems[name]
    y, ends = jnp.asarray(p.y0), [*BREAKS.get(name, ()), p.t1]
    for t, t1 in zip([p.t0, *ends], ends):
        inside = np.nextafter(t, t1), np.nextafter(t1, t)
        y = jaxode.solve(
            lambda y, t, inside=inside: p.f(y, jnp.clip(t, *inside), *p.args), y, [t, t1],
            method=method, rtol=tolerance, atol=tolerance * p.scale, max_steps=2**23,
            linear=Banded(*p.band) if p.band else None,
        ).ys[-1]  # fmt: skip
    return y


def digits(a, b, scale) -> float:
    """How many decimal digits of each number are the same, at least."""
    off = np.max(np.abs(np.asarray(a) - b) / (np.abs(b) + 1e-6 * scale))
    return float(-np.log10(max(off, 1e-17)))


def attempt(way, *arguments):
    """The answer, or None where a way does not come to an end; says so."""
    try:
        return np.asarray(way(*arguments))
    except Exception as error:
        print(f"    {way.__name__} {arguments}: {str(error)[:200]}", flush=True)
        return None


def reference(name, others=True):
    p, began = problems[name], time.perf_counter()
    if name in SLOW:
        end, steps, others = by_scipy(name, SLOW[name]), "SciPy's", False
        agreement = {"rodas5p": attempt(by_jaxode, name, "rodas5p", 10 * SLOW[name])}
    elif name in LONGEST:
        end, steps, others = by_jaxode(name, "rodas5p", 2e-12), "our", False
        agreement = {"at 1e-11": attempt(by_jaxode, name, "rodas5p", 1e-11)}
    else:
        end, steps = by_collocation(name)
        agreement = {"7 nodes": by_collocation(name, 7, 1e-13)[0]}
    if p.exact:
        agreement["the exact solution"] = p.answer()
    if others:
        if p.mass is None:
            agreement["SciPy's Radau"] = attempt(by_scipy, name)
        else:
            agreement["IDA"] = attempt(by_ida, name)
        if end.size <= 20 and p.mass is None:
            for method in ("rodas5p", "kvaerno5"):
                agreement[method] = attempt(by_jaxode, name, method)
    found = ", ".join(
        f"{way} {digits(y, end, p.scale):.1f}" for way, y in agreement.items() if y is not None
    )
    print(f"{name}: {steps} steps, {time.perf_counter() - began:.0f} s. Digits shared: {found}")
    print(f"    {[float(x) for x in end]}", flush=True)
    return end


HEAD = '''"""Values of the stiff problems at their ends, as `python -m bench.references --write` computed them.

Not to be edited: which two and more ways they were computed by, and in how many digits they agree,
is printed by that command.
"""

# fmt: off
ends: dict[str, tuple[float, ...]] = {
'''


def write(found):
    ends = runpy.run_path(str(FILE))["ends"]  # as it is now: another of these may be running
    ends.update({name: tuple(map(float, y)) for name, y in found.items()})
    text = HEAD
    for name in (name for name, p in problems.items() if name in ends and not p.exact):
        values = [f"{x!r}," for x in ends[name]]
        lines = ["        " + " ".join(values[i : i + 4]) for i in range(0, len(values), 4)]
        text += f'    "{name}": (\n' + "\n".join(lines) + "\n    ),\n"
    FILE.write_text(text + "}\n")


def main():
    parser = argparse.ArgumentParser("python -m bench.references", description=__doc__)
    parser.add_argument("names", nargs="*", help="problems; all stiff ones, if none is named")
    parser.add_argument("--write", action="store_true", help=f"write the answers into {FILE.name}")
    parser.add_argument("--quick", action="store_true", help="collocation only")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    names = options.names or [name for name, p in problems.items() if p.stiff]
    for name in names:
        end = reference(name, not options.quick)
        if options.write:
            write({name: end})


if __name__ == "__main__":
    sys.exit(main())
