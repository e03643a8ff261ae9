"""Our messages against those of tfds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core import example_serializer

from jaxuda.data import encoding
from jaxuda.data.example import serialise


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 40_000), st.text(max_size=20))
def test_the_message_is_that_of_tfds(image: bytes, length: int, name: str) -> None:
    features = encoding.features(depth=True)
    record = {"image": image, "label": b"", "depth": np.arange(length, dtype=np.uint8).tobytes(), "id": name}
    theirs = example_serializer.ExampleSerializer(features.get_serialized_info())
    expected = theirs.get_tf_example(features.encode_example(record))
    assert example_serializer.tf_example_pb2.Example.FromString(serialise(record)) == expected
