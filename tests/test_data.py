"""Data: every sample where it should be, once, and the same ones the next time."""

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
