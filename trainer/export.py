"""`python -m trainer.export SOURCE --out FOLDER [--format …] [--step N]`: a run's policy, or a model folder, for others to load.

    python -m trainer.export runs/stage3 --out models/confucius                    # newest checkpoint, dtypes of the base model
    python -m trainer.export runs/stage3 --out models/confucius-fp8 --format fp8   # what vLLM serves as it is

The result is a Hugging Face folder. Formats: `base` (each weight in the dtype that the base model has it in: untrained weights
come out bit for bit as they went in), `bfloat16`, `float32`, and `fp8`: the layers' matrices as e4m3 with one scale per output
channel, the rest in bfloat16, activations to be quantized per token while serving; the compressed-tensors form. Written beside
and renamed, in files of a few GB; in memory is one file's worth of tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from rollout.cli import Parser
from rollout.errors import InputError
from rollout.model_folder import TOKENIZER_FILES
from rollout.weights.folder import FolderWeights
from rollout.weights.source import WeightSource
from rollout.weights.wire import quantize
from trainer import cli
from trainer.checkpoint_folder import complete_checkpoint, flush
from trainer.checkpoint_weights import CheckpointWeights
from trainer.config_file import load_config
from trainer.disk import refusals
from trainer.model_folder import check_full_precision_folder

FORMATS = ("base", "bfloat16", "float32", "fp8")
FILE_BYTES = 4 << 30
FP8_SETTINGS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        }
    },
}
"""config.json's quantization_config, as vLLM's compressed-tensors loader reads it: W8A8, weights by output channel."""


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m trainer.export", description="A run's policy, or a model folder, as a Hugging Face folder.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run folder, or model folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--format", choices=FORMATS, default="base", help="default: base")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest complete one")
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise InputError(f"--out {options.out}: exists; name another folder, or remove it")
    weights, base, what = open_source(options.source, options.step)
    with Progress(transient=True) as progress:
        task = progress.add_task("exporting", total=len(weights.metadata()))
        written = export(weights, base, options.out, options.format, lambda: progress.advance(task))
    print(f"{options.out}: {what} as {options.format}, {written / 1e9:.2f} GB")
    return 0


def open_source(source: Path, step: int | None) -> tuple[WeightSource, Path, str]:
    """(weights, folder of the base model, in words). Raises InputError."""
    if not (source / "config.yaml").exists():
        if step is not None:
            raise InputError(f"--step: {source} is no run folder (it has no config.yaml)")
        check_full_precision_folder(source)
        return FolderWeights(source), source, str(source)
    base = load_config(source / "config.yaml", []).model.path
    check_full_precision_folder(base)
    checkpoint = complete_checkpoint(source, step)
    return CheckpointWeights(checkpoint, tied=is_tied(base)), base, f"{source}, {checkpoint.name}"


def export(weights: WeightSource, base: Path, out: Path, form: str, advance: Callable[[], object] = lambda: None) -> int:
    """Writes `out`, with the configuration and tokenizer of `base`; bytes of the weights."""
    dtypes = {meta.name: meta.dtype for meta in FolderWeights(base).metadata()}
    for meta in weights.metadata():
        if meta.name not in dtypes:
            raise InputError(f"{base}: has no weight {meta.name}, which is to be exported; it is not the run's base model")
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    total = write_weights(encoded(weights, dtypes, form, advance), beside)
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (base / name).exists():
            shutil.copyfile(base / name, beside / name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (beside / "config.json").write_text(json.dumps(described(config, form), indent=2) + "\n", encoding="utf-8")
    for path in (*beside.iterdir(), beside):
        flush(path)
    os.replace(beside, out)
    flush(out.absolute().parent)
    return total


def is_tied(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)


def encoded(
    weights: WeightSource, dtypes: dict[str, torch.dtype], form: str, advance: Callable[[], object]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they are to be stored. dtypes: of the base model's weights."""
    for name, weight in weights:
        if form == "fp8" and is_quantized(name, weight):
            quantized, scale = quantize(weight)
            yield name, quantized
            yield name.removesuffix("weight") + "weight_scale", scale.unsqueeze(1)
        else:
            dtype = dtypes[name] if form == "base" else torch.float32 if form == "float32" else torch.bfloat16
            yield name, weight.to(dtype)
        advance()


def is_quantized(name: str, weight: Tensor) -> bool:
    """A linear layer's weight; not the embedding, the head, a norm or a bias."""
    return weight.ndim == 2 and ".layers." in name and name.endswith(".weight")


def described(config: dict[str, Any], form: str) -> dict[str, Any]:
    """config.json for a format."""
    if form == "base":
        return config
    config = {name: value for name, value in config.items() if name not in ("torch_dtype", "dtype", "quantization_config")}
    config["dtype"] = "float32" if form == "float32" else "bfloat16"
    return config | {"quantization_config": FP8_SETTINGS} if form == "fp8" else config


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, file_bytes: int = FILE_BYTES) -> int:
    """Into model.safetensors, or into as many files of about `file_bytes` as it takes, with their index; bytes in all."""
    total, names = 0, []
    for number, part in enumerate(_parts(tensors, file_bytes)):
        with refusals(folder / f"part-{number}"):
            save_file(part, folder / f"part-{number}", metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in part.values())
        names.append(list(part))
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return total
    place = {}
    for number, part in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        place |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _parts(tensors: Iterable[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > file_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor.contiguous()
        size += tensor.nbytes
    yield part


if __name__ == "__main__":
    cli.run(main)
