"""Make goldens/chat: what Jinja2, set up as `transformers` sets it up, makes of chat templates.

    python reference/chat_goldens.py

Templates: four of our own in goldens/chat, with the constructs of those of Qwen3 (also Qwen3-MoE's), GLM-4, SmolLM2 (plain
ChatML, by a Llama) and Llama 3.1, and the one that is built in for Pangu. `cases.json` holds
- `messages`, `tools`: pools that cases draw from;
- for each template its name: [[indices of messages, results], ..] for every combination of roles of up to four messages,
  for the Llamas' of up to three. There is a result for each of: tools or none, add_generation_prompt or not, enable_thinking not given, true or false;
  the last varies fastest. It is the text's FNV-1a hash (32 bits), without messages the text
  itself, and null if the template fails;
- `context`, `expressions`: [template, text or null], rendered with that context.
"""

import itertools
import json
import random
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "goldens" / "chat"
TEMPLATES = {
    "qwen3_like": OUT / "qwen3_like.jinja",
    "glm4_like": OUT / "glm4_like.jinja",
    "pangu": ROOT / "crates" / "moge-model" / "src" / "chat_template" / "pangu.jinja",
    "smollm2_like": OUT / "smollm2_like.jinja",
    "llama3_like": OUT / "llama3_like.jinja",
}
MAX_MESSAGES = {"qwen3_like": 4, "glm4_like": 4, "pangu": 4, "smollm2_like": 3, "llama3_like": 3}
ROLES = ["system", "user", "assistant", "tool"]
THINKING = [None, True, False]


class Generation(Extension):
    """`{% generation %}` prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def message_pool():
    """Three or four messages of every role."""
    call = lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}}
    parts = [{"type": "text", "text": "看 <b>"}, {"type": "text", "text": " & 'this'\n"}]
    arguments = {"città": "Zürich", "days": 3, "exact": 0.1, "tiny": 1e-7, "none": None, "flags": [True, False], "o": {}}
    return {
        "system": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": ""},
            {"role": "system", "content": "  你是助手。\n"},
        ],
        "user": [
            {"role": "user", "content": "Hi \U0001f642"},
            {"role": "user", "content": "<tool_response>x</tool_response>"},
            {"role": "user", "content": parts},
            {"role": "user", "content": "用户：\"quoted\" \\ {{ not.jinja }}", "metadata": "m"},
        ],
        "assistant": [
            {"role": "assistant", "content": "\nHello.\n"},
            {"role": "assistant", "content": "<think>\nhm\n\n</think>\n\nYes."},
            {"role": "assistant", "content": "No.", "reasoning_content": "\nWhy not?\n"},
            {"role": "assistant", "content": None, "tool_calls": [call("weather", arguments), call("now", {})]},
            {"role": "assistant", "content": "Calling.", "tool_calls": [call("f", '{"x":1}')]},
        ],
        "tool": [
            {"role": "tool", "content": '{"temp": 21.5}', "tool_call_id": "1"},
            {"role": "tool", "content": "多云"},
            {"role": "tool", "content": [{"type": "text", "text": "ok"}]},
        ],
    }


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather of <city> & \"more\": 天气",
            "parameters": {
                "type": "object",
                "properties": {"città": {"type": "string", "enum": []}, "days": {"type": "integer", "default": -1}},
                "required": ["città"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]

X = {"s": " a,b,,c ", "n": None, "t": True, "i": 7, "f": 2.5, "l": [3, 1, 2], "d": {"b": 1, "a": [None, "x"]}, "u": "é文\U0001f642\x7f"}
EXPRESSIONS = [
    "{{ s.strip() }}|{{ s.split(',') }}|{{ s.split(',')[1] }}|{{ s.split() }}|{{ s.split(',', 1) | length }}",
    "{{ 'xxaxx'.strip('x') }}|{{ 'xya'.lstrip('yx') }}|{{ 'a\n\n'.rstrip('\n') }}|{{ s.replace(',', ';') }}",
    "{{ s.startswith(' a') }}|{{ s.endswith(('c', 'c ')) }}|{{ s.upper() }}|{{ 'Ab'.lower() }}|{{ 'ab cd'.title() }}",
    "{{ 'ab'.find('b') }}|{{ 'ab'.find('z') }}|{{ 'a.b'.join(['1', '2']) }}|{{ 'abca'.count('a') }}|{{ '12'.isdigit() }}",
    "{{ n }}|{{ t }}|{{ i }}|{{ f }}|{{ l }}|{{ d }}|{{ missing }}|{{ 1.0 }}|{{ [none, true, 'a\\'b', 1.5] }}",
    "{{ n ~ t ~ i ~ f ~ l }}|{{ 'a' ~ missing }}|{{ 'x' * 3 }}|{{ [1] + l }}|{{ [0] * 2 }}",
    "{{ l[::-1] }}|{{ l[1:] }}|{{ l[:-1] }}|{{ l[-1] }}|{{ u[::-1] }}|{{ u[0] }}|{{ l | reverse | list }}|{{ l[5:] }}",
    "{{ d | tojson }}|{{ d | tojson(indent=2) }}|{{ d | tojson(sort_keys=True) }}|{{ d | tojson(separators=(',', ':')) }}",
    "{{ u | tojson }}|{{ u | tojson(ensure_ascii=True) }}|{{ '<&\\'>\"\\\\/' | tojson }}|{{ '\b\f\n\r\t\x00\x1f' | tojson }}",
    "{{ [] | tojson(indent=1) }}|{{ {} | tojson(indent=1) }}|{{ [[], {}, [1]] | tojson(indent=0) }}|{{ [1] | tojson(indent='--') }}",
    "{{ 1e16 | tojson }}|{{ 0.00001 | tojson }}|{{ 123456789012345680.0 | tojson }}|{{ 0.1 | tojson }}|{{ -0.0 | tojson }}|{{ 1e300 | tojson }}",
    "{{ {1: 2, none: 3, true: 4, 1.5: 5} | tojson }}|{{ (1, 'a') | tojson }}|{{ 12345678901234567890 | tojson }}",
    "{{ [1, 2] | tojson(True, 1) }}",
    "{{ missing | tojson }}",
    "{{ missing.x }}",
    "{{ d.missing is defined }}|{{ d.missing }}|{{ d['b'] }}|{{ d.get('z', 9) }}|{{ d.get('z') }}|{{ d['a'][1] }}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}{{ d.keys() | list }}",
    "{% for k, v in d | dictsort %}{{ k }}={{ v }};{% endfor %}{{ d.values() | list }}|{{ d | length }}|{{ d | items | list }}",
    "{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.length }};{% endfor %}",
    "{% for x in l if x > 1 %}{{ x }}{% else %}none{% endfor %}{% for x in [] %}{{ x }}{% else %}none{% endfor %}",
    "{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% if x == 2 %}{% break %}{% endif %}{% endfor %}",
    "{% set x = 1 %}{% for y in l %}{% set x = y %}{% endfor %}{{ x }}",
    "{% set ns = namespace(a=1, b=[]) %}{% for y in l %}{% set ns.a = ns.a + y %}{% set ns.b = ns.b + [y] %}{% endfor %}{{ ns.a }}{{ ns.b }}",
    "{% set x %}a{{ i }}{% endset %}{{ x | length }}{{ x }}",
    "{% macro m(a, b='c', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }}{{ m(1, c=2) }}{{ m(b='x', a='y') }}",
    "{% call(x) twice() %}{% endcall %}",
    "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{% endcall %}",
    "{% with a=1, b=2 %}{{ a + b }}{% endwith %}{% filter upper %}ab{% endfilter %}",
    "{% generation %}{% set y = 1 %}g{{ y }}{% endgeneration %}{{ y is defined }}",
    "a\n{% if true %}\n  b\n{% endif %}\n  {% if true %}c{% endif %}\n{# d #}\ne\n",
    "a\n  {%- if true -%}\n  b\n{%- endif %}\n  {%+ if true %}c{% endif +%}\nd\n\n",
    "{{ s is string }}|{{ l is string }}|{{ l is iterable }}|{{ s is iterable }}|{{ d is mapping }}|{{ l is sequence }}|{{ i is number }}|{{ n is none }}|{{ t is boolean }}|{{ i is integer }}|{{ f is float }}",
    "{{ t is true }}|{{ t is false }}|{{ i is odd }}|{{ 4 is divisibleby 2 }}|{{ 1 in l }}|{{ 'b' in d }}|{{ 'a,' in s }}|{{ 9 not in l }}|{{ i is eq 7 }}|{{ 1 == 1.0 }}|{{ t == 1 }}",
    "{{ 7 // 2 }}|{{ -7 // 2 }}|{{ 7 % 3 }}|{{ -7 % 3 }}|{{ 7 / 2 }}|{{ 2 ** 3 }}|{{ 6 / 2 }}|{{ 1 < 2 < 3 }}|{{ not t }}|{{ n or 'd' }}|{{ 0 and 1 }}",
    "{{ 'yes' if t else 'no' }}|{{ 'yes' if n }}|{{ n | default('d') }}|{{ n | default('d', true) }}|{{ missing | default('d') }}",
    "{{ l | join('-') }}|{{ l | sort | first }}|{{ l | last }}|{{ l | max }}|{{ l | min }}|{{ l | sum }}|{{ l | map('string') | join }}|{{ l | unique | list }}",
    "{{ [{'a': 1}, {'a': 2, 'b': 3}] | map(attribute='a') | list }}|{{ [{'a': 1}, {'b': 3}] | selectattr('a', 'defined') | list }}",
    "{{ [{'a': 'x'}, {'a': 'y'}] | selectattr('a', 'equalto', 'y') | list }}|{{ [{'a': 'x'}, {'a': 'y'}] | rejectattr('a', 'eq', 'y') | list }}|{{ l | select('odd') | list }}|{{ l | reject('odd') | list }}",
    "{{ ' x ' | trim }}|{{ 'xax' | trim('x') }}|{{ 'a b' | capitalize }}|{{ 'ab' | upper }}|{{ 'a-b' | replace('-', '+') }}|{{ '5' | int + 1 }}|{{ 2.7 | int }}|{{ '2' | float }}|{{ -3 | abs }}",
    "{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ i | string + 'x' }}|{{ 'abc' | list }}|{{ '%s-%d' | format('a', 3) }}|{{ '{}-{}'.format(1, 'b') }}",
    "{{ range(3) | list }}|{{ range(1, 6, 2) | list }}|{{ range(3, 0, -1) | list }}|{{ dict(a=1) }}|{{ {'a': 1, 'b': {'c': [1, 'd']}} }}",
    "{{ 'a' 'b' }}|{{ \"it's\" }}|{{ 'tab\\t' }}|{{ '\\u00e9' }}|{{ '\\x41' }}|{{ 'a\\\\nb' }}",
    "{{ raise_exception('no ' + s) }}",
    "{{ 'a' + 1 }}",
    "{{ 'a' + none }}",
    "{{ l.append(4) }}",
    "{{ unknown_function() }}",
    "{{ s | unknown_filter }}",
    "{{ {'items': 1, 'get': 2}.items() | list }}",
    "{{ '<' | e }}|{{ '<b>' }}|{{ '<b>' | safe }}|{{ '&' | escape }}",
    "{% raw %}{{ x }}{% endraw %}|{{ '{{' }}",
    "{{ d.a is string }}|{{ d.a is not string and d.a is iterable }}|{{ (d.a or [])[1] }}|{{ d.b.c is defined }}",
    "{% if l %}l{% endif %}{% if '' %}e{% endif %}{% if [] %}e{% endif %}{% if {} %}e{% endif %}{% if 0.0 %}e{% endif %}{% if missing %}m{% endif %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% for a, b in [(1, 2), (3, 4)] %}{{ a * b }}{% endfor %}{% set (c) = 3 %}{{ c }}",
    "{{ u | length }}|{{ u.upper() }}|{{ '文' in u }}|{{ 'x'.isalpha() }}|{{ '' is none }}|{{ 'A' | lower == 'a' }}",
    "{{ 'a\nb'.splitlines() }}|{{ 'a\r\nb' | tojson }}|{{ '\\r\\n' | tojson }}",
    "{{ l | tojson | length }}|{{ (l | length) - 1 }}|{{ l|length > 2 and l[2] == 2 }}|{{ l.count(1) }}",
    "{{ [1,2,3,4] | batch(2) | list }}|{{ 1.256 | round(2) }}|{{ 2.5 | round }}|{{ l | sort(reverse=true) }}",
]


def fnv1a(text):
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return value


def append_no_think(messages):
    """What Pangu's last user text gets when thinking is off."""
    messages = json.loads(json.dumps(messages))
    for message in reversed(messages):
        if message["role"] == "user":
            if isinstance(message["content"], str):
                message["content"] += " /no_think"
            else:
                message["content"][-1]["text"] += " /no_think"
            break
    return messages


def render(template, context):
    try:
        return template.render(context)
    except Exception:
        return None


def renders(template, name, pool, flat):
    rng = random.Random(name)
    offsets = {role: min(i for i, message in enumerate(flat) if message["role"] == role) for role in ROLES}
    for count in range(MAX_MESSAGES[name] + 1):
        for roles in itertools.product(ROLES, repeat=count):
            indices = [offsets[role] + rng.randrange(len(pool[role])) for role in roles]
            results = []
            for setting in itertools.product([False, True], [False, True], THINKING):
                text = render(template, context(name, [flat[index] for index in indices], *setting))
                results.append(text if text is None or count == 0 else fnv1a(text))
            yield [indices, results]


def context(name, messages, tools, add_generation_prompt, thinking):
    if name == "pangu" and thinking is False:
        messages = append_no_think(messages)
    context = {"messages": messages, "tools": TOOLS if tools else None, "documents": None}
    context["add_generation_prompt"] = add_generation_prompt
    if thinking is not None:
        context["enable_thinking"] = thinking
    return context


def main():
    env = environment()
    pool = message_pool()
    flat = [message for role in ROLES for message in pool[role]]
    expressions = []
    for source in EXPRESSIONS:
        # One expression a case, so that a failing one does not hide the others.
        for part in source.split("|{{") if source.startswith("{{") else [source]:
            part = part if part.startswith("{{") or not source.startswith("{{") else "{{" + part
            try:
                expressions.append([part, render(env.from_string(part), X)])
            except jinja2.TemplateError:
                expressions.append([part, None])
    cases = {
        "messages": flat,
        "tools": TOOLS,
        "context": X,
        "expressions": expressions,
    }
    dump = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    lines = []
    for key, value in cases.items():
        lines.append(f'"{key}":' + (dump(value) if isinstance(value, dict) else "[\n" + ",\n".join(map(dump, value)) + "\n]"))
    for name, path in TEMPLATES.items():
        cases = renders(env.from_string(path.read_text()), name, pool, flat)
        lines.append(f'"{name}":[\n' + ",\n".join(map(dump, cases)) + "\n]")
    (OUT / "cases.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
