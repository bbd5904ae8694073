"""Sample files as a run records them, made up: mathematics with formulas, thinking, loops, foreign scripts, hostile markup.

A script too: `python -m tests.trainer.fake_samples RUN --steps 40 --groups 16 --size 8` fills RUN/samples, for looking at the
report of a run that has none.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "<!-- <script> ]]> &lt;b&gt; {{DATA}} \u2028",
)
TOPICS = (
    (
        "Solve $x^2 - {a}x + {b} = 0$ for the greater root.",
        "Completing the square, $x = \\frac{{{a} \\pm \\sqrt{{{a}^2 - 4 \\cdot {b}}}}}{{2}}$.",
    ),
    (
        "Compute $\\sum_{{k=1}}^{{{a}}} k$.",
        "By the formula \\[\\sum_{{k=1}}^{{n}} k = \\frac{{n(n+1)}}{{2}}\\] with $n = {a}$.",
    ),
    ("What is the sum of 3 and {a}, less {b}?", "Adding term by term, 3 + {a} gives 3{a}, and then we take away {b}."),
    ("求函数 $f(x) = x^{a}$ 在 $x = {b}$ 处的导数。", "由求导法则 $f'(x) = {a}x^{{{a}-1}}$，代入 $x = {b}$ 即可。"),
)
SOURCES = ("gsm8k", "math", "chain_sum", "高考")
REASONS = ("right", "wrong", "wrong", "truncated", "format", "repetition", "unjudged")
DETAILS = {
    "wrong": "'{a}' is not '{b}'",
    "repetition": "tokens 80–290 of 400 are a stretch of 14 repeated 15 times",
    "format": "no_answer",
}
FATES = ("trained", "recovered", "waiting", "expired", "uniform", "failed")
FILLER = (
    "Now let us look at this once more.",
    "So the term is positive.",
    "Wait, that is not what was asked.",
    "Hence both sides agree.",
    "Check the sign of the last factor.",
    "The case of equality is trivial.",
    "再检查一遍符号。",
)


def sample(draw: random.Random, length: int, topic: int, values: dict, *, detailed: bool = True, step: int = 1) -> dict:
    """One sample of about `length` characters."""
    reason = draw.choice(REASONS)
    body = [TOPICS[topic][1].format(**values)]
    while sum(map(len, body)) < length:
        body.append(f"{draw.choice(FILLER)} {draw.randint(1, 999)} + {draw.randint(1, 999)} = {draw.randint(2, 1998)}.")
    mixed = draw.random() < 0.1
    if mixed and topic != 3:
        body.append("所以答案就是这样的")
    if reason == "repetition":
        body.append("and the same again, " * 15)
    text = " ".join(body) + f"\n</think>\n<answer>The answer is $\\boxed{{{values['a']}}}$.</answer><｜end▁of▁sentence｜>"
    if reason == "truncated":
        text = text[: length * 3 // 4]
    ends, place = [], 0
    while place < len(text):
        place = min(len(text), place + draw.randint(1, 6))
        ends.append(place)
    row = {
        "text": text,
        "right": reason == "right",
        "reason": reason,
        "detail": DETAILS.get(reason, "").format(**values),
        "mixed": mixed,
        "finish": "length" if reason == "truncated" else "stop",
        "version": step - 1 - draw.randint(0, 1),
        "tokens": len(ends),
        "advantage": round(draw.gauss(0, 1), 3) if draw.random() < 0.7 else None,
    }
    if detailed:
        row |= {"ends": ends, "logprob": [-round(draw.expovariate(1.5), 3) for _ in ends]}
        row["entropy"] = [round(draw.expovariate(1.2), 3) for _ in ends] if row["advantage"] is not None else None
    return row


def group(draw: random.Random, step: int, place: int, size: int, length: int, *, detailed: bool = True) -> dict:
    topic = draw.randrange(len(TOPICS))
    values = {"a": draw.randint(2, 9), "b": draw.randint(2, 9)}
    fate = draw.choice(FATES)
    return {
        "step": step,
        "stage": step // 26,
        "stage_name": ("1 GRPO + TER", "2 DAPO + RSR + PSHW", "3 DAPO + RSR + PSHW")[min(2, step // 26)],
        "prompt": {
            "id": f"train-{draw.randrange(500):05d}",
            "question": TOPICS[topic][0].format(**values),
            "answer": str(values["a"]),
            "source": SOURCES[topic],
        },
        "fate": fate,
        "drawn_step": step - (fate == "recovered"),
        "samples": [sample(draw, length, topic, values, detailed=detailed, step=step) for _ in range(size)],
    }


def write_step(run: Path, step: int, groups: list[dict]) -> Path:
    folder = run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.jsonl.gz"
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in groups)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=1, mtime=0))
    return path


def write_samples(
    run: Path, steps: int, groups: int, size: int, length: int = 600, *, detailed: bool = True, seed: int = 0
) -> list[dict]:
    """All groups written, step by step."""
    draw = random.Random(seed)
    written = []
    for step in range(1, steps + 1):
        own = [group(draw, step, place, size, length, detailed=detailed) for place in range(groups)]
        write_step(run, step, own)
        written += own
    return written


def metrics_rows(steps: int) -> list[dict]:
    rows = [{"kind": "eval", "step": 0, "name": "heldout", "pass@1": 0.25}]
    for step in range(1, steps + 1):
        row = {"kind": "train", "step": step, "stage": step // 26, "stage_name": f"stage {step // 26}", "context": 128}
        row |= {"reward/accuracy": step / (2 * steps), "entropy/mean": 0.5 + 1 / step, "entropy/target": 0.55}
        row |= {"length/mean": 50 + step, "verdict/right": 0.4, "verdict/wrong": 0.6, "grad_norm": 0.1 * step, "clip/low": 0.0}
        row |= {"ledger/drawn": 10 * step, "ledger/trained": 6 * step, "ledger/recovered": step, "ledger/uniform": 3 * step}
        row |= {"time/sample": 3.0, "time/update": 1.5, "time/step": 5.0, "alarm/entropy": int(3 <= step <= 5)}
        rows.append(row)
    return [*rows, {"kind": "eval", "step": steps, "name": "heldout", "pass@1": 0.5}]


def write_run(run: Path, steps: int = 10) -> Path:
    """A folder with metrics alone."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics_rows(steps)), encoding="utf-8")
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    for name, default in (("steps", 40), ("groups", 16), ("size", 8), ("length", 600)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    write_samples(chosen.run, chosen.steps, chosen.groups, chosen.size, chosen.length)
