"""Confusion matrix and IoU against a hand count."""

import jax.numpy as jnp
import numpy as np

from jaxuda.metrics import confusion_matrix, iou, iou_table, mean_iou, pixel_accuracy


def test_confusion_matrix_counts_and_ignores() -> None:
    labels = jnp.array([[0, 0, 1, 255], [2, 2, 1, 0]], jnp.uint8)
    predictions = jnp.array([[0, 1, 1, 2], [2, 0, 1, 0]])
    expected = [[2, 1, 0], [0, 2, 0], [1, 0, 1]]
    np.testing.assert_array_equal(confusion_matrix(labels, predictions, 3), expected)


def test_iou_by_hand() -> None:
    confusion = np.array([[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(iou(confusion), [2 / 4, 2 / 3, 1 / 2, np.nan])
    assert mean_iou(confusion) == np.mean([1 / 2, 2 / 3, 1 / 2])
    assert pixel_accuracy(confusion) == 5 / 7


def test_a_class_only_predicted_counts_as_zero() -> None:
    assert iou(np.array([[3, 1], [0, 0]]))[1] == 0


def test_nothing_labelled() -> None:
    nothing = np.zeros((2, 2))
    assert np.isnan(mean_iou(nothing)) and np.isnan(pixel_accuracy(nothing))
    assert "-" in iou_table({"model": nothing}, ["a", "b"])


def test_table_names_the_number_of_classes() -> None:
    table = iou_table({"source only": np.eye(2), "adapted": np.ones((2, 2))}, ["road", "sky"])
    assert "mIoU (2)" in table and "100.0" in table and "33.3" in table
