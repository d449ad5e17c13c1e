"""Every causal language model that transformers can name, each small enough to run in a moment.

`families()` reads transformers' own mapping when it runs, so a model added later is among them.
`build(name)` shrinks the family's default config by the names of its numbers (widths, layers,
heads, experts, ...), and keeps one layer of each kind that the default has. `CHANGES` says what
the names do not tell. Weights are redrawn: none is left at a start of 0 that hides a path.

    from tests.model_families import build, families
    model = build("qwen3_5")                    # in eval mode, float32, vocabulary VOCAB
    model = build("llama4", tiny_lengths=False) # windows, chunks, ... as long as by default
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 64
WIDTH = 32
# Of a number whose name matches, the first that does, and which is larger: the number it becomes.
SIZES = (
    (r"vocab_size.*|n_words|encoder_hash_byte_group_vocab", VOCAB),
    (r"max_position_embeddings|n_positions|max_target_positions|max_source_positions|n_ctx"
     r"|max_seq_len|seq_length|max_sequence_length|context_length", 128),
    (r"num_(hidden|nextn_predict|encoder|decoder)?_?layers|n_layers?|(en|de)coder_layers|depth"
     r"|num_blocks", 2),
    (r"(num|n)_(key_value|kv|global_key_value|query_group)s?_?(heads|groups)?|multi_query_group_num"
     r"|.*(num|n)_(key_value|kv)_heads|n_groups|mamba_n_groups|num_query_groups", 2),
    (r".*(num|n)_(attention_|linear_|local_)?(key_|value_|query_)?heads?|(en|de)coder_attention_heads"
     r"|.*num_(key|value)_heads|attention_heads|.*n_heads?|n_head", 4),
    (r".*(head_dim|head_size|d_head|headdim|d_kv|qk_nope.*dim|qk_rope.*dim|v_head.*dim)", 8),
    (r"rotary_dim", 4),
    (r"n_group|topk_group|n_langs", 1),
    (r"(mamba_)?expand", 1),
    (r"hc_lowrank|ngram_vocab_size_base|split_ngram_parts|.*ngram_size_divisible_by", 8),
    (r"n_routed_experts|num_(local_|routed_)?experts|moe_num_experts|n_experts", 4),
    (r"(num|n)_shared_experts", 1),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k|num_experts_per_token|moe_top_k)", 2),
    (r".*lora_rank|.*_rank|rank", 8),
    (r".*(intermediate|ffn|inner|mlp|expert)_?(hidden_)?(size|dim|width)|n_inner|d_ff"
     r"|(en|de)coder_ffn_dim|.*ffn_hidden_size", WIDTH),
    (r"(ssm_|mamba_)?(d_state|state_size|ssm_state_size)", 8),
    (r"(.*_)?hidden_size(_global|_per_layer_input)?|d_model|n_embd|dim|embedding_size|hidden_dim"
     r"|.*emb.*_dim|d_embed|lru_width", WIDTH),
)  # fmt: skip
# Numbers that a default config leaves open.
UNSET = {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4}
# How far a token looks, in tokens: by default longer than any row of a test.
LENGTHS = (
    (r"(sliding|attention|local)?_?window(_size)?|window_size|sliding_window_size", 4),
    (r"attention_chunk_size", 4),
    (r"index_topk|.*topk_tokens", 2),
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
           "indexer_compress_ratio": 2}  # fmt: skip
DOTS3 = {"head_dim": 16, "per_layer_config": {}}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE | {"mrope_section": [1, 1, 2]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": DOTS3,
                   "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
                   "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH}},
    "dots3_note_text": DOTS3,
    "longcat_flash": {"qk_head_dim": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16, "mamba_dt_rank": 4,
              "num_hidden_layers": 3, "layers_block_type": ["linear_attention", *["hybrid"] * 2]},
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16, "mamba_expand": 2,
               "n_mamba_heads": 4, "mamba_headdim": 16, "hybrid_layer_ids": [1, 2],
               "num_hidden_layers": 3, "layers_block_type": ["linear_attention", *["hybrid"] * 2]},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
}  # fmt: skip
# Families that are not built here, and why. A family that fails and is not here fails the tests.
DRAFT = "a draft head, which reads another model's keys and hidden states"
CODES = "reads several streams of audio codes at once; AutoModelForCausalLM cannot build it"
NOT_TINY: dict[str, str] = {
    "gemma3n": "needs the package timm for its vision tower; gemma3n_text is its language model",
    "gemma4_assistant": DRAFT,
    "gemma4_unified_assistant": DRAFT,
    "musicgen": CODES,
    "musicgen_melody": CODES,
}


def families() -> list[str]:
    """Model types of transformers' causal-LM mapping."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(family: str) -> str:
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return found if isinstance(found, str) else found[0]


def build(family: str, *, tiny_lengths: bool = True, seed: int = 0, **changes: Any) -> Any:
    """The family's model in eval mode, float32; `changes` go into its (text) config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(family, tiny_lengths=tiny_lengths, **changes)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    redraw(model, seed)
    return model.eval()


def tiny_config(family: str, *, tiny_lengths: bool = True, **changes: Any) -> Any:
    kind = CONFIG_MAPPING[family]
    given = shrunk(kind(), SIZES + LENGTHS * tiny_lengths)
    merge(given, CHANGES.get(family, {}))
    text = given.get("text_config")
    merge(text if isinstance(text, dict) else given, changes)
    return kind(**given)


def has_lengths(family: str) -> bool:
    """Whether tiny_lengths makes the family another model."""
    default = CONFIG_MAPPING[family]()
    return shrunk(default, SIZES) != shrunk(default, SIZES + LENGTHS)


def merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def shrunk(config: Any, rules: Any) -> dict[str, Any]:
    """Keywords that make `config` small; what a rule does not name is left to the default."""
    given: dict[str, Any] = {}
    kinds = vars(config).get("layer_types")
    layers = max(len(set(kinds or ())), 2)
    for name, value in vars(config).items():
        if name in getattr(config, "sub_configs", {}) and value is not None:
            given[name] = shrunk(value, rules)
            if not isinstance(value, dict):
                given[name]["model_type"] = value.model_type
        elif type(value) is int and value > 1:
            size = next((n for pattern, n in rules if re.fullmatch(pattern, name)), None)
            if size is not None and value > size:
                given[name] = size
        elif value is None and name in UNSET:
            given[name] = UNSET[name]
        elif isinstance(value, list) and len(value) > 8 and name != "layer_types":
            given[name] = [WIDTH if type(x) is int and x > WIDTH else x for x in value[:layers]]
    heads = vars(config).get("num_attention_heads")
    if heads and heads == vars(config).get("num_key_value_heads"):
        given["num_key_value_heads"] = given.get("num_attention_heads", heads)
    for name in ("is_decoder", "causal"):  # encoders that may be decoders
        if vars(config).get(name) is False:
            given[name] = True
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = vars(config).get(name)
        if isinstance(value, list) or (isinstance(value, int) and not 0 <= value < VOCAB):
            given[name] = 1 if name == "eos_token_id" else 0
    if kinds:
        chosen = list(dict.fromkeys(kinds))
        chosen = chosen if len(chosen) > 1 else chosen * 2
        given |= {"layer_types": chosen, "num_hidden_layers": len(chosen)}
    return given


@torch.no_grad()
def redraw(model: Any, seed: int) -> None:
    """Matrices anew with unit gain; vectors and scalars moved by a tenth. All are finite then."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        if p.ndim > 1:
            p.copy_(noise / max(p[0].numel(), 1) ** 0.5 if "embed" not in name else noise)
        else:
            p.copy_(torch.nan_to_num(p) + 0.1 * noise)
