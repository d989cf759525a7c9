"""Exponential integrators: what DPM-Solver, DPM-Solver++, DEIS and UniPC are made of.

With h = lambda_t - lambda_s and lambda = log(alpha / sigma), the half-log-SNR that is `log_snr` in code, the
probability-flow ODE integrates exactly to

    x_t = (sigma_t / sigma_s) x_s + sigma_t * int_{lambda_s}^{lambda_t} exp(l) x0(l) dl         (2211.01095, eq. 9)
    x_t = (alpha_t / alpha_s) x_s - alpha_t * int_{lambda_s}^{lambda_t} exp(-l) epsilon(l) dl   (2206.00927, eq. 3.4)

and with the prediction expanded at lambda_s, d(lambda_s + tau) = sum_k D_k tau^k / k!, to

    x_t = (sigma_t / sigma_s) x_s + alpha_t * sum_k h^(k+1) phi_{k+1}(-h) D_k
    x_t = (alpha_t / alpha_s) x_s - sigma_t * sum_k h^(k+1) phi_{k+1}(+h) D_k
"""

from __future__ import annotations

import math

from pydiff.plans.builder import Point


def phi(k: int, z: float) -> float:
    """phi_k(z), k >= 1, of phi_0 = exp(z), phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z. By series where that cancels."""
    if abs(z) < 1.0:
        total, term = 0.0, 1.0 / math.factorial(k)
        for n in range(1, 24):
            total += term
            term *= z / (k + n)
        return total
    if k == 1:
        return math.expm1(z) / z
    return (phi(k - 1, z) - 1.0 / math.factorial(k - 1)) / z


def step_size(s: Point, t: Point) -> float:
    """h = lambda_t - lambda_s > 0; infinite when s is pure noise or t is clean."""
    return t.log_snr - s.log_snr


class Transfer:
    """Coefficients of one step from `s` to `t`, for d = "sample" or "epsilon".

    carry   multiplies x_s
    phi(k)  multiplies h^k D_k (k = 0: the prediction itself; k = 1: h times its first derivative; ...)
    """

    def __init__(self, s: Point, t: Point, target: str):
        self.h = step_size(s, t)
        self.sample = target == "sample"
        if self.sample:
            self.carry = t.sigma / s.sigma
            self.scale = t.alpha
        else:
            self.carry = t.alpha / s.alpha
            self.scale = -t.sigma
        # sigma_t (e^h - 1), written so that a clean t (sigma_t = 0, h = inf) is no special case
        self._epsilon_zero = t.sigma - t.alpha * s.ratio if not self.sample else 0.0

    @property
    def z(self) -> float:
        """The argument of the phi functions: -h in x0, h in epsilon."""
        return -self.h if self.sample else self.h

    def phi(self, k: int) -> float:
        """What multiplies h^k D_k, see the class."""
        if k == 0:
            return -self.scale * math.expm1(-self.h) if self.sample else self._epsilon_zero
        return self.scale * self.h * phi(k + 1, self.z)
