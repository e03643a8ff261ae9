"""Projection heads, which published files hold beside the network: CFContra's and SePiCo's."""

from collections.abc import Mapping

import numpy as np

from jaxuda.errors import UserError
from jaxuda.interop.layouts import LEAVES
from jaxuda.interop.parts import prefixes_of
from jaxuda.interop.pickle_names import Unread
from jaxuda.interop.torch_checkpoint import State, from_torch, listed, to_torch, unusable

# Kind -> path of a variable of the head -> torch name, from its first layer to its last. "mlp" is CFContra's Sequential
# of linear, ReLU, linear; "normed" is SePiCo's, twice a convolution, normalisation and ReLU.
_KINDS = {
    "mlp": {
        f"params.linear{layer}.{leaf}": f"head.{place}.{LEAVES[leaf]}"
        for layer, place in ((0, 0), (1, 2))
        for leaf in ("kernel", "bias")
    },
    "normed": {
        f"{collection}.{module}{layer}.{leaf}": f"auxiliary_head.convs.{layer}.{module}.{LEAVES[leaf]}"
        for layer in (0, 1)
        for collection, module, leaves in (
            ("params", "conv", ("kernel",)),
            ("params", "bn", ("scale", "bias")),
            ("batch_stats", "bn", ("mean", "var")),
        )
        for leaf in leaves
    },
}


def match_projection(
    state: State, kind: str, channels: tuple[int, int], prefix: str = "", where: str = ""
) -> tuple[dict[str, np.ndarray], list[str]]:
    """A projection head, if the file has one.

    Args:
      state: as returned by `torch_checkpoint.clean`.
      kind: "mlp" (CFContra's) or "normed" (SePiCo's, whose number of channels between its layers is the file's).
      channels: those that the head maps from and to.
      prefix: the prefix of the network that the head belongs to.
      where: begins messages.

    Returns:
      Path of a variable ("params.linear0.kernel", "batch_stats.bn0.mean", ...) -> array in our layout, and the names of
      its entries in the file; both are empty if the file has none.

    Raises:
      UserError: an entry is missing, of another shape or not finite.
    """
    names = _KINDS[kind]
    first = next(iter(names.values()))
    found = [name for name in prefixes_of(state, first) if name.startswith(prefix)]
    if not found:
        return {}, []
    prefix, arrays, problems = min(found, key=len), {}, []
    between = channels[1] if kind == "mlp" else (*getattr(state[prefix + first], "shape", ()), 0)[0]
    widths = (channels[0], between, channels[1])
    for path, name in names.items():
        array, layer = state.get(prefix + name), int(path.split(".")[1][-1])
        shape = (widths[layer + 1], widths[layer], 1, 1) if path.endswith("kernel") else (widths[layer + 1],)
        if array is None:
            problems.append(f"missing: {prefix}{name}")
        elif isinstance(array, Unread):
            problems.append(f"{prefix}{name} {array}")
        elif array.size != np.prod(shape) or array.shape != shape[: array.ndim]:  # linear layers have two axes
            problems.append(f"shape of {prefix}{name}: {array.shape} in the checkpoint, {shape} in the network")
        elif problem := unusable(array, path.rpartition(".")[2]):
            problems.append(f"{prefix}{name} {problem}")
        else:
            arrays[path] = from_torch(array.reshape(shape)).astype(np.float32)
    if problems:
        raise UserError(f"{where}the projection head of the torch checkpoint does not fit:{listed(problems)}")
    return arrays, [prefix + name for name in names.values()]


def projection_state(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The inverse of `match_projection`: torch name -> array; None if the head is not of a published kind."""
    for names in _KINDS.values():
        if arrays.keys() == names.keys():
            return {names[path]: to_torch(np.asarray(array)) for path, array in arrays.items()}
    return None
