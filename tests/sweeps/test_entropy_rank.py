"""Scores and split of the ranking against the published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from golden_weights import golden

from jaxuda.data.labels import label_space
from jaxuda.models.layers import resize_bilinear
from jaxuda.sweeps.entropy_rank import RARE, favour_rare, image_scores, split


def test_golden() -> None:
    arrays = golden("entropy_rank")
    with jax.enable_x64(True):
        logits = jnp.asarray(arrays["logits"], jnp.float64)
        upsampled = resize_bilinear(logits, tuple(arrays["upsample_size"].tolist()), align_corners=True)
        scores, present = map(np.asarray, image_scores(jax.nn.softmax(upsampled), jnp.ones(upsampled.shape[:3], bool)))
    np.testing.assert_allclose(scores, arrays["scores_f64"], rtol=1e-6)

    classes = label_space("cityscapes19").classes
    rare = [classes.index(name) for name in RARE]
    assert sorted(rare) == sorted(arrays["rare_classes"].tolist())
    np.testing.assert_array_equal(present[:, rare].sum(1), arrays["num_rare_present"])
    normalised = favour_rare(scores, present[:, rare].sum(1))
    np.testing.assert_allclose(normalised, arrays["scores_normalised_f64"], rtol=1e-6)

    ids = [str(index) for index in range(len(scores))]
    for values, suffix in ((scores, ""), (normalised, "_normalised")):
        easy, hard = split(ids, values.tolist(), float(arrays["lambda1"]))
        assert [int(name) for name in easy] == arrays[f"easy{suffix}"].tolist()
        assert [int(name) for name in hard] == arrays[f"hard{suffix}"].tolist()


def test_ties_go_by_id() -> None:
    assert split(["b", "a", "c"], [1.0, 1.0, 0.5], 0.67) == (["c", "a"], ["b"])
