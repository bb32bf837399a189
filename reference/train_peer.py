"""Train a Pangu Pro MoE in eager PyTorch, written with the usual operators: what `moge` is measured beside.

Usage: python reference/train_peer.py MODEL BATCHES --num-sequences N --sequence-length N
       [--num-steps N] [--dtype f32|bf16] [--threads N] [--learning-rate X]

MODEL is a checkpoint of PanguProMoEForCausalLM, which is trained in f32; with `--dtype bf16` under autocast. BATCHES is
what `train_batches.py` writes: step n learns its nth `num_sequences` sequences. A sequence is a document, so its last
row has no target.

Each step prints a line of JSON. Its seconds are those of forward, backward, clipping and optimiser. Its `flops` are six
(two forward, four backward) for each token and each weight of a matrix that the token is multiplied with: projections,
gate, chosen experts, shared expert, head. Attention's scores and sums, norms and all else are left out.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from pangu import Config

IGNORED = -100
AUX_COEFFICIENT = 0.001
CLIP = 1.0


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    raw = json.loads((args.model / "config.json").read_text())
    with torch.device("meta"):  # All weights come from the files.
        model = PanguProMoe(raw)
    weights = {}
    for file in sorted(args.model.glob("model*.safetensors")):
        weights.update(load_file(file))
    model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )

    tokens = load_file(args.batches)["tokens"].long().view(-1, args.num_sequences, args.sequence_length)
    num_flops = 6 * weights_per_token(raw) * tokens[0].numel()
    for step in range(args.num_steps):
        start = time.perf_counter()
        losses = train_step(model, optimizer, tokens[step], args.dtype)
        seconds = time.perf_counter() - start
        line = {"step": step + 1, **losses, "seconds": seconds, "tokens": tokens[step].numel(), "flops": num_flops}
        print(json.dumps(line), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("--num-sequences", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    return parser.parse_args()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, dtype: str) -> dict:
    """Learn `tokens` `[num_sequences, sequence_length]`; return the losses before that and the gradient's norm."""
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        logits, aux_loss = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
    (loss + AUX_COEFFICIENT * aux_loss).backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item(), "aux_loss": AUX_COEFFICIENT * aux_loss.item(), "grad_norm": grad_norm.item()}


def weights_per_token(raw: dict) -> int:
    """Weights of all matrices that one token is multiplied with."""
    config, hidden_size = Config.from_json(raw), raw["hidden_size"]
    attention = 2 * hidden_size * (config.num_q_heads + config.num_kv_heads) * config.head_dim
    inner = raw["num_experts_per_tok"] * raw["moe_intermediate_size"] + raw["shared_expert_intermediate_size"]
    layer = attention + hidden_size * (config.num_experts + 3 * inner)
    return config.num_layers * layer + raw["vocab_size"] * hidden_size


# The network. Modules and parameters have the names of the checkpoint.


class PanguProMoe(nn.Module):
    def __init__(self, raw: dict):
        super().__init__()
        self.model = Decoder(raw)
        self.lm_head = nn.Linear(raw["hidden_size"], raw["vocab_size"], bias=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, aux_loss = self.model(tokens)
        return self.lm_head(hidden), aux_loss


class Decoder(nn.Module):
    def __init__(self, raw: dict):
        super().__init__()
        self.config = Config.from_json(raw)
        self.embed_tokens = nn.Embedding(raw["vocab_size"], raw["hidden_size"])
        self.layers = nn.ModuleList(Layer(raw, self.config) for _ in range(self.config.num_layers))
        self.norm = nn.RMSNorm(raw["hidden_size"], self.config.rms_norm_eps)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, aux_loss = self.embed_tokens(tokens), 0.0
        angles = rope_angles(self.config, tokens.shape[1])
        for layer in self.layers:
            x, layer_aux_loss = layer(x, angles)
            aux_loss = aux_loss + layer_aux_loss
        return self.norm(x), aux_loss


class Layer(nn.Module):
    def __init__(self, raw: dict, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(raw["hidden_size"], config.rms_norm_eps)
        self.self_attn = Attention(raw, config)
        self.post_attention_layernorm = nn.RMSNorm(raw["hidden_size"], config.rms_norm_eps)
        self.mlp = GroupedExperts(raw, config)

    def forward(self, x: torch.Tensor, angles: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        y, aux_loss = self.mlp(self.post_attention_layernorm(x))
        return x + y, aux_loss


class Attention(nn.Module):
    def __init__(self, raw: dict, config: Config):
        super().__init__()
        self.config = config
        q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(raw["hidden_size"], q_size)
        self.k_proj = nn.Linear(raw["hidden_size"], kv_size)
        self.v_proj = nn.Linear(raw["hidden_size"], kv_size)
        self.o_proj = nn.Linear(q_size, raw["hidden_size"])

    def forward(self, x: torch.Tensor, angles: tuple) -> torch.Tensor:
        q, k, v = (
            project(x).view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rope(q, angles), rope(k, angles)
        q_per_kv = self.config.num_q_heads // self.config.num_kv_heads
        k, v = k.repeat_interleave(q_per_kv, dim=1), v.repeat_interleave(q_per_kv, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rope_angles(config: Config, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[num_tokens, head_dim]` of all positions."""
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    angles = torch.arange(num_tokens)[:, None] * frequencies
    return torch.cat((angles, angles), dim=-1).cos(), torch.cat((angles, angles), dim=-1).sin()


def rope(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim / 2) of `x` `[num_sequences, num_heads, num_tokens, head_dim]`."""
    cos, sin = (angle.to(x.dtype) for angle in angles)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class GroupedExperts(nn.Module):
    def __init__(self, raw: dict, config: Config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(raw["hidden_size"], config.num_experts, bias=False)
        self.router_scale = nn.Parameter(torch.ones(1, config.num_experts))
        self.experts = nn.ModuleList(
            SwiGlu(raw["hidden_size"], raw["moe_intermediate_size"]) for _ in range(config.num_experts)
        )
        self.shared_expert = SwiGlu(raw["hidden_size"], raw["shared_expert_intermediate_size"])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.flatten(0, 1)
        probs, expert_ids = self.route(rows)
        expert_weights = (probs * self.router_scale).gather(1, expert_ids)

        y = self.shared_expert(rows)
        for expert_id, expert in enumerate(self.experts):
            row, place = (expert_ids == expert_id).nonzero(as_tuple=True)
            weighted = expert(rows.index_select(0, row)) * expert_weights[row, place, None]
            y.index_add_(0, row, weighted.to(y.dtype))
        return y.view(x.shape), balance_loss(probs, expert_ids)

    def route(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities `[num_rows, num_experts]`, and the ids of the best in each expert group, side by side."""
        config = self.config
        with torch.autocast("cpu", enabled=False):  # The router is f32, as it is in moge.
            probs = self.gate(rows.float()).softmax(-1)
        experts_per_group = config.num_experts // config.num_expert_groups
        best = probs.view(len(rows), config.num_expert_groups, -1).topk(config.top_k_per_group, dim=-1).indices
        return probs, (best + torch.arange(0, config.num_experts, experts_per_group)[:, None]).flatten(1)


class SwiGlu(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def balance_loss(probs: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """`sum_i f_i p_i` (arXiv 2505.21411 §2): one where experts are chosen equally often, more where not."""
    num_rows, num_experts = probs.shape
    counts = torch.bincount(expert_ids.flatten(), minlength=num_experts)
    f = counts * num_experts / (expert_ids.shape[1] * num_rows)
    return (f * probs.mean(0)).sum()


if __name__ == "__main__":
    main()
