"""What a user can get wrong ends in one line on stderr and exit code 2, before anything in the run folder is touched.

The whole command is run, alone and with two ranks: there the mistake must not become the report of a torchrun whose worker died.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
from tiny_run import ROOT, command, write_config, write_rows

GOOD = [{"id": f"q{number}", "question": f"{number} + 1?", "answer": str(number + 1)} for number in range(5)]
BOTH = pytest.mark.parametrize("ranks", [[], ["--ranks", "2"]], ids=["alone", "two ranks"])


@pytest.fixture
def place(tmp_path):
    """A folder with data, something that passes for a model, and a run that has been going on."""
    write_rows(tmp_path / "train.jsonl", GOOD)
    write_rows(tmp_path / "warmup.jsonl", GOOD)
    for name in ("warm", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2"}')
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "config.yaml").write_text("old: true\n")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (run / "run.lock").write_text('{"pid": 1}')
    return tmp_path


def listing(folder):
    """Everything in it with its time of change and its content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *folder.rglob("*")]
    }


def refused(place, config_path, *arguments, module="trainer.train"):
    """The one line on stderr, after the folder has been found untouched."""
    before = listing(place)
    process = command(config_path, *arguments, module=module)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.startswith("keju: error: ")
    assert errors.count("\n") == 1, errors
    assert errors.endswith("\n")
    assert listing(place) == before
    return errors.removeprefix("keju: error: ").removesuffix("\n")


def missing_column(place):
    write_rows(place / "train.jsonl", [{"id": "a", "qestion": "1?", "answer": "1"}])
    return f"{place}/train.jsonl: line 1, field question: there is no column 'question'; the nearest is 'qestion'"


def empty_answer(place):
    write_rows(place / "train.jsonl", [*GOOD, {"id": "z", "question": "1?", "answer": " "}])
    return f"{place}/train.jsonl: line 6, field answer: ' ' is blank; fill it in, or drop the row"


def not_utf8(place):
    with (place / "train.jsonl").open("ab") as file:
        file.write('{"id": "é", "question": "?", "answer": "1"}\n'.encode("latin-1"))
    return f"{place}/train.jsonl: line 6, byte 9: 0xe9 is not UTF-8; save the file as UTF-8"


def duplicate_id(place):
    write_rows(place / "train.jsonl", [*GOOD, GOOD[2]])
    return f"{place}/train.jsonl: line 6, field id: 'q2' is also the id of line 3; give each prompt its own"


def no_prompts_file(place):
    (place / "train.jsonl").unlink()
    return f"{place}/train.jsonl: there is no such file; check the path"


def no_weights(place):
    (place / "warm" / "model.safetensors").unlink()
    return f"{place}/warm: no *.safetensors weights; save the model with safetensors into this folder"


def no_model_folder(place):
    shutil.rmtree(place / "warm")
    return f"{place}/warm: no such model folder"


def unknown_architecture(place):
    (place / "warm" / "config.json").write_text('{"model_type": "gpt2"}')
    return f"{place}/warm/config.json: model_type: 'gpt2' is not supported"


def broken_config(place):
    (place / "warm" / "config.json").write_text('{"model_type": ')
    return f"{place}/warm/config.json: not JSON"


MISTAKES = [
    missing_column,
    empty_answer,
    not_utf8,
    duplicate_id,
    no_prompts_file,
    no_weights,
    no_model_folder,
    unknown_architecture,
    broken_config,
]


@BOTH
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_bad_data_and_models(place, mistake, ranks):
    expected = mistake(place)
    assert refused(place, write_config(place, place / "run"), *ranks).startswith(expected)


@BOTH
def test_misspelt_key(place, ranks):
    config_path = write_config(place, place / "run", ("lr: 2.0e-4", "lrr: 2.0e-4"))
    assert refused(place, config_path, *ranks) == f"{config_path}: actor.lrr: unknown key (value 0.0002); did you mean 'lr'?"


@BOTH
def test_a_run_folder_in_use(place, ranks):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from trainer.environment import RunLock\n"
         "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()", place / "run"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        owner = json.loads((place / "run" / "run.lock").read_text())
        assert owner["pid"] == holder.pid
        config_path = write_config(place, place / "run")
        holder.send_signal(signal.SIGSTOP)  # or its heartbeat would touch the folder, which the refused must not
        text = refused(place, config_path, *ranks)
        assert text.startswith(f"{place}/run: run: in use by a living run (")
        assert str(holder.pid) in text
    finally:
        holder.send_signal(signal.SIGCONT)
        holder.communicate("")
    config_path = write_config(place, place / "run")
    assert command(config_path, "--check").wait(timeout=60) == 0, "the lock goes with the process that held it"


@BOTH
def test_a_run_folder_that_is_none(place, ranks):
    (place / "file").write_text("")
    assert refused(place, write_config(place, place / "file"), *ranks).startswith(f"{place}/file: run: cannot be used")


@BOTH
def test_a_refusal_creates_no_run_folder(place, ranks):
    duplicate_id(place)
    refused(place, write_config(place, place / "new"), *ranks)
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "0"], "command line: --ranks: '0' is not a whole number above 0"),
        (["--ranks", "two"], "command line: --ranks: 'two' is not a whole number above 0"),
        (["actor.lr"], "command line: 'actor.lr' is not of the form key.key=value"),
        (["--ranks", "2", "actor.lr=slow"], "{config}: actor.lr: input should be a valid number"),
    ],
)
def test_command_line(place, arguments, expected):
    config_path = write_config(place, place / "run")
    assert refused(place, config_path, *arguments).startswith(expected.format(config=config_path))


@BOTH
@pytest.mark.parametrize("mistake", ["no solutions", "no section"])
def test_warm_up(place, mistake, ranks):
    config_path = write_config(place, place / "run")
    if mistake == "no section":
        lines = config_path.read_text().splitlines(keepends=True)
        config_path.write_text("".join(line for line in lines if not line.startswith("warmup:")))
    text = refused(place, config_path, *ranks, module="trainer.warmup")
    assert text.startswith(
        f"{place}/warmup.jsonl: warmup.data: none of" if mistake == "no solutions" else f"{config_path}: warmup: missing"
    )


@BOTH
def test_an_evaluation_prompt_that_leaves_too_little_room(tiny, tmp_path, ranks):
    """Only the model's tokenizer can tell, so the ranks are there already; nothing is sampled, and nothing is kept."""
    sets = []
    for name, sevens in {"fits": (1, 19), "long": (1, 20, 21, 1)}.items():  # each a token, and 5 more are in each prompt
        rows = [{"id": f"e{place}", "question": "digit " + "7" * count, "answer": "1"} for place, count in enumerate(sevens)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        sets.append(f"{{name: {name}, path: {tmp_path}/{name}.jsonl}}")
    heldout = f"{{name: heldout, path: {tiny}/train.jsonl, limit: 3}}"
    config_path = write_config(tiny, tmp_path / "run", (heldout, ", ".join(sets)))
    process = command(config_path, *ranks)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    lines = [line for line in errors.splitlines() if line.startswith("keju: error: ")]
    assert set(lines) == {
        f"keju: error: {tmp_path}/long.jsonl: evaluation set long: 2 of 4 prompts are too long, the longest, e2, with 26 tokens; "
        "at most 24 leave room for the response; raise data.max_prompt_tokens, or leave them out"
    }
    assert ranks or errors.count("\n") == 1, errors
    assert not list((tmp_path / "run").glob("metrics*")) + list((tmp_path / "run").glob("checkpoints/*"))


def test_check_says_what_it_found(place):
    process = command(write_config(place, place / "run"), "--check")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output == f"{place}/run.yaml: 5 prompts, 7 steps: fine\n"
