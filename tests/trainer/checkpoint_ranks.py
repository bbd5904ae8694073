"""Checkpoints of several ranks, for test_checkpoint_ranks.py: `checkpoint_ranks.py FOLDER`.

The process loads torch once and forks for each rank. FOLDER/NAME.pt is what rank 0 of a launch found, FOLDER/KIND a run folder.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_actor import checkpoints, small_actor, state_at, update
from optimizer_ranks import coded_actor
from tiny_policy import whole_weights
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rollout.errors import InputError
from rollout.ranks import Ranks
from trainer.actor import Actor
from trainer.checkpoint_folder import read_manifest
from trainer.checkpoint_tensors import Writer
from trainer.distributed import MESH_NAMES, mesh_shape

KINDS: dict[str, Callable[[DeviceMesh], Actor]] = {
    "adamw": small_actor,
    "adamw8bit": lambda mesh: coded_actor(mesh, torch.float32),
}
Work = Callable[[Ranks, DeviceMesh, Path], dict]
SAVED_ON, RESUMED_ON = 4, (1, 2, 8)
UPDATES = 2
"""Before the save, and after it."""


def going_on(actor: Actor) -> dict:
    """Further updates, and the weights after them."""
    found = update(actor, UPDATES)
    return {"updates": found, "weights": whole_weights(actor.policy)}


def save(ranks: Ranks, mesh: DeviceMesh, folder: Path) -> dict:
    found = {}
    for kind, build in KINDS.items():
        actor = build(mesh)
        update(actor, UPDATES)
        with checkpoints(folder / kind, ranks=ranks) as kept:
            kept.save(actor, state_at(UPDATES))
            for number in range(50):  # the loop's own collectives beside those of the threads that write
                assert ranks.all_gather((ranks.rank, number)) == [(rank, number) for rank in range(ranks.size)]
            found[kind] = going_on(actor)
    return found


def resume(ranks: Ranks, mesh: DeviceMesh, folder: Path) -> dict:
    found = {}
    for kind, build in KINDS.items():
        actor = build(mesh)
        state = checkpoints(folder / kind, ranks=ranks).resume(actor)
        assert actor.updates == UPDATES
        found[kind] = {"ledger": asdict(state.ledger), "step": state.step, "buffer": len(state.buffer)} | going_on(actor)
    return found


def save_copies(ranks: Ranks, mesh: DeviceMesh, folder: Path) -> dict:
    """Two copies of the model, two shards each."""
    actor = small_actor(mesh)
    update(actor, UPDATES)
    with checkpoints(folder / "copies", ranks=ranks) as kept:
        kept.save(actor, state_at(UPDATES))
    return {"adamw": going_on(actor)}


def fail(ranks: Ranks, mesh: DeviceMesh, folder: Path) -> dict:
    """The disk refuses rank 1 alone, and then what rank 0 writes last."""
    said: list[str] = []
    kept = checkpoints(folder / "failing", said.append, ranks, max_failures=3)
    actor = small_actor(mesh)
    kept.save(actor, state_at(1), wait=True)
    write = Writer.write_data

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "the disk")

    if ranks.rank == 1:
        Writer.write_data = refuse
    outcomes = []
    for step, wait in ((2, False), (3, True)):
        try:
            kept.save(actor, state_at(step), wait=wait)
            outcomes.append("went on")
        except InputError as error:
            outcomes.append(str(error))
    Writer.write_data = write
    Writer.finish = refuse if ranks.first else Writer.finish
    try:
        kept.save(actor, state_at(4), wait=True)
    except InputError as error:
        outcomes.append(str(error))
    left = sorted(path.name for path in (folder / "failing" / "checkpoints").iterdir())
    everywhere = ranks.all_gather((outcomes, said))
    return {"outcomes": [each for each, _ in everywhere], "said": [each for _, each in everywhere], "left": left}


def skip(ranks: Ranks, mesh: DeviceMesh, folder: Path) -> dict:
    """Of three checkpoints the newest two are damaged: in a file of rank 0's share, and in one of rank 1's."""
    said: list[str] = []
    actor = small_actor(mesh)
    with checkpoints(folder / "damaged", ranks=ranks, keep=3) as kept:
        for step in (1, 2, 3):
            kept.save(actor, state_at(step), wait=True)
    for step in (2, 3):
        checkpoint = folder / f"damaged/checkpoints/step-{step:06d}"
        if ranks.first:
            victim = checkpoint / sorted(read_manifest(checkpoint))[step - 2]
            content = bytearray(victim.read_bytes())
            content[-1] ^= 1
            victim.write_bytes(content)
    ranks.all_gather(None)
    state = checkpoints(folder / "damaged", said.append, ranks).resume(actor)
    everywhere = ranks.all_gather((state.step, said))
    return {"steps": [step for step, _ in everywhere], "said": [said for _, said in everywhere]}


def launch(work: Work, name: str, folder: Path, size: int, shards: int | None = None) -> None:
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            try:
                run_rank(work, name, folder, rank, size, shards)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size, name


def run_rank(work: Work, name: str, folder: Path, rank: int, size: int, shards: int | None) -> None:
    meet = f"file://{folder}/{name}.meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    ranks = Ranks(rank, size, dist.new_group(backend="gloo") if size > 1 else None)
    shape = mesh_shape(size, shards)
    found = work(ranks, init_device_mesh("cpu", shape, mesh_dim_names=MESH_NAMES[-len(shape) :]), folder)
    if ranks.first:
        torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    launch(save, "stayed", folder, SAVED_ON)
    for size in RESUMED_ON:
        launch(resume, f"on {size}", folder, size)
    launch(save_copies, "copies", folder, SAVED_ON, 2)
    launch(fail, "failing", folder, 2)
    launch(skip, "damaged", folder, 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
