"""Make `goldens/train/`: small networks, batches of packed pieces, the gradients of their losses, and a short training.

Usage: python reference/train_goldens.py

A case is a folder, `goldens/train/CASE/`:

    config.json, model.safetensors   the network, f32
    batch.safetensors                `tokens` and `targets` i32 [num_rows], -1 where a row has no target;
                                     `piece_offsets` i32 [num_pieces + 1]; of experts also
                                     `expert_ids` i32 [num_routed_layers, num_rows, num_expert_groups, top_k_per_group]
    gradients.safetensors            gradient of the sum of all losses, under the name of each weight
    expected.json                    the coefficients, each loss (multiplied with its coefficient), the norm of all
                                     gradients, and by how much the closest choice of an expert was won

    cross_entropy   mean over the rows that have a target
    aux_loss        aux_coefficient * sum over routed layers of sum_i f_i p_i (arXiv 2505.21411 §2), over all rows of
                    the batch; p_i is a mean of softmax over all experts, before weights are renormalised
    z_loss          z_coefficient * sum over routed layers of mean over rows of logsumexp(router logits)^2

RUN_CASE has a run too: 20 steps from the same weights, each on a batch of its own. `run.safetensors` holds `tokens` and
`targets` i32 [num_steps, num_rows] and `piece_offsets`; `run.json` the settings and what came out of each step before its
update. Weights are decayed as torch.optim.AdamW does, all of them.

All is computed in f64. Seeds are tried until no choice of an expert is close; for the run, until f32 gives the same losses.
"""

import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cases import GLM4, LLAMA, PANGU_EMBEDDED, PANGU_PRO_MOE, QWEN3, QWEN3_MOE, Case
from make_goldens import GOLDENS, routing_margin, write_checkpoint, write_json
from pangu import Model, Output, forward

DIRECTORY = GOLDENS / "train"
# Large enough that a gradient without one of them would be wrong by far more than is allowed.
AUX_COEFFICIENT, Z_COEFFICIENT = 0.3, 0.02
# Rounding moves a probability by about 1e-6 of itself in f32.
MIN_MARGIN = 5e-3
IGNORED = -1

RUN_CASE, NUM_STEPS = "pangu-pro-moe-k2", 20
RUN_AUX_COEFFICIENT, RUN_Z_COEFFICIENT = 0.01, 0.001
FIRST_LEARNING_RATE, LAST_LEARNING_RATE = 1e-2, 1e-3
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Between the norms of the run's gradients, so that some steps are clipped and others not.
CLIP = 4.0
# The difference that training in f32 may make to a loss of the run, a tenth of what its test allows.
MAX_RUN_DIFFERENCE = 1e-4

F32 = {"torch_dtype": "float32"}
PANGU_IDS = {"eos_token_id": 2}

CASES = {
    # One expert from each of 3 expert groups of 4, as the first release.
    "pangu-pro-moe-k1": {
        **PANGU_PRO_MOE,
        **PANGU_IDS,
        **F32,
        "head_dim": 10,
        "hidden_size": 24,
        "moe_intermediate_size": 11,
        "num_attention_heads": 6,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 17,
        "vocab_size": 59,
    },
    # Two experts from each of 2 expert groups of 5.
    "pangu-pro-moe-k2": {
        **PANGU_PRO_MOE,
        **PANGU_IDS,
        **F32,
        "head_dim": 6,
        "hidden_size": 20,
        "moe_intermediate_size": 7,
        "num_attention_heads": 6,
        "num_expert_groups": 2,
        "num_experts": 10,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "shared_expert_intermediate_size": 13,
        "vocab_size": 53,
    },
    # Plain top-K: all experts are one expert group.
    "plain-top-k": {
        **PANGU_PRO_MOE,
        **PANGU_IDS,
        **F32,
        "head_dim": 8,
        "hidden_size": 22,
        "moe_intermediate_size": 9,
        "num_attention_heads": 4,
        "num_expert_groups": 1,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "shared_expert_intermediate_size": 15,
        "vocab_size": 47,
    },
    "pangu-embedded-tied": {
        **PANGU_EMBEDDED,
        **PANGU_IDS,
        **F32,
        "head_dim": 8,
        "hidden_size": 28,
        "intermediate_size": 34,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "vocab_size": 61,
    },
    "qwen3": {
        **QWEN3,
        **F32,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "head_dim": 10,
        "hidden_size": 26,
        "intermediate_size": 38,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": 57,
    },
    # Plain top-K whose weights are renormalised, and a dense layer between two routed ones.
    "qwen3-moe": {
        **QWEN3_MOE,
        **F32,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 3,
        "head_dim": 6,
        "hidden_size": 22,
        "intermediate_size": 31,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 9,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": 49,
    },
    # Biases on q, k, v and o, and scaled frequencies: of the seven, one stays and one is blended.
    "llama3": {
        **LLAMA,
        **F32,
        "attention_bias": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "head_dim": 14,
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 37,
        "max_position_embeddings": 131072,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 72,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.45.0.dev0",
        "vocab_size": 51,
    },
    "glm4": {
        **GLM4,
        **F32,
        "attention_bias": True,
        "eos_token_id": [4, 5],
        "head_dim": 12,
        "hidden_size": 30,
        "intermediate_size": 33,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 4,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "vocab_size": 43,
    },
}


@dataclass(frozen=True)
class Batch:
    """Pieces of documents, one after another. A row sees its own piece only, and positions start anew in each."""

    tokens: torch.Tensor  # [num_rows]
    targets: torch.Tensor  # [num_rows]
    piece_offsets: torch.Tensor  # [num_pieces + 1]


@dataclass(frozen=True)
class Losses:
    """The losses of a batch, each multiplied with its coefficient, and what the network yielded for each piece."""

    cross_entropy: torch.Tensor
    aux_loss: torch.Tensor
    z_loss: torch.Tensor
    outputs: list[Output]

    def total(self) -> torch.Tensor:
        return self.cross_entropy + self.aux_loss + self.z_loss

    def margin(self) -> float:
        return min(routing_margin(output) for output in self.outputs)


def main() -> None:
    torch.set_num_threads(1)  # The order of sums, and so the recorded bits, must not depend on the machine's cores.
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    print("case                  seed  closest margin  f32 to f64, of a tensor's gradient  without aux  without z")
    for name, config in CASES.items():
        make_case(name, config)
    make_run(DIRECTORY / RUN_CASE)
    total_bytes = sum(file.stat().st_size for file in DIRECTORY.rglob("*") if file.is_file())
    print(f"{total_bytes / 1e6:.2f} MB in {DIRECTORY.name}/")


# One batch.


def make_case(name: str, config: dict) -> None:
    """Write `goldens/train/<name>/` from the first seed that makes every choice of an expert a clear one."""
    directory = DIRECTORY / name
    case = Case(name, config, num_tokens=0, num_prompt_tokens=0)
    for seed in itertools.count():
        write_checkpoint(case, directory, seed)
        batch = random_batch(config["vocab_size"], torch.Generator().manual_seed(seed))
        model = trainable(directory, torch.float64)
        losses = losses_of(model, batch, AUX_COEFFICIENT, Z_COEFFICIENT)
        if losses.margin() > MIN_MARGIN:
            break
    gradients = gradients_of(model, losses.total())
    tensors = vars(batch)
    if model.config.num_experts:
        tensors = {**tensors, "expert_ids": over_pieces(losses.outputs, "expert_ids")}
    save_file({field: tensor.int() for field, tensor in tensors.items()}, directory / "batch.safetensors")
    save_file({weight: g.float() for weight, g in gradients.items()}, directory / "gradients.safetensors")
    write_json(
        directory / "expected.json",
        {
            "aux_coefficient": AUX_COEFFICIENT,
            "z_coefficient": Z_COEFFICIENT,
            "cross_entropy": losses.cross_entropy.item(),
            "aux_loss": losses.aux_loss.item(),
            "z_loss": losses.z_loss.item(),
            "grad_norm": norm_of(gradients),
            "routing_margin": losses.margin() if model.config.num_experts else None,
        },
    )

    def distance(dtype: torch.dtype, aux_coefficient: float, z_coefficient: float) -> float:
        other = trainable(directory, dtype)
        loss = losses_of(other, batch, aux_coefficient, z_coefficient).total()
        return relative_distance(gradients, gradients_of(other, loss))

    rounding = distance(torch.float32, AUX_COEFFICIENT, Z_COEFFICIENT)
    without_aux, without_z = distance(torch.float64, 0.0, Z_COEFFICIENT), distance(torch.float64, AUX_COEFFICIENT, 0.0)
    print(f"{name:21} {seed:4} {losses.margin():15.4f} {rounding:35.1e} {without_aux:12.3f} {without_z:10.3f}")


def random_batch(vocab_size: int, generator: torch.Generator) -> Batch:
    """Five pieces. Of the second and the last the document goes on elsewhere, so that their last row has a target."""
    piece_offsets = torch.tensor([0, 5, 24, 25, 38, 46])
    documents = torch.randint(vocab_size, [int(piece_offsets[-1]) + 1], generator=generator)
    tokens, targets = documents[:-1], documents[1:].clone()
    targets[piece_offsets[[1, 3, 4]] - 1] = IGNORED
    return Batch(tokens, targets, piece_offsets)


def trainable(directory: Path, dtype: torch.dtype) -> Model:
    model = Model.load(directory, dtype)
    for weight in model.weights.values():
        weight.requires_grad_()
    return model


def losses_of(model: Model, batch: Batch, aux_coefficient: float, z_coefficient: float) -> Losses:
    outputs = [forward(model, tokens) for tokens in batch.tokens.tensor_split(batch.piece_offsets[1:-1])]
    logits = torch.cat([output.logits for output in outputs])
    cross_entropy = F.cross_entropy(logits, batch.targets, ignore_index=IGNORED)
    aux_loss = z_loss = torch.zeros((), dtype=logits.dtype)
    if model.config.num_experts:
        expert_ids = over_pieces(outputs, "expert_ids").flatten(2)  # [num_routed_layers, num_rows, experts_per_token]
        router_logits = over_pieces(outputs, "router_logits")  # [num_routed_layers, num_rows, num_experts]
        counts = F.one_hot(expert_ids, model.config.num_experts).sum(dim=[1, 2])
        f = counts * model.config.num_experts / expert_ids[0].numel()
        p = router_logits.softmax(-1).mean(1)
        aux_loss = aux_coefficient * (f * p).sum()
        z_loss = z_coefficient * router_logits.logsumexp(-1).square().mean(1).sum()
    return Losses(cross_entropy, aux_loss, z_loss, outputs)


def over_pieces(outputs: list[Output], field: str) -> torch.Tensor:
    """What each routed layer yielded for the rows of all pieces, `[num_routed_layers, num_rows, ..]`."""
    return torch.cat([torch.stack(getattr(output, field)) for output in outputs], dim=1)


def gradients_of(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(model.weights, torch.autograd.grad(loss, list(model.weights.values()))))


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradients.values()))


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest distance between gradients of the same weight, relative to the gradient's norm."""
    # The gradients of an expert that no row chose are zero.
    return max(((a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-30)).item() for name in a)


# Twenty steps.


def make_run(directory: Path) -> None:
    """Write the run of RUN_CASE, from the first seed whose losses are the same in f32."""
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        batches = [learnable_batch(vocab_size, generator) for _ in range(NUM_STEPS)]
        steps, steps_f32 = (train(trainable(directory, dtype), batches) for dtype in (torch.float64, torch.float32))
        difference = max(abs(a["cross_entropy"] - b["cross_entropy"]) for a, b in zip(steps, steps_f32))
        if difference < MAX_RUN_DIFFERENCE:
            break
    tensors = {name: torch.stack([getattr(batch, name) for batch in batches]).int() for name in ("tokens", "targets")}
    save_file({**tensors, "piece_offsets": batches[0].piece_offsets.int()}, directory / "run.safetensors")
    settings = {
        "aux_coefficient": RUN_AUX_COEFFICIENT,
        "z_coefficient": RUN_Z_COEFFICIENT,
        "beta1": ADAMW["betas"][0],
        "beta2": ADAMW["betas"][1],
        "eps": ADAMW["eps"],
        "weight_decay": ADAMW["weight_decay"],
        "clip": CLIP,
    }
    write_json(directory / "run.json", {**settings, "steps": steps})
    first, last = steps[0]["cross_entropy"], steps[-1]["cross_entropy"]
    num_clipped = sum(step["grad_norm"] > CLIP for step in steps)
    print(f"run: seed {seed}, loss {first:.3f} to {last:.3f}, {difference:.1e} from f32, {num_clipped} steps clipped")


def learnable_batch(vocab_size: int, generator: torch.Generator) -> Batch:
    """As `random_batch`, of documents in which most tokens follow from the one before."""
    batch = random_batch(vocab_size, generator)
    tokens = torch.cat([batch.tokens, batch.tokens[:1]])
    follows = torch.rand(tokens.shape, generator=generator) < 0.8
    for row in range(1, len(tokens)):
        if follows[row]:
            tokens[row] = (3 * tokens[row - 1] + 1) % vocab_size
    return Batch(tokens[:-1], torch.where(batch.targets == IGNORED, IGNORED, tokens[1:]), batch.piece_offsets)


def train(model: Model, batches: list[Batch]) -> list[dict]:
    """Train on one batch after another; return what each step began with."""
    weights, steps = list(model.weights.values()), []
    optimizer = torch.optim.AdamW(weights, **ADAMW)
    for step, batch in enumerate(batches):
        cosine = 0.5 * (1 + math.cos(math.pi * step / (len(batches) - 1)))
        learning_rate = LAST_LEARNING_RATE + (FIRST_LEARNING_RATE - LAST_LEARNING_RATE) * cosine
        optimizer.param_groups[0]["lr"] = learning_rate
        losses = losses_of(model, batch, RUN_AUX_COEFFICIENT, RUN_Z_COEFFICIENT)
        optimizer.zero_grad()
        losses.total().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        steps.append(
            {
                "learning_rate": learning_rate,
                "cross_entropy": losses.cross_entropy.item(),
                "aux_loss": losses.aux_loss.item(),
                "z_loss": losses.z_loss.item(),
                "grad_norm": grad_norm.item(),
            }
        )
    return steps


if __name__ == "__main__":
    main()
