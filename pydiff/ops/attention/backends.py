"""Which backend computes an attention call: measured once for each shape, remembered, then taken directly.

Backends are ``triton`` (`attention_kernel`) and those of PyTorch's `scaled_dot_product_attention`, each alone:
``cudnn``, ``flash``, ``efficient``, ``math``. The first call with a new key (shapes, strides, dtype, mask or none,
device) times every backend that accepts it on the call's own tensors, and keeps the fastest; one that raises is left
out. While a CUDA graph is being captured, and while a compiler traces, nothing is measured: the remembered choice is
taken, or that of a table (`likely`). So run a model once before capturing or compiling it.

The environment variable ``PYDIFF_ATTENTION`` names a backend that runs every call which it accepts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pydiff.ops import triton_ops
from pydiff.ops.attention.kernel import attention_kernel, can_use_attention
from pydiff.ops.attention.reference import expanded_mask, sequence_major, without_dead_rows
from pydiff.ops.measured import Choice, Measured

HALF = (torch.bfloat16, torch.float16)
_sdpa_flags = threading.RLock()  # PyTorch keeps the enabled backends in process-wide flags
MATH_SCORES = 2**26  # more scores than that, and PyTorch's unfused attention is timed only where nothing else runs


class Call(NamedTuple):
    """One attention call.

    Attributes:
        q: [B, H, Lq, D].
        k, v: [B, H, Lk, D].
        mask: bool [B, Lk], true where a key may be attended to; None: everywhere.
        scale: of the scores; None: D**-0.5.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None

    def key(self) -> tuple[Any, ...]:
        """What a choice depends on, with all that decides whether a backend accepts a call: that is not asked again.

        So the strides belong to it, those of dimensions of size 1 as 0.
        """
        q, k, v, mask, scale = self
        strides = tuple(0 if n == 1 else s for t in (q, k, v) for n, s in zip(t.shape, t.stride()))
        masked = None if mask is None else mask.stride(1)
        return tuple(q.shape), k.shape[2], strides, q.dtype, masked, scale is None or scale > 0.0, q.device


class AttentionBackend(NamedTuple):
    """One way to compute a call."""

    run: Callable[[Call], torch.Tensor]
    """Computes it, [B, H, Lq, D] in memory [B, Lq, H, D]."""
    accepts: Callable[[Call], triton_ops.Usable]
    """Whether it would, and if not, why."""


def likely(call: Call) -> tuple[str, ...]:
    """Backends in the order in which they are expected to be fastest; not measured on the device at hand.

    Half precision: the Triton kernels for few keys and for head dimensions that the others pad (all but 64 and 128),
    cuDNN for 64 and 128 from sm_90 on, flash attention below. float32: PyTorch's memory-efficient kernels.
    """
    if call.q.dtype not in HALF:
        return "efficient", "triton", "math"
    if call.q.shape[3] not in (64, 128) or call.k.shape[2] <= 128:
        return "triton", "flash", "efficient", "math"
    library = ("cudnn", "flash") if triton_ops.capability(call.q.device) >= (9, 0) else ("flash", "cudnn")
    return *(library if call.mask is None else ()), "triton", "efficient", "math"


class Chooser:
    """Finds the fastest backend of a call (see `Measured`) and runs it.

    Args:
        backends: by name; "math", if there, is timed only where its scores are few or nothing else runs.
        measured: what measures and remembers.
        order: the names to try, best first, where nothing is remembered.
    """

    def __init__(
        self,
        backends: Mapping[str, AttentionBackend],
        measured: Measured | None = None,
        order: Callable[[Call], tuple[str, ...]] = likely,
    ) -> None:
        self.backends, self.measured, self._order = backends, measured or Measured(), order

    def run(self, call: Call) -> torch.Tensor:
        """Compute `call` by the remembered backend; if there is none, measure, unless a graph is being captured."""
        name = self._forced(call) or self.measured.known(call.key()) or self._find(call)
        return self._run_expected(call) if name is None else self.backends[name].run(call)

    def run_unmeasured(self, call: Call) -> torch.Tensor:
        """Compute `call`, which is being traced, by the remembered backend or the one that is likely best."""
        name = self._decided(call)
        return self._run_expected(call) if name is None else self.backends[name].run(call)

    def name(self, call: Call) -> str:
        """The backend that `call` gets without a measurement."""
        return self._decided(call) or self._expected(call)[0]

    def _decided(self, call: Call) -> str | None:
        forced = self._forced(call)
        if forced is not None:
            return forced
        symbolic = any(not isinstance(n, int) for t in call[:3] for n in (*t.shape, *t.stride()))
        return None if symbolic else self.measured.known(call.key())

    def _expected(self, call: Call) -> list[str]:
        names = [name for name in self._order(call) if name in self.backends and self.backends[name].accepts(call)[0]]
        return names or ["math"]

    def _run_expected(self, call: Call) -> torch.Tensor:
        *names, last = self._expected(call)
        for name in names:
            with contextlib.suppress(RuntimeError):  # PyTorch refuses for more reasons than `accepts` knows
                return self.backends[name].run(call)
        return self.backends[last].run(call)

    def _forced(self, call: Call) -> str | None:
        name = os.environ.get("PYDIFF_ATTENTION")
        if not name:
            return None
        if name not in self.backends:
            raise ValueError(f"PYDIFF_ATTENTION is {name!r}; it can be {', '.join(self.backends)}")
        accepted, reason = self.backends[name].accepts(call)
        if not accepted:
            warnings.warn(f"PYDIFF_ATTENTION={name} does not run {tuple(call.q.shape)}: {reason}", stacklevel=2)
        return name if accepted else None

    def _find(self, call: Call) -> str | None:
        few = call.q.shape[:3].numel() * call.k.shape[2] <= MATH_SCORES
        try:
            return self._fastest(call, few)
        except Exception as error:
            if not few:
                return self._fastest(call, True)
            raise RuntimeError(
                f"no attention backend runs {tuple(call.q.shape)}, {call.q.dtype}: {type(error).__name__}: {error}"
            ) from error

    def _fastest(self, call: Call, math: bool) -> str | None:
        candidates: dict[str, Any] = {}
        for name in sorted(self.backends, key=lambda name: name == "math"):
            accepted, reason = self.backends[name].accepts(call)
            if name == "math" and not math:
                accepted, reason = False, "its scores would fill too much memory"
            candidates[name] = functools.partial(self.backends[name].run, call) if accepted else reason
        return self.measured.find(call.key(), candidates, call.q.device)


def _library(backend: SDPBackend, accepts: Callable[[Call], triton_ops.Usable]) -> AttentionBackend:
    """One backend of `scaled_dot_product_attention`, without the others to fall back to."""

    def run(call: Call) -> torch.Tensor:
        mask = None if call.mask is None else expanded_mask(call.mask)
        with _sdpa_flags, sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)
        return sequence_major(without_dead_rows(out, call.mask))

    return AttentionBackend(run, accepts)


def _half_without_mask(call: Call) -> triton_ops.Usable:
    if call.mask is not None:
        return False, "it takes no mask"
    return _half(call)


def _half(call: Call) -> triton_ops.Usable:
    if call.q.dtype not in HALF:
        return False, f"it takes bfloat16 and float16, not {call.q.dtype}"
    if call.q.shape[3] > 256:
        return False, f"it takes heads of at most 256 elements, not {call.q.shape[3]}"
    return _dense(call)


def _dense(call: Call) -> triton_ops.Usable:
    if any(t.stride(3) != 1 for t in call[:3]):
        return False, "the last dimension of q, k or v is not dense"
    if call.q.shape[3] * call.q.element_size() % 16:
        return False, f"heads of {call.q.shape[3]} elements are no multiple of 16 bytes"
    return True, ""


def _any(call: Call) -> triton_ops.Usable:
    return True, ""


chooser = Chooser(
    {
        "triton": AttentionBackend(lambda call: attention_kernel(*call), lambda call: can_use_attention(*call)),
        "cudnn": _library(SDPBackend.CUDNN_ATTENTION, _half),
        "flash": _library(SDPBackend.FLASH_ATTENTION, _half_without_mask),
        "efficient": _library(SDPBackend.EFFICIENT_ATTENTION, _dense),
        "math": _library(SDPBackend.MATH, _any),
    }
)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """`attention` of CUDA tensors (a key mask [B, Lk] or none, no gradients) by the fastest backend."""
    return chooser.run(Call(q, k, v, mask, scale))


def run_unmeasured(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """`run`, while a compiler traces."""
    return chooser.run_unmeasured(Call(q, k, v, mask, scale))


def attention_choices() -> dict[Hashable, Choice]:
    """What has been measured: {`Call.key`: Choice}."""
    return chooser.measured.choices()
