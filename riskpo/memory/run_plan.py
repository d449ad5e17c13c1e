"""The memory plan of one run: said at its start, held against the measured peak at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from riskpo.config import TrainConfig
from riskpo.memory.budget import GIB, MIB, MOMENTS, Budget, Workload, budget, gib
from riskpo.memory.meter import PeakMeter
from riskpo.memory.shapes import with_parameters

SMALL_GIB = 0.1  # below it there is nothing to plan
TELLING_MIB = 500  # below it a process' own buffers are a large part of what is measured


@dataclass
class RunPlan:
    """What is predicted, and the meter that runs from the moment the model is loaded."""

    meter: PeakMeter
    predicted: Budget | None  # None: the plan does not know this kind of model
    capacity: float | None  # bytes of the device; None: the CPU

    def lines(self) -> list[str]:
        """What is expected, in three lines at most."""
        b = self.predicted
        if b is None:
            return ["memory plan: none for this kind of model"]
        fixed = sum(b.fixed.values())
        moments = ", ".join(f"{MOMENTS[k]} {gib(fixed + size)}" for k, size in b.moments.items())
        largest = sorted({**b.fixed, **b.update}.items(), key=lambda term: -term[1])[:4]
        named = ", ".join(f"{name} {gib(size)}" for name, size in largest)
        found = [f"memory plan: below {SMALL_GIB} GiB on {self.meter.device.type}"]
        if b.peak > SMALL_GIB * GIB:
            found = [
                f"memory plan, GiB on {self.meter.device.type}: {moments}",
                f"memory plan, largest: {named}",
            ]
        if self.capacity is not None and b.peak > self.capacity:
            found.append(
                f"memory plan: {gib(b.peak)} GiB will hardly fit in {gib(self.capacity)}; "
                "`riskpo plan --model ...` shows what each switch buys"
            )
        return found

    def outcome(self) -> str:
        """Predicted beside measured increase over the loaded model."""
        measured, kind = self.meter.increase(), "allocated"
        if self.meter.device.type == "cpu":
            kind = "resident set"
        said = "memory over the loaded model: predicted "
        said += "nothing" if self.predicted is None else f"{self.predicted.run_increase / MIB:.0f}"
        if measured is None:
            return f"{said} MiB; this machine does not tell what was used"
        small = measured < TELLING_MIB * MIB
        hint = f"; below {TELLING_MIB} MiB mostly the libraries' own" if small else ""
        return f"{said} MiB, measured {measured / MIB:.0f} MiB ({kind}{hint})"


def plan_run(config: TrainConfig, model: Any) -> RunPlan:
    """The plan of a resolved config and its loaded model; the meter starts here."""
    device = next(model.parameters()).device
    capacity = None
    if device.type == "cuda":
        capacity = float(torch.cuda.get_device_properties(device).total_memory)
    return RunPlan(PeakMeter(device), _predicted(config, model, device), capacity)


def _predicted(config: TrainConfig, model: Any, device: torch.device) -> Budget | None:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    everything, trained = sum(n for n, _ in counts), sum(n for n, learns in counts if learns)
    try:
        shape = with_parameters(model.config, type(model).__name__, everything, trained)
    except ValueError:
        return None
    # resolve has seen to all three
    assert config.micro_batch_tokens and config.max_prompt_tokens and config.max_response_tokens
    context = config.max_prompt_tokens + config.max_response_tokens
    responses = config.questions_per_step * config.responses_per_question
    mini_batch = context * responses // config.updates_per_step
    work = Workload(
        tokens=max(context, min(config.micro_batch_tokens, mini_batch)),
        bytes_per_weight=4 if config.dtype == "float32" else 2,
        sequences=min(config.sampler.sequences, responses),
        context=context,
        prompt=config.max_prompt_tokens,
        on_host=device.type == "cpu",
    )
    return budget(shape, config.memory, work)
