"""Data sets, and batches of them, as functions of a key."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Images(NamedTuple):
    """Images in [0, 1], shape (n, height, width, channels), and their labels, shape (n,)."""

    x: np.ndarray
    y: np.ndarray


def digits(*, test: float = 0.2, seed: int = 0, dtype="float32") -> tuple[Images, Images]:
    """The 1,797 handwritten 8 x 8 digits that scikit-learn ships: (train, test), split by class.

    Source: Alpaydin and Kaynak (1998), UCI, test part. Needs scikit-learn, no download.

    >>> train, test = digits()
    >>> train.x.shape, test.x.shape
    ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = (raw.images[..., None] / 16).astype(dtype)
    parts = train_test_split(x, raw.target, test_size=test, random_state=seed, stratify=raw.target)
    return Images(parts[0], parts[2]), Images(parts[1], parts[3])


def batch_indices(key, size: int, batch: int, step: int) -> np.ndarray:
    """The samples of training step `step`: a new order every epoch, the incomplete batch left out.

    A function of the step alone, so that a run that is resumed sees the same batches.

    >>> import jax
    >>> batch_indices(jax.random.key(0), size=10, batch=4, step=3).shape
    (4,)
    """
    if not 0 < batch <= size:
        raise ValueError(f"A batch must have 1 to {size} samples, got {batch}.")
    per_epoch = size // batch
    epoch, place = divmod(step, per_epoch)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), size))
    return order[place * batch : (place + 1) * batch]


def shifted(key, x):
    """Each image moved by -1, 0 or 1 pixel in both directions, zeros moved in.

    >>> import jax, jax.numpy as jnp
    >>> shifted(jax.random.key(0), jnp.ones((5, 8, 8, 1))).shape
    (5, 8, 8, 1)
    """
    n, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 3)
    crop = lambda image, corner: jax.lax.dynamic_slice(
        image, (corner[0], corner[1], jnp.zeros_like(corner[0])), (h, w, c)
    )
    return jax.vmap(crop)(padded, corners)
