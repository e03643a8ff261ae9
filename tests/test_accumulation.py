"""A batch is cut into the same parts on any number of devices. (tests/methods/test_contract.py compares the updates
of parts and of the whole batch.)"""

import numpy as np
import pytest

from jaxuda.errors import UserError
from jaxuda.training.step import split


def test_devices_share_each_part() -> None:
    """Part k has the same images, whether the batch is first cut over devices or not."""
    whole = split(np.arange(8), 2)
    halves = [split(part, 2) for part in np.split(np.arange(8), 2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves, axis=1))


def test_a_cut_that_does_not_divide() -> None:
    with pytest.raises(UserError, match="accumulate=3 does not divide the 2 images"):
        split({"image": np.zeros((2, 4, 4, 3))}, 3)
