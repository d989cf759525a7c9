"""Train the small digit classifier that ``evaluate_mnist.py`` judges samples with.

    python examples/train_classifier.py --data mnist.npz

It is a convolutional network of its own, trained on the MNIST training images alone; the test images only measure it.
Input everywhere is [B, 1, 28, 28] in [-1, 1], the range samples come in; output is class logits [B, 10].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run from a checkout, without installing
    sys.path.insert(0, str(ROOT))

from examples.train_mnist import find_data  # noqa: E402
from pydiff.models.loader import write_atomically  # noqa: E402

WEIGHTS = Path(__file__).resolve().parent / "weights" / "mnist_classifier.safetensors"


class Classifier(nn.Sequential):
    """Three strided convolutions with batch normalisation and a linear layer: [B, 1, 28, 28] -> logits [B, 10]."""

    def __init__(self, width: int = 32):
        def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *layer(1, width, 1), *layer(width, width, 2),
            *layer(width, 2 * width, 1), *layer(2 * width, 2 * width, 2),
            *layer(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(9 * 2 * width, 10),
        )  # fmt: skip


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The trained classifier, in eval mode and float32."""
    if not path.is_file():
        raise SystemExit(f"no classifier at {path}: run examples/train_classifier.py first")
    model = Classifier()
    model.load_state_dict(load_file(path))
    return model.float().requires_grad_(False).eval()


def scaled(images: np.ndarray) -> Tensor:
    """uint8 [N, 28, 28] -> float32 [N, 1, 28, 28] in [-1, 1]."""
    return torch.from_numpy(images)[:, None].float() / 127.5 - 1


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to two pixels each way, as a whole: cheap, and enough variety over many batches."""
    dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(images, (dy, dx), dims=(2, 3))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of images [N, 1, 28, 28] read as their label [N]."""
    predictions = torch.cat([model(batch).argmax(1) for batch in images.split(1000)])
    return (predictions == labels).float().mean().item()


def train(images: Tensor, labels: Tensor, epochs: int, batch: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    with tqdm(total=steps, unit="step", mininterval=5.0) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in order[: len(order) // batch * batch].split(batch):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(shifted(images[index], generator))
                loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


def main(argv: list[str] | None = None) -> float:
    """Train, export in float16, and return the test accuracy of what was exported."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="npz with train_images, train_labels, test_images and test_labels")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with np.load(find_data(args.data)) as arrays:
        images, test_images = scaled(arrays["train_images"]), scaled(arrays["test_images"])
        labels, test_labels = (torch.from_numpy(arrays[f"{k}_labels"]).long() for k in ("train", "test"))
    model = train(images, labels, args.epochs, args.batch, args.seed)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write_atomically(args.out, save(tensors))
    result = accuracy(load_classifier(args.out), test_images, test_labels)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, test accuracy {100 * result:.2f} %")
    print(f"written to {args.out} ({args.out.stat().st_size / 1000:.0f} kB)")
    return result


if __name__ == "__main__":
    main()
