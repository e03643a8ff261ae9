"""Colour jitter and blur against numbers of the published code."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.data.photometric import HUE, blur_size, gaussian_blur, kornia_jitter
from jaxuda.models.layers import denormalise, normalise

JITTER, BLUR = golden("jitter"), golden("blur")
jitter = jax.jit(kornia_jitter)


@pytest.mark.parametrize("case", "abcd")
def test_jitter(case):
    given = {name[2:]: array for name, array in JITTER.items() if name.startswith(f"{case}_")}
    factors = np.stack([given[name] for name in ("brightness", "contrast", "saturation", "hue")], axis=1)
    order = np.tile(given["order"], (2, 1))
    for dtype, expected, tolerance in (("float32", "output", 2e-5), ("float64", "output_f64", 2e-6)):
        with jax.enable_x64(dtype == "float64"):
            colours = denormalise(jnp.asarray(given["image"], dtype), "imagenet") / 255
            found = normalise(255 * jitter(colours, factors, order), "imagenet")
            assert found.dtype == dtype
            np.testing.assert_allclose(found, given[expected], rtol=0, atol=tolerance)


def test_images_have_orders_and_factors_of_their_own():
    x = np.random.default_rng(0).random((2, 4, 5, 3)).astype(np.float32)
    factors = np.array([[1.2, 0.8, 1.1, 0.1], [0.9, 1.2, 0.8, -0.2]], np.float32)
    order = np.array([[3, 1, 0, 2], [0, 2, 1, 3]])
    together = jitter(x, factors, order)
    alone = [jitter(x[i : i + 1], factors[i : i + 1], order[i : i + 1])[0] for i in range(2)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    swapped = jitter(x, factors, order[::-1])
    assert np.abs(swapped - together).max(axis=(1, 2, 3)).min() > 0.01


def test_hue_and_saturation_are_those_of_hsv():
    x = np.random.default_rng(0).random((1, 3, 40, 3))
    x[0, 0, :4] = [[0, 0, 0], [1, 1, 1], [0.3, 0.3, 0.3], [1, 0, 0]]
    with jax.enable_x64(True):
        found = jitter(x, np.array([[1, 1, 1.3, 0.9]]), np.array([[0, 1, 2, HUE]]))
    expected = []
    for pixel in x.reshape(-1, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + 0.9) % 1, min(1.3 * saturation, 1), value))
    np.testing.assert_allclose(np.reshape(found, (-1, 3)), expected, rtol=0, atol=5e-6)  # kornia adds 1e-6 to V


@pytest.mark.parametrize("case", "abcd")
def test_blur(case):
    given = {name[2:]: array for name, array in BLUR.items() if name.startswith(f"{case}_")}
    sizes = tuple(blur_size(side) for side in given["image"].shape[1:3])
    assert sizes == tuple(given["kernel_size"])
    with jax.enable_x64(True):
        found = gaussian_blur(given["image"].astype(np.float64), given["sigma_f64"][None], sizes)
        np.testing.assert_allclose(found, given["output_f64"], rtol=0, atol=1e-9)


def test_blur_of_images_of_their_own_deviation():
    x = np.tile(BLUR["a_image"], (2, 1, 1, 1))
    narrow, wide = gaussian_blur(x, np.array([0.3, BLUR["a_sigma"]], np.float32), (5, 7))
    np.testing.assert_allclose(wide, BLUR["a_output"][0], rtol=0, atol=1e-5)
    assert np.abs(narrow - wide).max() > 0.1


def test_kernel_sizes():
    assert [blur_size(int(side)) for side in BLUR["sizes"]] == BLUR["kernel_sizes"].tolist()
