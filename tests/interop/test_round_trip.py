"""A torch network: converted, scored by the command line as by torch, exported, and loaded in torch again."""

import re
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

from jaxuda import convert
from jaxuda.data.labels import lookup_table
from jaxuda.inference.restore import restore
from jaxuda.main import main
from jaxuda.metrics import mean_iou
from jaxuda.prepare import prepare

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.functional import interpolate, relu  # noqa: E402

ROOT = Path(__file__).parents[2]
WIDTH, CLASSES = 8, 19
WORDS = [
    *("--config=configs/advent.py:gta5", "--config.model.backbone=resnet18", f"--config.model.width={WIDTH}"),
    *("--config.model.variant=torchvision", "--config.model.aux=False"),
]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dilations: tuple[int, int]):
        super().__init__()
        first, second = dilations
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, first, first, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, second, second, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


class Features(nn.Module):
    """ResNet-18 of output stride 8, under its name in published files."""

    def __init__(self):
        super().__init__()
        stem = {
            "conv1": nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False),
            "bn1": nn.BatchNorm2d(WIDTH),
            "relu": nn.ReLU(),
            "maxpool": nn.MaxPool2d(3, 2, 1),
        }
        stages, inputs = {}, WIDTH
        # The first block of a dilated stage begins with the dilation of the stage before.
        for index, (stride, before, dilation) in enumerate(((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))):
            outputs = WIDTH * 2**index
            blocks = Block(inputs, outputs, stride, (before, dilation)), Block(outputs, outputs, 1, (dilation,) * 2)
            stages[f"layer{index + 1}"], inputs = nn.Sequential(*blocks), outputs
        self.backbone = nn.Sequential()
        for name, module in {**stem, **stages}.items():
            self.backbone.add_module(name, module)

    def forward(self, x):
        return self.backbone(x)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(8 * WIDTH, CLASSES, 3, 1, rate, rate) for rate in (6, 12, 18, 24)]
        self.conv2d_list = nn.ModuleList(convolutions)

    def forward(self, x):
        return sum(convolution(x) for convolution in self.conv2d_list)


def network() -> dict[str, nn.Module]:
    return {"feature_extractor": Features().eval(), "classifier": Classifier().eval()}


def random_network() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    parts = network()
    for name, array in parts["feature_extractor"].named_buffers():
        if name.endswith("running_mean"):
            array.copy_(0.1 * torch.randn_like(array))
        elif name.endswith("running_var"):
            array.copy_(torch.exp(0.1 * torch.randn_like(array)))
    return parts


def logits(parts: dict[str, nn.Module], image: np.ndarray) -> torch.Tensor:
    """Logits (1, C, h, w) of an image (H, W, 3) uint8, prepared as networks from Caffe need it."""
    shown = image[..., ::-1] - np.array([104.00698793, 116.66876762, 122.67891434])
    with torch.no_grad():
        return parts["classifier"](parts["feature_extractor"](torch.tensor(shown.transpose(2, 0, 1)[None]).float()))


def test_in_evaluated_out_and_in_torch_again(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    parts, file, folder = random_network(), tmp_path / "network.pth", tmp_path / "network"
    state = {name: {f"module.{key}": v for key, v in part.state_dict().items()} for name, part in parts.items()}
    torch.save(state, file)
    assert convert.main([str(file), *WORDS, f"--out={folder}"]) == 0

    source, size = layouts.cityscapes(tmp_path / "source", (64, 48)), (48, 64)
    prepare("cityscapes", manual_dir=source, data_dir=tmp_path)
    table, confusion = lookup_table("cityscapes", "cityscapes19"), np.zeros((CLASSES, CLASSES), np.int64)
    images = {}
    for path in (source / "leftImg8bit" / "val").rglob("*.png"):
        name = str(path).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit", "_gtFine_labelIds")
        truth, images[path] = table[np.asarray(Image.open(name))], np.asarray(Image.open(path))
        scores = interpolate(logits(parts, images[path]), size, mode="bilinear", align_corners=True)
        np.add.at(confusion, (truth[truth != 255], scores[0].argmax(0).numpy()[truth != 255]), 1)
    capsys.readouterr()
    assert main(
        [
            *("jaxuda", *WORDS, "--mode=eval", f"--checkpoint={folder}"),
            *(f"--config.data_dir={tmp_path}", "--config.evaluation.size=(64, 48)"),
        ]
    ) == 0  # fmt: skip
    scored = float(re.search(r"mIoU \(19\)\s+([\d.]+)", capsys.readouterr().out)[1])
    assert scored == pytest.approx(100 * mean_iou(confusion), abs=0.06) and scored > 0.5

    model, variables, _ = restore(str(folder), CLASSES)
    for image in list(images.values())[:1]:
        normalised = (image[..., ::-1] - np.array([104.00698793, 116.66876762, 122.67891434]))[None]
        ours = np.asarray(model.apply(variables, normalised.astype(np.float32)).main).transpose(0, 3, 1, 2)
        expected = logits(parts, image).numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

        assert convert.main([str(folder), f"--export={tmp_path / 'out.pth'}"]) == 0
        again = network()
        for name, written in torch.load(tmp_path / "out.pth", weights_only=True).items():
            again[name].load_state_dict(written)  # raises if a name is missing or unexpected
        np.testing.assert_array_equal(logits(again, image).numpy(), expected)
