"""The names that the pickle in a torch file may use, and what they stand for: plain records of tensors.

No name leads to anything of Python or torch. Plain values of Python and NumPy beside the weights (a set, a path,
settings) become `Opaque`; tensors that are not plain numbers (sparse, quantised, ...) become `Unread`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_KEYS = (str, int, float, bool, bytes, type(None))


class Storage(NamedTuple):
    """A run of numbers in the file. `count` is its length; `start` and `length` are the part of it that is used."""

    key: str
    dtype: np.dtype
    count: int
    start: int
    length: int


class Tensor(NamedTuple):
    """The place of a tensor's numbers in its storage; offset and strides count elements. Nothing is checked yet.

    negative: the tensor is the numbers times -1 (torch's lazy negation, as in the imaginary part of a conjugate).
    """

    storage: Storage
    offset: Any
    shape: Any
    strides: Any
    negative: bool = False


class Unread(NamedTuple):
    """A tensor whose numbers cannot be read as they are: what it is, and what to do in torch."""

    kind: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.remedy}"


class Call:
    """A name that a pickle may call; `build` makes its value, which does nothing."""

    def __init__(self, build: Any):
        self.build = build


class Opaque:
    """A value that weights do not need (a NumPy scalar, a device): its content is dropped."""


class Type(Opaque):
    """A torch.dtype."""

    def __init__(self, name: str):
        self.name = name


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, bits: Any = None
) -> Tensor | Unread:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without numbers")
    if storage.dtype.kind == "c":
        return unread_type(str(storage.dtype))
    negative = isinstance(bits, dict) and bits.get("neg") is True
    if negative and storage.dtype == np.bool_:
        raise ValueError("a negative truth value")
    return Tensor(storage, offset, shape, strides, negative)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, kind: Any, bits: Any = None
) -> Tensor | Unread:
    """A tensor whose type torch has no kind of storage for: its storage counts bytes."""
    if not isinstance(kind, Type) or not isinstance(storage, Storage):
        raise ValueError("a tensor without a type or numbers")
    if kind.name not in _UNSIGNED:
        return unread_type(kind.name)
    dtype = np.dtype(kind.name)
    counts = (bytes_ // dtype.itemsize for bytes_ in (storage.count, storage.start, storage.length))
    return _tensor(Storage(storage.key, dtype, *counts), offset, shape, strides, grad, hooks, bits)


def unread_type(name: str) -> Unread:
    """A tensor of a type that is no weight's."""
    kind = f"has the type {name}, which is not supported"
    if name.lower().startswith(("complex", "c")):
        return Unread(kind, "weights are real numbers; save torch.view_as_real(tensor) or leave it out")
    return Unread(kind, "in torch, save tensor.float() instead, times its scale if the file has one")


def _tensor_of_class(build: Any, _class: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, or a buffer."""
    if not isinstance(build, Call):
        raise ValueError("a tensor that is made by something else")
    return build.build(*of_type(arguments, tuple))


def _unread(kind: str, remedy: str) -> Call:
    return Call(lambda *_: Unread(kind, remedy))


def _ordered_dict(items: Any = ()) -> dict:
    made: dict = {}
    for key, value in items:
        set_item(made, key, value)
    return made


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def opaque(*_: Any) -> Opaque:
    """A value whose content is dropped."""
    return Opaque()


# The kinds of storages of tensors that are read.
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Storages of tensors that are not read; their sizes are needed to find what follows them.
_OTHER_STORAGES = {
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "QInt8Storage": np.int8,
    "QUInt8Storage": np.uint8,
    "QInt32Storage": np.int32,
    "QUInt4x2Storage": np.uint8,
    "QUInt2x4Storage": np.uint8,
}
_UNSIGNED = ("uint16", "uint32", "uint64")
TYPES = re.compile(r"torch (bool|(bfloat|float|complex|q?u?int|bits)\d\w*)")
# Values beside the weights: module -> names. Nothing is made of them.
_VALUES = {
    "builtins": "set frozenset complex slice range bytearray bytes int float str bool list dict tuple object Ellipsis "
    "long unicode xrange",
    "collections": "deque Counter",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    "typing": "Any",
    "_codecs": "encode",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar",
    "numpy._core.multiarray": "scalar",
    "torch": "Size device Tensor strided contiguous_format preserve_format channels_last channels_last_3d sparse_coo "
    "sparse_csr sparse_csc sparse_bsr sparse_bsc per_tensor_affine per_channel_affine per_tensor_symmetric "
    "per_channel_symmetric per_channel_affine_float_qparams",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.serialization": "_get_layout",
    "yacs.config": "CfgNode",
    "easydict": "EasyDict",
    "addict.addict": "Dict",
    "mmcv.utils.config": "ConfigDict Config",
    "mmengine.config.config": "ConfigDict Config",
    "ml_collections.config_dict.config_dict": "ConfigDict FrozenConfigDict",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode PathNode BytesNode EnumNode",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
}
_DENSE = _unread("is a sparse tensor", "in torch, save tensor.to_dense() instead")
_ARRAY = _unread("is a NumPy array", "save torch.from_numpy(array) instead")
_META = _unread(
    "is without numbers (on torch's device 'meta')", "load the weights into the network in torch before you save it"
)
NAMES: dict[str, Any] = {
    "collections OrderedDict": Call(_ordered_dict),
    "torch._utils _rebuild_tensor": Call(_tensor),
    "torch._utils _rebuild_tensor_v2": Call(_tensor),
    "torch._utils _rebuild_tensor_v3": Call(_typed_tensor),
    "torch._tensor _rebuild_from_type_v2": Call(_tensor_of_class),
    "torch._utils _rebuild_parameter": Call(_parameter),
    "torch._utils _rebuild_parameter_with_state": Call(_parameter),
    "torch._utils _rebuild_device_tensor_from_cpu_tensor": Call(_parameter),
    "torch._utils _rebuild_device_tensor_from_numpy": _ARRAY,
    "torch._utils _rebuild_meta_tensor_no_storage": _META,
    "torch._utils _rebuild_sparse_tensor": _DENSE,
    "torch._utils _rebuild_sparse_csr_tensor": _DENSE,
    "torch._utils _rebuild_nested_tensor": _unread("is a nested tensor", "save its parts, tensor.unbind(), instead"),
    "torch._utils _rebuild_qtensor": _unread("is quantised", "in torch, save tensor.dequantize() instead"),
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    "numpy.core.numeric _frombuffer": _ARRAY,
    "numpy._core.numeric _frombuffer": _ARRAY,
    "collections defaultdict": Call(lambda *_: {}),
    "torch.storage UntypedStorage": np.dtype(np.uint8),
    **{f"{module} {name}": Call(opaque) for module, names in _VALUES.items() for name in names.split()},
    **{f"torch {name}": np.dtype(dtype) for name, dtype in _OTHER_STORAGES.items()},
    **{f"torch {name}": np.dtype(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.cuda {name}": np.dtype(dtype) for name, dtype in STORAGES.items()},
}


def of_type(value: Any, kind: type) -> Any:
    """The value, if it is exactly of this type; raises TypeError otherwise."""
    if type(value) is not kind:
        raise TypeError(f"not a {kind.__name__}")
    return value


def set_item(target: dict, key: Any, value: Any) -> None:
    """target[key] = value; raises TypeError for keys that no file needs: hashing nested tuples can take forever."""
    if not all(type(part) in _KEYS for part in (key if type(key) is tuple else (key,))):
        raise TypeError("a key that is neither text nor a number")
    target[key] = value
