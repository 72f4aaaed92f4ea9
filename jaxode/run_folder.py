"""The folder of a run: a checkpoint, the one before it, a copy of the metrics, and a lock.

`checkpoint.eqx` is all of the run in one file: a line that says what the file is, a line of JSON (name,
dtype and shape of every array; the metrics of every step), the arrays as equinox writes them, and a
checksum. It is written under another name and put in place at once, after the last one has become
`checkpoint.previous.eqx`: whenever a process is killed, one of the two is whole. Since the metrics are
in it too, the two cannot contradict each other; `metrics.jsonl` is a copy for readers.
"""

import contextlib
import io
import json
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import __version__

CHECKPOINT, PREVIOUS = "checkpoint.eqx", "checkpoint.previous.eqx"
DAMAGED, METRICS, LOCK = "checkpoint.damaged.eqx", "metrics.jsonl", "lock"
FORMAT = 1
FIRST_WORDS = b"jaxode checkpoint "
REMEDY = "Use another folder, or start over with fresh=True."


class TrainState(NamedTuple):
    """All that a run is, at one step: what a checkpoint holds."""

    model: PyTree
    optimiser: PyTree
    step: jax.Array
    key: jax.Array


class UnreadableError(ValueError):
    """A file that is no checkpoint, or is one no longer."""


class NotSavedError(OSError):
    """A checkpoint could not be written; the one before it is whole."""


def save(folder: str | Path, state: TrainState, history: list[dict]) -> None:
    """Write the checkpoint and the metrics; whenever this is cut off, the last ones are whole.

    Raises:
        NotSavedError: an `OSError`; the disk is full, for instance.
    """
    folder = made(folder)
    try:
        put(folder / CHECKPOINT, packed(state, history), before=folder / PREVIOUS)
        put(folder / METRICS, lines(history))
    except OSError as error:
        raise NotSavedError(
            error.errno,
            f"The checkpoint of step {int(state.step)} cannot be written to {folder} "
            f"({error.strerror}); the last one that was written is whole. Mend that, and start the run "
            "again: it goes on from there",
        ) from error


def resume(folder: str | Path, state: TrainState) -> tuple[TrainState, list[dict]]:
    """The run in a folder, and its metrics up to the checkpoint; `state` itself if there is none.

    A checkpoint that is damaged is put aside, and the one before it taken, with a warning.

    Raises:
        ValueError: the checkpoint is that of another model, optimiser or random key, or of a newer
            jaxode; or both checkpoints are damaged.
    """
    folder, faults = Path(folder), []
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            found, history = unpacked(path, state)
        except UnreadableError as error:
            faults.append(str(error))
            continue
        if faults:
            put_aside(folder, f"{faults[0]} The run goes on from {path}, step {len(history)}.")
        return found, history
    if faults:
        raise ValueError(f"{' '.join(faults)} Put a copy of one in its place. {REMEDY}")
    return state, []


def put_aside(folder: Path, message: str) -> None:
    """Rename a damaged checkpoint, so that the next one to be written replaces no whole one by it."""
    if jax.process_index() == 0:  # the others only read
        os.replace(folder / CHECKPOINT, folder / DAMAGED)
    warnings.warn(message, stacklevel=4)


def forget(folder: str | Path) -> None:
    """Remove the run in a folder."""
    for name in (PREVIOUS, CHECKPOINT, METRICS):
        (Path(folder) / name).unlink(missing_ok=True)


def restore_metrics(folder: str | Path, history: list[dict]) -> None:
    """Write the copy of the metrics again, if it is not what the checkpoint says."""
    path, wanted = Path(folder) / METRICS, lines(history)
    if history and not (path.exists() and path.read_bytes() == wanted):
        with contextlib.suppress(OSError):  # of a full disk the next checkpoint tells
            put(path, wanted)


def lines(history: list[dict]) -> bytes:
    """A line of JSON for each step."""
    return "".join(json.dumps(record) + "\n" for record in history).encode()


# The file.


def packed(state: TrainState, history: list[dict]) -> bytes:
    """What a checkpoint file holds; see the module."""
    file = io.BytesIO()
    about = {"jaxode": __version__, "arrays": arrays(state), "history": history}
    file.write(FIRST_WORDS + f"{FORMAT}\n{json.dumps(about)}\n".encode())
    eqx.tree_serialise_leaves(file, savable(state))
    content = file.getvalue()
    return content + checksum(content)


def unpacked(path: Path, state: TrainState) -> tuple[TrainState, list[dict]]:
    """The run and its metrics in a checkpoint file; `state` says what it must be like.

    Raises:
        UnreadableError: it is damaged, or no checkpoint.
        ValueError: it is that of another run, or in a format that is not known here.
    """
    content = path.read_bytes() if path.is_file() else b""
    first, _, rest = content.partition(b"\n")
    number = first.removeprefix(FIRST_WORDS)
    if not (first.startswith(FIRST_WORDS) and number.isdigit()):
        raise UnreadableError(
            f"{path} is no checkpoint of jaxode in its present format, or only the beginning of one."
        )
    if int(number) > FORMAT:
        raise ValueError(
            f"The checkpoint {path} was written by a newer jaxode than this one, {__version__}: "
            f"install that one. {REMEDY}"
        )
    if checksum(content[:-8]) != content[-8:]:
        raise UnreadableError(
            f"The checkpoint {path} is damaged: it was cut short, or changed after it was written."
        )
    about, _, rest = rest.partition(b"\n")
    about = json.loads(about)
    check_arrays(path, about["arrays"], arrays(state))
    found = eqx.tree_deserialise_leaves(io.BytesIO(rest), savable(state))
    found = jax.tree.map(with_keys, found, state)
    if not np.array_equal(savable(found).key, savable(state).key):
        raise ValueError(
            f"The checkpoint {path} is that of a run with another random key. {REMEDY}"
        )
    return found, about["history"]


def checksum(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)


def arrays(state: TrainState) -> dict[str, str]:
    """Dtype and shape of every array in a state, by its name."""
    return {
        jax.tree_util.keystr(name): described(x)
        for name, x in jax.tree_util.tree_leaves_with_path(savable(state))
        if eqx.is_array_like(x)
    }


def described(x) -> str:
    """Dtype and shape of an array or a number, the type of all else.

    >>> described(np.zeros((2, 3), np.int32)), described(None)
    ('int32[2,3]', 'NoneType')
    """
    if not eqx.is_array_like(x):
        return type(x).__name__
    return f"{jnp.result_type(x)}[{','.join(map(str, jnp.shape(x)))}]"


def check_arrays(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """See that a checkpoint has the arrays of the model and the optimiser that are to be trained."""
    other = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if other:
        part = "model" if other[0].startswith(".model") else "optimiser"
        there, here = (names.get(other[0], "not there") for names in (found, wanted))
        more = f", and {len(other) - 1} more differ" if other[1:] else ""
        raise ValueError(
            f"The checkpoint {path} is that of another {part}: {other[0]} is {there} in it and {here} "
            f"in this run{more}. {REMEDY}"
        )


def is_key(x) -> bool:
    """Whether this is an array of random keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def savable(state: TrainState) -> TrainState:
    """The state with its random keys as plain numbers, which can be written to a file."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)


def with_keys(x, like):
    """Numbers as random keys, if `like` is one."""
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key(like) else x


# The folder.


def put(path: Path, content: bytes, before: Path | None = None) -> None:
    """Write a file all at once: there is the old one, kept as `before`, or the new one, never half of it."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # on a full disk, half a file is in the way
    if os.name == "posix":  # a new name outlives a loss of power when its folder is written too
        with contextlib.suppress(OSError):  # which not all file systems can do
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def made(folder: str | Path) -> Path:
    """The folder, made if it is not there yet.

    Raises:
        ValueError: it cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((str(path) for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{file} is a file" if file else error.strerror
        raise ValueError(
            f"{folder} cannot be the folder of a run ({reason}): choose another one."
        ) from error
    return folder


@contextlib.contextmanager
def held(folder: str | Path | None) -> Iterator[None]:
    """The folder is this process's alone, until the end of the block or of the process, kill -9 included.

    The operating system keeps the lock: a record lock, which a child process does not inherit. Where the
    file system has no locks, there is none. None is no folder.

    Raises:
        ValueError: another process has it, or it cannot be made.
    """
    if folder is None:
        yield
        return
    folder = made(folder)
    with open(folder / LOCK, "a+") as file:
        try:
            lock(file)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"Another process{file.read()} is training in {folder}: wait until it has ended, or "
                "choose another folder."
            ) from error
        except OSError:
            pass
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f" ({os.getpid()})")
            file.flush()
        yield


def lock(file) -> None:
    """Take the lock of an open file, or raise an OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(1 << 20)  # beyond what is written there, so that others can read it
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
