"""Sample guided digits and report how many a separately trained classifier reads as the class that was asked for.

    python examples/evaluate_mnist.py --guidance 2 --grid digits.png

The classifier is the one of ``train_classifier.py``; it never saw a generated image.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run from a checkout, without installing
    sys.path.insert(0, str(ROOT))

import pydiff  # noqa: E402
from examples.train_classifier import load_classifier  # noqa: E402
from pydiff.models import UNet, load_model  # noqa: E402


def sample_classes(model: UNet, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """One image for each of the labels [N] -> [N, 1, 28, 28] in [-1, 1], in batches of ``args.batch``."""
    images = []
    for i, y in enumerate(tqdm(labels.split(args.batch), unit="batch")):
        images.append(
            pydiff.sample(
                model, shape=(len(y), *model.sample_shape), solver=args.solver, steps=args.steps,
                seed=args.seed + i * args.batch,  # row r of a batch has seed + r: no two images share their noise
                cond={"labels": y}, uncond={"labels": torch.full_like(y, model.null_label)},
                guidance_scale=args.guidance,
            )
        )  # fmt: skip
    return torch.cat(images).clamp(-1, 1)


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write images [N, 1, H, W] in [-1, 1] as one grey PNG; N is a multiple of ``columns``."""
    pixels = ((images + 1) * 127.5).round().byte().cpu()
    rows = pixels.unflatten(0, (-1, columns)).squeeze(2)  # [rows, columns, H, W]
    page = rows.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page.numpy()).save(path)


def main(argv: list[str] | None = None) -> float:
    """Sample, judge, write the grid; returns the fraction read as requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mnist", help="a packaged name or the path of a safetensors file")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--solver", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--grid", type=Path, default=Path("mnist_samples.png"))
    args = parser.parse_args(argv)
    classifier = load_classifier().to(args.device)
    model = load_model(args.model, device=args.device)
    labels = torch.arange(model.num_classes, device=args.device).repeat_interleave(args.per_class)
    started = time.perf_counter()
    images = sample_classes(model, labels, args)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        predictions = torch.cat([classifier(batch).argmax(1) for batch in images.split(500)])
    right = predictions == labels
    print(f"{len(images)} images in {seconds:.1f} s: {args.solver}, {args.steps} steps, guidance {args.guidance:g}")
    by_class = right.view(model.num_classes, -1).float().mean(1)
    for digit, fraction in enumerate(by_class.tolist()):
        print(f"  {digit}: {100 * fraction:.1f} %")
    print(f"read as requested: {100 * right.float().mean().item():.2f} %")
    shown = images.unflatten(0, (model.num_classes, -1))[:, :10]
    save_grid(shown.flatten(0, 1), shown.shape[1], args.grid)
    print(f"grid written to {args.grid}")
    return right.float().mean().item()


if __name__ == "__main__":
    main()
