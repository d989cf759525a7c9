"""Train the class-conditional U-Net that ships with the package.

    python examples/train_mnist.py --data mnist.npz --minutes 50 --out mnist_unet.safetensors

The data file is an npz with ``train_images`` uint8 [N, 28, 28] and ``train_labels`` uint8 [N]. The network learns to
predict v = alpha * eps - sigma * x0 on the variance-preserving cosine schedule, with labels dropped at random so that
the same network is the unconditional one of classifier-free guidance. What is exported is the moving average.

A run is bounded by ``--steps``, ``--minutes`` or both, and the learning rate decays to zero over whichever ends first.
``--resume`` continues from the checkpoint with the state the run had; a run bounded by steps alone then ends with the
very numbers of an uninterrupted one.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run from a checkout, without installing
    sys.path.insert(0, str(ROOT))

from pydiff.models.loader import save_model  # noqa: E402
from pydiff.models.unet import UNet  # noqa: E402


def find_data(path: str | None) -> Path:
    """The npz to train on; without a path, the one beside the repository."""
    found = Path(path) if path else ROOT.parent / "shared" / "data" / "mnist.npz"
    if not found.is_file():
        raise SystemExit(f"no data at {found}: pass --data with the path of an npz of train_images and train_labels")
    return found


def load_data(path: Path, held_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 [N, 28, 28] and labels int64 [N], then the same of the ``held_out`` last ones."""
    with np.load(path) as arrays:
        missing = {"train_images", "train_labels"} - set(arrays.files)
        if missing:
            raise SystemExit(f"{path} has no {' and no '.join(sorted(missing))}; it holds {arrays.files}")
        images = torch.from_numpy(arrays["train_images"])
        labels = torch.from_numpy(arrays["train_labels"].astype(np.int64))
    if images.shape[1:] != UNet.sample_shape[1:] or len(images) != len(labels) or len(images) <= held_out:
        raise SystemExit(
            f"{path}: need train_images [N, 28, 28] and train_labels [N] with N over {held_out}; "
            f"got {list(images.shape)} and {list(labels.shape)}"
        )
    # The last images of MNIST come from other writers than the first: hold out a fixed random part instead.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[held_out:], order[:held_out]
    return images[train], labels[train], images[test], labels[test]


def cosine_alpha_sigma(t: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """alpha(t) and sigma(t) of the variance-preserving cosine schedule, t in [0, 1], same shape."""
    start = math.cos(s / (1 + s) * math.pi / 2)
    alpha = (torch.cos((t + s) / (1 + s) * (math.pi / 2)) / start).clamp(0, 1)
    return alpha, (1 - alpha * alpha).sqrt()


def v_loss(model, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor, autocast) -> Tensor:
    """Mean squared error of v over uint8 images [B, 28, 28], at times t [B] with noise [B, 1, 28, 28].

    With uniform time on the cosine schedule this weighs the denoising error by sech(log-SNR / 2) up to a constant:
    most at the noise levels where digits take shape, little at both ends.
    """
    x0 = images[:, None].float() / 127.5 - 1
    alpha, sigma = (c[:, None, None, None] for c in cosine_alpha_sigma(t, UNet.schedule_config["s"]))
    with autocast:
        v = model(alpha * x0 + sigma * noise, t, labels)
    return F.mse_loss(v.float(), alpha * noise - sigma * x0)


def stratified_times(n: int, generator: torch.Generator) -> Tensor:
    """n times, one in each of n equal parts of [0, 1), all moved by one random offset."""
    return (torch.arange(n) / n + torch.rand((), generator=generator)) % 1


class Batches:
    """Random batches without end; each epoch is a permutation that depends on the seed and the epoch alone."""

    def __init__(self, n: int, batch: int, seed: int):
        self.n, self.batch, self.seed = n, min(batch, n), seed
        self.per_epoch = n // self.batch
        self._epoch, self._order = -1, None

    def __call__(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + 1 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order[index * self.batch : (index + 1) * self.batch]


class Trainer:
    """Everything a run carries from step to step, and how to write it down and read it back."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.manual_seed(args.seed)
        self.model = UNet(
            channels=args.channels, blocks=args.blocks, attention=args.attention, embedding_dim=args.embedding_dim
        )
        self.model = self.model.to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay
        )
        self.generator = torch.Generator().manual_seed(args.seed)
        self.step, self.seconds = 0, 0.0
        self.forward = torch.compile(self.model) if args.compile else self.model

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def progress(self) -> float:
        """How much of the budget is spent, 0 to 1: of the steps or of the minutes, whichever is further."""
        by_steps = self.step / self.args.steps if self.args.steps else 0.0
        by_time = self.seconds / (60 * self.args.minutes) if self.args.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def learning_rate(self) -> float:
        warmup = min(1.0, (self.step + 1) / self.args.warmup)
        return self.args.lr * warmup * 0.5 * (1 + math.cos(math.pi * self.progress()))

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update on uint8 images [B, 28, 28] and labels [B]; returns the loss, still on the device."""
        n = len(images)
        t = stratified_times(n, self.generator)
        noise = torch.randn(n, *UNet.sample_shape, generator=self.generator)
        dropped = torch.rand(n, generator=self.generator) < self.args.label_dropout
        labels = labels.masked_fill(dropped, UNet.null_label)
        batch = [a.to(self.device, non_blocking=True) for a in (images, labels, t, noise)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = v_loss(self.forward, *batch, self.autocast())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.update_ema()
        return loss.detach()

    @torch.no_grad()
    def update_ema(self) -> None:
        """The decay grows towards its final value, so that the average forgets the initialisation."""
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> float:
        """Loss of the averaged network on held-out data, the same times and noise whenever it is asked."""
        generator = torch.Generator().manual_seed(1234)
        total = 0.0
        for i in range(0, len(images), 500):
            x, y = images[i : i + 500].to(self.device), labels[i : i + 500].to(self.device)
            t = stratified_times(len(x), generator).to(self.device)
            noise = torch.randn(len(x), *UNet.sample_shape, generator=generator).to(self.device)
            total += v_loss(self.ema, x, y, t, noise, self.autocast()).item() * len(x)
        return total / len(images)

    def save_checkpoint(self, path: Path) -> None:
        """Write the whole state; a crash while writing leaves the previous checkpoint."""
        state = {
            "model": self.model.state_dict(), "ema": self.ema.state_dict(), "config": self.model.config,
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
            "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load_checkpoint(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] != self.model.config:
            raise SystemExit(f"{path} holds a model of {state['config']}, this run asks for {self.model.config}")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    def integers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    def switches(text: str) -> tuple[bool, ...]:
        return tuple(part == "1" for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="npz with train_images and train_labels")
    parser.add_argument("--out", type=Path, default=Path("mnist_unet.safetensors"), help="the exported weights")
    parser.add_argument("--checkpoint", type=Path, help="default: beside --out, with the suffix .ckpt")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes of training")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=400, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--ema", type=float, default=0.999, help="final decay of the moving average")
    parser.add_argument("--label-dropout", type=float, default=0.12)
    parser.add_argument("--held-out", type=int, default=1000, help="training images kept for the final loss")
    parser.add_argument("--channels", type=integers, default=(32, 64, 128), help="width of each level: 32,64,128")
    parser.add_argument("--blocks", type=integers, default=(1, 1, 1), help="residual blocks of each level")
    parser.add_argument("--attention", type=switches, default=(False, False, True), help="per level: 0,0,1")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args(argv)
    if not args.minutes and not args.steps:
        parser.error("give --minutes, --steps or both")
    args.checkpoint = args.checkpoint or args.out.with_suffix(".ckpt")
    return args


def train(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
    """Run until the budget is spent, writing a checkpoint every few minutes and at the end."""
    args = trainer.args
    batches = Batches(len(images), args.batch, args.seed)
    started = time.monotonic() - trainer.seconds
    saved, average = time.monotonic(), None
    with tqdm(initial=trainer.step, total=args.steps, unit="step", mininterval=5.0) as bar:
        while trainer.progress() < 1:
            index = batches(trainer.step)
            loss = trainer.train_step(images[index], labels[index])
            trainer.seconds = time.monotonic() - started
            average = loss if average is None else torch.lerp(average, loss, 0.01)
            bar.update()
            if trainer.step % 50 == 0:
                bar.set_postfix(loss=f"{average.item():.4f}", epoch=f"{trainer.step / batches.per_epoch:.2f}")
            if time.monotonic() - saved > 60 * args.checkpoint_minutes:
                trainer.save_checkpoint(args.checkpoint)
                saved = time.monotonic()
    trainer.save_checkpoint(args.checkpoint)


def main(argv: list[str] | None = None) -> float:
    """Train, export, and return the held-out loss of the averaged network."""
    args = parse_args(argv)
    images, labels, test_images, test_labels = load_data(find_data(args.data), args.held_out)
    trainer = Trainer(args)
    if args.resume:
        trainer.load_checkpoint(args.checkpoint)
    # PyTorch's fused CPU attention is many times slower than plain matrix products for 49 positions in bfloat16.
    backends = [SDPBackend.MATH] if trainer.device.type == "cpu" else list(SDPBackend.__members__.values())
    with sdpa_kernel(backends):
        train(trainer, images, labels)
        loss = trainer.evaluate(test_images, test_labels)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    rate = trainer.step * min(args.batch, len(images)) / max(trainer.seconds, 1e-9)
    metadata = {
        "steps": trainer.step, "batch": args.batch, "minutes": round(trainer.seconds / 60, 2),
        "held_out_loss": round(loss, 6),
    }  # fmt: skip
    save_model(trainer.ema, args.out, metadata)
    print(f"{parameters} parameters, {trainer.step} steps, {trainer.seconds / 60:.1f} min, {rate:.0f} images/s")
    print(f"held-out loss of the averaged network: {loss:.5f}; written to {args.out}")
    return loss


if __name__ == "__main__":
    main()
