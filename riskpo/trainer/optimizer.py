"""AdamW with warm-up, gradient clipping and, for 16-bit weights, float32 master copies.

A bfloat16 weight has 8 significant bits, so a step of 1e-6 would round to nothing.

Where the state lives (MemoryConfig.optimizer), in bytes per parameter of a 16-bit model:

    device   masters 4, moments 8 and gradients 2 on the device; 4 more while it steps
    8bit     masters 4, moments 2 (bitsandbytes), gradients as above
    host     nothing but the weights on the device; masters 4, moments 8, gradients 4 on the CPU

"host" does not use torchao's CPUOffloadOptimizer, which keeps masters in 16 bits and frees the
device's gradients only without accumulation over micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from riskpo.distributed import whole_tensor


def _master(weight: torch.nn.Parameter, state: str) -> torch.Tensor:
    """The tensor that AdamW steps: the weight if it is float32 and in place, else a copy."""
    device = torch.device("cpu") if state == "host" else weight.device
    if weight.dtype == torch.float32 and weight.device == device:
        return weight
    return weight.detach().to(device, torch.float32, copy=True).requires_grad_()


def _move_gradient(master: torch.Tensor, weight: torch.Tensor) -> None:
    """Add the weight's gradient to its master's as soon as the backward has finished it."""
    assert weight.grad is not None
    moved = weight.grad.to(master.device, torch.float32)
    master.grad = moved if master.grad is None else master.grad.add_(moved)
    weight.grad = None


def _adamw(state: str, cuda: bool) -> Any:
    """The AdamW class for this state and device."""
    if state == "8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError(
                "memory.optimizer='8bit': the package bitsandbytes is not installed. Install "
                "riskpo[eightbit], or set it to 'host'."
            ) from None
        return AdamW8bit
    # torch's default on CUDA holds one more copy of all moments while it steps
    return partial(torch.optim.AdamW, fused=True) if cuda else torch.optim.AdamW


class Optimizer:
    """AdamW on the trainable parameters. A step with a NaN or infinity is skipped and counted."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        learning_rate: float,
        warmup_steps: int,
        weight_decay: float,
        max_grad_norm: float,
        state: str = "device",
    ) -> None:
        self.weights = [p for p in parameters if p.requires_grad]
        self.masters = [_master(p, state) for p in self.weights]
        if state == "host":
            for weight, master in self._copied():
                weight.register_post_accumulate_grad_hook(partial(_move_gradient, master))
        self.max_grad_norm, self.skipped = max_grad_norm, 0
        settings = {"lr": learning_rate, "weight_decay": weight_decay}
        cuda = any(p.device.type == "cuda" for p in self.weights)
        self.adamw = _adamw(state, cuda)(self.masters, **settings)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min(1.0, (step + 1) / max(warmup_steps, 1))
        )

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def _copied(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """(weight, master) where the master is a copy."""
        pairs = zip(self.weights, self.masters, strict=True)
        return [(weight, master) for weight, master in pairs if master is not weight]

    def zero_grad(self) -> None:
        for p in (*self.weights, *self.masters):
            p.grad = None

    def step(self, loss: torch.Tensor) -> tuple[float, bool]:
        """(gradient norm before clipping, whether the step was taken); clears the gradients.

        The step is skipped if `loss` or a gradient is not finite.
        """
        for weight, master in self._copied():
            if weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm))
        taken = bool(torch.isfinite(norm) & torch.isfinite(loss.to(norm.device)))
        if taken:
            self.adamw.step()
            self.schedule.step()
            with torch.no_grad():
                for weight, master in self._copied():
                    weight.copy_(master)
        else:
            self.skipped += 1
        self.zero_grad()
        return float(norm), taken

    def state_dict(self) -> dict[str, Any]:
        """Moments, schedule, counter, and the master copies where there are any."""
        pairs = zip(self.weights, self.masters, strict=True)
        copies = [None if m is w else m.detach() for w, m in pairs]
        return {
            "adamw": self.adamw.state_dict(),
            "schedule": self.schedule.state_dict(),
            "skipped": self.skipped,
            "masters": copies,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`; the weights themselves are loaded elsewhere."""
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])
        self.skipped = state["skipped"]
        for master, copy in zip(self.masters, state["masters"], strict=True):
            if copy is not None:
                master.copy_(copy)
