"""JAX's debugging switches: what of a solve they look at, and which of its transfers are meant.

`jax_debug_nans` and `jax_debug_infs` look at every number that a program returns. The program of a solve
returns more than results: to a backward pass limits that are infinite, and NaN in rows where nothing happened.
So it runs without these checks, and then they look at what is real of its solution. The numbers of a backward
pass are all real, and looked at by JAX itself.
"""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.solution import Solution, Status

NOTHING = contextlib.nullcontext()  # for switches that are off, in every call
GUARDS = ("disallow", "log")


def are_on() -> bool:
    """Whether JAX is to look for NaN or for infinities."""
    return bool(jax.config.jax_debug_nans or jax.config.jax_debug_infs)  # type: ignore[attr-defined]


def unchecked():
    """Where JAX does not look for them."""
    return with_all(jax.debug_nans(False), jax.debug_infs(False)) if are_on() else NOTHING


def moving():
    """Where transfers between host and device are meant, as those of `jax.device_put` and `jax.device_get`:
    `jax_transfer_guard` allows these where it says "disallow", and is silent on them where it says "log".
    """
    guarded = jax.config.jax_transfer_guard_host_to_device in GUARDS  # type: ignore[attr-defined]
    read = jax.config.jax_transfer_guard_device_to_host in GUARDS  # type: ignore[attr-defined]
    if not (guarded or read):
        return NOTHING
    lifted = [jax.transfer_guard_host_to_device("allow")] if guarded else []
    return with_all(*lifted, *([jax.transfer_guard_device_to_host("allow")] if read else []))


def tracing():
    """Where func is traced, as in every call of which it is not known that it does the same as before.
    `jax_no_tracing` is about the programs that are made after that."""
    return jax.no_tracing(False) if jax.config.jax_no_tracing else NOTHING  # type: ignore[attr-defined]


@contextlib.contextmanager
def with_all(*contexts):
    """Several contexts as one."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def look_at(solution: Solution) -> None:
    """Raise a FloatingPointError if JAX is to look for such numbers, and a solution has one that is real.

    Inside of `jit` nothing is known yet, and JAX looks at what the whole program returns.
    """
    status = solution.status
    why = "The solve failed (its `status` says how), or func, `save`, `fold` or an event made it."
    if tree.known(status) and status != Status.SUCCESS.value:
        why = Status(int(status)).message
    sought(lambda: real_of(solution), f"the solution of a solve. {why}")


def look_at_cotangents(bars) -> None:
    """The same of what the backward pass of a solve has found."""
    sought(lambda: [kept(True, x) for x in bars], "the backward pass of a solve.")


def sought(find: Callable, where: str) -> None:
    """Compute something, and say where it is if JAX finds such a number in it."""
    if not are_on():
        return
    try:
        find()
    except FloatingPointError as error:
        found = str(error).partition(" encountered")[0]
        raise FloatingPointError(f"{found} encountered in {where}") from None


def real_of(solution: Solution) -> PyTree:
    """The values of a solution, with 0 in the rows that are documented to be NaN: those after a terminal event,
    steps that were not taken, events that did not happen."""
    each = lambda there, values: jax.tree.map(lambda x: kept(there, x), values)
    rows = solution.status != Status.EVENT.value if solution.mask is None else solution.mask
    found = [each(rows, solution.ys), each(True, solution.folded)]
    for event in solution.events or ():
        there = jnp.arange(len(event.times), dtype=jnp.int32) < event.count
        found.append(each(there, (event.times, event.states)))
    return found


def kept(there, x):
    """x where it is there, else 0: one operation, at whose result JAX looks."""
    there = jnp.reshape(there, jnp.shape(there) + (1,) * (x.ndim - jnp.ndim(there)))
    return lax.select(jnp.broadcast_to(there, x.shape), x, jnp.zeros_like(x))
