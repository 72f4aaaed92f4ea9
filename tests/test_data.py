"""Data: every sample where it should be, once, and the same ones the next time."""

import functools
import gzip
import hashlib
import http.server
import importlib.util
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import data

KEY = jax.random.key(0)


def test_the_digits_are_those_of_scikit_learn_in_two_parts():
    from sklearn.datasets import load_digits

    train, test = data.digits()
    ours = np.concatenate([train.x, test.x]).reshape(-1, 64)
    assert sorted(map(bytes, ours)) == sorted(
        map(bytes, (load_digits().data / 16).astype(np.float32))
    )
    assert ours.min() == 0 and ours.max() == 1 and ours.dtype == np.float32


def test_the_split_is_fixed_and_has_every_class_in_its_share():
    train, test = data.digits()
    again = data.digits()[1]
    np.testing.assert_array_equal(test.x, again.x)
    shares = np.bincount(test.y) / (np.bincount(train.y) + np.bincount(test.y))
    assert np.all(np.abs(shares - 0.2) < 0.01)


def test_an_epoch_visits_no_sample_twice_and_the_next_one_has_another_order():
    epochs = [
        np.concatenate([data.batch_indices(KEY, 11, 3, step) for step in range(3 * e, 3 * e + 3)])
        for e in range(2)
    ]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert not np.array_equal(*epochs)


def test_a_batch_is_a_function_of_its_step():
    first, second = (data.batch_indices(KEY, 100, 10, 57) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("batch", [0, 11])
def test_an_impossible_batch_is_refused(batch):
    with pytest.raises(ValueError, match="1 to 10"):
        data.batch_indices(KEY, 10, batch, 0)


def test_a_shift_moves_whole_images_by_at_most_a_pixel():
    image = np.zeros((1, 8, 8, 1), np.float32)
    image[0, 4, 4, 0] = 1
    moved = np.asarray(data.shifted(KEY, jnp.asarray(np.repeat(image, 200, 0))))
    assert np.all(moved.sum((1, 2, 3)) == 1)
    places = {tuple(np.argwhere(one)[0][:2] - 4) for one in moved}
    assert places == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def idx_bytes(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype("u1").tobytes()


@pytest.fixture
def mnist_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 3)):
        images = idx_bytes(rng.integers(0, 256, (n, 28, 28)))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(rng.integers(0, 10, n)))
    return tmp_path


def test_idx_files_are_read_gzipped_or_not(mnist_folder):
    train, test = data.mnist(mnist_folder)
    assert train.x.shape == (6, 28, 28, 1) and test.y.shape == (3,)
    assert train.x.dtype == np.float32 and train.x.min() >= 0 and train.x.max() <= 1


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("t10k-labels-idx1-ubyte", lambda raw: raw[:-1], "cut short"),
        ("t10k-labels-idx1-ubyte", lambda raw: raw + b"\0", "too long"),
        ("t10k-labels-idx1-ubyte", lambda raw: raw[:6], "cut short"),
        ("t10k-labels-idx1-ubyte", lambda raw: b"\x01" + raw[1:], "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda raw: b"", "not an IDX file"),
        ("train-images-idx3-ubyte.gz", lambda raw: raw[:-9], "damaged or cut short"),
        ("train-images-idx3-ubyte.gz", lambda raw: idx_bytes(np.zeros(6)), "exchanged"),
        ("train-labels-idx1-ubyte", lambda raw: idx_bytes(np.zeros(5)), "6 images but 5 labels"),
        ("train-labels-idx1-ubyte", lambda raw: idx_bytes(np.full(6, 12)), "a label 12"),
    ],
)
def test_a_bad_file_gets_an_error_that_names_it(mnist_folder, name, change, message):
    path = mnist_folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        data.mnist(mnist_folder)


def test_a_missing_file_is_named(mnist_folder):
    (mnist_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        data.mnist(mnist_folder)


def test_an_unreachable_server_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    pytest.importorskip("pooch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(data.MNIST, "mnist", ("http://127.0.0.1:9/", data.MNIST["mnist"][1]))
    with pytest.raises(ConnectionError, match="--data"):
        data.mnist()


@pytest.mark.filterwarnings("ignore:unclosed")  # sockets of the server's threads
@pytest.mark.parametrize("dataset", ["mnist", "fashion"])
def test_files_are_fetched_once_and_their_digests_checked(
    monkeypatch, mnist_folder, tmp_path_factory, dataset
):
    pytest.importorskip("pooch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for path in mnist_folder.glob("*ubyte"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(args[0])

    handler = functools.partial(Handler, directory=mnist_folder)
    digests = {
        p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in mnist_folder.glob("*ubyte.gz")
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(data.MNIST, dataset, (url, digests))
        first = data.mnist(dataset=dataset)
        again = data.mnist(dataset=dataset)
        monkeypatch.setitem(data.MNIST, dataset, (url, dict.fromkeys(digests, "0" * 32)))
        with pytest.raises(ValueError, match="hash"):
            data.mnist(dataset=dataset)
        server.shutdown()
    assert len(asked) == 4 + 1
    np.testing.assert_array_equal(first[0].x, data.mnist(mnist_folder)[0].x)
    np.testing.assert_array_equal(first[1].y, again[1].y)


def test_the_real_subset_is_read():
    folder = Path(__file__).parents[2] / "shared" / "data" / "mnist10k"
    if not folder.exists():
        pytest.skip("no real data here")
    train, test = data.mnist(folder)
    assert (len(train.y), len(test.y)) == (8000, 2000)
    assert set(train.y) == set(range(10)) and 0.1 < train.x.mean() < 0.2


# Labelled time series.

TS_FILE = """#A comment
@problemName Tiny
@timeStamps false
@classLabel true low high
@data
1.0,2.0,?:0.5,-1.0,4.0:low
3.0,5.0,0.0,0.0:2.0,0.0,0.0,0.0:high
"""


def test_spirals_turn_as_their_class_says():
    series, y = data.turning(KEY, 200, noise=0.0)
    x = np.asarray(series.values)
    area = np.sum(x[:, :-1, 0] * x[:, 1:, 1] - x[:, :-1, 1] * x[:, 1:, 0], axis=1)
    assert np.all((area < 0) == (y == 1)) and 60 < y.sum() < 140
    assert np.all(np.diff(series.times, axis=1) >= 0)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), np.exp(-2 * series.times), rtol=1e-5)


def test_a_file_of_series_has_their_values_and_labels_without_padding(tmp_path):
    path = tmp_path / "Tiny_TRAIN.ts"
    path.write_text(TS_FILE)
    series, labels = data.ts_file(path)
    assert labels == ["low", "high"]
    np.testing.assert_array_equal(series[0], [[1, 0.5], [2, -1], [np.nan, 4]])
    np.testing.assert_array_equal(series[1], [[3, 2], [5, 0]])


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,2:3,4:a\n", "no line @data"),
        ("@data\n", "no series"),
        ("@data\n(0,1),(1,2):a\n", "a time for each value"),
        ("@data\n1,2:3,4,5:a\n", "different lengths"),
    ],
)
def test_what_is_no_file_of_series_is_refused(text, message, tmp_path):
    path = tmp_path / "wrong.ts"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.ts_file(path)


def test_a_set_of_series_is_standardised_by_its_training_part(tmp_path, monkeypatch):
    folder = tmp_path / "sktime" / "datasets" / "data" / "Tiny"
    folder.mkdir(parents=True)
    for part, scale in (("TRAIN", 1), ("TEST", 2)):
        lines = TS_FILE.replace("1.0,2.0,?", f"{scale},{2 * scale},?")
        (folder / f"Tiny_{part}.ts").write_text(lines)
    (tmp_path / "sktime" / "__init__.py").write_text("raise ImportError('this is not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    train, test = data.time_series("Tiny")
    assert train.series.values.shape == (2, 3, 2) and train.series.values.dtype == np.float32
    np.testing.assert_array_equal(train.y, [1, 0])  # classes are in alphabetical order
    np.testing.assert_array_equal(train.series.mask[..., 0], [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(train.series.times, [[0, 0.5, 1]] * 2)
    seen = np.array([1, 2, 3, 5])
    first = (seen - seen.mean()) / seen.std()
    np.testing.assert_allclose(train.series.values[:, :2, 0].ravel(), first, rtol=1e-6)
    doubled = (np.array([2, 4]) - seen.mean()) / seen.std()
    np.testing.assert_allclose(test.series.values[0, :2, 0], doubled, rtol=1e-6)


def test_without_sktime_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps sktime.*--files"):
        data.time_series("BasicMotions")
    with pytest.raises(FileNotFoundError, match=r"BasicMotions_TRAIN\.ts is not there"):
        data.time_series("BasicMotions", tmp_path)


def test_the_vowels_are_those_of_the_archive():
    if importlib.util.find_spec("sktime") is None:
        pytest.skip("no sktime here: pip install --no-deps sktime")
    train, test = data.time_series("JapaneseVowels")
    assert train.series.values.shape == (270, 29, 12) and test.series.values.shape == (370, 29, 12)
    assert np.bincount(train.y).tolist() == [30] * 9 and len(np.unique(test.y)) == 9
    lengths = np.concatenate([part.series.mask.any(-1).sum(1) for part in (train, test)])
    assert lengths.min() == 7 and lengths.max() == 29


def test_what_is_left_out_of_series_is_left_out_at_a_larger_share_too():
    series, _ = data.turning(KEY, 100)
    some, more = (data.dropped(KEY, series, share).mask for share in (0.3, 0.7))
    assert abs(some.mean() - 0.7) < 0.02 and abs(more.mean() - 0.3) < 0.02
    assert not np.any(more & ~some)
