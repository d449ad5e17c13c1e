"""Apply MemoryConfig to a loaded model: less memory, the same numbers."""

from __future__ import annotations

from typing import Any

from riskpo.config import MemoryConfig
from riskpo.model.activation_offload import CpuCheckpoints, CudaTransfers, Transfers
from riskpo.model.isolation import Packing, adopt_packing, settle_attention
from riskpo.model.tiled_mlp import tile_mlps


def apply_switches(
    model: Any,
    memory: MemoryConfig,
    transfers: Transfers | None = None,
    packing: Packing | None = None,
) -> None:
    """Set attention, checkpointing, offloading and MLP tiles, in place.

    transfers  how to offload; None: from CUDA to pinned memory, and not at all on the CPU
    packing    result of the test before the weights were sharded; None: test now

    ValueError for a switch that the model cannot take.
    """
    if packing is None:
        settle_attention(model, memory.attention)
    else:
        adopt_packing(model, memory.attention, packing)
    if memory.mlp_tile_tokens:
        tile_mlps(model, memory.mlp_tile_tokens)
    if memory.checkpointing:
        # transformers renamed it in 5.23; both take the options of torch's checkpoint
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if transfers is None and model.device.type == "cuda":
            transfers = CudaTransfers(model.device)
        if memory.offload_checkpoints and transfers is not None:
            park_checkpoints(model, CpuCheckpoints(transfers))


def park_checkpoints(model: Any, checkpoints: CpuCheckpoints) -> None:
    """Make every checkpointed layer of the model save its input through `checkpoints`."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = checkpoints
