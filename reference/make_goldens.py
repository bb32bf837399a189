"""Make `goldens/`: small random checkpoints and what the reference computes from them. See README.md.

Usage: python reference/make_goldens.py

For each case, seeds are tried in order until no recorded choice is close: a greedy token or an expert that wins by a
hair could flip with the order of an f32 sum, and a golden file must not depend on that.
"""

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from cases import CASES, Case
from pangu import Config, Model, Output, forward

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
NUM_GREEDY_TOKENS = 64
# f32 results differ by about 1e-5 between orders of summation; choices must be a hundred times clearer.
MIN_MARGIN = 1e-3
# With bf16 activations, f32 noise can tip a rounding and so move a router's logit by one bf16 step of one input.
MIN_MARGIN_BF16 = 5e-3
# Fewer distinct tokens than this, and the continuation has fallen into a loop that proves little.
MIN_DISTINCT_GREEDY_TOKENS = 24
# Between our forward and transformers', in log-probability, hidden state and expert weight.
ORACLE_TOLERANCE = 1e-5
# Pangu Pro MoE is not in transformers, and for Pangu Embedded a Llama stands in.
TRANSFORMERS = {
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "Glm4ForCausalLM": Glm4ForCausalLM,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    torch.set_num_threads(1)  # The order of sums, and so the recorded bits, must not depend on the machine's cores.
    disable_progress_bar()
    print("                           closest margin of a    largest difference in log-probability")
    print("case                  seed    token   expert    f32 to f64  bf16 to f32  bf16 on f32 to bf16 on f64")
    for case in CASES:
        make_case(case)
    total_bytes = sum(file.stat().st_size for file in GOLDENS.rglob("*") if file.is_file())
    print(f"{total_bytes / 1e6:.2f} MB in {GOLDENS.name}/")


@dataclass(frozen=True)
class Recording:
    """What our forward yields for a case whose choices are all clear."""

    output: Output
    simulated: Output  # With bf16 activations.
    greedy_tokens: torch.Tensor  # [NUM_GREEDY_TOKENS]
    token_margin: float  # Closest logit of a greedy token over the next best, absolute.
    expert_margin: float  # Closest probability of a chosen expert over the next best, relative.


def make_case(case: Case) -> None:
    """Write `goldens/<case>/` from the first seed whose choices are all clear."""
    directory = GOLDENS / case.name
    for seed in itertools.count():
        tokens = write_checkpoint(case, directory, seed)
        prompt = tokens[: case.num_prompt_tokens]
        recording = record_if_clear(Model.load(directory), tokens, prompt)
        if recording:
            break

    output, simulated = recording.output, recording.simulated
    logits, hidden = ask_transformers(case, directory, tokens, output) or (output.logits, output.hidden)
    expected = {
        "tokens": tokens.int(),
        "logits": logits,
        "hidden": hidden,
        "logits_bf16_activations": simulated.logits,
        "greedy_prompt": prompt.int(),
        "greedy_tokens": recording.greedy_tokens.int(),
    }
    if output.expert_ids:
        expected["expert_ids"] = torch.stack(output.expert_ids).int()
        expected["expert_weights"] = torch.stack(output.expert_weights)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, directory / "expected.safetensors")

    model_f64 = Model.load(directory, torch.float64)
    distances = [
        logprob_distance(logits, forward(model_f64, tokens).logits),
        logprob_distance(logits, simulated.logits),
        logprob_distance(simulated.logits, forward(model_f64, tokens, bf16_activations=True).logits),
    ]
    margins = f"{recording.token_margin:7.4f} {recording.expert_margin:8.4f}"
    print(f"{case.name:21} {seed:4}  {margins} {distances[0]:13.1e} {distances[1]:12.3f} {distances[2]:27.3f}")


def record_if_clear(model: Model, tokens: torch.Tensor, prompt: torch.Tensor) -> Recording | None:
    """Run `tokens`, and `prompt` with its greedy continuation; None if any choice is close or the text dull."""
    output = forward(model, tokens)
    simulated = forward(model, tokens, bf16_activations=True)
    if routing_margin(output) < MIN_MARGIN or routing_margin(simulated) < MIN_MARGIN_BF16:
        return None
    if not all(torch.equal(x, y) for x, y in zip(output.expert_ids, simulated.expert_ids)):
        return None
    greedy_tokens, token_margin, expert_margin = continue_greedily(model, prompt)
    if min(token_margin, expert_margin) < MIN_MARGIN or len(greedy_tokens.unique()) < MIN_DISTINCT_GREEDY_TOKENS:
        return None
    expert_margin = min(expert_margin, routing_margin(output))
    return Recording(output, simulated, greedy_tokens, token_margin, expert_margin)


# The checkpoint.


def write_checkpoint(case: Case, directory: Path, seed: int) -> torch.Tensor:
    """Write config and random weights in the official layout; return the case's random tokens `[num_tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    raw = case.config
    dtype = DTYPES[raw.get("torch_dtype") or raw["dtype"]]
    weights = {name: random_weight(name, shape, generator).to(dtype) for name, shape in tensor_shapes(raw)}

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_json(directory / "config.json", raw)
    if case.generation_config:
        write_json(directory / "generation_config.json", case.generation_config)
    write_weights(directory, weights, case.num_shards)
    return torch.randint(raw["vocab_size"], [case.num_tokens], generator=generator)


def tensor_shapes(raw: dict):
    """Yield the name and shape of each tensor that the official checkpoint of this architecture holds."""
    config, hidden_size = Config.from_json(raw), raw["hidden_size"]
    architecture = raw["architectures"][0]
    is_pangu, is_glm4 = architecture.startswith("Pangu"), architecture == "Glm4ForCausalLM"
    has_shared_expert = architecture == "PanguProMoEForCausalLM"
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim

    yield "model.embed_tokens.weight", [raw["vocab_size"], hidden_size]
    for n in range(config.num_layers):
        layer = f"model.layers.{n}"
        yield f"{layer}.input_layernorm.weight", [hidden_size]
        yield f"{layer}.post_attention_layernorm.weight", [hidden_size]
        if is_glm4:
            yield f"{layer}.post_self_attn_layernorm.weight", [hidden_size]
            yield f"{layer}.post_mlp_layernorm.weight", [hidden_size]
        for name, size in [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)]:
            yield f"{layer}.self_attn.{name}.weight", [size, hidden_size]
            if is_pangu or raw["attention_bias"]:
                yield f"{layer}.self_attn.{name}.bias", [size]
        yield f"{layer}.self_attn.o_proj.weight", [hidden_size, q_size]
        if is_pangu or (architecture == "LlamaForCausalLM" and raw["attention_bias"]):
            yield f"{layer}.self_attn.o_proj.bias", [hidden_size]
        if architecture.startswith("Qwen3"):
            yield f"{layer}.self_attn.q_norm.weight", [config.head_dim]
            yield f"{layer}.self_attn.k_norm.weight", [config.head_dim]
        if n in config.routed_layers:
            yield f"{layer}.mlp.gate.weight", [config.num_experts, hidden_size]
            if has_shared_expert:
                yield f"{layer}.mlp.router_scale", [1, config.num_experts]
            for expert in range(config.num_experts):
                yield from mlp_shapes(f"{layer}.mlp.experts.{expert}", hidden_size, raw["moe_intermediate_size"])
            if has_shared_expert:
                yield from mlp_shapes(f"{layer}.mlp.shared_expert", hidden_size, raw["shared_expert_intermediate_size"])
        elif is_glm4:
            yield f"{layer}.mlp.gate_up_proj.weight", [2 * raw["intermediate_size"], hidden_size]
            yield f"{layer}.mlp.down_proj.weight", [hidden_size, raw["intermediate_size"]]
        else:
            yield from mlp_shapes(f"{layer}.mlp", hidden_size, raw["intermediate_size"])
    yield "model.norm.weight", [hidden_size]
    if not config.tie_word_embeddings:
        yield "lm_head.weight", [raw["vocab_size"], hidden_size]


def mlp_shapes(name: str, hidden_size: int, intermediate_size: int):
    yield f"{name}.gate_proj.weight", [intermediate_size, hidden_size]
    yield f"{name}.up_proj.weight", [intermediate_size, hidden_size]
    yield f"{name}.down_proj.weight", [hidden_size, intermediate_size]


def random_weight(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Draw a weight such that activations are of order one, attention looks about, and routing and logits spread."""
    if "norm" in name or name.endswith("router_scale"):  # Around one, so that swapped ones cannot pass.
        return 0.5 + torch.rand(shape, generator=generator)
    normal = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return 0.3 * normal
    louder = (".o_proj.", ".down_proj.", ".gate.", "embed_tokens.", "lm_head.")
    gain = 1.6 if any(part in name for part in louder) else 1.2
    return gain * normal / shape[-1] ** 0.5


def write_weights(directory: Path, weights: dict[str, torch.Tensor], num_shards: int) -> None:
    """Write one file, or shards of about equal size (cut without regard to layers) and their index."""
    if num_shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    total_size = sum(w.nbytes for w in weights.values())
    shards, begin = [{} for _ in range(num_shards)], 0
    for name, w in weights.items():
        shards[begin * num_shards // total_size][name] = w
        begin += w.nbytes
    weight_map = {}
    for n, shard in enumerate(shards, start=1):
        file = f"model-{n:05}-of-{num_shards:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# The choices.


def routing_margin(output: Output) -> float:
    """Return by how much, relatively, each choice beats the next in its expert group, at the closest of all.

    The next is the expert chosen after it or, for the last one chosen, the best that was not.
    """
    margin = float("inf")
    for probs, expert_ids in zip(output.router_probs, output.expert_ids):
        chosen_and_next = probs.sort(dim=-1, descending=True).values[..., : expert_ids.shape[-1] + 1]
        better, worse = chosen_and_next[..., :-1], chosen_and_next[..., 1:]
        margin = min(margin, ((better - worse) / better).min().item())
    return margin


def continue_greedily(model: Model, prompt: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Continue with the likeliest token, over and over, past any end-of-sequence token.

    Returns the tokens `[NUM_GREEDY_TOKENS]` and the closest margins: of a logit over the next best (absolute) and of
    an expert over the next best (relative).
    """
    tokens, token_margin = prompt, float("inf")
    for _ in range(NUM_GREEDY_TOKENS):
        output = forward(model, tokens)
        best, second = output.logits[-1].topk(2).values.tolist()
        token_margin = min(token_margin, best - second)
        tokens = torch.cat([tokens, output.logits[-1].argmax(keepdim=True)])
    return tokens[len(prompt) :], token_margin, routing_margin(output)


# The second opinion.


def ask_transformers(case: Case, directory: Path, tokens: torch.Tensor, ours: Output):
    """Return transformers' logits and hidden states, after a check that ours agree; None where it has no such model.

    Pangu Embedded is a Llama with a bias on each of attention's projections: there the agreement is checked, and
    our own result is kept.
    """
    architecture = case.config["architectures"][0]
    if architecture == "PanguProMoEForCausalLM":
        return None
    if architecture == "PanguEmbeddedForCausalLM":
        keys = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
            " rms_norm_eps rope_theta tie_word_embeddings max_position_embeddings"
        ).split()
        options = {key: case.config[key] for key in keys}
        network, source = LlamaForCausalLM, {"config": LlamaConfig(attention_bias=True, **options)}
    else:
        network, source = TRANSFORMERS[architecture], {}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # Grouped products refuse odd widths.
    theirs, report = network.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **eager, **source
    )
    assert not any(report.values()), report

    # transformers' own `output_hidden_states` ends with the normed state; record what enters each layer and the norm.
    hidden = []
    for module in [*theirs.model.layers, theirs.model.norm]:
        module.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0]))
    routes = record_routes(theirs)
    with torch.no_grad():
        logits = theirs(input_ids=tokens[None]).logits[0]
    hidden = torch.stack(hidden)

    assert logprob_distance(ours.logits, logits) < ORACLE_TOLERANCE, case.name
    assert (ours.hidden - hidden).abs().max() < ORACLE_TOLERANCE, case.name
    assert len(routes) == len(ours.expert_ids), case.name
    for (expert_weights, expert_ids), our_ids, our_weights in zip(routes, ours.expert_ids, ours.expert_weights):
        assert torch.equal(expert_ids, our_ids.flatten(1)), case.name
        assert (expert_weights - our_weights.flatten(1)).abs().max() < ORACLE_TOLERANCE, case.name
    return None if architecture == "PanguEmbeddedForCausalLM" else (logits, hidden)


def record_routes(network: PreTrainedModel) -> list:
    """Return a list that gets weights and ids of the chosen experts, `[num_tokens, top_k]`, from each routed layer."""
    routes = []
    for layer in network.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(lambda _module, _inputs, outputs: routes.append(outputs[1:]))
    return routes


def logprob_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double().log_softmax(-1) - b.double().log_softmax(-1)).abs().max().item()


if __name__ == "__main__":
    main()
