"""The memory plan of one run: said at its start, held against the measured peak at its end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from riskpo.config import RunConfig
from riskpo.memory_plan.budget import GIB, MIB, MOMENTS, Budget, Workload, budget, gib
from riskpo.memory_plan.model_shape import shape_of_model
from riskpo.memory_plan.peak_meter import PeakMeter

SMALL_GIB = 0.1  # below it there is nothing to plan
TELLING_MIB = 500  # below it a process' own buffers are a large part of what is measured
# what a container may use, and all of it where it is not limited (cgroup v2, v1)
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_of_this_machine() -> float:
    """Bytes of its main memory, or of the part that a container may use."""
    found = float(psutil.virtual_memory().total)
    for limit in LIMITS:
        if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
            found = min(found, float(text))
    return found


@dataclass
class RunPlan:
    """What is predicted, and the meter that runs from the moment the model is loaded."""

    meter: PeakMeter
    predicted: Budget | None  # None: the plan does not know this kind of model
    capacity: float  # bytes of the device
    prompt: int  # tokens of the data's longest prompt
    response: int  # tokens of a response at most

    def lines(self) -> list[str]:
        """What is expected, in four lines at most."""
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
                f"memory plan, lengths: the longest prompt of the data has {self.prompt} tokens, "
                f"a response at most {self.response}",
            ]
        if b.peak > self.capacity:
            found.append(
                f"warning: {gib(b.peak)} GiB will hardly fit in {gib(self.capacity)}; "
                "`riskpo plan --model ...` shows what each switch buys"
            )
        return found

    def outcome(self) -> str:
        """Predicted beside measured increase over the loaded model."""
        measured = self.meter.increase()
        kind = "resident set" if self.meter.device.type == "cpu" else "allocated"
        said = "memory over the loaded model: predicted "
        said += "nothing" if self.predicted is None else f"{self.predicted.increase() / MIB:.0f}"
        if measured is None:
            return f"{said} MiB; this machine does not tell what was used"
        if measured < TELLING_MIB * MIB:
            kind += f"; below {TELLING_MIB} MiB mostly the libraries' own"
        return f"{said} MiB, measured {measured / MIB:.0f} MiB ({kind})"


def plan_run(config: RunConfig, model: Any, prompt: int, teacher: Any = None) -> RunPlan:
    """The plan of a loaded model and the longest prompt of its data in tokens.

    Of a loaded teacher the weights alone count. The meter starts here.
    """
    device, response = next(model.parameters()).device, config.max_response_tokens
    capacity = memory_of_this_machine()
    if device.type == "cuda":
        capacity = float(torch.cuda.get_device_properties(device).total_memory)
    predicted: Budget | None = None
    with contextlib.suppress(ValueError):  # another kind of model
        work = largest_work(config, prompt, on_host=device.type == "cpu")
        predicted = budget(shape_of_model(model), config.memory, work)
    if predicted is not None and teacher is not None:
        predicted.fixed["weights"] += sum(p.nbytes for p in teacher.model.parameters())
    return RunPlan(PeakMeter(device, model), predicted, capacity, prompt, response)


def largest_work(config: RunConfig, prompt: int, *, on_host: bool) -> Workload:
    """The largest work of a run whose prompts have at most `prompt` tokens."""
    context = prompt + config.max_response_tokens
    responses = config.questions_per_step * config.responses_per_question
    # evaluations sample too, beside the optimiser's state from the first step on
    if config.eval_every_steps:
        responses = max(responses, config.eval_questions * config.eval_samples)
    # a mini-batch has whole questions; the last token of a sequence is a target only
    rows = -(-config.questions_per_step // config.updates_per_step) * config.responses_per_question
    mini_batch = rows * (context - 1)
    tokens = max(context - 1, min(config.micro_batch_tokens, mini_batch))
    return Workload(
        tokens=tokens,
        head_tokens=min(tokens, rows * config.max_response_tokens),
        micro_batches=1 if mini_batch <= config.micro_batch_tokens else 2,
        bytes_per_weight=4 if config.dtype == "float32" else 2,
        sequences=min(config.sampler.sequences, responses),
        context=context,
        prompt=prompt,
        on_host=on_host,
    )
