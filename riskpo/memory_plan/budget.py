"""The memory of one training step, by term, from the model's shape and the switches.

The terms follow from what autograd keeps in a transformers decoder layer (RMSNorm, rotary attention
on a flash kernel, SwiGLU); docs/long-context.md compares them with measurements. The peak is the
largest of four moments, each on top of the fixed terms:

    update   checkpoints of all layers, the backward of one layer or of the head, and gradients: of
             earlier micro-batches, or those that this one has made so far
    step     gradients in float32 and the optimiser's temporaries
    prompts  keys and values of all prompts, and one layer's activations while it reads them
    sampling keys and values of the rollouts, and the logits of one step

P parameters, L layers, T tokens of a micro-batch, H hidden width, I intermediate width, nq and nk
widths of all queries and of all keys, V vocabulary, b bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from riskpo.config import IN_FLIGHT, MemoryConfig
from riskpo.memory_plan.model_shape import ModelShape

MIB, GIB = 2**20, 2**30
PARKED_ON_DEVICE = IN_FLIGHT + 2  # layer inputs on their way out, back, and the layer's own
MOMENTS = dict(update="updating", step="stepping", prompts="reading prompts", sampling="sampling")
# Bytes per element of the tensor that is being stepped. torch.optim.AdamW: the root of the second
# moment, and its quotient by the bias correction. bitsandbytes unpacks both moments and scales a
# copy of the gradient before that (backends/cpu/ops.py). On CUDA both are one kernel, without any.
STEP_ON_CPU = {"device": 8.0, "host": 8.0, "8bit": 20.0}
ENOUGH = 2**26  # tokens; a longest context beyond it is called unlimited


@dataclass(frozen=True)
class Workload:
    """Sizes of the work: tokens of the largest micro-batch, and the sampling before it."""

    tokens: int
    bytes_per_weight: int = 2  # 2: bfloat16 with float32 masters; 4: float32
    sequences: int = 8  # responses sampled at once
    context: int | None = None  # tokens of each, prompt included; None: `tokens`
    prompt: int = 512  # of these, where the context has as many
    on_host: bool = False  # the model itself is on the CPU: nothing can be moved off it
    plain_head: bool = False  # [T, V] logits and autograd, to compare with
    head_tokens: int | None = None  # tokens that go through the head (responses); None: all
    micro_batches: int = 2  # of an update; the second finds the gradients of the first in memory


@dataclass(frozen=True)
class Budget:
    """Bytes by term. Only the largest of the MOMENTS is added to `fixed`."""

    fixed: dict[str, float]
    update: dict[str, float]
    step: dict[str, float]
    prompts: dict[str, float]
    sampling: dict[str, float]
    host: dict[str, float]  # pinned and ordinary memory of the host
    other: dict[str, float]  # parts of the update that take turns with a larger one in `update`

    @property
    def moments(self) -> dict[str, float]:
        return {name: sum(getattr(self, name).values()) for name in MOMENTS}

    @property
    def peak(self) -> float:
        """Bytes on the device at the worst moment."""
        return sum(self.fixed.values()) + max(self.moments.values())

    def increase(self, *moments: str) -> float:
        """Bytes over the loaded model at the worst of these moments, by default of all."""
        worst = max(self.moments[name] for name in moments or MOMENTS)
        return sum(self.fixed.values()) - self.fixed["weights"] + worst


def budget(shape: ModelShape, memory: MemoryConfig, work: Workload) -> Budget:
    """The terms of one training step, in bytes."""
    P, T, b = shape.trainable, work.tokens, work.bytes_per_weight
    away = memory.optimizer == "host" and not work.on_host
    moments = {"device": 8.0, "8bit": 2.04, "host": 0.0 if away else 8.0}[memory.optimizer]
    masters = 4.0 if b < 4 and not away else 0.0
    # with the state on the host a gradient becomes float32 as soon as it is there
    gradient = 4.0 if memory.optimizer == "host" else float(b)
    fixed = {
        "weights": float(shape.parameters * b),
        "optimiser moments": moments * P,
        "master copies": masters * P,
    }
    gradients = {"gradients": 0.0 if away else gradient * P}
    kept, layer = _kept(shape, memory, work), _layer(shape, memory, work)
    head = {"head workspace": _head(shape, memory, work)}
    # a layer's MLP and its attention take turns, and so do the head and the layers
    less = min(("MLP of one layer", "attention backward"), key=lambda name: layer[name])
    waiting = {less: layer.pop(less)}
    other, stage = sorted((layer, head), key=lambda x: sum(x.values()))
    there = _gradients(shape, work, gradients["gradients"], kept, layer, stage)
    host = {}
    if away:
        host["masters, moments, gradients"] = 16.0 * P
    if memory.offload_checkpoints and not work.on_host:
        # torch's caching host allocator rounds pinned memory up to a power of two
        pinned = 1 << max(T * shape.hidden * b - 1, 0).bit_length()
        host["checkpoints"] = float(shape.layers * pinned)
    return Budget(
        fixed,
        update={**there, **kept, **stage},
        step=gradients | _step(shape, memory, work, gradient),
        prompts=_prompts(shape, work),
        sampling=_sampling(shape, work),
        host=host,
        other=other | waiting,
    )


def _gradients(
    shape: ModelShape,
    work: Workload,
    all_of_them: float,
    kept: dict[str, float],
    layer: dict[str, float],
    stage: dict[str, float],
) -> dict[str, float]:
    """Gradients beside the largest turn of the update.

    From the second micro-batch on all of them wait there. In a single one they grow while the
    activations of the layers go: the last layer's turn has all gradients and its own activations.
    The head's comes first; a tied one waits, and at the end the embedding's is beside it.
    """
    once, beside = work.micro_batches == 1, sum(kept.values()) + sum(stage.values())
    head = float(shape.vocab * shape.hidden * work.bytes_per_weight * shape.head_learns)
    there = "head workspace" not in stage and (shape.tied or once)
    found = {"gradient of the head": head} if there and head else {}
    beside += sum(found.values())
    first_layer = sum(kept.values()) / shape.layers + sum(layer.values())
    embedding = head * shape.tied
    if once:
        rest = max(0.0, all_of_them + max(first_layer, embedding) - beside)
    else:
        rest = max(all_of_them, all_of_them + 2 * embedding - beside)
    return {"gradients": rest} | found


def _step(
    shape: ModelShape, memory: MemoryConfig, work: Workload, gradient: float
) -> dict[str, float]:
    """Beyond `gradient` bytes for each parameter: they become float32, then the weights move."""
    # tensor by tensor, each in the place of its 16-bit gradient: both exist for one at a time
    most = gradient if gradient < 4 else 0.0
    if work.on_host:
        most = max(most, STEP_ON_CPU[memory.optimizer])
    return {
        "gradients in float32": (4.0 - gradient) * shape.trainable,
        "temporaries of the step": most * shape.largest_tensor,
    }


def _kept(shape: ModelShape, memory: MemoryConfig, work: Workload) -> dict[str, float]:
    """What waits from the forward to the backward."""
    T, H, b = work.tokens, shape.hidden, work.bytes_per_weight
    # a bool mask for all layers, and its additive copy in every layer that keeps its activations
    copies = 1 if memory.checkpointing else shape.layers
    mask = {"[T, T] masks": T**2 * (1.0 + copies * b)} if memory.attention == "masked" else {}
    if not memory.checkpointing:
        # gate, silu and up; their product is the input of the last projection
        mlp = 0 if _is_tiled(memory, work) else (3 + shape.mlp_learns) * b * shape.intermediate
        layer = _saved_by_attention(shape, b) + _norm_of_mlp(shape, b) + 2 * b * H + mlp
        return {"activations of all layers": float(T * shape.layers * layer), **mask}
    layers = float(shape.layers)
    if memory.offload_checkpoints and not work.on_host:
        layers = min(layers, PARKED_ON_DEVICE)
    return {"checkpoints": layers * T * H * b, **mask}


def _layer(shape: ModelShape, memory: MemoryConfig, work: Workload) -> dict[str, float]:
    """One layer in its backward: what all of it needs, then its MLP's and its attention's turn."""
    T, H, I, b = work.tokens, shape.hidden, shape.intermediate, work.bytes_per_weight  # noqa: E741
    saved = 0.0
    if memory.checkpointing:
        saved = _saved_by_attention(shape, b) + _norm_of_mlp(shape, b) + b * H
    flowing = 3 * b * H  # gradients of the two residual streams and of what is added to them
    if _is_tiled(memory, work):
        # tiles as above, gradients of one layer's weights twice: the sum in float32 and a tile's
        mlp = memory.mlp_tile_tokens * 6 * b * I + shape.largest_mlp * (4.0 + b)
        mlp += 2 * b * H * T
    else:
        # gate, silu, up and the gradients of the three; without checkpoints the first are kept
        mlp = float(T * b * I * (6 if memory.checkpointing else 2))
    # gradients of q, k, v (as many heads as queries inside the kernel), of the output, rotary's
    attention = T * (6.0 * b * shape.queries + 4.0 * shape.queries * (not work.on_host))
    return {
        "activations of one layer": T * (saved + flowing),
        "MLP of one layer": mlp,
        "attention backward": attention,
    }


def _norm(shape: ModelShape, b: int) -> float:
    """Bytes per token that an RMSNorm keeps: its input as float32 where it is not, what its weight
    multiplies if that learns, and its output, the input of a projection."""
    return float(shape.hidden * (4 * (b < 4) + b * shape.norms_learn + b))


def _norm_of_mlp(shape: ModelShape, b: int) -> float:
    return _norm(shape, b) - b * shape.hidden * (not shape.mlp_learns)


def _saved_by_attention(shape: ModelShape, b: int) -> float:
    """Bytes per token: its norm, q, k, v, the output and the log-sum-exp."""
    return _norm(shape, b) + b * (2 * shape.queries + 2 * shape.keys) + 4 * shape.heads


def _head(shape: ModelShape, memory: MemoryConfig, work: Workload) -> float:
    """The last norm, dH in float32 and as a gradient, dW in float32, and the workspace."""
    T, H, b = work.tokens, shape.hidden, work.bytes_per_weight
    around = T * (_norm(shape, b) + (4 + b) * H)
    rows = T if work.head_tokens is None else work.head_tokens
    if work.plain_head:
        # float32 log-softmax, its gradient and the logits'; 16-bit logits besides
        return around + rows * (12.0 + (b if b < 4 else 0)) * shape.vocab
    # no workspace outgrows the logits, their gradient and one more of their size
    workspace = min(memory.head_mib * MIB, 12.0 * rows * shape.vocab)
    return around + 4.0 * shape.vocab * H * shape.head_learns + workspace


def _prompts(shape: ModelShape, work: Workload) -> dict[str, float]:
    """All prompts go through the model together, padded to one length, without autograd. Most
    models read the prompt of several responses once, and take less.

    The most that is alive is in an MLP: embeddings, the layer's input, its middle and the norm of
    that, all [tokens, H]; gate, up and their product.
    """
    each = min(work.prompt, work.context or work.tokens)
    rows = float(work.sequences * each)
    alive = 4 * shape.hidden + 3 * shape.intermediate
    return {
        "keys and values": rows * _keys_and_values(shape, work),
        "activations of one layer": rows * work.bytes_per_weight * alive,
        "mask of the padding": rows * each,
    }


def _sampling(shape: ModelShape, work: Workload) -> dict[str, float]:
    """Keys and values of all sequences, and what is drawn from: the logits, their copy and their
    log-softmax in float32, and in float64 the probabilities and their running sum."""
    rows = float(work.sequences * (work.context or work.tokens))
    return {
        "keys and values": rows * _keys_and_values(shape, work),
        "logits of one step": work.sequences * shape.vocab * (work.bytes_per_weight + 24.0),
    }


def _keys_and_values(shape: ModelShape, work: Workload) -> float:
    """Bytes of one token in all layers."""
    return 2.0 * work.bytes_per_weight * shape.layers * shape.keys


def _is_tiled(memory: MemoryConfig, work: Workload) -> bool:
    return 0 < memory.mlp_tile_tokens < work.tokens


def longest(shape: ModelShape, memory: MemoryConfig, work: Workload, capacity: float) -> int:
    """The largest context in tokens, a multiple of 128, whose peak fits; 0: none does."""

    def fits(blocks: int) -> bool:
        tokens = blocks * 128
        return budget(shape, memory, replace(work, tokens=tokens, context=tokens)).peak <= capacity

    if not fits(1):
        return 0
    low, high = 1, ENOUGH // 128
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * 128


def attention_flop(shape: ModelShape, memory: MemoryConfig, tokens: int) -> float:
    """Of causal attention on one sequence: forward 2 T^2 nq a layer, backward 2.5 times that.

    A checkpointed layer runs its forward twice.
    """
    return (4.5 if memory.checkpointing else 3.5) * 2.0 * tokens**2 * shape.queries * shape.layers


def gib(size: float) -> str:
    """Bytes in GiB, for a table."""
    return "-" if not size else f"{size / GIB:.1f}" if size >= 0.05 * GIB else "<0.1"
