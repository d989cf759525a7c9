"""A Gaussian mixture: data whose denoiser is known in closed form, and whose probability-flow ODE is solved to 1e-12.

With data x0 ~ sum_k w_k N(mu_k, s_k^2 I), the noisy marginal at (alpha, sigma) is a mixture with means alpha mu_k and
variances v_k = alpha^2 s_k^2 + sigma^2, and E[x0 | x] is the responsibility-weighted mean of
mu_k + (alpha s_k^2 / v_k) (x - alpha mu_k).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp

from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.prediction import Prediction, get_prediction


@dataclass(frozen=True)
class GaussianMixture:
    """means [K, D], stds [K], weights [K], float64."""

    means: np.ndarray
    stds: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.weights @ self.means

    @property
    def covariance(self) -> np.ndarray:
        centred = self.means - self.mean
        spread = np.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return spread + np.eye(self.means.shape[1]) * (self.weights @ self.stds**2)

    def denoise(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """E[x0 | x] for x [B, D]; alpha, sigma [B, 1]."""
        means = torch.as_tensor(self.means, dtype=x.dtype)
        variances = torch.as_tensor(self.stds, dtype=x.dtype) ** 2
        total = alpha**2 * variances + sigma**2  # [B, K]
        offset = x.unsqueeze(1) - alpha.unsqueeze(1) * means  # [B, K, D]
        log = (
            torch.as_tensor(np.log(self.weights), dtype=x.dtype)
            - 0.5 * offset.square().sum(-1) / total
            - 0.5 * self.means.shape[1] * total.log()
        )
        gain = (alpha * variances / total).unsqueeze(-1)
        return (log.softmax(1).unsqueeze(-1) * (means + gain * offset)).sum(1)

    def model(self, schedule: NoiseSchedule, prediction: str | Prediction) -> Callable[..., torch.Tensor]:
        """A perfect model of the given prediction type: (x [B, D], t [B]) -> [B, D]."""
        kind = get_prediction(prediction)

        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            times = t.double().numpy()
            levels = schedule.alpha(times), schedule.sigma(times)
            alpha, sigma = (torch.as_tensor(v, dtype=x.dtype).unsqueeze(1) for v in levels)
            w_x, w_m = (torch.as_tensor(w, dtype=x.dtype).reshape(-1, 1) for w in kind.weights("sample", *levels))
            return (self.denoise(x, alpha, sigma) - w_x * x) / w_m

        return call

    def solve_ode(self, x: torch.Tensor, start: tuple[float, float], end: tuple[float, float]) -> torch.Tensor:
        """The probability-flow ODE from (alpha, sigma) = start to end, to about 1e-12.

        In y = x / sigma and lambda = log(alpha / sigma): y' = (alpha / sigma) x0, finite for every alpha > 0.
        """
        shape = x.shape
        l0, l1 = (math.log(a / s) for a, s in (start, end))

        # x0 depends on (alpha, sigma) through their ratio alone once x is rescaled: take alpha^2 + sigma^2 = 1
        def slope(lam: float, y: np.ndarray) -> np.ndarray:
            alpha, sigma = (math.sqrt(1 / (1 + math.exp(s * 2 * lam))) for s in (-1, 1))
            column = torch.ones(shape[0], 1, dtype=torch.float64)
            values = torch.as_tensor(y.reshape(shape)) * sigma
            x0 = self.denoise(values, alpha * column, sigma * column)
            return (alpha / sigma * x0).numpy().ravel()

        y = solve_ivp(slope, (l0, l1), (x.double() / start[1]).numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
        assert y.success
        return torch.as_tensor(y.y[:, -1].reshape(shape)) * end[1]


def mixture(dim: int = 4, components: int = 3, seed: int = 0) -> GaussianMixture:
    """A fixed mixture with well separated, unequal components."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, components)
    means, stds = rng.normal(0, 0.8, (components, dim)), rng.uniform(0.3, 0.6, components)
    return GaussianMixture(means, stds, weights / weights.sum())
