"""Configurations and prompts as people and programs spoil them: each ends in one clear line, or works. Never a traceback, a hang.

About 500 of each kind here. As many as one likes, and where they are not the same each time:

    KEJU_FUZZ_EXAMPLES=10000 python -m pytest tests/e2e/test_fuzz_inputs.py
    KEJU_FUZZ_SEED=7 KEJU_FUZZ_EXAMPLES=10000 python -m pytest tests/e2e/test_fuzz_inputs.py

A case is a function of its number (and KEJU_FUZZ_SEED), which a failure prints: KEJU_FUZZ_ONLY=NUMBER runs that one alone.
Left out: what a file system does (test_bad_input.py has it), and Parquet files whose bytes are spoilt within a page, of which
pyarrow reads some.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import CONFIG, ROOT, write_rows

from rollout.errors import InputError
from rollout.prompts import PromptSource, read_prompts
from rollout.template import encode_prompt
from trainer.config_file import dump_config, load_config
from trainer.preflight import check_run

EXAMPLES = int(os.environ.get("KEJU_FUZZ_EXAMPLES", 500))
SEED = int(os.environ.get("KEJU_FUZZ_SEED", 0))
ONLY = os.environ.get("KEJU_FUZZ_ONLY")
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
SECONDS = 5.0
"""Of the processor, for one case; the usual ones take milliseconds. One that waits for ever meets pytest's own limit."""
LINE = 2000
"""Characters an error may have."""
BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 12))
"""Nine to the power of twelve words, if anybody writes them out."""
SCALARS = [
    *(None, True, False, 0, 1, -1, 3, 7.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**63, 2**64, 10**400),
    *("", " ", "x", "0", "1e-6", "true", "null", "nan", "None", "auto", "vllm", "demo", "2024-13-45", "{}", "[]", "(", "*", "&a"),
    *(
        "../../x",
        "/etc/passwd",
        "/dev/null",
        "/dev/zero",
        "CON",
        "a/b",
        "\x00",
        "a\x00b",
        "a\nb",
        "\t",
        "\u202e",
        "é",
        "数学",
        "😀",
    ),
    *(
        "\ud800",
        "x" * 300,
        "x" * 100_000,
        "!!python/object/apply:os.system [ls]",
        "${HOME}",
        "http://a b",
        "http://127.0.0.1:1/v1",
    ),
    *("####\\s*(.+)$", "(a+)+$"),
]
SCALAR_TEXTS = [
    "1:30:00",
    "0x1F",
    "0o17",
    "1_000",
    "2024-13-45",
    "2024-01-01",
    "!!binary aGk=",
    "!!set {a}",
    "!!float x",
    "=",
    "~",
    "<<",
]


def cases(function):
    """The function with the numbers 0 … EXAMPLES - 1, or KEJU_FUZZ_ONLY's."""
    if ONLY is not None:
        return pytest.mark.parametrize("number", [int(ONLY)])(function)
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    limits = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    return limits(given(number=st.integers(0, 2**48))(function))


def judged(attempt, file: Path | str):
    """What `attempt` returns, or the line it refuses with, which names the file; whatever else it does fails the test."""
    start = time.process_time()
    try:
        return attempt(), None
    except InputError as error:
        line = " ".join(str(error).split())  # as a command prints it
        assert str(file) in line, line[:300]
        assert 0 < len(line) < LINE, line[:300]
        return None, line
    finally:
        seconds = time.process_time() - start
        assert seconds < SECONDS, f"{seconds:.1f} s"


# configurations


def places(value, at=()):
    """Every place in a tree of dicts and lists, root included."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


def found(tree, at):
    for key in at:
        tree = tree[key]
    return tree


def junk(chance: random.Random, depth=0):
    kind = chance.random()
    if depth < 4 and kind < 0.15:
        return [junk(chance, depth + 1) for _ in range(chance.randrange(4))]
    if depth < 4 and kind < 0.3:
        keys = ["path", "x", "name", "", "lr", 1, None, True, "question"]
        return {chance.choice(keys): junk(chance, depth + 1) for _ in range(chance.randrange(4))}
    return chance.choice(SCALARS)


def nested(depth: int, chance: random.Random):
    value = 1
    for _ in range(depth):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


def mutate_tree(tree, chance: random.Random):
    """One key or entry dropped, retyped, renamed, moved, doubled, wrapped or added."""
    at = chance.choice([place for place in places(tree) if place])
    parent, key = found(tree, at[:-1]), at[-1]
    kind = chance.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = junk(chance)
    elif kind == 2 and isinstance(parent, dict):
        parent[str(key)[:-1] + chance.choice(["", "s", "_", " ", "\t"])] = parent.pop(key)
    elif kind == 3:
        parent[key] = [parent[key], *(copy.deepcopy(parent[key]) for _ in range(chance.randrange(3)))]  # or a move makes a circle
    elif kind == 4:
        parent[key] = {"x": parent[key]}
    elif kind == 5:
        value, other = parent.pop(key), chance.choice([place for place in places(tree) if isinstance(found(tree, place), dict)])
        found(tree, other)[str(key)] = value
    elif kind == 6 and isinstance(parent[key], int | float) and parent[key] < 1e300:
        parent[key] = parent[key] * chance.choice([0, -1, 1e6, 1e-6, 1e30]) if chance.random() < 0.8 else str(parent[key])
    else:
        home = chance.choice([place for place in places(tree) if isinstance(found(tree, place), dict)])
        names = [
            "guards",
            "alarms",
            "samples",
            "engine",
            "reward",
            "judge",
            "model",
            "optimizer",
            "parallel",
            "stop",
            "servers",
            "kind",
            "x",
        ]
        found(tree, home)[chance.choice(names)] = (
            nested(chance.choice([3, 60, 100]), chance) if chance.random() < 0.2 else junk(chance)
        )


def mutate_text(text: str, chance: random.Random) -> bytes:
    """A slip of an editor, an encoding or a program."""
    lines = text.splitlines(keepends=True) or [""]
    at = chance.randrange(len(lines))
    kind = chance.randrange(14)
    if kind == 0:
        lines.insert(at, chance.choice(lines))
    elif kind == 1:
        lines[at] = "\t" + lines[at]
    elif kind == 2:
        lines[at] = " " * chance.randrange(1, 4) + lines[at]
    elif kind == 3:
        lines[at] = lines[at].partition(":")[0] + ": " + chance.choice(SCALAR_TEXTS) + "\n"
    elif kind == 4:
        lines.insert(0, BOMB)
        lines.append(f"{chance.choice(['stages', 'x', 'data', 'actor', 'run', 'engine'])}: *b{chance.randrange(12)}\n")
    elif kind == 5:
        depth = chance.choice([50, 2000, 20_000])
        lines.append(f"x: {'[' * depth}{']' * chance.choice([0, depth])}\n")
    elif kind == 6:
        lines[at] = (
            lines[at].rstrip("\n")
            + chance.choice([" &a *a", " *nowhere", " #", " |", " >", " {", " [", ' "', " '", ": :", " !x y"])
            + "\n"
        )
    elif kind == 7:
        lines.append(
            chance.choice(
                [
                    "---\n",
                    "--- {}\n",
                    "...\nx: 1\n",
                    "<<: {x: 1}\n",
                    "<<: [1]\n",
                    "? [a]\n: b\n",
                    "? {a: b}\n",
                    "&a x: *a\n",
                    "x: &x [*x]\n",
                    "x: &x {a: *x}\n",
                ]
            )
        )
    elif kind == 8:
        lines = lines[:at]
    elif kind == 9:
        lines = [
            chance.choice(
                ["", "\n", "[]", "- a\n- b\n", "x", "3", "null", "{}", "# nothing\n", "%YAML 1.1\n---\n", "\x00", "@", "`"]
            )
        ]
    whole = "".join(lines).encode("utf-8", "surrogatepass")
    if kind == 10:
        whole = chance.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]) + whole
    elif kind == 11:
        place = chance.randrange(len(whole) + 1)
        whole = whole[:place] + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 4))) + whole[place:]
    elif kind == 12:
        whole = whole.decode("utf-8", "replace").encode(chance.choice(["utf-16", "utf-32", "latin-1"]), "replace")
    elif kind == 13 and whole:
        whole = whole[: chance.randrange(len(whole))]
    return whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, what passes for a model, and the configurations to spoil."""
    folder = tmp_path_factory.mktemp("fuzz")
    rows = [{"id": f"q{number}", "question": f"{number} + 1?", "answer": str(number + 1)} for number in range(5)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "warmup.jsonl", rows)
    for name in ("warm", "base"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "qwen2"}')
        (folder / name / "tokenizer.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(b"")
    tiny = yaml.safe_load(CONFIG.format(folder=folder, run=folder / "run"))
    others = [yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("demo.yaml", "confucius3-14b.yaml")]
    whole = [json.loads(json.dumps(each)) for each in (tiny, tiny, *others)]  # what an alias shares would be changed twice
    return folder, whole


def spoilt_config(bases, chance: random.Random) -> bytes:
    tree = copy.deepcopy(chance.choice(bases))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
        if tree:
            mutate_tree(tree, chance)
    options = {"sort_keys": False, "allow_unicode": True, "default_flow_style": chance.choice([None, False])}
    try:
        text = yaml.dump(tree, Dumper=DUMPER, **options)
    except UnicodeEncodeError:
        text = yaml.safe_dump(tree, **options)
    except RecursionError:
        text = "x: {" * 900
    return mutate_text(text, chance) if chance.random() < 0.5 else text.encode("utf-8", "surrogatepass")


@cases
def test_configurations(place, number):
    folder, bases = place
    chance = random.Random(f"{SEED}/{number}")
    path = folder / "run.yaml"
    path.write_bytes(spoilt_config(bases, chance))
    config, _ = judged(lambda: load_config(path), path)
    if config is None:
        return
    dump_config(config, folder / "resolved.yaml")
    assert load_config(folder / "resolved.yaml") == config, "what was accepted is written down and read back the same"
    judged(lambda: check_run(config), "")


# prompts


def spoilt_rows(chance: random.Random, deepest: int) -> list[dict]:
    rows = [
        {
            "id": f"p{number}",
            "question": f"What is {number} + 1?",
            "answer": f"#### {number + 1}",
            "source": "s",
            "metadata": {"judge": False},
        }
        for number in range(chance.randrange(6))
    ]
    for _ in range(chance.choice([0, 1, 1, 2])):
        if not rows:
            break
        row = chance.choice(rows)
        kind, key = chance.randrange(6), chance.choice(["id", "question", "answer", "source", "solution", "metadata", "x"])
        if kind == 0:
            row.pop(key, None)
        elif kind == 1:
            row[key] = junk(chance)
        elif kind == 2:
            rows.append(row)
        elif kind == 3:
            row[chance.choice(["Question", "qestion", "", "id ", "answer\x00"])] = row.pop(key, 1)
        elif kind == 4:
            row[key] = chance.choice(
                [
                    "<|im_start|>",
                    "<|im_end|>",
                    "{{ x }}",
                    "{% for %}",
                    "</think>",
                    "\ud83d",
                    "\x00",
                    "",
                    "x" * 20_000,
                    "\u2028",
                    "﷽" * 200,
                ]
            )
        else:
            row[key] = nested(chance.choice([5, deepest // 10, deepest]), chance)
    return rows


def as_jsonl(rows: list[dict], chance: random.Random) -> bytes:
    lines = []
    for row in rows:
        try:
            lines.append(json.dumps(row, ensure_ascii=chance.random() < 0.5, default=str))
        except RecursionError:
            lines.append('{"question": ' + "[" * 5000)
    text = "\n".join(lines)
    if chance.random() < 0.5:
        return text.encode("utf-8", "surrogatepass")
    return mutate_text(text, chance)


def as_parquet(rows: list[dict], chance: random.Random) -> bytes:
    """Rows as columns, where pyarrow can write them; then now and then with its bytes spoilt."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[str(name)] = pyarrow.array(values)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, RecursionError, UnicodeError):
            columns[str(name)] = pyarrow.array([repr(value)[:50].encode("utf-8", "replace") for value in values])
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    except (pyarrow.ArrowException, UnicodeError, RecursionError):
        return b"PAR1"
    whole = bytearray(sink.getvalue())
    kind = chance.randrange(6)
    if kind == 0:
        whole = whole[: chance.randrange(len(whole) + 1)]
    elif kind == 1:
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        whole[chance.randrange(max(footer, 0), len(whole))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        whole = whole[4:] if chance.random() < 0.5 else whole + b"\n"
    return bytes(whole)


@pytest.fixture(scope="module")
def tokenizer(place):
    from rollout.model_folder import load_tokenizer
    from trainer.demo_task import write_base_model

    write_rows(place[0] / "solved.jsonl", [{"id": "a", "question": "1 + 1?", "answer": "2", "solution": "two"}])
    write_base_model(place[0] / "real", place[0] / "solved.jsonl", 0)
    return load_tokenizer(place[0] / "real")


def checked_prompts(path, chance, tokenizer):
    options = [
        {},
        {},
        {"answer_pattern": r"####\s*(.+)$"},
        {"columns": {"question": "x"}},
        {"columns": {"question": "question", "solution": "answer"}},
    ]
    prompts = read_prompts(path, **chance.choice(options))
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 0
    source = PromptSource(prompts, seed=3)
    assert sorted(prompt.id for prompt in source.draw(len(prompts))) == sorted(prompt.id for prompt in prompts)
    json.dumps([[prompt.id, prompt.question, prompt.answer, prompt.metadata] for prompt in prompts], allow_nan=False).encode()
    for prompt in prompts:
        assert encode_prompt(tokenizer, prompt.question, system="Think.", prefill="<think>\n")
    return prompts


@cases
def test_prompts_as_jsonl(place, tokenizer, number):
    chance = random.Random(f"{SEED}/{number}")
    path = place[0] / "spoilt.jsonl"
    path.write_bytes(as_jsonl(spoilt_rows(chance, 3000), chance))
    judged(lambda: checked_prompts(path, chance, tokenizer), path)


@cases
def test_prompts_as_parquet(place, tokenizer, number):
    chance = random.Random(f"{SEED}/{number}")
    path = place[0] / "spoilt.parquet"
    path.write_bytes(as_parquet(spoilt_rows(chance, 300), chance))  # pyarrow dies of writing 3000
    judged(lambda: checked_prompts(path, chance, tokenizer), path)
