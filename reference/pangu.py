"""The decoder that moge runs, written a second time in plain PyTorch: slow, short, and made to be read.

One forward pass covers the six architectures. They differ in a few places only:

                               norms      q/k norm  RoPE                      MLP
    PanguProMoEForCausalLM     pre        no        whole head, rotate-half   grouped experts + shared expert
    PanguEmbeddedForCausalLM   pre        no        whole head, rotate-half   dense
    Qwen3ForCausalLM           pre        yes       whole head, rotate-half   dense
    Qwen3MoeForCausalLM        pre        yes       whole head, rotate-half   plain top-K experts, some layers dense
    LlamaForCausalLM           pre        no        whole head, rotate-half,  dense
                                                    frequencies may be scaled
    Glm4ForCausalLM            sandwich   no        part, interleaved pairs   dense, gate and up fused

A projection has a bias exactly where the checkpoint stores one. The routed layer follows arXiv 2505.21411 §2; plain
top-K is the same with one expert group.

The arithmetic is f32 on the stored weights, whatever their type. `bf16_activations=True` simulates a machine whose
matrix products take bf16 inputs and accumulate in f32: see `forward` for the points where values are rounded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


@dataclass(frozen=True)
class Config:
    """What the arithmetic needs from a `config.json`, under the names that moge uses."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    rope_interleaved: bool
    rope_scaling: dict | None  # Llama 3's, under the names of its config; None: frequencies are not scaled
    tie_word_embeddings: bool
    num_experts: int  # 0: all layers are dense
    num_expert_groups: int
    top_k_per_group: int
    renormalise: bool  # Whether the weights of a token's experts are divided by their sum.
    routed_layers: tuple[int, ...]  # The other layers have a dense MLP.

    @staticmethod
    def from_json(raw: dict) -> "Config":
        head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        rope = {**raw, **raw.get("rope_parameters", {})}  # Newer files nest the RoPE settings.
        num_layers, experts_per_token = raw["num_hidden_layers"], raw.get("num_experts_per_tok", 0)
        if raw["architectures"] == ["Qwen3MoeForCausalLM"]:
            num_expert_groups = 1
        else:  # Pangu's first release does not state their number: one expert is taken from each.
            num_expert_groups = raw.get("num_expert_groups", experts_per_token)
        # Every step-th layer is routed, unless it is listed as one with an MLP only.
        step, mlp_only_layers = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers", [])
        can_route = [n for n in range(num_layers) if (n + 1) % step == 0 and n not in mlp_only_layers]
        return Config(
            num_layers=num_layers,
            num_q_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=head_dim,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=rope["rope_theta"],
            rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)),
            rope_interleaved=raw["architectures"] == ["Glm4ForCausalLM"],
            rope_scaling=raw.get("rope_scaling"),
            tie_word_embeddings=raw["tie_word_embeddings"],
            num_experts=raw.get("num_experts", 0),
            num_expert_groups=num_expert_groups,
            top_k_per_group=experts_per_token // num_expert_groups if num_expert_groups else 0,
            renormalise=raw.get("norm_topk_prob", False),
            routed_layers=tuple(can_route) if raw.get("num_experts", 0) else (),
        )


@dataclass(frozen=True)
class Model:
    """A configuration and the weights by their names in the checkpoint, widened to one type."""

    config: Config
    weights: dict[str, torch.Tensor]

    @staticmethod
    def load(directory: Path, dtype: torch.dtype = torch.float32) -> "Model":
        weights = {}
        for file in sorted(directory.glob("model*.safetensors")):
            weights.update(load_file(file))
        raw = json.loads((directory / "config.json").read_text())
        return Model(Config.from_json(raw), {name: w.to(dtype) for name, w in weights.items()})

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        variance = x.square().mean(-1, keepdim=True)
        return self.weights[f"{name}.weight"] * (x * torch.rsqrt(variance + self.config.rms_norm_eps))


@dataclass(frozen=True)
class Output:
    """What one forward pass over a sequence yields. The last four are empty lists in a dense model."""

    logits: torch.Tensor  # [num_tokens, vocab_size]
    hidden: torch.Tensor  # [num_layers + 1, num_tokens, hidden_size]: residual stream around the layers
    expert_ids: list  # per routed layer: [num_tokens, num_expert_groups, top_k_per_group]
    expert_weights: list  # per routed layer, same shape
    router_probs: list  # per routed layer: [num_tokens, num_expert_groups, experts_per_group]
    router_logits: list  # per routed layer: [num_tokens, num_experts]


def forward(model: Model, tokens: torch.Tensor, bf16_activations: bool = False) -> Output:
    """Run a whole sequence `tokens` `[num_tokens]` through the network.

    With `bf16_activations` these are rounded to bf16: the norms' outputs that enter a projection, the router or the
    head; q and k after RoPE; v; the attention's output before `o_proj`; the SwiGLU product before `down_proj`. All
    else stays f32: the residual stream, biases, attention and router probabilities, and what projections yield.
    """
    rounded = (lambda x: x.to(torch.bfloat16).to(x.dtype)) if bf16_activations else (lambda x: x)
    config, weights = model.config, model.weights

    x = weights["model.embed_tokens.weight"][tokens]
    hidden, routes = [x], []
    for n in range(config.num_layers):
        layer = f"model.layers.{n}"
        sandwich = f"{layer}.post_mlp_layernorm.weight" in weights

        y = attention(model, f"{layer}.self_attn", rounded(model.norm(f"{layer}.input_layernorm", x)), rounded)
        x = x + (model.norm(f"{layer}.post_self_attn_layernorm", y) if sandwich else y)

        normed = rounded(model.norm(f"{layer}.post_attention_layernorm", x))
        if n in config.routed_layers:
            y, *route = grouped_experts(model, f"{layer}.mlp", normed, rounded)
            routes.append(route)
        else:
            y = swiglu(model, f"{layer}.mlp", normed, rounded)
        x = x + (model.norm(f"{layer}.post_mlp_layernorm", y) if sandwich else y)
        hidden.append(x)

    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = model.linear(head, rounded(model.norm("model.norm", x)))
    return Output(logits, torch.stack(hidden), *(map(list, zip(*routes)) if routes else ([], [], [], [])))


def attention(model: Model, name: str, x: torch.Tensor, rounded) -> torch.Tensor:
    """Causal attention in which `num_q_heads / num_kv_heads` consecutive query heads share a K/V head."""
    config, num_tokens = model.config, len(x)
    q = model.linear(f"{name}.q_proj", x).view(num_tokens, config.num_q_heads, config.head_dim)
    k = model.linear(f"{name}.k_proj", x).view(num_tokens, config.num_kv_heads, config.head_dim)
    v = model.linear(f"{name}.v_proj", x).view(num_tokens, config.num_kv_heads, config.head_dim)
    if f"{name}.q_norm.weight" in model.weights:
        q, k = model.norm(f"{name}.q_norm", q), model.norm(f"{name}.k_norm", k)
    q, k, v = rounded(rope(config, q)), rounded(rope(config, k)), rounded(v)

    q_per_kv = config.num_q_heads // config.num_kv_heads
    k, v = k.repeat_interleave(q_per_kv, dim=1), v.repeat_interleave(q_per_kv, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(diagonal=1)
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    y = torch.einsum("hqk,khd->qhd", probs, v).flatten(start_dim=1)
    return model.linear(f"{name}.o_proj", rounded(y))


def rope(config: Config, x: torch.Tensor) -> torch.Tensor:
    """Turn the first `rotary_dim` numbers of each head of `x` `[num_tokens, num_heads, head_dim]` by its position."""
    dim = config.rotary_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    if config.rope_scaling:
        frequencies = scaled_frequencies(config.rope_scaling, frequencies)
    angles = (torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    turned, kept = x[..., :dim], x[..., dim:]
    if config.rope_interleaved:  # Neighbours turn together: (0, 1), (2, 3), ...
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:  # Rotate-half: i turns with i + dim / 2.
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, kept), dim=-1)


def scaled_frequencies(scaling: dict, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3's way to longer contexts: `frequencies` that turn seldom within the original one are slowed by `factor`.

    Those of up to `low_freq_factor` turns are, those of `high_freq_factor` and more stay, and in between the two blend.
    """
    assert scaling["rope_type"] == "llama3"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    num_turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    kept = ((num_turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


def swiglu(model: Model, name: str, x: torch.Tensor, rounded) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))`; a fused `gate_up_proj` holds the gate's rows first."""
    if f"{name}.gate_up_proj.weight" in model.weights:
        gate, up = model.linear(f"{name}.gate_up_proj", x).chunk(2, dim=-1)
    else:
        gate, up = model.linear(f"{name}.gate_proj", x), model.linear(f"{name}.up_proj", x)
    return model.linear(f"{name}.down_proj", rounded(F.silu(gate) * up))


def grouped_experts(model: Model, name: str, x: torch.Tensor, rounded) -> tuple[torch.Tensor, ...]:
    """Routed experts in expert groups, plus the shared expert if there is one.

    The softmax runs over all experts; then every expert group of consecutive experts contributes those of its
    `top_k_per_group` with the highest probability, best first, ties to the lower id. A chosen expert's weight is its
    probability: in Pangu times its `router_scale`, which has no say in the choice; in Qwen3-MoE, if its config asks for
    it, divided by the sum over the token's experts.
    """
    config = model.config
    experts_per_group = config.num_experts // config.num_expert_groups
    logits = model.linear(f"{name}.gate", x)
    probs = logits.softmax(-1)
    grouped_probs = probs.view(len(x), config.num_expert_groups, experts_per_group)
    best_first = grouped_probs.sort(dim=-1, descending=True, stable=True).indices
    group_starts = torch.arange(0, config.num_experts, experts_per_group)[:, None]
    expert_ids = best_first[..., : config.top_k_per_group] + group_starts
    router_scale = model.weights.get(f"{name}.router_scale")
    scaled_probs = probs if router_scale is None else probs * router_scale
    expert_weights = scaled_probs.gather(1, expert_ids.flatten(1)).view(expert_ids.shape)
    if config.renormalise:
        expert_weights = expert_weights / expert_weights.sum(dim=(1, 2), keepdim=True)

    has_shared_expert = f"{name}.shared_expert.down_proj.weight" in model.weights
    y = swiglu(model, f"{name}.shared_expert", x, rounded) if has_shared_expert else torch.zeros_like(x)
    for expert in range(config.num_experts):
        token, *place = (expert_ids == expert).nonzero(as_tuple=True)
        weight = expert_weights[token, *place][:, None]
        y[token] += weight * swiglu(model, f"{name}.experts.{expert}", x[token], rounded)
    return y, expert_ids, expert_weights, grouped_probs, logits
