"""Mix Transformers against PyTorch: forward and backward of the backbone, training mode, without drop path.

    python experiments/benchmarks/transformers.py --memory                                        # MiT-B0, 4 x 256x128
    python experiments/benchmarks/transformers.py --variant b5 --batch 1 --size 512x512 --memory

Both have the same weights and images, and their losses and gradients are compared. Then they take turns in one process,
on the same number of threads, and the medians are compared; PyTorch with both memory layouts of the maps between its
convolutions, and with its fused attention (`scaled_dot_product_attention`). With `--memory` each also runs in its own
process: for JAX the figure is that of the compiled code, for PyTorch the growth of the peak.
"""

import argparse
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from train_step import interleaved, peak_of_process, torch_weights

from jaxuda import parallel
from jaxuda.models import mix_transformer, mix_transformer_files
from jaxuda.training.allocation import keep_freed_memory

LAYOUTS = ("contiguous_format", "channels_last")


class Attention(nn.Module):
    """Attention to a smaller map; names as in the authors' files."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr, self.norm = nn.Conv2d(channels, channels, reduction, reduction), nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        n, count, channels = x.shape
        small = x
        if hasattr(self, "sr"):
            small = self.norm(self.sr(as_map(x, size, self.layout)).flatten(2).transpose(1, 2))
        split = lambda y: y.reshape(n, -1, self.heads, channels // self.heads).transpose(1, 2)  # noqa: E731
        q, (k, v) = split(self.q(x)), map(split, self.kv(small).chunk(2, dim=-1))
        found = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(found.transpose(1, 2).reshape(n, count, channels))


class FeedForward(nn.Module):
    """Linear, depthwise convolution, GELU, linear."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = 4 * channels
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        hidden = self.dwconv["dwconv"](as_map(self.fc1(x), size, self.layout)).flatten(2).transpose(1, 2)
        return self.fc2(functional.gelu(hidden))


class Block(nn.Module):
    """Attention and feed-forward network, each added to what goes in."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(channels, heads, reduction), FeedForward(channels)

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), size)
        return x + self.mlp(self.norm2(x), size)


class Backbone(nn.Module):
    """Returns the normalised maps of four stages, as (N, positions, channels)."""

    def __init__(self, width: int, blocks: tuple[int, ...]):
        super().__init__()
        before = 3
        for stage, count in enumerate(blocks, 1):
            heads, reduction = mix_transformer.HEADS[stage - 1], mix_transformer.REDUCTIONS[stage - 1]
            channels, (kernel, stride) = width * heads, (3, 2) if stage > 1 else (7, 4)
            parts = {"proj": nn.Conv2d(before, channels, kernel, stride, kernel // 2), "norm": nn.LayerNorm(channels)}
            self.add_module(f"patch_embed{stage}", nn.ModuleDict(parts))
            self.add_module(f"block{stage}", nn.ModuleList(Block(channels, heads, reduction) for _ in range(count)))
            self.add_module(f"norm{stage}", nn.LayerNorm(channels, eps=1e-6))
            before = channels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in range(1, 5):
            embed = getattr(self, f"patch_embed{stage}")
            x = embed["proj"](x)
            size = x.shape[2:]
            x = embed["norm"](x.flatten(2).transpose(1, 2))
            for block in getattr(self, f"block{stage}"):
                x = block(x, size)
            x = getattr(self, f"norm{stage}")(x)
            maps.append(x)
            x = as_map(x, size, self.layout)
        return maps


def as_map(x: torch.Tensor, size: tuple[int, int], layout: torch.memory_format) -> torch.Tensor:
    """(N, positions, A) -> (N, A, h, w); with channels last in memory it is a view."""
    return x.transpose(1, 2).unflatten(2, size).contiguous(memory_format=layout)


class Ours:
    """Forward and backward of jaxuda's backbone, compiled."""

    def __init__(self, options: argparse.Namespace, images: np.ndarray):
        width, blocks = mix_transformer.VARIANTS[options.variant]
        model = mix_transformer.Encoder(width, blocks, 0.0, False, "float32")
        self.images = jnp.asarray(images)
        self.variables = jax.jit(partial(model.init, train=False, index=None))(jax.random.key(0), self.images)

        def loss(variables: dict, images: jax.Array) -> jax.Array:
            maps = model.apply(variables, images, True, jnp.arange(len(images)))
            return sum(jnp.mean(jnp.abs(x)) for x in maps)

        step = parallel.jit_step(jax.value_and_grad(loss), jax.devices()[0], donate=False)
        self.compiled = step.lower(self.variables, self.images).compile()

    def step(self) -> tuple[float, dict]:
        value, gradients = self.compiled(self.variables, self.images)
        return float(value), gradients

    def memory(self) -> float:
        """Bytes of temporaries; gradients, which both keep, do not count."""
        return self.compiled.memory_analysis().temp_size_in_bytes


class Theirs:
    """PyTorch's, eager."""

    def __init__(self, options: argparse.Namespace, images: np.ndarray, layout: str):
        memory_format = getattr(torch, layout)
        self.model = Backbone(*mix_transformer.VARIANTS[options.variant]).to(memory_format=memory_format)
        for module in self.model.modules():
            module.layout = memory_format
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)

    def step(self) -> tuple[float, dict]:
        self.model.zero_grad(set_to_none=False)
        loss = sum(x.abs().mean() for x in self.model(self.images))
        loss.backward()
        return loss.item(), {name: x.grad for name, x in self.model.named_parameters()}

    def memory(self) -> float:
        """Bytes by which the peak grows over two steps, without the gradients.

        No step goes before: the process keeps freed memory (`keep_freed_memory`), which the second step would reuse.
        """
        before = peak_of_process(reset=True)
        self.step(), self.step()
        kept = sum(x.grad.numel() * x.grad.element_size() for x in self.model.parameters())
        return peak_of_process() - before - kept


def main() -> None:
    """Prints losses, times and, with --memory, memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=tuple(mix_transformer.VARIANTS), default="b0")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", default="256x128", help="WIDTHxHEIGHT")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--alone", choices=("ours", *LAYOUTS), help="only the memory of one")
    options = parser.parse_args()
    keep_freed_memory()
    width, height = map(int, options.size.split("x"))
    images = np.random.default_rng(0).standard_normal((options.batch, height, width, 3)).astype(np.float32)
    if options.alone:
        form = Ours(options, images) if options.alone == "ours" else Theirs(options, images, options.alone)
        print(json.dumps(form.memory()))
        return

    ours = Ours(options, images)
    layout = mix_transformer_files.backbone_layouts()["mit"]
    rename = lambda tree: torch_weights({"params": {"backbone": tree}}, layout)  # noqa: E731
    weights = {name: torch.from_numpy(x) for name, x in rename(ours.variables["params"]).items()}
    forms = {"ours": ours, **{name: Theirs(options, images, name) for name in LAYOUTS}}
    for name in LAYOUTS:
        forms[name].model.load_state_dict(weights)
    (loss, gradients), *others = (form.step() for form in forms.values())
    gradients = rename(gradients["params"])
    for other, theirs in others:
        np.testing.assert_allclose(other, loss, rtol=1e-5)
        for name, x in theirs.items():
            np.testing.assert_allclose(x, gradients[name], atol=1e-3 * np.abs(gradients[name]).max())
    seconds = np.median(interleaved([form.step for form in forms.values()], options.repeats), axis=0)
    fastest = seconds[1:].min()
    threads = torch.get_num_threads()
    print(f"MiT-{options.variant.upper()}, {options.batch} x {options.size}, float32, {threads} thread(s)")
    for name, value in zip(forms, seconds, strict=True):
        print(f"{name:20}{value:10.4f} s{value / fastest:8.2f}")
    if options.memory:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
        run = partial(subprocess.run, check=True, capture_output=True, text=True)
        sizes = {name: json.loads(run([*command, name]).stdout.splitlines()[-1]) for name in forms}
        least = min(sizes[name] for name in LAYOUTS)
        cells = (f"{name} {size / 1e6:.0f} MB ({size / least:.2f})" for name, size in sizes.items())
        print("memory: " + ", ".join(cells))


if __name__ == "__main__":
    main()
