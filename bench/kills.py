"""Kill training at random moments, and see whether anything is lost: `python -m bench.kills --count 200`.

A child process trains with a checkpoint at every step. It is killed (SIGKILL, which no process sees coming)
at a random moment, nine times in ten after its first step, when all has been compiled and most of the time
goes into checkpoints, and once somewhere from its start on. The run is started again in the same folder,
until it ends; then another run begins. Each has to go on from the very step of its last checkpoint, and to
end with the losses, the checksum of the weights after every step and the arrays of the last checkpoint of a
run that was left alone, bit for bit.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import tempfile
import threading
import warnings
import zlib
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxode import train
from jaxode.run_folder import CHECKPOINT, METRICS, PREVIOUS

# Processes that have imported everything, and have not started JAX yet: a life costs a third of the time.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["jaxode.train", "optax"])


def train_in(folder: Path, steps: int, batch_numbers) -> None:
    """What a process does that may be killed; it tells the numbers of its first two batches."""
    warnings.simplefilter("error", UserWarning)  # that of a damaged checkpoint
    tqdm.set_lock(threading.RLock())  # its own would be left behind by a kill
    # Small, since what is looked at is what becomes of the numbers, and not what they are.
    model, optimiser = {"w": np.eye(4, dtype=np.float32)}, optax.adam(1e-2)
    state, told = train.start(model, optimiser, jax.random.key(1)), []

    def batches(n):
        if len(told) < 2:
            batch_numbers.send(n)
            told.append(n)
        return np.random.default_rng(n).normal(size=(8, 4)).astype(np.float32)

    def loss(model, batch, key):
        noise = 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean((jnp.tanh(batch @ model["w"]) - noise) ** 2)

    def weights(model):
        return {"weights": zlib.crc32(np.asarray(model["w"]).tobytes())}

    options = dict(folder=folder, every=1, evaluate=weights, progress=False)
    train.fit(loss, optimiser, state, batches, steps, **options)


def life(folder: Path, steps: int, moment: float | None, since_start: bool):
    """Train, and be killed so many seconds after the first step, or after the start; None: at the end.

    Returns whether the process was killed, and the number of its first batch (None: there was none).
    """
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=train_in, args=(folder, steps, there))
    process.start()
    there.close()
    told = []
    with contextlib.suppress(EOFError):  # the process has ended
        while not since_start and len(told) < 2:
            told.append(here.recv())
    process.join(moment)
    process.kill()
    process.join()
    check(process.exitcode in (0, -9), "training ended with the error above")
    with contextlib.suppress(EOFError):
        while True:
            told.append(here.recv())
    return process.exitcode != 0, next(iter(told), None)


def checkpoint(folder: Path) -> tuple[int, bytes]:
    """The step of the newest checkpoint, and its arrays."""
    for name in (CHECKPOINT, PREVIOUS):
        if (folder / name).exists():
            _, about, rest = (folder / name).read_bytes().split(b"\n", 2)
            return len(json.loads(about)["history"]), rest[:-8]
    return 0, b""


def numbers(folder: Path) -> list[dict]:
    """The metrics of a run but for the clock."""
    records = map(json.loads, (folder / METRICS).read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"Lost: {message}")


def run(folder: Path, steps: int, next_moment, alone: Path, found: Counter, bar) -> None:
    """Train until the end, killed at moments as long as there are any, and compare with the run alone."""
    ended = False
    while not ended:
        moment, since_start = next_moment()
        last, _ = checkpoint(folder)
        was_killed, first = life(folder, steps, moment, since_start)
        check(first in (last, None), f"a run went on from step {first}, not from step {last}")
        ended = not was_killed
        if was_killed:
            found["before the first step"] += first is None
            found["with a file half written"] += any(folder.glob("*.part"))
            previous_alone = (folder / PREVIOUS).exists() and not (folder / CHECKPOINT).exists()
            found["between two names"] += previous_alone
            bar.update()
    check(numbers(folder) == numbers(alone), f"the metrics in {folder} are not those in {alone}")
    check(checkpoint(folder) == checkpoint(alone), f"the arrays in {folder} differ")


def main(count: int, steps: int, window: float, seed: int) -> None:
    chance, found, runs = random.Random(seed), Counter(), 0

    def next_moment():
        if bar.n == count:
            return None, False
        since_start = chance.random() < 0.1
        return chance.uniform(0, 3.0 if since_start else window), since_start

    with tempfile.TemporaryDirectory() as folder, tqdm(total=count, desc="kills") as bar:
        alone = Path(folder) / "alone"
        life(alone, steps, None, False)
        while bar.n < count:
            run(Path(folder) / f"run {runs}", steps, next_moment, alone, found, bar)
            runs += 1
    where = ", ".join(f"{number} {name}" for name, number in found.items())
    print(f"{count} kills, {where}; runs that were compared: {runs}, of {steps} steps")
    print(
        "nothing was lost: every run went on from its last checkpoint and ended as the one left alone"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument(
        "--window", type=float, default=0.5, help="seconds of training before a kill"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.count, options.steps, options.window, options.seed)
