"""The reference of the benchmarks: DeepLab-v2, EfficientNet-Lite0 and train steps of five methods in plain PyTorch.

The same networks and losses as in jaxuda, with the parameter names of the published networks, so that
`jaxuda.interop` can convert weights. The code is fast where it stays readable: fused library operations, either memory
layout, gradients set to None.
"""

import copy
import itertools
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

DEPTHS = {"resnet18": (False, (2, 2, 2, 2)), "resnet50": (True, (3, 4, 6, 3)), "resnet101": (True, (3, 4, 23, 3))}
IGNORE = 255


def conv(inputs: int, features: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias; keeps the size at stride 1."""
    return nn.Conv2d(inputs, features, size, stride, dilation * (size // 2), dilation, bias=False)


class BasicBlock(nn.Module):
    """As in torchvision, with dilations."""

    growth = 1

    def __init__(self, inputs: int, features: int, stride: int, dilations: tuple[int, int], caffe: bool):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, features, 3, stride, dilations[0]), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = conv(features, features, 3, 1, dilations[1]), nn.BatchNorm2d(features)
        self.downsample = shortcut(inputs, features, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; strides in its first convolution (caffe) or its second (torchvision)."""

    growth = 4

    def __init__(self, inputs: int, features: int, stride: int, dilations: tuple[int, int], caffe: bool):
        super().__init__()
        first, second = (stride, 1) if caffe else (1, stride)
        self.conv1, self.bn1 = conv(inputs, features, 1, first), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = conv(features, features, 3, second, dilations[0]), nn.BatchNorm2d(features)
        self.conv3, self.bn3 = conv(features, 4 * features, 1), nn.BatchNorm2d(4 * features)
        self.downsample = shortcut(inputs, 4 * features, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def shortcut(inputs: int, features: int, stride: int) -> nn.Module:
    """Identity where the shapes allow it."""
    if inputs == features and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(inputs, features, 1, stride), nn.BatchNorm2d(features))


class Head(nn.Module):
    """Sum of four dilated 3x3 convolutions."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        rates = (6, 12, 18, 24)
        self.conv2d_list = nn.ModuleList(nn.Conv2d(inputs, classes, 3, padding=r, dilation=r) for r in rates)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x) for layer in self.conv2d_list)


class DeepLab(nn.Module):
    """DeepLab-v2 on a ResNet, output stride 8; with `aux` layer5 is the head on the third stage, else the only one."""

    def __init__(self, classes: int, depth: str, width: int, caffe: bool, aux: bool):
        super().__init__()
        bottleneck, blocks = DEPTHS[depth]
        make = Bottleneck if bottleneck else BasicBlock
        self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=caffe)
        inputs, before = width, 1
        for stage, (stride, dilation) in enumerate(zip((1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            layers, features = [], width * 2**stage
            for index in range(blocks[stage]):
                first = before if index == 0 and not caffe else dilation
                layers.append(make(inputs, features, 1 if index else stride, (first, dilation), caffe))
                inputs = features * make.growth
            before = dilation
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.aux = aux
        self.layer5 = Head(inputs // 2 if aux else inputs, classes)
        if aux:
            self.layer6 = Head(inputs, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Main logits, those of the second level or None, features."""
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        middle = self.layer3(self.layer2(self.layer1(x)))
        features = self.layer4(middle)
        if self.aux:
            return self.layer6(features), self.layer5(middle), features
        return self.layer5(features), None, features


class LightLite(nn.Module):
    """EfficientNet-Lite0 of the package efficientnet-lite-pytorch under the head "light" of jaxuda."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.backbone = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        for unused in ("_conv_head", "_bn1", "_fc"):
            delattr(self.backbone, unused)
        self.decoder, self.head = nn.Module(), nn.Conv2d(width, classes, 1)
        self.decoder.branches = nn.ModuleList(
            nn.Conv2d(320, width, 3, padding=rate, dilation=rate, bias=False) for rate in (1, 2, 4)
        )
        self.decoder.fine_conv, self.decoder.bn = conv(40, width, 1), nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor]:
        """Logits, None, features, the backbone's last map."""
        network, decoder = self.backbone, self.decoder
        x = network._swish(network._bn0(network._conv_stem(x)))
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number == 4:
                fine = x
        coarse = sum(layer(x) for layer in decoder.branches)
        coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        features = F.relu(decoder.bn(decoder.fine_conv(fine) + coarse), inplace=True)
        return self.head(features), None, features, x


def discriminator(classes: int, width: int) -> nn.Sequential:
    """Five 4x4 convolutions of stride 2."""
    widths, layers = (classes, width, 2 * width, 4 * width, 8 * width, 1), []
    for inputs, features in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, features, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers[:-1])


# Losses -----------------------------------------------------------------------------------------------------


def upsample(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Logits at the size of the images."""
    return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)


def nearest(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Labels at another size."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()


def entropy_map(logits: torch.Tensor) -> torch.Tensor:
    """-p log2(p) / log2(C)."""
    probs = torch.softmax(logits, 1)
    return -probs * torch.log2(probs + 1e-30) / torch.log2(torch.tensor(float(probs.shape[1])))


def lovasz_softmax(probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class by class, over the labelled pixels of the batch."""
    valid = labels != IGNORE
    probs, labels, losses = probs.permute(0, 2, 3, 1)[valid], labels[valid], []
    for index in labels.unique():
        hits = (labels == index).to(probs.dtype)
        errors, order = (hits - probs[:, index]).abs().sort(descending=True)
        hits = hits[order]
        jaccard = 1 - (hits.sum() - hits.cumsum(0)) / (hits.sum() + (1 - hits).cumsum(0))
        losses.append(errors @ torch.diff(jaccard, prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()


class Statistics:
    """Mean, variance and count of the features of each class, over all pixels seen."""

    def __init__(self, classes: int, channels: int, device: str):
        self.mean, self.var = torch.zeros(2, classes, channels, device=device)
        self.count = torch.zeros(classes, device=device)

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        members = F.one_hot(torch.where(labels == IGNORE, 0, labels), len(self.count)).to(features.dtype)
        members *= (labels != IGNORE)[:, None]
        count = members.sum(0)
        divisor = count.clamp(min=1)[:, None]
        mean = members.T @ features / divisor
        var = members.T @ (features - members @ mean).square() / divisor
        new = (count / (count + self.count).clamp(min=1))[:, None]
        self.var = (1 - new) * self.var + new * var + new * (1 - new) * (self.mean - mean).square()
        self.mean = (1 - new) * self.mean + new * mean
        self.count = self.count + count

    def contrast(self, features: torch.Tensor, labels: torch.Tensor, tau: float) -> torch.Tensor:
        """SDCA's loss in closed form."""
        features, mean, var = (F.normalize(x, dim=1) for x in (features, self.mean, self.var))
        spread = features.square() @ var.T / (2 * tau)
        logits = (features @ mean.T + spread) / tau
        valid = labels != IGNORE
        if not valid.any():
            return 0.0 * logits.sum()
        own = spread[valid].gather(1, labels[valid][:, None]).mean() / tau
        return F.cross_entropy(logits, labels, ignore_index=IGNORE) + own


def weighted_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """A mean over all pixels, also over ignored ones."""
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return (losses if weights is None else losses * weights).mean()


def feature_distance(features: torch.Tensor, fixed: torch.Tensor, label: torch.Tensor, config) -> torch.Tensor:
    """The mean distance in cells that one of `config.feature_classes` covers."""
    factor = -(-label.shape[2] // features.shape[3])
    classes = torch.where(label == IGNORE, 0, label)
    shares = F.one_hot(classes).float() * (label != IGNORE)[..., None]
    shares, best = F.avg_pool2d(shares.permute(0, 3, 1, 2), factor).max(1)
    height, width = (min(sides) for sides in zip(best.shape[1:], features.shape[2:], strict=True))
    wanted = torch.tensor(config.feature_classes, device=label.device)
    mask = ((shares >= config.feature_ratio) & torch.isin(best, wanted))[:, :height, :width]
    distances = (features - fixed)[:, :, :height, :width].norm(dim=1)[mask]
    return distances.mean() if len(distances) else 0.0 * features.sum()


def in_hsv(x: torch.Tensor, saturation: torch.Tensor | None = None, hue: torch.Tensor | None = None) -> torch.Tensor:
    """RGB (N, 3, H, W) with S multiplied and clipped, or H moved by turns; the factors are (N, 1, 1, 1)."""
    red, green, blue = x.unbind(1)
    value, first = x.max(1)
    chroma = value - x.min(1)[0]
    safe = torch.where(chroma > 0, chroma, 1)
    sixths = torch.stack([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], 1)
    sixth = torch.where(chroma > 0, sixths.gather(1, first[:, None])[:, 0], 0)[:, None]
    full = (chroma / (value + 1e-6))[:, None]
    if saturation is not None:
        full = (full * saturation).clamp(0, 1)
    if hue is not None:
        sixth = sixth + 6 * hue
    value = value[:, None]
    place = (torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1) + sixth) % 6
    return value - value * full * torch.minimum(place, 4 - place).clamp(0, 1)


def jitter(x: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The colour jitter of DAFormer on RGB in 0..1, image by image, since each has its own order."""
    images = []
    for image, own, operations in zip(x.split(1), factors[..., None, None, None], order.tolist(), strict=True):
        for operation in operations:
            if operation == 0:
                image = (image + own[0] - 1).clamp(0, 1)
            elif operation == 1:
                image = (image * own[1]).clamp(0, 1)
            else:
                image = in_hsv(image, saturation=own[2]) if operation == 2 else in_hsv(image, hue=own[3])
        images.append(image)
    return torch.cat(images)


def blur(x: torch.Tensor, sigma: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """A separable Gaussian, one deviation per image, with reflected borders."""
    reaches = [size // 2 for size in sizes]
    x = F.pad(x, (reaches[1], reaches[1], reaches[0], reaches[0]), mode="reflect")
    count, channels, _, _ = x.shape
    for shape, reach in (((-1, 1), reaches[0]), ((1, -1), reaches[1])):
        distances = torch.arange(-reach, reach + 1, device=x.device)
        kernels = torch.softmax(-(distances / sigma[:, None]).square() / 2, 1)
        kernels = kernels.repeat_interleave(channels, 0).view(count * channels, 1, *shape)
        x = F.conv2d(x.reshape(1, count * channels, *x.shape[2:]), kernels, groups=count * channels)
        x = x.view(count, channels, *x.shape[2:])
    return x


def flat(x: torch.Tensor) -> torch.Tensor:
    """(N, A, h, w) as (P, A), float32."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()


# Train steps ------------------------------------------------------------------------------------------------


class Trainer:
    """One step of source-only, MinEnt, AdvEnt, SDCA or DAFormer; `config` is that of the stage in jaxuda.

    draws: for DAFormer, what jaxuda draws in each step (see `train_step.draws`), for as many steps as are run.
    colours: mean and deviation (2, 3) of the images' channels before they were normalised, in 0..1.
    """

    def __init__(
        self,
        method: str,
        config,
        classes: int,
        device: str,
        layout: torch.memory_format,
        draws: tuple = (),
        colours: torch.Tensor | None = None,
    ):
        model, optim = config.model, config.optim
        self.method, self.config, self.device, self.layout = method, config, device, layout
        if model.name == "deeplab":
            self.model = DeepLab(classes, model.backbone, model.width, model.variant == "caffe", model.aux)
            make_optimizer = partial(torch.optim.SGD, momentum=optim.momentum, weight_decay=optim.weight_decay)
        else:
            self.model = LightLite(classes, model.decoder_width)
            make_optimizer = partial(torch.optim.AdamW, weight_decay=optim.weight_decay)
        self.model.to(device, memory_format=layout).train()
        self.bfloat16 = model.dtype == "bfloat16"
        self.optimizers = [make_optimizer(self.model.parameters(), config.lr)]
        self.discriminators = {}
        if method == "advent":
            levels = ("main", "aux") if model.aux else ("main",)
            for level in levels:
                network = discriminator(classes, config.discriminator_width).to(device, memory_format=layout)
                self.discriminators[level] = network
                self.optimizers.append(torch.optim.Adam(network.parameters(), config.discriminator_lr, (0.9, 0.99)))
        if method == "sdca":
            channels = self.model.layer5.conv2d_list[0].in_channels
            self.statistics = [Statistics(classes, n, device) for n in (channels, classes)]
        self.classes, self.draws, self.colours, self.count = classes, draws, colours, 0

    def load(self, weights: tuple[dict, dict]) -> None:
        """State dicts of the network and of the discriminators, of tensors; the teacher starts as the network."""
        self.model.load_state_dict(weights[0], strict=False)
        for network, named in zip(self.discriminators.values(), weights[1].values(), strict=False):
            network.load_state_dict(named, strict=False)
        if self.method == "daformer":
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()

    def place(self, image: torch.Tensor) -> torch.Tensor:
        """Images on the device."""
        return image.to(self.device).contiguous(memory_format=self.layout)

    def step(self, source: torch.Tensor, label: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One update on source and target images (N, 3, H, W) and labels (N, H, W); returns the loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16):
            loss = getattr(self, self.method)(source, label, target)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def supervised(self, outputs: tuple, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, list]:
        """The loss on the source, and the logits of each level at image size."""
        upsampled = [upsample(logits.float(), image) for logits in outputs[:2] if logits is not None]
        loss = 0.0
        for logits, weight in zip(upsampled, (1.0, self.config.lambda_aux), strict=False):
            loss = loss + weight * F.cross_entropy(logits, label, ignore_index=IGNORE)
        if self.config.lambda_lovasz:
            loss = loss + self.config.lambda_lovasz * self.lovasz(outputs, image, label)
        return loss, upsampled

    def lovasz(self, outputs: tuple, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The Lovasz term on the grid of the recipe."""
        size = tuple(side // self.config.lovasz_shrink for side in image.shape[2:])
        probs = torch.softmax(F.interpolate(outputs[0].float(), size, mode="bilinear", align_corners=True), 1)
        return lovasz_softmax(probs, nearest(label, size))

    def source_only(self, source: torch.Tensor, label: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss, _ = self.supervised(self.model(source), source, label)
        loss.backward()
        return loss

    def minent(self, source: torch.Tensor, label: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One backward pass per domain, as published."""
        loss, _ = self.supervised(self.model(source), source, label)
        loss.backward()
        entropy = entropy_map(upsample(self.model(target)[0].float(), target)).sum(1).mean()
        (self.config.lambda_entropy * entropy).backward()
        return loss.detach() + self.config.lambda_entropy * entropy.detach()

    def daformer(self, source: torch.Tensor, label: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One backward pass per loss, as published; colours change only in the steps whose coins say so."""
        config, drawn = self.config, self.draws[self.count]
        with torch.no_grad():
            kept = min(1 - 1 / (self.count + 1), config.alpha)
            for ours, theirs in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                ours.lerp_(theirs, 1 - kept)
            confidence, pseudo = torch.softmax(upsample(self.teacher(target)[0].float(), target), 1).max(1)
            share = (confidence >= config.threshold).float().mean()
            mask = torch.stack([torch.isin(one, values) for one, values in zip(label, drawn["classes"], strict=True)])
            mixed = self.coloured(torch.where(mask[:, None], source, target), drawn)
            mixed_label, weight = torch.where(mask, label, pseudo), torch.where(mask, 1.0, share)
        self.count += 1

        outputs = self.model(source)
        loss = weighted_cross_entropy(upsample(outputs[0].float(), source), label)
        loss = loss + config.lambda_lovasz * self.lovasz(outputs, source, label)
        if config.lambda_features:
            with torch.no_grad():
                fixed = self.reference(source)[-1]
            loss = loss + config.lambda_features * feature_distance(outputs[-1].float(), fixed.float(), label, config)
        loss.backward()
        mixed_loss = weighted_cross_entropy(upsample(self.model(mixed)[0].float(), mixed), mixed_label, weight)
        mixed_loss.backward()
        return loss.detach() + mixed_loss.detach()

    def coloured(self, images: torch.Tensor, drawn: dict) -> torch.Tensor:
        """Jittered and blurred images, still normalised."""
        if drawn["jitter"]:
            mean, deviation = self.colours.view(2, 1, 3, 1, 1)
            images = (jitter(images * deviation + mean, drawn["factors"], drawn["order"]) - mean) / deviation
        if drawn["blur"]:
            # An odd tenth of a side; what lies further than 7 pixels away weighs nothing.
            sizes = [min((-(-side // 10) - 1) | 1, 15) for side in images.shape[2:]]
            images = blur(images, drawn["sigma"], sizes)
        return images.contiguous(memory_format=self.layout)

    def advent(self, source: torch.Tensor, label: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Each loss is propagated as soon as it is computed, as published: this saves memory."""
        config, total = self.config, 0.0
        for network in self.discriminators.values():
            network.requires_grad_(False)
        loss, ours = self.supervised(self.model(source), source, label)
        loss.backward()
        total += loss.detach()

        theirs = [upsample(logits.float(), target) for logits in self.model(target)[:2] if logits is not None]
        maps, weights = [entropy_map(logits) for logits in theirs], (config.lambda_adv, config.lambda_adv_aux)
        loss = 0.0
        for network, values, weight in zip(self.discriminators.values(), maps, weights, strict=False):
            loss = loss + weight * F.softplus(network(values)).mean()
        loss.backward()
        total += loss.detach()

        for network in self.discriminators.values():
            network.requires_grad_(True)
        with torch.no_grad():
            ours = [entropy_map(logits) for logits in ours]
        for network, source_maps, target_maps in zip(self.discriminators.values(), ours, maps, strict=True):
            for values, domain in ((source_maps, 0), (target_maps.detach(), 1)):
                logits = network(values)
                loss = 0.5 * (F.softplus(logits) - domain * logits).mean()
                loss.backward()
                total += loss.detach()
        return total

    def sdca(self, source: torch.Tensor, label: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        config = self.config
        outputs = self.model(source)
        loss, _ = self.supervised(outputs, source, label)
        theirs = self.model(target)
        size = outputs[0].shape[2:]
        label = nearest(label, size).flatten()
        confidence, pseudo = torch.softmax(flat(theirs[0].detach()), 1).max(1)
        pseudo = torch.where(confidence >= config.confidence, pseudo, IGNORE)
        levels = ((2, config.lambda_features), (0, config.lambda_logits))
        for statistics, (index, weight) in zip(self.statistics, levels, strict=True):
            statistics.update(flat(outputs[index].detach()), label)
            for maps, classes in ((outputs, label), (theirs, pseudo)):
                loss = loss + weight * statistics.contrast(flat(maps[index]), classes, config.tau)
        loss.backward()
        return loss
