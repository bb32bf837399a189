"""Train a small Pangu Pro MoE on text files, so that what quantisation costs can be told on a model that has learnt something.

Usage: python reference/train_small.py OUT [--text FILE ..] [--steps N]

Writes OUT/model, a checkpoint with its tokenizer, and OUT/held_out.txt, text that it has not seen: what
`moge perplexity --model A --baseline OUT/model --file OUT/held_out.txt` reads. Without --text, the sources and documents of
this repository are learnt. 400 steps take some ten minutes on two cores.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cases import PANGU_PRO_MOE
from make_goldens import tensor_shapes
from pangu import Config, Model, forward

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE_LEN = 384
SEQUENCES_PER_STEP = 2
LEARNING_RATE = 3e-3
BALANCE_WEIGHT = 0.01
# Every so many characters of the text, a hundredth of them is held out.
HELD_OUT_EVERY = 40_000

# All widths that a weight's row can have are multiples of 32, as W4A8 asks.
CONFIG = {
    **PANGU_PRO_MOE,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "vocab_size": 1024,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "shared_expert_intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="*")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    files = args.text or sorted(f for ext in ("md", "rs", "py") for f in ROOT.rglob(f"*.{ext}") if "target" not in f.parts)
    text = "\n".join(file.read_text() for file in files)
    kept, held_out = split(text)
    directory = args.out / "model"
    directory.mkdir(parents=True, exist_ok=True)
    (args.out / "held_out.txt").write_text(held_out)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer = train_tokenizer(kept)
    tokenizer.save(str(directory / "tokenizer.json"))

    tokens = torch.tensor(tokenizer.encode(kept).ids)
    print(f"{len(kept) / 1e6:.2f} M characters, {len(tokens) / 1e6:.2f} M tokens")
    weights = train(tokens, args.steps)
    save_file({name: w.detach().bfloat16() for name, w in weights.items()}, directory / "model.safetensors", {"format": "pt"})


def split(text: str) -> tuple[str, str]:
    """Text to learn, and text that is held out."""
    pieces = [text[i : i + HELD_OUT_EVERY] for i in range(0, len(text), HELD_OUT_EVERY)]
    num_held_out = HELD_OUT_EVERY // 100
    return "".join(p[num_held_out:] for p in pieces), "".join(p[:num_held_out] for p in pieces)


def train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def train(tokens: torch.Tensor, num_steps: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {name: first_weight(name, shape, generator).requires_grad_() for name, shape in tensor_shapes(CONFIG)}
    model = Model(Config.from_json(CONFIG), weights)
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.05)
    for step in range(num_steps):
        starts = torch.randint(len(tokens) - SEQUENCE_LEN - 1, [SEQUENCES_PER_STEP], generator=generator)
        total = 0.0
        for start in starts.tolist():
            sequence = tokens[start : start + SEQUENCE_LEN + 1]
            output = forward(model, sequence[:-1])
            loss = F.cross_entropy(output.logits, sequence[1:])
            ((loss + BALANCE_WEIGHT * imbalance(output)) / len(starts)).backward()
            total += loss.item() / len(starts)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {num_steps}: loss {total:.3f}", flush=True)
    return weights


def first_weight(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name or name.endswith("router_scale"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * (0.02 if "embed" in name else shape[-1] ** -0.5)


def imbalance(output) -> torch.Tensor:
    """One where an expert group's experts are taken equally often, more where not: tokens of each times probability."""
    total = 0.0
    for ids, probs in zip(output.expert_ids, output.router_probs):
        num_tokens, num_groups, experts_per_group = probs.shape
        counts = torch.bincount(ids.flatten(), minlength=num_groups * experts_per_group).view(num_groups, -1)
        within_group = (probs / probs.sum(-1, keepdim=True)).mean(0)
        total = total + (counts / num_tokens * within_group).sum() * experts_per_group / num_groups
    return total / len(output.expert_ids)


if __name__ == "__main__":
    main()
