"""Compile and time programs in turn, and check them before they are timed."""

import statistics
import time

import jax
import jax.numpy as jnp


def compile_in_turn(make, *args, rounds=3):
    """Trace and compile each; the programs of the first round, and medians of seconds.

    `make(change)` gives the functions; a constant in them changes from round to round, so that no
    library is helped by what it remembers.
    """
    compiled, seconds = {}, {}
    for i in range(rounds):
        for name, function in make(1 + 1e-9 * i).items():
            began = time.perf_counter()
            program = jax.jit(function).lower(*args).compile()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            compiled.setdefault(name, program)
    return compiled, {name: Seconds.of(times) for name, times in seconds.items()}


class Seconds(float):
    """A median, and the spread about it: half of the range between the quartiles, relative.

    One sample has no spread.
    """

    spread: float | None

    @classmethod
    def of(cls, samples):
        middle = cls(statistics.median(samples))
        middle.spread = None
        if len(samples) > 1:
            low, _, high = statistics.quantiles(samples)
            middle.spread = (high - low) / 2 / middle
        return middle


def time_in_turn(
    compiled, *args, rounds=15, least=0.02, clock=time.perf_counter
) -> dict[str, Seconds]:
    """Medians of seconds a call; the programs take turns, so that a slow moment hits all of them.

    `clock=time.process_time` counts those of all cores of this process, whatever else the machine does.
    """
    calls = {}
    for name, program in compiled.items():
        jax.block_until_ready(program(*args))
        began = clock()
        jax.block_until_ready(program(*args))
        calls[name] = max(1, int(least / (clock() - began)))
    samples = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, program in compiled.items():
            began = clock()
            for _ in range(calls[name]):
                jax.block_until_ready(program(*args))
            samples[name].append((clock() - began) / calls[name])
    return {name: Seconds.of(times) for name, times in samples.items()}


def off(answer, reference) -> float:
    """How far an answer is off, relative to the largest number in it; the worst of its arrays."""
    pairs = zip(jax.tree.leaves(answer), jax.tree.leaves(reference))
    errors = [jnp.max(jnp.abs(a - b)) / (1 + jnp.max(jnp.abs(b))) for a, b in pairs]
    return float(jnp.max(jnp.stack(errors)))


def check(compiled, args, reference, tolerance):
    """No program is timed on a wrong answer."""
    for name, program in compiled.items():
        error = off(program(*args), reference)
        assert error < tolerance, f"{name} is off by {error:.1e}"


def row(work, seconds, unit):
    """A line of the table: seconds of each library (or ratios, if the unit is "times")."""
    spread = {
        name: s.spread for name, s in seconds.items() if getattr(s, "spread", None) is not None
    }
    return {"work": work, "unit": unit, "seconds": seconds, "spread": spread}
