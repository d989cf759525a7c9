"""The examples that need no training run, and do what they say."""

from __future__ import annotations

import torch

import pydiff
from examples import serve_threads


def test_requests_from_several_threads_get_their_own_images(capsys) -> None:
    serve_threads.main("--requests 6 --threads 3 --steps 2 3 --sizes 1 2 --device cpu".split())
    assert "6 requests" in capsys.readouterr().out
    service = serve_threads.Service(pydiff.load_model("mnist"), [1, 2], [2, 3])
    jobs = [serve_threads.random_job(seed, [1, 2], [2, 3]) for seed in range(6)]
    with serve_threads.ThreadPoolExecutor(3) as threads:
        together = list(threads.map(service.sample, jobs))
    alone = [service.sample(job) for job in jobs]
    assert all(torch.equal(a, b) for a, b in zip(together, alone))
    assert len({x.sum().item() for x in alone}) == len(jobs)
