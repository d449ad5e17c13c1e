"""Probe a head: its logits of chosen and of the model's own hidden states; what they depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from riskpo_kernels.causal_lm.decoder import decoder_of

# Largest |h W^T| of a row of the probe. 0 shows a bias, the small ones a scale, the large ones a
# softcap of any size.
SIZES = (0.0, 0.0, 1.0, 1.0, 30.0, 30.0, 1e3, 1e3, 3e4, 3e4, 1e6, 1e6)
HALF_SIZE = 1e4  # float16 ends at 65504
VOCAB_CHUNK = 8192  # rows of the head in float32 at a time
COARSE = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HeadSight:
    """Pairs of raw logits h W^T + bias and the model's logits of the same h, [N, V] each.

    rows: how many of the head's rows have a logit, None for all.
    tolerance: what rounding explains, relative.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    rows: int | None
    tolerance: float

    def gap(self, options: Any) -> float:
        """The worst row's difference under these options; inf where anything is not finite."""
        gaps = torch.cat([row_gaps(raw, theirs, options) for raw, theirs in self.pairs])
        return float(gaps.nan_to_num(float("inf")).max())


@torch.no_grad()
def raw_logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """h W^T + bias [N, V] in float32 of hidden [N, D], without a float32 copy of the head."""
    weight, bias = head.weight, head.bias
    hidden = hidden.to(weight.device).float()
    raw = torch.cat([hidden @ part.float().T for part in weight.split(VOCAB_CHUNK)], dim=-1)
    if head.lora is not None:
        a, b, factor = head.lora
        raw += factor * (hidden @ a.float().T) @ b.float().T
    return raw if bias is None else raw + bias.float()


@torch.no_grad()
def row_gaps(raw: torch.Tensor, theirs: torch.Tensor, options: Any) -> torch.Tensor:
    """[N] root mean squares of the difference, relative to the model's logits of the row."""
    ours = raw * options.scale
    if options.softcap is not None:
        ours = options.softcap * torch.tanh(ours / options.softcap)
    theirs = theirs.to(ours.device).float()
    difference, size = (x.square().mean(-1).sqrt() for x in (ours - theirs, theirs))
    return torch.where(difference == 0, difference, difference / size)


def relative_gap(head: Any, hidden: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square of formula minus model's logits, relative to the logits'; worst row.

    hidden states [..., D] and the model's logits [..., V] of them.
    """
    raw = raw_logits(head, hidden.flatten(0, -2))
    return float(row_gaps(raw, theirs.flatten(0, -2), head.options).max())


def look(model: Any, head: Any) -> HeadSight:
    """Run the probe in eval mode.

    ValueError for a model that cannot be probed, or whose logits depend on more than its head.
    """
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        ids = probe_ids(model)
        decoder = decoder_of(model)
        with torch.inference_mode(False):
            with torch.no_grad():
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
                own = model(input_ids=ids, use_cache=False).logits
            _check_dtypes(model, hidden, head.weight)
            given = chosen_hidden(head, hidden)
            with torch.enable_grad(), _all_tracked(model, decoder):
                theirs = _logits_of(model, decoder, ids, given)
                _refuse_strange_leaves(model, head, theirs)
    except ValueError as error:
        if str(error).startswith("head: "):
            raise
        raise _unknown(model, error) from None
    except Exception as error:  # whatever a model's code raises when it is called like this
        raise _unknown(model, error) from None
    finally:
        for part, mode in modes:
            part.training = mode
    vocab, rows = len(head.weight), theirs.shape[-1]
    if theirs.shape != own.shape or theirs.shape[:-1] != ids.shape or rows > vocab:
        raise ValueError(
            f"head: got a {type(model).__name__} with logits {list(theirs.shape)}; "
            f"expected [1, {ids.numel()}, up to {vocab}], one for each row of the head."
        )
    pairs = [
        (raw_logits(head, h[0])[:, :rows], z.detach()[0])
        for h, z in ((hidden, own), (given, theirs))
    ]
    coarse = any(x.dtype in COARSE for x in (hidden, head.weight, theirs))
    return HeadSight(pairs, None if rows == vocab else rows, 1e-2 if coarse else 1e-3)


def probe_ids(model: Any) -> torch.Tensor:
    """[1, N] ordinary ids: none that the config names, such as an end token or an image's."""
    weight = model.get_input_embeddings().weight
    config = model.config
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    named = {
        value
        for part in parts
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    vocab = min(len(weight), len(model.get_output_embeddings().weight))
    free = [i for i in (k * 7919 % vocab for k in range(4 * len(SIZES))) if i not in named]
    ids = (free or [0]) * len(SIZES)
    return torch.tensor([ids[: len(SIZES)]], device=weight.device)


def chosen_hidden(head: Any, like: torch.Tensor) -> torch.Tensor:
    """Random hidden states [1, N, D] whose products with the head have the SIZES."""
    g, shape = torch.Generator().manual_seed(0), (len(SIZES), like.shape[-1])
    weight = head.weight.detach()
    unit = torch.randn(shape, generator=g, dtype=torch.float32).to(weight.device)
    largest = torch.stack(
        [(unit @ part.float().T).abs().amax(-1) for part in weight.split(VOCAB_CHUNK)]
    ).amax(0)
    sizes = torch.tensor(SIZES, dtype=torch.float32, device=weight.device)
    if torch.float16 in (like.dtype, weight.dtype):
        sizes = sizes.clamp(max=HALF_SIZE)
    factor = sizes / largest.clamp(min=1e-6)
    if like.dtype == torch.float16:
        factor = factor.clamp(max=HALF_SIZE / float(unit.abs().max()))
    return (unit * factor[:, None]).to(like)[None]


def _logits_of(model: Any, decoder: Any, ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The model's logits when its decoder has given `given`, with the graph from there on."""
    calls = []

    def before(*_: Any) -> None:
        torch.set_grad_enabled(False)  # the decoder's own graph is of no interest

    def after(module: Any, arguments: Any, output: Any) -> Any:
        torch.set_grad_enabled(True)
        calls.append(module)
        if isinstance(output, tuple):
            return (given, *output[1:])
        output["last_hidden_state"] = given
        return output

    hooks = [decoder.register_forward_pre_hook(before), decoder.register_forward_hook(after)]
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        raise ValueError(
            f"head: got a {type(model).__name__} whose forward calls its decoder "
            f"({type(decoder).__name__}) {len(calls)} times; expected once, as log-probs are "
            "computed from what it gives. This kind of model is not supported."
        )
    return logits


@contextmanager
def _all_tracked(model: Any, decoder: Any) -> Iterator[None]:
    """Inside, autograd sees every parameter, and every buffer outside the decoder."""
    inside = {id(buffer) for buffer in decoder.buffers()}
    tensors = [*model.parameters(), *(b for b in model.buffers() if id(b) not in inside)]
    quiet = [x for x in tensors if x.is_floating_point() and not x.requires_grad]
    for tensor in quiet:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in quiet:
            tensor.requires_grad_(False)


def _refuse_strange_leaves(model: Any, head: Any, logits: torch.Tensor) -> None:
    """ValueError unless the logits depend on what the head's weight and bias are made of."""
    theirs, ours = leaves(logits), leaves(head.weight, head.bias, *(head.lora or ())[:2])
    names = {id(x): name for name, x in (*model.named_buffers(), *model.named_parameters())}
    for found, known, what in (
        (theirs, ours, "depend on {} beside the head's weight and bias"),
        (ours, theirs, "do not depend on {}, of which its head is made"),
    ):
        strange = [names.get(key, "a tensor without a name") for key in found if key not in known]
        if strange:
            listed = ", ".join(sorted(strange)[:3]) + (", ..." if len(strange) > 3 else "")
            raise ValueError(
                f"head: got a {type(model).__name__} whose logits {what.format(listed)}; expected "
                "softcap(scale * (h W^T + bias)) of its decoder's output, or that part would not "
                "be trained. This kind of head is not supported."
            )


def leaves(*tensors: torch.Tensor | None) -> dict[int, torch.Tensor]:
    """The leaves of the graphs of `tensors` by id; no gradient is computed."""
    found: dict[int, torch.Tensor] = {}
    nodes, seen = [], set()
    for tensor in tensors:
        if tensor is not None and tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
        elif tensor is not None and tensor.requires_grad:
            found[id(tensor)] = tensor
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes += [below for below, _ in node.next_functions if below is not None]
    return found


def _check_dtypes(model: Any, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    wider = hidden.dtype in COARSE and weight.dtype == torch.float32
    if hidden.dtype != weight.dtype and not wider:
        raise ValueError(
            f"head: got a {type(model).__name__} with {hidden.dtype} hidden states and a "
            f"{weight.dtype} head; expected one dtype, or a float32 head on 16-bit hidden states. "
            "Convert the head."
        )


def _unknown(model: Any, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ValueError(
        f"head: cannot probe a {type(model).__name__} ({reason}); expected a causal language model "
        "that gives logits for input_ids alone. This kind of model is not supported."
    )
