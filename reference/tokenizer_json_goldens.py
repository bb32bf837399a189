"""Make goldens/tokenizer_json: small BPE tokenizers and what the `tokenizers` library does with them.

    python reference/tokenizer_json_goldens.py

`qwen3` has Qwen3's pre-tokenizer and no prefix, `glm4` has GLM-4's and puts `[gMASK]<sop>` before a text; `smollm2` cuts
digits as SmolLM2 does. These are byte-level. `llama2` is SentencePiece converted, as Llama 2 and Mistral publish it.
Each folder holds `tokenizer.json`, `tokenizer_config.json` and `cases.json`:
`encode` is a list of [text, ids, text of the ids], `decode` a list of [ids, text], many of them no valid UTF-8.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = Path(__file__).resolve().parent.parent / "goldens" / "tokenizer_json"
VOCAB_SIZE = 600

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

ENGLISH = "the a model routes each token to one expert of every group so that devices share work evenly and none waits".split()
CHINESE = "模型把每个词元送给各组中的一位专家于是设备均衡地分担计算没有谁需要等待系统用户助手工具方法".strip()
CODE = ["fn main() {", "    let x = &mut y[0..n];", "}", "for i in range(10):", "\tprint(f\"{i:>3}\")", "// note", "a += 1;", "x = {'k': [1, 2]}"]
OTHER = ["naïve café", "Ωμέγα", "привет мир", "日本語のテキスト", "한국어", "مرحبا", "שלום", "नमस्ते", "e\u0301a\u0308", "ﬁ Ⅷ ½"]
EMOJI = ["🙂", "👩‍👩‍👧", "🇨🇳", "✅", "🧑🏽‍💻"]
SPACES = [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", " \n ", "        "]
ODD = ["\x00", "\x07", "\x1b[0m", "\u200b", "\ufeff", "\ufffd", "\U0010ffff", "<0x0A>", "▁", "Ġ", "Ċ"]


def text(rng, parts):
    """A line of words, Chinese, code and numbers."""
    out = []
    for _ in range(parts):
        kind = rng.randrange(8)
        if kind < 3:
            out.append(" ".join(rng.choices(ENGLISH, k=rng.randint(1, 6))))
        elif kind == 3:
            start = rng.randrange(len(CHINESE) - 6)
            out.append(CHINESE[start : start + rng.randint(1, 6)] + rng.choice("，。！？："))
        elif kind == 4:
            out.append(rng.choice(CODE))
        elif kind == 5:
            out.append(str(rng.randrange(10 ** rng.randint(1, 9))))
        elif kind == 6:
            out.append(rng.choice(["it's", "WE'LL", "don't", "I'm", "they've", "O'D"]))
        else:
            out.append(rng.choice(OTHER))
    return rng.choice([" ", "", ", ", "\n"]).join(out)


def strings(rng, special, count):
    """Texts to encode: ordinary ones, and mixtures with everything that is easily got wrong."""
    fixed = ["", " ", "a", *SPACES, *ODD, *EMOJI, *OTHER, *CODE, *special, "".join(special), " ".join(special)]
    fixed += [token[:-1] for token in special] + [token + token for token in special]
    out = list(fixed)
    while len(out) < count:
        pieces = []
        for _ in range(rng.randint(1, 6)):
            pool = rng.choice([SPACES, ODD, EMOJI, OTHER, CODE, special, None, None])
            pieces.append(text(rng, rng.randint(1, 3)) if pool is None else rng.choice(pool))
        out.append("".join(pieces)[:120])
    return out[:count]


def train(split, vocab_size=VOCAB_SIZE):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rng = random.Random(1)
    tokenizer.train_from_iterator([text(rng, 12) for _ in range(400)], trainer)
    return tokenizer


def qwen3():
    tokenizer = train(rf"{CONTRACTION}|{WORDS}|\p{{N}}|{REST}")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return tokenizer, special + plain, config


def glm4():
    tokenizer = train(rf"{CONTRACTION}|{WORDS}|\p{{N}}{{1,3}}|{REST}")
    special = ["<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>"]
    special.append("<|observation|>")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    template = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair="[gMASK] <sop> $A $B",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    config = {"eos_token": {"content": "<|user|>", "special": True}, "pad_token": "<|endoftext|>"}
    return tokenizer, special, config


def smollm2():
    tokenizer = train(rf"{CONTRACTION}|{WORDS}|\p{{N}}|{REST}", vocab_size=320)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return tokenizer, special, config


def llama2():
    """Merges of a Metaspace BPE, put together as the converter of SentencePiece models does it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    rng = random.Random(1)
    trainer = trainers.BpeTrainer(vocab_size=350, limit_alphabet=120, show_progress=False)
    trained.train_from_iterator([text(rng, 12) for _ in range(400)], trainer)
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(model["vocab"], key=model["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizer, special, config


def has_mixed_bytes(tokenizer, ids):
    """Whether a run of byte tokens is partly UTF-8: the library then replaces all of it, SentencePiece only what is not."""
    runs, inside = [], False
    for id in ids:
        token = tokenizer.id_to_token(id)
        if token is None:
            continue
        is_byte = len(token) == 6 and token.startswith("<0x")
        if is_byte and inside:
            runs[-1] += bytes([int(token[3:5], 16)])
        elif is_byte:
            runs.append(bytes([int(token[3:5], 16)]))
        inside = is_byte
    texts = [run.decode(errors="replace") for run in runs]
    return any("\ufffd" in text and text.strip("\ufffd") for text in texts)


def write(name, tokenizer, special, config, num_encode=400, num_decode=200):
    rng = random.Random(2)
    encode = []
    for string in strings(rng, special, num_encode):
        ids = tokenizer.encode(string, add_special_tokens=False).ids
        encode.append([string, ids, tokenizer.decode(ids, skip_special_tokens=False)])
    decode = []
    while len(decode) < num_decode:
        ids = [rng.randrange(tokenizer.get_vocab_size() + 20) for _ in range(rng.randint(1, 12))]
        if name == "llama2" and has_mixed_bytes(tokenizer, ids):
            continue
        decode.append([ids, tokenizer.decode(ids, skip_special_tokens=False)])
    prefix = tokenizer.encode("").ids
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    dump = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    published = tokenizer.to_str(pretty=False)
    if name == "llama2":
        # Older files spell a merge as one string.
        fields = json.loads(published)
        fields["model"]["merges"] = [" ".join(merge) for merge in fields["model"]["merges"]]
        published = dump(fields)
    (folder / "tokenizer.json").write_text(published + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    cases = {"prefix": prefix, "encode": encode, "decode": decode}
    # One case a line, so that a change of one is a change of one line.
    lines = [f'"{key}":[\n' + ",\n".join(map(dump, value)) + "\n]" for key, value in cases.items()]
    (folder / "cases.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    write("qwen3", *qwen3())
    write("glm4", *glm4())
    write("smollm2", *smollm2(), num_encode=90, num_decode=40)
    write("llama2", *llama2(), num_encode=130, num_decode=100)
