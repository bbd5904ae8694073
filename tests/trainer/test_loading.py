"""Weights from a folder into shards: each rank gets its own rows, bit for bit, reads no others; what does not fit is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_policy import causal_lm, one_rank
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.loading import count_reads
from rollout.errors import InputError
from trainer.distributed import mesh_shape
from trainer.loading import empty_causal_lm
from trainer.policy import PolicyOptions, build_policy, load_causal_lm

MESHES = {2: (2,), 4: (2, 2)}


def save(folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    causal_lm(tied=tied).to(dtype).save_pretrained(folder)
    return folder


def on_ranks(rank: int, ranks: int, rendezvous: str, folder: str, output: str) -> None:
    """One rank's part of `test_every_rank_reads_its_own_rows_alone`."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    shape = MESHES[ranks]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    read = count_reads()
    policy = build_policy(Path(folder), mesh, PolicyOptions(torch.float32))
    held = [parameter.to_local().numel() for parameter in policy.causal_lm.parameters()]
    weights = {name: weight.clone() for name, weight in policy.whole_weights()}
    torch.save({"read": sum(read) // torch.bfloat16.itemsize, "held": sum(held), "weights": weights}, f"{output}-{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "tied"), [(2, True), (2, False), (4, True)])
def test_every_rank_reads_its_own_rows_alone(tmp_path, ranks, tied):
    """4 ranks: two replicas of two shards each (HSDP)."""
    folder = save(tmp_path / "model", tied=tied, dtype=torch.bfloat16)
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    code = "import sys, test_loading; test_loading.on_ranks(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(ranks), str(tmp_path / "meet"), str(folder), str(tmp_path / "out")],
            env=environment,
            cwd=root,
        )
        for rank in range(ranks)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * ranks
    whole = dict(load_causal_lm(folder, torch.float32).named_parameters())
    shards = MESHES[ranks][-1]
    results = [torch.load(f"{tmp_path}/out-{rank}") for rank in range(ranks)]
    for result in results:
        assert result["weights"].keys() == whole.keys()
        assert all(torch.equal(result["weights"][name], weight) for name, weight in whole.items())
        assert result["read"] == result["held"]
    elements = sum(weight.numel() for weight in whole.values())
    assert sum(result["held"] for result in results[:shards]) == elements, "the ranks of a replica share it without overlap"


def test_nothing_is_allocated_before_it_is_sharded(tmp_path):
    model = empty_causal_lm(save(tmp_path, tied=True))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers()), "rotary frequencies are in no file"


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_as_the_model_that_transformers_loads(tmp_path, tied):
    folder = save(tmp_path, tied=tied)
    expected = load_causal_lm(folder, torch.float32)
    with one_rank() as mesh:
        policy = build_policy(folder, mesh, PolicyOptions(torch.float32, trainable=False))
        assert dict(policy.whole_weights()).keys() == dict(expected.named_parameters()).keys()
        for (name, weight), (_, other) in zip(policy.whole_weights(), expected.named_parameters(), strict=True):
            assert torch.equal(weight, other), name
        for (name, buffer), (_, other) in zip(policy.causal_lm.named_buffers(), expected.named_buffers(), strict=True):
            assert torch.equal(buffer, other), name


def changed(folder: Path, change) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(NAME), f"no weight {NAME} in its"),
        (lambda weights: weights.update({NAME: weights[NAME][:3].clone()}), rf"{NAME} is \[3, \d+\], config.json says"),
        (lambda weights: weights.update({"model.extra": torch.zeros(1)}), "model.extra is no weight of the model"),
    ],
)
def test_a_folder_that_does_not_fit_its_config_is_refused(tmp_path, change, message):
    folder = changed(save(tmp_path, tied=False), change)
    with one_rank() as mesh, pytest.raises(InputError, match=message):
        build_policy(folder, mesh, PolicyOptions(torch.float32))


def test_what_cannot_be_trained_is_refused(tmp_path):
    folder = save(tmp_path, tied=False)
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="only full_attention is"):
        empty_causal_lm(folder)


def test_copies_of_the_model_are_the_outer_dimension():
    assert mesh_shape(16, None) == mesh_shape(16, 16) == (16,)
    assert mesh_shape(16, 8) == (2, 8)
    with pytest.raises(InputError, match=r"^parallel\.shard_ranks: 3 does not divide the 16 ranks"):
        mesh_shape(16, 3)
