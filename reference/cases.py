"""The golden cases: one small network each, described by a `config.json` as its official release spells it.

Within a case the dimensions differ from one another, so that swapped ones cannot pass; the number of expert groups
never equals the experts in one, and some widths are no multiple of a SIMD register.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A network and how to exercise it."""

    name: str
    config: dict
    num_tokens: int  # Length of the recorded sequence; over 32, so that it spans two blocks of KV cache.
    num_prompt_tokens: int  # How many of its tokens the greedy continuation starts from.
    num_shards: int = 1
    generation_config: dict | None = None


PANGU_TOKENS = {"bos_token_id": 1, "eos_token_id": 89, "pad_token_id": 0}

PANGU_PRO_MOE = {
    "architectures": ["PanguProMoEForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_pangu_moe.PanguProMoEConfig",
        "AutoModel": "modeling_pangu_moe.PanguProMoEModel",
        "AutoModelForCausalLM": "modeling_pangu_moe.PanguProMoEForCausalLM",
    },
    **PANGU_TOKENS,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "PanguProMoE",
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "transformers_version": "4.48.2",
    "use_cache": True,
}

PANGU_EMBEDDED = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    "bias": True,
    **PANGU_TOKENS,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "PanguEmbedded",
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "transformers_version": "4.53.2",
    "use_cache": True,
}

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 101,
    "eos_token_id": 103,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "max_window_layers": 3,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
}

GLM4 = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": [94, 98, 99],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "glm4",
    "pad_token_id": 94,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "use_cache": True,
}

CASES = [
    # Exactly the keys of the first release: neither the number of expert groups (3 of 4 experts) nor head_dim.
    Case(
        name="pangu-pro-moe-v1",
        num_tokens=53,
        num_prompt_tokens=11,
        num_shards=2,
        config={
            **PANGU_PRO_MOE,
            "hidden_size": 48,
            "moe_intermediate_size": 20,
            "num_attention_heads": 6,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "shared_expert_intermediate_size": 44,
            "torch_dtype": "bfloat16",
            "vocab_size": 307,
        },
        generation_config={
            **PANGU_TOKENS,
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 50,
            "top_p": 0.95,
            "transformers_version": "4.48.2",
        },
    ),
    # Our own two keys: two experts from each of 2 expert groups of 5, and heads wider than hidden / heads.
    Case(
        name="pangu-pro-moe-k2",
        num_tokens=41,
        num_prompt_tokens=9,
        config={
            **PANGU_PRO_MOE,
            "head_dim": 12,
            "hidden_size": 40,
            "moe_intermediate_size": 23,
            "num_attention_heads": 6,
            "num_expert_groups": 2,
            "num_experts": 10,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 3,
            "shared_expert_intermediate_size": 31,
            "torch_dtype": "float32",
            "vocab_size": 149,
        },
    ),
    Case(
        name="pangu-embedded",
        num_tokens=67,
        num_prompt_tokens=7,
        config={
            **PANGU_EMBEDDED,
            "hidden_size": 36,
            "intermediate_size": 52,
            "num_attention_heads": 6,
            "num_hidden_layers": 4,
            "num_key_value_heads": 3,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": 167,
        },
    ),
    Case(
        name="pangu-embedded-tied",
        num_tokens=37,
        num_prompt_tokens=13,
        config={
            **PANGU_EMBEDDED,
            "hidden_size": 56,
            "intermediate_size": 78,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 139,
        },
    ),
    Case(
        name="qwen3",
        num_tokens=59,
        num_prompt_tokens=17,
        config={
            **QWEN3,
            "head_dim": 16,
            "hidden_size": 44,
            "intermediate_size": 76,
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 181,
        },
        generation_config={
            "bos_token_id": 101,
            "do_sample": True,
            "eos_token_id": [103, 101],
            "pad_token_id": 101,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    ),
    Case(
        name="qwen3-tied",
        num_tokens=43,
        num_prompt_tokens=8,
        config={
            **QWEN3,
            "head_dim": 10,
            "hidden_size": 28,
            "intermediate_size": 50,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vocab_size": 127,
        },
    ),
    # The spelling of the 0414 releases: RoPE settings and torch_dtype at the top.
    Case(
        name="glm4",
        num_tokens=47,
        num_prompt_tokens=12,
        config={
            **GLM4,
            "attention_bias": True,
            "head_dim": 16,
            "hidden_size": 52,
            "intermediate_size": 70,
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.52.0.dev0",
            "vocab_size": 163,
        },
    ),
    # The spelling of newer transformers: RoPE settings nested, torch_dtype renamed. Neither theta nor the factor has
    # its usual value, so that a default cannot stand in for reading them.
    Case(
        name="glm4-rope-parameters",
        num_tokens=70,
        num_prompt_tokens=10,
        config={
            **GLM4,
            "attention_bias": False,
            "dtype": "float16",
            "head_dim": 16,
            "hidden_size": 34,
            "intermediate_size": 58,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 50000.0, "rope_type": "default"},
            "transformers_version": "5.23.0",
            "vocab_size": 113,
        },
    ),
]
