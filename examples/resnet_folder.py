"""A residual network, in the way of torchvision's, on images from a folder: FOLDER/class/*.png (or .jpg).

ps-run -n 2 examples/resnet_folder.py FOLDER
ps-run -n 2 examples/resnet_folder.py FOLDER --amp          in mixed precision

BatchNorm's statistics are averaged over the workers with every step. Lines marked with <-- are about the servers.
"""

import argparse
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import nn

import torch_ps  # <--


class Folder(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images, shape (3, 32, 32), fp32 in [-1, 1], and the number of their class."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(folder.name for folder in root.iterdir())
        self.items = [(p, n) for n, name in enumerate(self.classes) for p in sorted((root / name).glob("*.[jp][pn]*g"))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = numpy.array(Image.open(self.items[index][0]).convert("RGB").resize((32, 32)))
        return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1, self.items[index][1]


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm2(self.second(torch.relu(self.norm1(self.first(x))))) + self.short(x))


def resnet(classes: int, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    blocks = Block(3, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args()
    device, data = torch_ps.device(), Folder(args.folder)
    model = resnet(len(data.classes)).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    optimizer = torch_ps.ParameterServerOptimizer(sgd, model)  # <--
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp)
    for epoch in range(args.epochs):
        right = seen = 0
        for images, labels in torch_ps.shard(data, optimizer, batch_size=16):  # <--
            with torch.autocast(device.type, enabled=args.amp):
                scores = model(images.to(device))
                loss = nn.functional.cross_entropy(scores, labels.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            right, seen = right + int((scores.argmax(1).cpu() == labels).sum()), seen + len(labels)
        print(f"epoch {epoch + 1}: {right} of {seen} training images of this worker right")
    optimizer.close()


if __name__ == "__main__":
    main()
