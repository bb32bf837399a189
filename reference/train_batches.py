"""Write the tokens that training is measured on, in the tokenised format of the trainer.

Usage: python reference/train_batches.py OUT --vocab-size N --num-sequences N --sequence-length N --num-steps N [--seed N]

    tokens            U16 [num_steps * num_sequences * sequence_length]
    document_offsets  I64 [num_steps * num_sequences + 1]

Each sequence is a document of its own. The text can be learnt, so that a wrong gradient shows in the loss: every other
token or so follows from the one before it, the others are drawn by Zipf's law.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    for name in ("vocab-size", "num-sequences", "sequence-length", "num-steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    shape = (args.num_steps * args.num_sequences, args.sequence_length)
    tokens = learnable_tokens(args.vocab_size, shape, torch.Generator().manual_seed(args.seed))
    offsets = torch.arange(shape[0] + 1) * args.sequence_length
    save_file({"tokens": tokens.flatten().to(torch.uint16), "document_offsets": offsets}, args.out)


def learnable_tokens(vocab_size: int, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Random tokens `[num_sequences, sequence_length]`, half of which are a function of their predecessor."""
    frequencies = 1.0 / torch.arange(1, vocab_size + 1)
    drawn = torch.multinomial(frequencies, shape[0] * shape[1], replacement=True, generator=generator)
    successor = torch.randperm(vocab_size, generator=generator)
    follows = torch.rand(shape, generator=generator) < 0.5
    tokens = drawn.view(shape)
    for column in range(1, shape[1]):
        tokens[:, column] = torch.where(follows[:, column], successor[tokens[:, column - 1]], tokens[:, column])
    return tokens


if __name__ == "__main__":
    main()
