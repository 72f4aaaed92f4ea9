"""Data sets, and batches of them, as functions of a key."""

import functools
import gzip
import importlib.util
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxode.nn.latent import Series, components_seen
from jaxode.nn.point_process import generator, thinned


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

    raw: Any = load_digits()
    x = (raw.images[..., None] / 16).astype(dtype)
    parts: Any = train_test_split(
        x, raw.target, test_size=test, random_state=seed, stratify=raw.target
    )
    return Images(parts[0], parts[2]), Images(parts[1], parts[3])


MNIST = {  # where the four files are fetched from, and their MD5 digests
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}


def mnist(folder: str | Path | None = None, dataset: str = "mnist") -> tuple[Images, Images]:
    """MNIST (LeCun et al. 1998) or Fashion-MNIST (Xiao et al. 2017): (train, test), 28 x 28.

    Args:
        folder: where the four IDX files are, gzipped or not, under their usual names. None: they
            are fetched once into the cache of the user (needs `pooch`), and their digests checked.
        dataset: "mnist" or "fashion": which one to fetch.

    Raises:
        FileNotFoundError: a file is not in the folder.
        ValueError: a file is cut short, or is not what its name says.
        ConnectionError: the files cannot be fetched.
    """
    if dataset not in MNIST:
        raise ValueError(f"`dataset` must be one of {list(MNIST)}, got {dataset!r}.")
    folder = fetched(dataset) if folder is None else Path(folder)
    parts = []
    for part in ("train", "t10k"):
        x = idx(found(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
        y = idx(found(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
        if len(x) != len(y):
            raise ValueError(f"{folder} has {len(x)} images but {len(y)} labels in part {part!r}.")
        if y.max(initial=0) > 9:
            raise ValueError(
                f"{folder} has a label {y.max()} in part {part!r}; they go from 0 to 9."
            )
        parts.append(Images((x[..., None] / 255).astype(np.float32), y.astype(np.int32)))
    return parts[0], parts[1]


def found(folder: Path, name: str) -> Path:
    """A file, or the same gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{folder} has neither {name} nor {name}.gz: it must hold the four files of MNIST "
        "(train- and t10k-, images-idx3-ubyte and labels-idx1-ubyte)."
    )


def fetched(dataset: str) -> Path:
    """The folder of the four files, fetched if they are not there."""
    import pooch

    url, digests = MNIST[dataset]
    registry = {name: f"md5:{digest}" for name, digest in digests.items()}
    folder = pooch.os_cache("jaxode") / dataset
    store = pooch.create(folder, base_url=url, registry=registry)
    try:
        for name in registry:
            store.fetch(name, progressbar=True)
    except OSError as error:
        raise ConnectionError(
            f"{url} cannot be reached ({type(error).__name__}). Where there is no network, pass "
            "the folder that holds the four files (--data DIR)."
        ) from error
    return Path(folder)


def idx(path: str | Path, dimensions: int | None = None) -> np.ndarray:
    """An array from a file in IDX format (LeCun), gzipped or not.

    The format: two bytes 0, one byte for the dtype, one for the number of dimensions; their sizes
    as big-endian 32-bit integers; the elements, big-endian.

    Raises:
        ValueError: the file is not an IDX file, is cut short, goes on too long, or has another
            number of dimensions than it should.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged or cut short ({error}): fetch it again."
            ) from error
    kinds = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in kinds or raw[3] == 0:
        raise ValueError(
            f"{path} is not an IDX file: it starts with 0x{raw[:4].hex()}, and IDX with 0x0000, a "
            "kind (08 to 0e) and a number of dimensions."
        )
    if dimensions is not None and raw[3] != dimensions:
        raise ValueError(
            f"{path} has {raw[3]} dimensions instead of {dimensions}: images and labels may have "
            "been exchanged."
        )
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], ">u4").astype(int)) if len(raw) >= start else (0,)
    size = start + np.dtype(kinds[raw[2]]).itemsize * math.prod(shape)
    if len(raw) != size:
        raise ValueError(
            f"{path} is {'cut short' if len(raw) < size else 'too long'}: {len(raw)} bytes where "
            f"its header promises {size}."
        )
    return np.frombuffer(raw[start:], kinds[raw[2]]).reshape(shape)


samples = functools.partial(jax.jit, static_argnames="n")


@samples
def circles(key, n: int):
    """Two circles of radius 1 and 2 with noise 0.08: samples of shape (n, 2)."""
    angle_key, which_key, noise_key = jax.random.split(key, 3)
    angle = jax.random.uniform(angle_key, (n,), maxval=2 * jnp.pi)
    radius = 1.0 + jax.random.bernoulli(which_key, shape=(n,))
    points = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    return points + 0.08 * jax.random.normal(noise_key, (n, 2))


@samples
def moons(key, n: int):
    """Two interleaving half circles with noise 0.1: samples of shape (n, 2)."""
    angle_key, which_key, noise_key = jax.random.split(key, 3)
    angle = jax.random.uniform(angle_key, (n,), maxval=jnp.pi)
    x, y = jnp.cos(angle), jnp.sin(angle)
    upper = jax.random.bernoulli(which_key, shape=(n,))
    points = jnp.where(
        upper[:, None], jnp.stack([x - 0.5, y - 0.25], 1), jnp.stack([0.5 - x, 0.25 - y], 1)
    )
    return 1.5 * (points + 0.1 * jax.random.normal(noise_key, (n, 2)))


@samples
def pinwheel(key, n: int):
    """Five twisted arms: samples of shape (n, 2)."""
    arm_key, noise_key = jax.random.split(key)
    radial, tangential = (0.3 * jax.random.normal(noise_key, (n, 2)) * jnp.array([1.0, 1 / 3])).T
    angle = 2 * jnp.pi * jax.random.randint(arm_key, (n,), 0, 5) / 5 + 0.25 * jnp.exp(1 + radial)
    across, along = tangential, 1 + radial
    x = along * jnp.cos(angle) - across * jnp.sin(angle)
    y = along * jnp.sin(angle) + across * jnp.cos(angle)
    return 2 * jnp.stack([x, y], 1)


@samples
def checkerboard(key, n: int):
    """Eight squares of a 4 x 4 board: samples of shape (n, 2), uniform, in [-4, 4] x [-4, 4] / 2."""
    place_key, square_key = jax.random.split(key)
    square = jax.random.randint(square_key, (n,), 0, 8)
    row, column = square // 2, 2 * (square % 2) + (square // 2) % 2
    corner = jnp.stack([column, row], 1) - 2
    return corner + jax.random.uniform(place_key, (n, 2))


def spirals(key, n: int, *, points: int = 100, ahead: int = 100, noise: float = 0.1):
    """Spirals in the plane, half of them clockwise, each from a random place (Chen et al. 2018, 5.1).

    Archimedean spirals as in the released example, on 500 instants of [0, 6 pi]; a window of 100 of
    them is the training interval, in which `points` are observed (without replacement) with noise.

    Returns:
        times (n, points), values (n, points, 2); later times (n, ahead) and values without noise,
        the `ahead` instants that follow the window. The first time of a window is 0.
    """
    which_key, start_key, choice_key, noise_key = jax.random.split(key, 4)
    window, total, last = 100, 500, 400  # beyond the last one, clockwise spirals run away
    clockwise = jax.random.bernoulli(which_key, shape=(n,))
    start = jax.random.randint(start_key, (n,), 0, last - window - ahead + 1)
    index = start[:, None] + jnp.arange(window + ahead)[None]
    angle = 6 * jnp.pi * index / (total - 1)
    reverse = 6 * jnp.pi + 1 - angle
    inward, outward = 0.3 * 50 / reverse, 0.3 * angle
    right = jnp.stack([inward * jnp.cos(reverse) - 5, inward * jnp.sin(reverse)], -1)
    left = jnp.stack([outward * jnp.cos(angle) + 5, outward * jnp.sin(angle)], -1)
    values = jnp.where(clockwise[:, None, None], right, left)
    times = jnp.arange(window + ahead) * (6 * jnp.pi / (total - 1))
    pick = lambda key: jnp.sort(jax.random.choice(key, window, (points,), replace=False))
    chosen = jax.vmap(pick)(jax.random.split(choice_key, n))
    seen = jnp.take_along_axis(values, chosen[..., None], axis=1)
    seen = seen + noise * jax.random.normal(noise_key, seen.shape)
    later = jnp.broadcast_to(times[window:], (n, ahead))
    return times[chosen], seen, later, values[:, window:]


class LabelledSeries(NamedTuple):
    """A batch of time series, and the class of each, shape (n,)."""

    series: Series
    y: np.ndarray


def turning(key, n: int, *, points: int = 30, noise: float = 0.1) -> LabelledSeries:
    """Spirals into the origin, at random times of [0, 1]: those of class 1 turn clockwise.

    The task of diffrax's example of a neural CDE, at irregular times: exp(-2 t) (cos a, sin a) with the
    angle a = start + 4 pi t, or start - 4 pi t for class 1, each from a random start, with noise.

    >>> import jax
    >>> series, y = turning(jax.random.key(0), 5)
    >>> series.times.shape, series.values.shape, y.shape
    ((5, 30), (5, 30, 2), (5,))
    """
    times, values, clockwise = turns(key, n, points, noise)
    arrays: Any = np.asarray(times), np.asarray(values), np.ones(times.shape, bool)
    return LabelledSeries(Series(*arrays), np.asarray(clockwise, np.int32))


@functools.partial(jax.jit, static_argnames=("n", "points"))
def turns(key, n, points, noise):
    """Times, values and classes of `turning`: one program."""
    time_key, start_key, which_key, noise_key = jax.random.split(key, 4)
    times = jnp.sort(jax.random.uniform(time_key, (n, points)), axis=1)
    clockwise = jax.random.bernoulli(which_key, shape=(n,))
    start = jax.random.uniform(start_key, (n, 1), maxval=2 * jnp.pi)
    angle = start + 4 * jnp.pi * jnp.where(clockwise, -1, 1)[:, None] * times
    values = jnp.exp(-2 * times)[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return times, values + noise * jax.random.normal(noise_key, values.shape), clockwise


def time_series(
    name: str = "JapaneseVowels", folder: str | Path | None = None
) -> tuple[LabelledSeries, LabelledSeries]:
    """A classification set of the UEA and UCR archive: (train, test), as it is split there.

    Standardised by the mean and deviation of each component in the training part; times go from 0 to 1, in
    equal steps, over the longest series. Points at the end of a series where all components are exactly 0
    are padding, and are masked.

    Args:
        name: "JapaneseVowels" (Kudo et al. 1999: nine speakers, 12 coefficients, 7 to 29 points),
            "BasicMotions" (four motions, 6 sensors, 100 points), or another one in the folder.
        folder: where NAME_TRAIN.ts and NAME_TEST.ts are. None: those that the package `sktime` ships. Only
            its files are read, nothing is imported, so that `pip install --no-deps sktime` is enough.

    Raises:
        FileNotFoundError: a file is not there, or sktime is not installed.
        ValueError: a file is not of the format, or has times.
    """
    folder = shipped(name) if folder is None else Path(folder)
    parts = []
    for part in ("TRAIN", "TEST"):
        path = folder / f"{name}_{part}.ts"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not there: the folder must hold {name}_TRAIN.ts and _TEST.ts."
            )
        parts.append(ts_file(path))
    classes = sorted({label for _, labels in parts for label in labels})
    length = max(len(x) for rows, _ in parts for x in rows)
    seen = np.concatenate(parts[0][0])
    mean, spread = np.nanmean(seen, axis=0), np.nanstd(seen, axis=0)
    sets = []
    for rows, labels in parts:
        pad = lambda x: np.pad(x, ((0, length - len(x)), (0, 0)), constant_values=np.nan)
        values = np.stack([pad((x - mean) / np.where(spread > 0, spread, 1)) for x in rows])
        times = np.broadcast_to(np.linspace(0, 1, length, dtype=np.float32), values.shape[:2])
        mask = ~np.isnan(values)
        arrays: Any = times, np.where(mask, values, 0).astype(np.float32), mask
        y = np.array(list(map(classes.index, labels)), np.int32)
        sets.append(LabelledSeries(Series(*arrays), y))
    return sets[0], sets[1]


def shipped(name: str) -> Path:
    """The folder of a set in the package sktime, which is looked for but not imported."""
    found = importlib.util.find_spec("sktime")
    places = found.submodule_search_locations if found else None
    if not places:
        raise FileNotFoundError(
            f"{name} is read from the files that the package sktime ships, which is not installed: "
            "`pip install --no-deps sktime` is enough, for none of it is imported. Or give the folder of "
            f"{name}_TRAIN.ts and {name}_TEST.ts (--files DIR)."
        )
    return Path(places[0]) / "datasets" / "data" / name


def ts_file(path: str | Path) -> tuple[list[np.ndarray], list[str]]:
    """The series, each (length, d), and the labels in a file in the format of sktime (.ts).

    After the line `@data` a line for each series: its components, separated by colons, and its label; the
    values of a component are separated by commas, and `?` is a missing one.

    Raises:
        ValueError: the file is not of that format, or its values have times, as (time, value).
    """
    lines = Path(path).read_text().splitlines()
    begins = [i for i, line in enumerate(lines) if line.strip().lower() == "@data"]
    rows = (
        [line.strip().split(":") for line in lines[begins[0] + 1 :] if line.strip()]
        if begins
        else []
    )
    if not rows or any(len(row) < 2 for row in rows):
        raise ValueError(f"{path} has no line @data, or no series after it: it is not a .ts file.")
    if "(" in rows[0][0]:
        raise ValueError(f"{path} has a time for each value, which is not supported here.")
    number = lambda word: float("nan" if word.strip() == "?" else word)
    series = []
    for i, (*parts, _) in enumerate(rows):
        columns = [list(map(number, part.split(","))) for part in parts]
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"Series {i + 1} of {path} has components of different lengths.")
        x = np.array(columns).T
        series.append(x[: 1 + max(np.flatnonzero(np.any(x != 0, axis=1)), default=0)])
    return series, [row[-1].strip() for row in rows]


def dropped(key, series: Series, fraction: float) -> Series:
    """The series with each value left out with a probability, independently of all others.

    >>> import jax, numpy as np
    >>> series = Series(np.zeros((50, 10)), np.zeros((50, 10, 2)), np.ones((50, 10), bool))
    >>> round(float(dropped(jax.random.key(0), series, 0.7).mask.mean()), 1)
    0.3
    """
    seen = components_seen(series)
    return series._replace(
        mask=np.asarray(seen & jax.random.bernoulli(key, 1 - fraction, seen.shape))
    )


def carbon_dioxide() -> tuple[np.ndarray, np.ndarray]:
    """Weekly carbon dioxide at Mauna Loa, 1958 to 2001, with gaps: (years, ppm), both (n,).

    Source: Keeling and Whorf (2004), as shipped with statsmodels; weeks without a value are left out.
    """
    from statsmodels.datasets import co2

    loaded: Any = co2.load_pandas()
    series = loaded.data["co2"].dropna()
    years = series.index.year + (series.index.day_of_year - 0.5) / 365.25
    return np.asarray(years, np.float64), np.asarray(series.values, np.float64)


def poisson_events(key, intensity, end: float, *, count: int, most: float):
    """Realisations of an inhomogeneous Poisson process on [0, end], by thinning.

    Args:
        intensity: the rate at times, vectorised, at most `most`.
        count: the number of realisations.

    Returns:
        times (count, n), increasing, and a mask of the same shape; hidden times are `end`.
    """
    rng, rates = generator(key), lambda times: np.asarray(intensity(times))
    rows = [thinned(rng, rates, 0, end, most) for _ in range(count)]
    longest = max(map(len, rows))
    times = np.full((count, longest), end)
    mask = np.zeros((count, longest), bool)
    for i, row in enumerate(rows):
        times[i, : len(row)], mask[i, : len(row)] = row, True
    return times, mask


# Days between one disaster and the next.
COAL_DAYS = """
157 123 2 124 12 4 10 216 80 12 33 66 232 826 40 12 29 190 97 65 186 23 92 197 431 16 154 95
25 19 78 202 36 110 276 16 88 225 53 17 538 187 34 101 41 139 42 1 250 80 3 324 56 31 96 70
41 93 24 91 143 16 27 144 45 6 208 29 112 43 193 134 420 95 125 34 127 218 2 0 378 36 15 31
215 11 137 4 15 72 96 124 50 120 203 176 55 93 59 315 59 61 1 13 189 345 20 81 286 114 108
188 233 28 22 61 78 99 326 275 54 217 113 32 388 151 361 312 354 307 275 78 17 1205 644 467
871 48 123 456 498 49 131 182 255 194 224 566 462 228 806 517 1643 54 326 1312 348 745 217
120 275 20 66 292 4 368 307 336 19 329 330 312 536 145 75 364 37 19 156 47 129 1630 29 217 7
18 1358 2366 952 632
"""


def coal_disasters() -> np.ndarray:
    """When more than nine men died in a British coal mine, 15 March 1851 to 22 March 1962, in years.

    Source: Jarrett (1979), A note on the intervals between coal-mining disasters, Biometrika 66: 191
    dates, shape (191,).
    """
    days = [int(word) for word in COAL_DAYS.split()]
    return 1851.2026 + np.concatenate([[0.0], np.cumsum(days)]) / 365.25


def breast_cancer(
    *, features: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measurements of 569 cell nuclei, standardised: (train, validation, test) of shape (n, features).

    The mean features of scikit-learn's `load_breast_cancer` (Street et al. 1993); no labels.
    """
    from sklearn.datasets import load_breast_cancer

    raw: Any = load_breast_cancer()
    x = raw.data[:, :features].astype(np.float32)
    x = x[np.random.default_rng(seed).permutation(len(x))]
    cuts = int(0.7 * len(x)), int(0.8 * len(x))
    mean, spread = x[: cuts[0]].mean(0), x[: cuts[0]].std(0)
    train, validation, test = np.split((x - mean) / spread, cuts)
    return train, validation, test


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
    words = tuple(np.asarray(jax.random.key_data(key)).tolist())
    order = shuffled(words, str(jax.random.key_impl(key)), epoch, size)
    return order[place * batch : (place + 1) * batch]


@functools.lru_cache(maxsize=8)
def shuffled(words: tuple, impl: str, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: to sort 8,000 numbers at every step took longer than many a step (5.7 ms)."""
    key = jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl=impl)
    order = np.array(jax.random.permutation(jax.random.fold_in(key, epoch), size))
    order.flags.writeable = False  # it is kept
    return order


def shifted(key, x, pad: int = 1):
    """Each image moved by at most `pad` pixels in both directions, zeros moved in.

    >>> import jax, jax.numpy as jnp
    >>> shifted(jax.random.key(0), jnp.ones((5, 8, 8, 1))).shape
    (5, 8, 8, 1)
    """
    n, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * pad + 1)
    crop = lambda image, corner: jax.lax.dynamic_slice(
        image, (corner[0], corner[1], jnp.zeros_like(corner[0])), (h, w, c)
    )
    return jax.vmap(crop)(padded, corners)
