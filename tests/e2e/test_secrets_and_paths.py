"""What comes from outside cannot run a program or leave the run folder, and no key leaves the environment."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from tiny_run import CONFIG, ROOT

from rollout.environment import without_secrets
from rollout.errors import InputError
from rollout.model_folder import check_model_folder
from rollout.vllm.child import common_environment
from trainer.config_file import dump_config, load_config
from trainer.metrics import MetricsWriter, read_metrics
from trainer.plot import plot

FLOORS = ("kernels", "rollout", "trainer", "curation")
NAMES = ["../../x", "/etc/x", "a/b", "CON", "x" * 300, "nul\0byte", "..", "", "a\nb", "$(touch x)", "$\\frac{$", "数学"]

# files


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}, node


@pytest.mark.parametrize("floor", FLOORS)
def test_no_file_is_read_in_a_way_that_can_run_a_program(floor):
    bad = []
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, keywords, node in calls(tree):
            told = f"{path.relative_to(ROOT)}:{node.lineno} {name}"
            last = name.rpartition(".")[2]
            if name in ("eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "os.system") or last == "Unpickler":
                bad.append(told)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                bad.append(told)
            if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                bad.append(told)
            if name == "yaml.load" and keywords.get("Loader") not in ("_Loader", "yaml.SafeLoader"):
                bad.append(told)
            if keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False":
                bad.append(told)
    assert bad == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_a_model_that_is_a_pickle_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match=re.escape(f"no *.safetensors weights ({name} is a pickle, which could run")):
        check_model_folder(tmp_path)


def test_a_pickle_beside_the_safetensors_is_not_opened(tmp_path):
    import torch

    from rollout.model_folder import load_causal_lm
    from trainer.demo_task import write_base_model

    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1?", "solution": "one"}) + "\n")
    write_base_model(tmp_path / "base", tmp_path / "rows.jsonl", 0)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode())
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    auto = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    (tmp_path / "base" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(load_causal_lm(tmp_path / "base", torch.float32, "sdpa")).__name__ == "Qwen2ForCausalLM"
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(tmp_path / "base", torch.float32, "sdpa")
    assert not (tmp_path / "ran").exists()


# keys


def config_with(tmp_path, lines):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, run=tmp_path / "run") + lines, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("{api_key: hunter2hunter2}", "api_key"),
        ("{headers: {Authorization: hunter2hunter2}}", "headers.Authorization"),
        ("{a: [{x-api-key: hunter2hunter2}]}", "a.0.x-api-key"),
        ("{auth_token: hunter2hunter2}", "auth_token"),
        ("{anything: sk-hunter2hunter2}", "anything"),
        ("{anything: Bearer hunter2hunter2}", "anything"),
        ("{list: [hf_hunter2hunter2]}", "list.0"),
    ],
)
def test_a_judges_extra_body_holds_no_secret(tmp_path, body, place):
    path = config_with(tmp_path, f"reward: {{judge: {{base_url: 'http://127.0.0.1:1/v1', model: m, extra_body: {body}}}}}\n")
    with pytest.raises(InputError) as caught:
        load_config(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: reward.judge.extra_body: {place} looks like a secret")
    assert "hunter2" not in line


def test_what_only_resembles_a_secret_is_taken(tmp_path):
    body = "{max_tokens: 5, stop_token_ids: [1], chat_template_kwargs: {enable_thinking: false}, keys: 3, tokenizer: x, top_k: 1}"
    path = config_with(tmp_path, f"reward: {{judge: {{base_url: 'http://127.0.0.1:1/v1', model: m, extra_body: {body}}}}}\n")
    assert load_config(path).reward.judge.extra_body["max_tokens"] == 5


@pytest.mark.parametrize("value", ["sk-hunter2hunter2", "hunter2hunter2", "A B", "", "A" * 200])
@pytest.mark.parametrize("section", ["judge", "engine"])
def test_a_key_in_the_place_of_its_variables_name_is_refused_and_not_repeated(tmp_path, section, value):
    judge = f"reward: {{judge: {{base_url: 'http://127.0.0.1:1/v1', model: m, api_key_env: '{value}'}}}}\n"
    path = config_with(tmp_path, judge if section == "judge" else f"engine: {{api_key_env: '{value}'}}\n")
    with pytest.raises(InputError, match="api_key_env: this is the name of an environment variable") as caught:
        load_config(path)
    assert "hunter2" not in str(caught.value)


def test_an_address_with_a_password_is_refused_and_not_repeated(tmp_path):
    path = config_with(tmp_path, "engine: {kind: vllm-server, servers: ['http://me:hunter2@127.0.0.1:8000']}\n")
    with pytest.raises(InputError, match="servers: an address holds a name or password") as caught:
        load_config(path)
    assert "hunter2" not in str(caught.value)


SECRETS = {
    "KEJU_API_KEY": "hunter2a", "KEJU_JUDGE_API_KEY": "hunter2b", "HF_TOKEN": "hunter2c", "AWS_SECRET_ACCESS_KEY": "hunter2d",
    "DB_PASSWORD": "hunter2e", "wandb_api_key": "hunter2f", "GOOGLE_CREDENTIALS": "hunter2g",
}  # fmt: skip
HARMLESS = {"PATH": "/bin", "TOKENIZERS_PARALLELISM": "x", "KEYBOARD": "x", "NCCL_DEBUG": "INFO"}


def test_an_engines_process_sees_no_key_but_its_own(monkeypatch):
    for name, value in (SECRETS | HARMLESS).items():
        monkeypatch.setenv(name, value)
    assert "hunter2" not in json.dumps(common_environment(1))
    served = common_environment(1, keep=("KEJU_API_KEY",))
    assert [name for name, value in served.items() if "hunter2" in value] == ["KEJU_API_KEY"]
    assert {name: served[name] for name in ("PATH", "KEYBOARD", "NCCL_DEBUG")} == {
        name: HARMLESS[name] for name in ("PATH", "KEYBOARD", "NCCL_DEBUG")
    }
    assert without_secrets(SECRETS | HARMLESS) == HARMLESS


def test_what_becomes_the_server_gets_its_key_by_the_environment_alone(monkeypatch):
    from rollout import serve
    from rollout.vllm.server_plugin import ServeSettings

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(serve.os, "execve", lambda *arguments: started.append(arguments))
    serve.become_server(ServeSettings("m", "127.0.0.1", 8000, "auto", 64, 4, None, 1, None, False), 1)
    ((_, arguments, environment),) = started
    assert "hunter2" not in " ".join(arguments), "ps shows it to everyone"
    assert [name for name, value in environment.items() if "hunter2" in value] == ["KEJU_API_KEY"]


def test_a_process_that_judges_answers_sees_no_key():
    script = (
        "import os, json; from rollout.reward.confine import confine; confine(99)\n"
        "print(json.dumps([name for name, value in os.environ.items() if 'hunter2' in value]), os.environ['PATH'] != '')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | SECRETS, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "[] True\n", ended.stderr


def test_no_value_of_a_key_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("KEJU_JUDGE_API_KEY", "hunter2hunter2")
    judge = "reward: {judge: {base_url: 'http://127.0.0.1:1/v1', model: m}}\n"
    dump_config(load_config(config_with(tmp_path, judge)), tmp_path / "resolved.yaml")
    written = (tmp_path / "resolved.yaml").read_text()
    assert "KEJU_JUDGE_API_KEY" in written
    assert "hunter2" not in written


# paths


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.filterwarnings("ignore:Glyph")  # no font has all of them
def test_no_name_from_a_file_becomes_a_path(tmp_path):
    """Evaluation sets and stages, in metrics, TensorBoard and figures: what is written where does not depend on a name."""
    listings = []
    for folder, names in (("plain", [f"set{number}" for number in range(len(NAMES))]), ("odd", NAMES)):
        run = tmp_path / folder / "below" / "run"
        with MetricsWriter(run, resume_after=None) as metrics:
            for step, name in enumerate(names, start=1):
                stage = {"stage": step, "stage_name": name}
                metrics.write({"kind": "train", "step": step, "entropy/mean": 0.5, "length/mean": 3.0} | stage)
                metrics.write({"kind": "eval", "step": step, "name": name, "pass@1": 0.5})
        assert [row["name"] for row in read_metrics(run) if row["kind"] == "eval"] == names
        plot(run)
        listings.append([re.sub(r"events\..*", "events", entry) for entry in entries(tmp_path / folder)])
    assert listings[0] == listings[1]
    assert entries(tmp_path) == sorted(
        ["odd", "plain", *(f"{each}/{entry}" for each in ("odd", "plain") for entry in entries(tmp_path / each))]
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_prompts_id_or_source_becomes_a_path(tmp_path, name):
    import numpy as np

    from rollout.types import Group, Prompt, Sample, Verdict
    from trainer.checkpoint_state import pack_groups, unpack_groups

    sample = Sample(np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 1)
    group = Group(Prompt(name, "?", "!", source=name), np.zeros(1, np.int32), (sample,), (Verdict(True, "right"),), 0)
    records, arrays = pack_groups([group])
    assert sorted(arrays) == ["0.0.logprobs", "0.0.tokens", "0.prompt"], "names of arrays are numbers"
    assert unpack_groups(json.loads(json.dumps(records)), arrays)[0].prompt.id == name
