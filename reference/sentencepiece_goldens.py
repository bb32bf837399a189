"""Small SentencePiece BPE models, and what the C++ library encodes and decodes with them.

    pip install sentencepiece==0.2.3 protobuf
    python reference/sentencepiece_goldens.py

Writes to goldens/sentencepiece/:
  texts.json    a list of strings
  NAME.model    a model, trained here on the sentences below
  NAME.json     {"texts": [[ids, decoded], ..] for each string; decoded is null where it is the string itself,
                 "pieces": [decoded, ..] for each id alone,
                 "sequences": [[ids, decoded], ..] for random ids}

Everything is derived from this file: the same library version writes the same bytes.
"""

import io
import json
import random
import tempfile
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as model_pb

OUT = Path(__file__).resolve().parent.parent / "goldens" / "sentencepiece"
NUM_TEXTS = 1000
NUM_SEQUENCES = 150

ENGLISH = """The quick brown fox jumps over the lazy dog while the children watch from the garden.
Mixture of grouped experts balances the load of experts across devices by design.
A router chooses one expert in every group, so that each device computes the same amount.
Large language models predict the next token from the tokens before it.
Please write a short story about a river that forgot the way to the sea.
How many days are there between 3 March 2021 and 17 November 2024? About 1355.
The price rose from $12.50 to $1,024.00, that is by 8092 percent!
She said: "I don't know, but it's probably the other one's fault."
Weather today: 21.5 degrees, wind 7 m/s, humidity 63%, no rain expected.
Reading and writing are two sides of the same coin; speaking and listening are two more."""
CHINESE = """大语言模型根据前面的词预测下一个词。
混合分组专家模型在设计上平衡了各个设备的负载。
今天天气很好，我们去公园散步吧！
请给我简短地介绍一下大语言模型。
北京是中华人民共和国的首都，上海是最大的城市。
他说：“我不知道，可能是别人的错。”
二〇二四年十一月十七日，气温21.5度，风速7米每秒。
你好，世界！你好，朋友！
模型的训练需要大量的数据和计算资源。
学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"""
CODE = """def main(args):
    for i in range(10):
        print(i, args[i] if i < len(args) else None)
    return {"key": [1, 2, 3], 'other': {'nested': True}}
fn sum(values: &[f32]) -> f32 { values.iter().sum() }
#include <stdio.h>
int main(void) { printf("%d\\n", 42); return 0; }
SELECT name, count(*) FROM users WHERE age >= 18 GROUP BY name;
if (x != y && z == 0x1F) { x += 1; } else { y -= 1; }
https://example.com/path?query=value&page=2#anchor"""
OTHER = """Привет, мир! Как дела?
こんにちは、世界。カタカナとひらがな。
안녕하세요 세계
Übergröße naïve café déjà señor
α + β = γ, ∑ x² ≤ ∞
😀 😃 👍 ❤️ 🎉"""

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"] + [f"[unused{n}]" for n in (9, 10, 11, 12, 16, 17)]
LONE_PIECES = ["<0x0A>", "<0x00>", "<0xE4>", "<0xe4>", "<0xFF>", "<0x1>", "▁", "▁▁", "▁the", "<0xE4><0xBD>"]
EMOJI = ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇳", "❤️", "☺", "🧑🏿‍🚀", "1️⃣", "😀", "🫠"]
COMBINING = ["e\u0301", "a\u0308o\u0308", "Z\u0351\u036b\u0343", "\u0301", "한", "각", "நி", "กำ", "ﷺ", "Å", "ﬁ", "ǅ", "ẞ", "İ"]
CONTROLS = ["\0", "\x01", "\x07", "\x1b[0m", "\x7f", "\x85", "\xa0", "\xad", "\u200b", "\u200d", "\u200e", "\u2028",
            "\u2060", "\u3000", "\ufeff", "\ufffd", "\ufffe", "\U000e0041", "\U0010ffff", "\u2000", "\u202f", "\u205f"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "        ", " \t ", "\u3000 ", " \u00a0"]
WIDE = ["ＡＢＣ１２３", "，。！？", "％＄", "ｶﾞｷﾞ", "①②㈱", "½ ㎏ ™", "Ⅷ", "㍿", "ＩＶ ｉｖ", "…", "‥", "ﾊﾟ"]
OVERLAPPING = ["ab", "abc", "abcd", "bcd", "a b", "a  b", "<a>", "<a><b>", "<b>", "xyz", "xy", "yz"]


def training_text():
    """Sentences, mixed and repeated so that merges have something to count."""
    rng = random.Random(7)
    lines = [line for text in (ENGLISH, CHINESE, CODE, OTHER) for line in text.splitlines()]
    for _ in range(400):
        text = rng.choice([ENGLISH, ENGLISH, CHINESE, CODE])
        words = rng.choice(text.splitlines()).split(" ")
        rng.shuffle(words)
        lines.append(" ".join(words))
    return lines


def test_texts():
    """Strings of every kind, and random mixtures of them."""
    rng = random.Random(11)
    sentences = [line for text in (ENGLISH, CHINESE, CODE, OTHER) for line in text.splitlines()]
    awkward = SPECIALS + LONE_PIECES + EMOJI + COMBINING + CONTROLS + SPACES + WIDE + OVERLAPPING
    texts = ["", *sentences, *awkward, CODE, "a" * 300, "ab" * 100, " " * 100, "中" * 200, "1234567890" * 12, "▁" * 40]
    texts += [left + right for left in SPACES[:6] for right in ["the", "你好", "[unused9]", "<s> x", "▁", ""]]
    texts += [left + right for left in ["the", "你好", "[unused9]", "</s>"] for right in SPACES]
    words = [word for sentence in sentences for word in sentence.split(" ")]
    while len(texts) < NUM_TEXTS:
        parts = []
        for _ in range(rng.randint(1, 7)):
            kind = rng.random()
            if kind < 0.35:
                parts.append(rng.choice(words))
            elif kind < 0.5:
                sentence = rng.choice(sentences)
                start = rng.randrange(len(sentence))
                parts.append(sentence[start:start + rng.randint(1, 12)])
            elif kind < 0.65:
                parts.append(rng.choice(SPACES))
            elif kind < 0.9:
                parts.append(rng.choice(awkward))
            elif kind < 0.95:
                parts.append("".join(rng.choice("abcd <>xyz") for _ in range(rng.randint(1, 10))))
            else:
                parts.append("".join(random_character(rng) for _ in range(rng.randint(1, 4))))
        texts.append("".join(parts))
    return texts


def random_character(rng):
    limit = rng.choice([0x80, 0x800, 0x3000, 0x10000, 0x110000])
    while 0xD800 <= (code := rng.randrange(limit)) < 0xE000:
        pass
    return chr(code)


def train(**options):
    settings = dict(model_type="bpe", num_threads=1, hard_vocab_limit=False, minloglevel=2) | options
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(training_text()), model_writer=model, **settings)
    return model_pb.ModelProto.FromString(model.getvalue())


def pangu_like():
    return train(vocab_size=760, normalization_rule_name="identity", byte_fallback=True, split_digits=True,
                 add_dummy_prefix=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
                 character_coverage=0.995, pad_id=3,
                 control_symbols=["[unused9]", "[unused10]", "[unused11]", "[unused12]"],
                 user_defined_symbols=["[unused16]", "[unused17]", "\n", "\t"])


def nmt_nfkc():
    return train(vocab_size=430, normalization_rule_name="nmt_nfkc", character_coverage=0.98)


def nmt_nfkc_cf():
    return train(vocab_size=590, normalization_rule_name="nmt_nfkc_cf", add_dummy_prefix=False, byte_fallback=True,
                 remove_extra_whitespaces=False, user_defined_symbols=["ＡＢＣ", "[unused9]"])


def user_defined():
    return train(vocab_size=470, normalization_rule_name="identity", remove_extra_whitespaces=False,
                 split_by_whitespace=False, unk_surface="<?>", user_defined_symbols=OVERLAPPING + ["▁▁", "，", "the"])


def unused():
    """Merged pieces, halves of merged pieces, and single characters that encoding must not yield."""
    model = pangu_like()
    rng = random.Random(13)
    for piece in model.pieces:
        if piece.type == model_pb.ModelProto.SentencePiece.NORMAL and rng.random() < 0.3:
            piece.type = model_pb.ModelProto.SentencePiece.UNUSED
    return model


def suffix():
    """Spaces after words, and rules that delete, that yield spaces, and of which one begins like another."""
    rules = [("\u00ad", ""), ("\u3000", " "), ("\t", "  "), ("...", "…"), ("..", " . "), ("…", "..."), ("①", " 1"),
             ("ab", "b"), ("abc", "c "), ("❤️", "love"), ("❤", "like")]
    lines = [" ".join(f"{ord(char):X}" for char in key) + "\t" + " ".join(f"{ord(char):X}" for char in value)
             for key, value in rules]
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as tsv:
        tsv.write("\n".join(lines) + "\n")
        tsv.flush()
        model = train(vocab_size=410, normalization_rule_tsv=tsv.name, treat_whitespace_as_suffix=True)
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    return model


def unescaped():
    """Spaces stay spaces, extra ones go."""
    model = pangu_like()
    model.normalizer_spec.escape_whitespaces = False
    model.normalizer_spec.remove_extra_whitespaces = True
    for piece in model.pieces:
        piece.piece = piece.piece.replace("▁", " ")
    return model


def lines_of(items):
    """A JSON list with one item a line."""
    return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items) + "\n]"


def record(name, model, texts):
    processor = spm.SentencePieceProcessor(model_proto=model.SerializeToString())
    rng = random.Random(name)
    encoded = []
    for text in texts:
        ids = processor.encode(text)
        decoded = processor.decode(ids)
        encoded.append([ids, None if decoded == text else decoded])
    num_pieces = processor.get_piece_size()
    # Byte pieces and special pieces are the interesting ones, and lie first.
    sequences = [[rng.randrange(rng.choice([8, min(280, num_pieces), num_pieces])) for _ in range(rng.randint(1, 9))]
                 for _ in range(NUM_SEQUENCES)]
    (OUT / f"{name}.model").write_bytes(model.SerializeToString(deterministic=True))
    (OUT / f"{name}.json").write_text(
        '{"texts":' + lines_of(encoded)
        + ',\n"pieces":' + json.dumps([processor.decode([i]) for i in range(num_pieces)], ensure_ascii=False)
        + ',\n"sequences":' + lines_of([[ids, processor.decode(ids)] for ids in sequences]) + "}\n")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    texts = test_texts()
    (OUT / "texts.json").write_text(lines_of(texts) + "\n")
    for build in (pangu_like, nmt_nfkc, nmt_nfkc_cf, user_defined, unused, suffix, unescaped):
        record(build.__name__, build(), texts)


if __name__ == "__main__":
    main()
