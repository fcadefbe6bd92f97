"""ResNet-50 with GeM and InceptionV3 of the FID in plain torch, from the published architectures (for tests only).

Names of parameters are those of torchvision and of the published files. Sizes are arguments, as in our modules.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Bottleneck with the stride on the 3x3 convolution."""

    def __init__(self, channels, width, stride, project):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        if project:
            convolution = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class TorchSSCD(nn.Module):
    """[B,3,H,W] normalised images -> unit vectors; parameters below ``backbone`` as in the published file."""

    def __init__(self, blocks=(3, 4, 6, 3), width=64, dims=512):
        super().__init__()
        net = self.backbone = nn.Module()
        net.conv1, net.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(blocks):
            row = []
            for index in range(count):
                stride = 2 if index == 0 and stage else 1
                row.append(Block(channels, width * 2**stage, stride, index == 0))
                channels = 4 * width * 2**stage
            setattr(net, f"layer{stage + 1}", nn.Sequential(*row))
        net.fc = nn.Linear(channels, dims)
        self.stages = len(blocks)

    def pooled(self, x):
        net = self.backbone
        x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 3, 2, 1)
        for stage in range(self.stages):
            x = getattr(net, f"layer{stage + 1}")(x)
        return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)

    def forward(self, x):
        return F.normalize(self.backbone.fc(self.pooled(x)), eps=1e-12)


class Conv(nn.Module):
    """Convolution, normalisation with eps 1e-3, ReLU."""

    def __init__(self, channels, features, size=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(features, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def inside_mean(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def table(cls_name, channels, d, extra):
    """Name -> (channels in, out, kernel, stride, padding) of the convolutions of one block."""
    c = channels
    if cls_name == "A":
        return {
            "branch1x1": (c, 64 // d),
            "branch5x5_1": (c, 48 // d),
            "branch5x5_2": (48 // d, 64 // d, 5, 1, 2),
            "branch3x3dbl_1": (c, 64 // d),
            "branch3x3dbl_2": (64 // d, 96 // d, 3, 1, 1),
            "branch3x3dbl_3": (96 // d, 96 // d, 3, 1, 1),
            "branch_pool": (c, extra // d),
        }
    if cls_name == "B":
        return {
            "branch3x3": (c, 384 // d, 3, 2),
            "branch3x3dbl_1": (c, 64 // d),
            "branch3x3dbl_2": (64 // d, 96 // d, 3, 1, 1),
            "branch3x3dbl_3": (96 // d, 96 // d, 3, 2),
        }
    if cls_name == "C":
        w, out = extra // d, 192 // d
        row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        return {
            "branch1x1": (c, out),
            "branch7x7_1": (c, w),
            "branch7x7_2": (w, w, *row),
            "branch7x7_3": (w, out, *column),
            "branch7x7dbl_1": (c, w),
            "branch7x7dbl_2": (w, w, *column),
            "branch7x7dbl_3": (w, w, *row),
            "branch7x7dbl_4": (w, w, *column),
            "branch7x7dbl_5": (w, out, *row),
            "branch_pool": (c, out),
        }
    if cls_name == "D":
        w = 192 // d
        return {
            "branch3x3_1": (c, w),
            "branch3x3_2": (w, 320 // d, 3, 2),
            "branch7x7x3_1": (c, w),
            "branch7x7x3_2": (w, w, (1, 7), 1, (0, 3)),
            "branch7x7x3_3": (w, w, (7, 1), 1, (3, 0)),
            "branch7x7x3_4": (w, w, 3, 2),
        }
    w, row, column = 384 // d, ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    return {
        "branch1x1": (c, 320 // d),
        "branch3x3_1": (c, w),
        "branch3x3_2a": (w, w, *row),
        "branch3x3_2b": (w, w, *column),
        "branch3x3dbl_1": (c, 448 // d),
        "branch3x3dbl_2": (448 // d, w, 3, 1, 1),
        "branch3x3dbl_3a": (w, w, *row),
        "branch3x3dbl_3b": (w, w, *column),
        "branch_pool": (c, 192 // d),
    }


class Mixed(nn.Module):
    """One block of parallel branches: kind A to E; F is E with the maximum in its pool branch."""

    def __init__(self, kind, channels, d, extra=0):
        super().__init__()
        self.kind = kind
        for name, arguments in table("E" if kind == "F" else kind, channels, d, extra).items():
            setattr(self, name, Conv(*arguments))

    def chain(self, x, *names):
        for name in names:
            x = getattr(self, name)(x)
        return x

    def forward(self, x):
        run, kind = self.chain, self.kind
        if kind == "A":
            parts = [run(x, "branch1x1"), run(x, "branch5x5_1", "branch5x5_2")]
            parts.append(run(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
        elif kind == "B":
            double = run(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
            return torch.cat([run(x, "branch3x3"), double, F.max_pool2d(x, 3, 2)], 1)
        elif kind == "C":
            parts = [run(x, "branch1x1"), run(x, *(f"branch7x7_{i}" for i in (1, 2, 3)))]
            parts.append(run(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))))
        elif kind == "D":
            seven = run(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
            return torch.cat([run(x, "branch3x3_1", "branch3x3_2"), seven, F.max_pool2d(x, 3, 2)], 1)
        else:
            three, double = run(x, "branch3x3_1"), run(x, "branch3x3dbl_1", "branch3x3dbl_2")
            parts = [run(x, "branch1x1")]
            parts += [run(three, "branch3x3_2a"), run(three, "branch3x3_2b")]
            parts += [run(double, "branch3x3dbl_3a"), run(double, "branch3x3dbl_3b")]
        pooled = F.max_pool2d(x, 3, 1, 1) if kind == "F" else inside_mean(x)
        return torch.cat([*parts, run(pooled, "branch_pool")], 1)


class TorchInception(nn.Module):
    """[B,3,H,W] scaled images -> features and logits without the bias."""

    def __init__(self, d=1, classes=1008):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32 // d, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32 // d, 32 // d, 3)
        self.Conv2d_2b_3x3 = Conv(32 // d, 64 // d, 3, 1, 1)
        self.Conv2d_3b_1x1 = Conv(64 // d, 80 // d)
        self.Conv2d_4a_3x3 = Conv(80 // d, 192 // d, 3)
        blocks = [("5b", "A", 192, 32), ("5c", "A", 256, 64), ("5d", "A", 288, 64), ("6a", "B", 288, 0)]
        blocks += [("6b", "C", 768, 128), ("6c", "C", 768, 160), ("6d", "C", 768, 160), ("6e", "C", 768, 192)]
        blocks += [("7a", "D", 768, 0), ("7b", "E", 1280, 0), ("7c", "F", 2048, 0)]
        self.names = [f"Mixed_{name}" for name, *_ in blocks]
        for name, kind, channels, extra in blocks:
            setattr(self, f"Mixed_{name}", Mixed(kind, channels // d, d, extra))
        self.fc = nn.Linear(2048 // d, classes)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.names:
            x = getattr(self, name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T
