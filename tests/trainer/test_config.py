"""A configuration is read right, or refused in one line that names the key and the mend, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rollout.errors import InputError
from trainer.config import STAGE_SECTIONS
from trainer.config_file import dump_config, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = """\
run: runs/x
model: {path: models/x}
data: {train: {path: train.jsonl}, max_prompt_tokens: 32}
batch: {groups: 8, group_size: 4}
actor: {lr: 1e-6}
stages:
  - {name: one, steps: 3, context: 64}
  - name: two
    steps: 2
    context: 128
    batch: {dynamic: true, groups: 4}
    recovery: {enabled: true}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    assert load_config(path).total_steps > 0


def test_sections_are_shared_and_overridden_key_by_key(write):
    one, two = load_config(write(MINIMAL)).stages
    assert (one.batch.groups, one.batch.group_size, one.batch.dynamic) == (8, 4, False)
    assert (two.batch.groups, two.batch.group_size, two.batch.dynamic) == (4, 4, True)
    assert one.actor.lr == two.actor.lr == 1e-6
    assert (one.response_limit, two.response_limit) == (32, 96)
    config = load_config(write(MINIMAL))
    assert [config.stage_of(step) for step in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("run: runs/x", "run: runs/x\nseeds: 4", "seeds: unknown key (value 4); did you mean 'seed'?"),
        ("run: runs/x", "run: runs/x\nactors: {}", "actors: unknown key (value {}); did you mean 'actor'?"),
        ("actor: {lr", "actor: {betass: 3, lr", "actor.betass: unknown key (value 3); did you mean 'betas'?"),
        ("groups: 4}", "grups: 4}", "stages[1].batch.grups: unknown key (value 4); did you mean 'groups'?"),
        ("steps: 3", "stesp: 3", "stages[0].stesp: unknown key (value 3); did you mean 'steps'?"),
        (
            "{path: train.jsonl}",
            "{paht: train.jsonl}",
            "data.train.paht: unknown key (value 'train.jsonl'); did you mean 'path'?",
        ),
        ("actor: {lr", "actor: {zzzz: 3, lr", "actor.zzzz: unknown key (value 3); valid keys: betas, lr,"),
        ("model: {path: models/x}", "model: {}", "model.path: missing; add this key"),
        ("{name: one, ", "{", "stages[0].name: missing; add this key"),
        ("lr: 1e-6", "lr: fast", "actor.lr: input should be a valid number"),
        ("lr: 1e-6", "lr: .inf", "actor.lr: input should be a finite number"),
        ("lr: 1e-6", "lr: 0", "actor.lr: input should be greater than 0, found 0"),
        ("steps: 3", "steps: 2.5", "stages[0].steps: input should be a valid integer"),
        ("steps: 3", "steps: -1", "stages[0].steps: input should be greater than 0, found -1"),
        ("batch: {groups: 8, group_size: 4}", "batch: 8", "batch: must be a section of keys, found 8"),
        ("recovery: {enabled: true}", "recovery:", "stages[1].recovery: must be a section of keys, found None"),
        ("lr: 1e-6", "betas: [0.9, 1.0]", "actor.betas[1]: input should be less than 1, found 1.0"),
        ("group_size: 4", "group_size: 1", "batch.group_size: input should be greater than or equal to 2, found 1"),
    ],
)
def test_a_wrong_key_or_value_is_named_where_it_stands(write, old, new, expected):
    assert MINIMAL.count(old) == 1
    path = write(MINIMAL.replace(old, new))
    assert refusal(path).startswith(f"{path}: {expected}")


def test_no_stages(write):
    head = MINIMAL[: MINIMAL.index("stages:")]
    assert refusal(write(head)).endswith("stages: missing; add this key")
    assert "stages" in refusal(write(head + "stages: []\n"))
    assert "stages" in refusal(write(head + "stages: {name: one}\n"))
    assert "stages[0]: must be a section of keys" in refusal(write(head + "stages: [one]\n"))


@pytest.mark.parametrize("name", ["start_seconds", "silence_seconds", "sync_seconds"])
def test_ranks_wait_longer_than_a_vllm_may_take(write, name):
    path = write(MINIMAL)
    slow = f"engine.{name}=700"
    load_config(path, ["engine.kind=vllm", slow, "parallel.timeout_seconds=701"])
    assert refusal(path, "engine.kind=vllm", slow, "parallel.timeout_seconds=700").startswith(
        f"{path}: parallel.timeout_seconds 700 is not above engine.{name} 700: the other ranks"
    )
    load_config(path, [slow, "parallel.timeout_seconds=700"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages[0].context=32", "stages[0]: context 32 leaves no room beside data.max_prompt_tokens 32"),
        ("batch.mini_batches=3", "stages[0]: batch.groups 8 is not divisible by batch.mini_batches 3"),
        ("data.train=null", "stages[0]: data.train is missing"),
        ("recovery.enabled=true", "stages[0]: recovery.enabled needs batch.dynamic"),
        ("actor.tokens_per_micro_batch=127", "stages[1]: actor.tokens_per_micro_batch 127 is smaller than context 128"),
        ("stages[1].name=one", "stages: two of the same name"),
        ("stages[1].data.train.answer_pattern='(.)'", "stages: train.jsonl is read with different columns or answer_pattern"),
        ("warmup={base: b, data: {path: p}, steps: 1, strip: ['(']}", "warmup: strip: '(' is no regular expression"),
        ("evaluation.sets=[{name: a, path: x}, {name: a, path: y}]", "evaluation.sets: two of the same name"),
        ("engine.kind=vllm-server", "engine: servers is empty: kind vllm-server needs at least one"),
        ("engine.servers=['127.0.0.1:8000']", "engine: servers: '127.0.0.1:8000' is not a base address"),
        ("engine.servers=['http://gpu7:8000']", "engine: servers: http://gpu7:8000 is not on this host: set sync_host"),
        ("engine.one_step_off=true", "engine: one_step_off needs an engine that samples beside the trainer"),
        (
            "engine={kind: vllm, one_step_off: true, score_early: true}",
            "engine: score_early and one_step_off exclude each other",
        ),
        ("batch.abort_surplus=true", "stages[0]: batch.abort_surplus needs batch.dynamic: true"),
        ("stages[1].batch.abort_surplus=true", "batch.abort_surplus needs an engine that streams"),
        ("model.saved_gib=1", "model: saved_gib and offload_activations need gradient_checkpointing: true"),
        ("model.offload_activations=true", "model: saved_gib and offload_activations need gradient_checkpointing: true"),
        (
            "model={path: m, gradient_checkpointing: true, saved_gib: 1, compile: true}",
            "model: compile and saved_gib exclude each other",
        ),
    ],
)
def test_impossible_combinations(write, override, expected):
    path = write(MINIMAL)
    assert refusal(path, override).startswith(f"{path}: {expected}")


def test_a_sequence_may_be_shared(write):
    """By two ranks, 128 tokens fit twice 64 and not twice 63."""
    path, shared = write(MINIMAL), "parallel.sequence_ranks=2"
    load_config(path, [shared, "actor.tokens_per_micro_batch=64"])
    assert refusal(path, shared, "actor.tokens_per_micro_batch=63").startswith(
        f"{path}: stages[1]: actor.tokens_per_micro_batch 63 on parallel.sequence_ranks 2, so 126, is smaller than context 128"
    )


SERVERS = "engine={kind: vllm-server, servers: ['http://gpu7:8000', 'http://127.0.0.1:8001'], sync_host: 10.0.0.1}"


def test_the_nearest_possible_values_are_accepted(write):
    for override in ("stages[0].context=33", "batch.mini_batches=4", "actor.tokens_per_micro_batch=128", SERVERS):
        load_config(write(MINIMAL), [override])


def test_overrides(write):
    config = load_config(
        write(MINIMAL), ["actor.lr=2e-6", "stages[1].steps=7", "stages[1].batch.groups=12", "evaluation.every=3", "run=a=b"]
    )
    assert [stage.actor.lr for stage in config.stages] == [2e-6, 2e-6]
    assert config.total_steps == 10
    assert [stage.batch.groups for stage in config.stages] == [8, 12]
    assert config.evaluation.every == 3
    assert config.run == Path("a=b")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("actor.lr", "'actor.lr' is not of the form key.key=value"),
        ("=3", "'=3' is not of the form key.key=value"),
        ("actor..lr=3", "'actor..lr=3' is not of the form key.key=value"),
        ("actor.lr =3", "'actor.lr =3' is not of the form key.key=value"),
        ("stages[x].steps=3", "'stages[x].steps=3' is not of the form key.key=value"),
        ("stages[-1].steps=3", "'stages[-1].steps=3' is not of the form key.key=value"),
        ("stages[2].steps=3", "stages[2].steps: 2 is no index of a list of 2"),
        ("stages.one.steps=3", "stages.one.steps: 'one' is no index of a list of 2"),
        ("run.x=3", "run.x: 'run' holds 'runs/x', which has no keys"),
        ("actor.lr=[1", "actor.lr: '[1' is not a YAML value"),
        ("run=2024-13-45", "run: '2024-13-45' is not a YAML value"),
    ],
)
def test_bad_forms_of_an_override(write, override, expected):
    assert refusal(write(MINIMAL), override) == f"command line: {expected}"


def test_a_misspelt_override_is_an_unknown_key(write):
    assert "actor.lrr: unknown key (value 1); did you mean 'lr'?" in refusal(write(MINIMAL), "actor.lrr=1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL.replace("actor: {lr: 1e-6}", "actor:\n  lr: 1\n  betas: [0, 0]\n  lr: 2"),
            "line 8: not valid YAML (key 'lr' stands twice)",
        ),
        (MINIMAL + "run: again\n", "line 13: not valid YAML (key 'run' stands twice)"),
        (MINIMAL.replace("runs/x", "runs/é").encode("latin-1"), "byte 10 is not UTF-8; save the file as UTF-8"),
        ("- a\n- b\n", "holds ['a', 'b'], not a mapping of keys"),
        ("", "holds None, not a mapping of keys"),
        ("run: [\n", "line 2: not valid YAML"),
        ("run: 2024-13-45\n", "not valid YAML"),
        ("run: \x07\n", "not valid YAML"),
        ("? [a]\n: b\n", "line 1: not valid YAML (a key must be a word)"),
    ],
)
def test_bad_yaml(write, text, expected):
    path = write(text)
    assert refusal(path).startswith(f"{path}: {expected}")


def test_no_such_file_and_no_file(tmp_path):
    assert refusal(tmp_path / "x.yaml").startswith(f"{tmp_path}/x.yaml: no such file")
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read")


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1E3", 1e3), ("2.5e-4", 2.5e-4), (".5e+1", 5.0), ("3", 3.0)])
def test_numbers_in_scientific_form_are_numbers(write, text, value):
    loaded = load_config(write(MINIMAL.replace("1e-6", text))).stages[0].actor.lr
    assert isinstance(loaded, float)
    assert loaded == value


def test_a_whole_number_in_scientific_form_is_one(write):
    assert load_config(write(MINIMAL.replace("steps: 3", "steps: 1e3"))).stages[0].steps == 1000


def test_yaml_merge_keys_work(write):
    text = MINIMAL.replace("batch: {dynamic: true, groups: 4}", "batch: &big {dynamic: true, groups: 4}")
    text += "  - name: three\n    steps: 1\n    context: 64\n    batch: {<<: *big, groups: 2}\n"
    batch = load_config(write(text)).stages[2].batch
    assert (batch.dynamic, batch.groups) == (True, 2)


@pytest.mark.parametrize("path", [None, *CONFIGS], ids=lambda path: path.name if path else "awkward")
def test_dump_reads_back_equal(write, tmp_path, path):
    if path is None:  # words that a reader could take for numbers, and text outside ASCII
        path = write(MINIMAL.replace("name: one", "name: '1e5'").replace("name: two", "name: 二").replace("runs/x", "'123'"))
    config = load_config(path)
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert all(set(STAGE_SECTIONS) <= set(stage) for stage in written["stages"]), "every stage stands whole"
    assert not set(STAGE_SECTIONS) & set(written)


def test_reading_and_checking_a_run_imports_nothing_heavy(write, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    path = write(MINIMAL)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "import trainer.train, trainer.warmup\n"
        "from trainer.config_file import load_config\n"
        "from trainer.preflight import check_run\n"
        f"config = load_config(Path({str(path)!r}), ['model.path={model}', 'data.train.path={tmp_path}/train.jsonl'])\n"
        "inputs = check_run(config)\n"
        f"assert list(inputs.sources) == ['{tmp_path}/train.jsonl']\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'safetensors', 'vllm'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
