"""A long-lived process that samples on request, from several threads: one captured sampler for each shape.

    python examples/serve_threads.py --requests 32 --threads 4

Each request brings its own class, seed, number of steps and guidance scale. Every batch size and number of steps is
captured when the service starts; a request then costs a copy of a small table and a launch. Without a CUDA device the
same samples come from the eager loop.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run from a checkout, without installing
    sys.path.insert(0, str(ROOT))

import pydiff  # noqa: E402
from pydiff.models import UNet  # noqa: E402

SCALES = [1.5, 2.0, 4.0]


@dataclass
class Job:
    """A request: as many images of a class as there are seeds."""

    label: int
    seeds: list[int]
    steps: int
    guidance_scale: float


class Service:
    """Samplers by batch size. Requests of different sizes do not wait for each other; those of one size take turns."""

    def __init__(self, model: UNet, sizes: list[int], steps: list[int]):
        self.model = model
        graph = "auto" if next(model.parameters()).is_cuda else False
        self.samplers = {
            size: pydiff.Sampler(model, "dpmpp_2m", max(steps), guidance_scale=2.0, graph=graph, max_graphs=1)
            for size in sizes
        }
        # Compiled once and kept: a plan is checked whenever it is made, which takes longer than a launch.
        compiler = self.samplers[sizes[0]]
        self.plans = {
            (n, scale): compiler.make_plan("dpmpp_2m", n, guidance_scale=scale) for n in steps for scale in SCALES
        }
        for size in sizes:  # before the first request: warm-up and capture, so that the longest run comes last
            for n in sorted(steps):
                self.sample(Job(0, [0] * size, n, SCALES[0]))

    def sample(self, job: Job) -> torch.Tensor:
        """Images [seeds, 1, 28, 28] in [-1, 1]."""
        labels = torch.full((len(job.seeds),), job.label, device=next(self.model.parameters()).device)
        return self.samplers[len(job.seeds)](
            (len(job.seeds), *self.model.sample_shape), plan=self.plans[job.steps, job.guidance_scale], seed=job.seeds,
            cond={"labels": labels}, uncond={"labels": torch.full_like(labels, self.model.null_label)},
        )  # fmt: skip

    def close(self) -> None:
        for sampler in self.samplers.values():
            sampler.release()


def random_job(seed: int, sizes: list[int], steps: list[int]) -> Job:
    draw = random.Random(seed)
    size = draw.choice(sizes)
    seeds = [draw.randrange(2**32) for _ in range(size)]
    return Job(draw.randrange(10), seeds, draw.choice(steps), draw.choice(SCALES))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample digits on request, from several threads.")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="batch sizes that are served")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10], help="numbers of steps that are served")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    service = Service(pydiff.load_model("mnist").to(args.device), args.sizes, args.steps)
    print(f"ready after {time.perf_counter() - start:.1f} s")
    jobs = [random_job(seed, args.sizes, args.steps) for seed in range(args.requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(args.threads) as threads:
        images = list(threads.map(service.sample, jobs))
    seconds = time.perf_counter() - start
    print(f"{len(jobs)} requests, {sum(map(len, images))} images in {seconds:.2f} s")
    for size, sampler in service.samplers.items():
        print(f"batch {size}: {sampler.stats()}")
    service.close()


if __name__ == "__main__":
    main()
