"""A run's folder of checkpoints: which of them are whole, which are kept, how one comes to stand and goes again.

    step-000010            stands; its manifest tells whether it is still what was written
    step-000010.tmp        being written: never read
    step-000010.old.tmp    being removed: never read

Each comes and goes by one rename, so a kill at any instant leaves no third thing. Files that a manifest does not name are not
looked at: nothing reads them. No torch here, no collectives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from rollout.errors import InputError

MANIFEST, STATE, ARRAYS, TENSORS = "manifest.json", "state.json", "arrays.safetensors", "dcp"
INDEX = f"{TENSORS}/.metadata"
NEEDED = (STATE, ARRAYS, INDEX)
UNFINISHED, GOING = ".tmp", ".old.tmp"
NAME = re.compile(r"step-(\d{6,})")
CHUNK_BYTES = 1 << 20
"""Read at a time for a checksum."""
READERS = 8
"""Files whose checksums are taken at a time."""

Files = dict[str, dict[str, Any]]
"""Path in the checkpoint → its "bytes" and "sha256"."""


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def folders_of(checkpoints: Path) -> list[Path]:
    """By step; whole ones and damaged ones. Raises InputError where the folder cannot be looked at: a run that does not see what
    it has learnt would begin anew."""
    try:
        with os.scandir(checkpoints) as entries:
            found = [checkpoints / entry.name for entry in entries if NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        if not checkpoints.is_symlink():
            return []
        raise InputError(f"{checkpoints}: is a link to nothing; is a disk not mounted? Mend or remove it") from None
    except OSError as error:
        raise InputError(f"{checkpoints}: cannot be looked at ({error.strerror}); mend that, or name another run") from None
    return sorted(found, key=step_of)


def newest_whole(checkpoints: Path, note: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest that its manifest confirms; one that is not whole is named and skipped. None where there is no checkpoint.

    Raises InputError where there are some and none is whole: to begin anew beside what was trained must be somebody's decision.
    """
    return newest_of(checkpoints, folders_of(checkpoints), damage, note)


def newest_of(
    checkpoints: Path, folders: Sequence[Path], check: Callable[[Path], str | None], note: Callable[[str], None]
) -> Path | None:
    """`newest_whole` among these, by step; check: gives what is wrong with one."""
    problems = []
    for folder in reversed(folders):
        problem = check(folder)
        if problem is None:
            return folder
        note(f"checkpoint {folder.name} skipped: {problem}")
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise InputError(
            f"{checkpoints}: no checkpoint is whole ({'; '.join(problems)}); mend one, or move this folder away or name another "
            "run to begin at step 0"
        )
    return None


def complete_checkpoint(run: Path, step: int | None = None) -> Path:
    """Of a run folder: that of a step, or the newest that is whole. Raises InputError."""
    checkpoints = run / "checkpoints"
    if step is None:
        folder = newest_whole(checkpoints)
        if folder is None:
            raise InputError(f"{checkpoints}: no complete checkpoint; give the folder of a run that has saved one")
        return folder
    wanted, folders = checkpoints / name_of(step), folders_of(checkpoints)
    if wanted not in folders:
        raise InputError(f"{wanted}: no such checkpoint; there are {', '.join(each.name for each in folders) or 'none'}")
    if (problem := damage(wanted)) is not None:
        raise InputError(f"{wanted}: not whole ({problem}); take another step")
    return wanted


def damage(folder: Path, share: int = 0, shares: int = 1, stir: Callable[[], None] = lambda: None) -> str | None:
    """What is wrong with a checkpoint, or None. share, of shares: only every so-many-th file's checksum is taken; stir: called,
    from any thread, as bytes are read."""
    try:
        files = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name in NEEDED:
        if name not in files:
            return f"{MANIFEST} does not name {name}"
    mine = sorted(files.items())[share::shares]
    with ThreadPoolExecutor(READERS) as pool:
        checks = pool.map(lambda item: _fault(folder, *item, stir), mine)
        return next((fault for fault in checks if fault is not None), None)


def _fault(folder: Path, name: str, facts: dict[str, Any], stir: Callable[[], None]) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != facts["bytes"]:
            return f"{name} has {size} bytes, not {facts['bytes']}"
        if _digest(path, stir) != facts["sha256"]:
            return f"{name} does not match its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def read_manifest(folder: Path) -> Files:
    """Raises OSError or ValueError where it is not a list of files in this folder."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(files, dict):
        raise ValueError("it is no table of files")
    for name, facts in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} does not lie in the checkpoint")
        if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
            raise ValueError(f"{name!r} has no size and checksum")
    return files


def describe(folder: Path, paths: Iterable[Path]) -> Files:
    """Of files in `folder`, as a manifest lists them."""
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(paths)}


def create(beside: Path) -> None:
    """An empty folder to write a checkpoint into; what unfinished ones left behind is removed first."""
    clear_unfinished(beside.parent)
    _remove(beside)
    (beside / TENSORS).mkdir(parents=True)


def publish(beside: Path, final: Path, files: Files) -> None:
    """Everything in `beside`, which `files` lists and which is on the disk, becomes the checkpoint `final`.

    Raises OSError where this machine does not see a file that another one wrote.
    """
    for name, facts in files.items():
        if not (beside / name).is_file() or (beside / name).stat().st_size != facts["bytes"]:
            raise OSError(f"{beside / name} is not there as it was written: all ranks need the same file system")
    manifest = beside / MANIFEST
    manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
    for path in (manifest, beside / TENSORS, beside):
        flush(path)
    if final.exists():  # damaged: one that is whole is not written again
        discard(final)
    os.replace(beside, final)
    flush(final.parent)


def kept(steps: Sequence[int], newest: int, *, last: int, every: int | None = None, best: int | None = None) -> set[int]:
    """Steps whose checkpoints stay: of those up to `newest`, the `last` newest, the multiples of `every`, and `best`. Later ones
    were skipped as damaged, and would push whole ones out."""
    past = sorted(step for step in steps if step <= newest)
    return {*past[-last:], *(step for step in past if every is not None and step % every == 0), *({best} & set(past))}


def best_of(steps: Iterable[int], score: Callable[[int], float | None]) -> int | None:
    """The step with the highest score, of equals the latest; None where none has one."""
    scored = [(value, step) for step in steps if (value := score(step)) is not None]
    return max(scored)[1] if scored else None


def discard(folder: Path) -> None:
    """A kill in the middle leaves nothing that looks like a checkpoint."""
    going = folder.with_name(folder.name + GOING)
    _remove(going)
    os.replace(folder, going)
    _remove(going)


def clear_unfinished(checkpoints: Path) -> None:
    """What can be removed of it: a file that another program holds open on a network file system stays until the next time."""
    for path in checkpoints.glob(f"step-*{UNFINISHED}"):
        if NAME.fullmatch(path.name.removesuffix(GOING).removesuffix(UNFINISHED)):
            with contextlib.suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def free_bytes(folder: Path) -> int:
    """For files in `folder`, which may not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def flush(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path, stir: Callable[[], None] = lambda: None) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            stir()
    return digest.hexdigest()
