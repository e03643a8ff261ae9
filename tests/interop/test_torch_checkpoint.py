import flax
import jax
import numpy as np
import pytest
from golden_weights import golden_keys, random_variables, state_dict

from jaxuda.errors import UserError
from jaxuda.interop import load_torch
from jaxuda.interop.torch_checkpoint import from_torch, to_torch
from jaxuda.models.deeplab import DeepLabV2

SMALL = DeepLabV2(3, backbone="resnet18", width=8, dilated=False)


def small_state():
    """A torch state dict of SMALL, made by running the names backwards."""
    variables = random_variables(SMALL, np.zeros((1, 32, 32, 3), np.float32))
    flat = flax.traverse_util.flatten_dict(variables)
    names = {path: SMALL.torch_layouts()["one_level"].name(path) for path in flat}
    return variables, {names[path]: to_torch(np.asarray(leaf)) for path, leaf in flat.items()}


def test_names_and_layouts_of_arrays_can_be_inverted():
    variables, state = small_state()
    jax.tree.map(np.testing.assert_array_equal, load_torch(state, SMALL), variables)
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(from_torch(to_torch(kernel)), kernel)


def test_every_key_of_a_published_network_has_its_place():
    keys = golden_keys("model_sdca_r101")
    model = DeepLabV2(19, variant="torchvision", norm="frozen", norm_eps=0.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    names = [model.torch_layouts()["split"].name(path) for path in flax.traverse_util.flatten_dict(shapes)]
    expected = [f"{part}.{key}" for part, pairs in keys.items() for key, _ in pairs]
    assert sorted(names) == sorted(expected)


def test_missing_left_over_and_misshapen_entries_are_all_listed():
    _, state = small_state()
    del state["layer2.1.conv2.weight"]
    state["fc.weight"] = np.zeros((10, 64), np.float32)
    state["bn1.running_mean"] = np.zeros(9, np.float32)
    with pytest.raises(UserError) as error:
        load_torch(state, SMALL)
    text = str(error.value)
    assert "missing: layer2.1.conv2.weight" in text
    assert "not part of the network: fc.weight" in text
    assert "shape of bn1.running_mean: (9,) in the checkpoint, (8,) in the network" in text


def test_wrong_number_of_classes_shows_torch_shapes():
    _, state = small_state()
    with pytest.raises(UserError, match=r"layer5.conv2d_list.0.weight: \(3, 64, 3, 3\).*\(4, 64, 3, 3\)"):
        load_torch(state, DeepLabV2(4, backbone="resnet18", width=8))


def test_unknown_checkpoint_is_refused():
    with pytest.raises(UserError, match="no DeepLabV2 that is known"):
        load_torch({"encoder.weight": np.zeros(3)}, SMALL)


def test_counters_of_batches_are_passed_over():
    _, state = small_state()
    load_torch(state | {"bn1.num_batches_tracked": np.zeros((), np.int64)}, SMALL)
    assert state_dict([["bn1.num_batches_tracked", []]])["bn1.num_batches_tracked"] == 0
