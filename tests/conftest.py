"""Every test runs with float64 available, no implicit promotion, and warnings as errors."""

import os

from compile_flags import QUICK

# One compilation cache for the whole run, shared by the workers of pytest-xdist.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join("/tmp", "jaxode-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tests wait for the compiler, not for what it makes: with its optimisations off a program is there in a third
# of the time. What depends on them, one native call, is tried in processes without this (test_one_call).
os.environ.setdefault("XLA_FLAGS", QUICK)

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker that has no tests left takes half of those that the other still has to do.

    By default they are given out in chunks, by count: one of long tests keeps a worker busy while the other
    has nothing left.
    """
    if config.getvalue("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)
    return None


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """Each compiled program holds maps of memory, of which Linux gives a process 65,530."""
    yield
    jax.clear_caches()
