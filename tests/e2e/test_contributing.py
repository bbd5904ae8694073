"""CONTRIBUTING.md's examples, run as they stand there: a copy of the tree with all of them in it is linted, runs their commands,
and trains with them.

A fence's first line says what it is: `file=PATH` a new file; `edit=PATH` hunks of a diff, apart by @@, whose lines without + are
there exactly once; `sh` commands for the copy. `make setup` there compiles the new file of csrc/ alone, beside the library
that is built already: what setup.py does with it test_native_build.py asks.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import ROOT, write_config

from kernels import backend

FENCE = re.compile(r"^```(\w+)(?: (file|edit)=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_COPIED = (".git", ".venv", ".*_cache", "__pycache__", "runs", "models", "build", "*.egg-info", ".hypothesis", "results")


@dataclass(frozen=True)
class Fence:
    language: str
    kind: str | None
    path: str | None
    body: str


def examples() -> dict[str, list[Fence]]:
    """By heading."""
    _, _, text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n# Adding things, by example\n")
    sections = [section.partition("\n") for section in text.split("\n## ")[1:]]
    return {heading: [Fence(*match.groups()) for match in FENCE.finditer(body)] for heading, _, body in sections}


EXAMPLES = examples()


def edited(text: str, hunks: str, path: str) -> str:
    for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] or "\n" for line in lines if not line.startswith(sign)) for sign in "+-")
        found = [match.start() for match in re.finditer(rf"^{re.escape(old)}", text, re.MULTILINE)]
        assert len(found) == 1, f"CONTRIBUTING.md edits {path}, where these lines stand {len(found)} times:\n{old}"
        text = text[: found[0]] + new + text[found[0] + len(old) :]
    return text


def environment(tree: Path) -> dict[str, str]:
    ours = ("RANK", "WORLD_SIZE", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PYTEST_")}
    return kept | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


def run(tree: Path, *arguments: object) -> str:
    """`python ARGUMENTS` in the copy; what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The copy, with every example in it."""
    tree = tmp_path_factory.mktemp("contributing") / "keju"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
    for fence in (fence for fences in EXAMPLES.values() for fence in fences if fence.path):
        file = tree / fence.path
        assert file.exists() == (fence.kind == "edit"), f"CONTRIBUTING.md: {fence.kind}={fence.path}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(edited(file.read_text("utf-8"), fence.body, fence.path) if fence.kind == "edit" else fence.body, "utf-8")
    return tree


@pytest.fixture(scope="module")
def compiled(tree):
    """Begins to compile what is new in csrc/; a function that waits for it. In the copy `kernels._native` is a module that loads
    the library that was built, and then the new one too."""
    if not backend.has_native():
        return lambda: None
    from torch.utils.cpp_extension import include_paths, library_paths

    (built,) = (tree / "kernels").glob("_native*.so")
    libraries = [built.rename(tree / "built.so")]
    sources = [fence.path for fences in EXAMPLES.values() for fence in fences if fence.language == "cpp"]
    flags = ["-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", *(f"-I{path}" for path in include_paths())]
    linked = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]
    command = [os.environ.get("CXX", "c++"), *flags, "-o", "new.so", *sources, *linked]
    compiler = subprocess.Popen(command, cwd=tree, stderr=subprocess.PIPE, text=True)

    def load() -> None:
        lines = [f"torch.ops.load_library({str(path)!r})" for path in libraries]
        (tree / "kernels" / "_native.py").write_text("\n".join(["import torch", "", *lines, ""]))

    def wait() -> None:
        _, errors = compiler.communicate(timeout=300)
        assert compiler.returncode == 0, errors
        libraries.append(tree / "new.so")
        load()

    load()
    return wait


def test_the_examples_are_written_as_the_rest_is(tree, compiled):
    files = [fence.path for fences in EXAMPLES.values() for fence in fences if fence.path and fence.path.endswith(".py")]
    assert len(files) >= 10
    run(tree, "-m", "ruff", "check", "--no-cache", *files)
    run(tree, "-m", "ruff", "format", "--no-cache", "--check", *files)


def test_training_takes_the_new_advantage_rule_and_engine(tree, tiny):
    config = write_config(tiny, tiny / "contributed")
    stages = "stages=[{name: one, steps: 3, context: 40, batch: {dynamic: true}}]"
    run(
        tree, "-m", "trainer.train", config, stages, "objective.advantage=rloo", "reward.rule=integer", "engine.kind=plain",
        "evaluation.every=3",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tiny / "contributed" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss/policy" in row]
    assert len(steps) == 3
    assert {row["path/engine"] for row in steps} == {"plain"}
    assert any(row["reward/accuracy"] > 0 for row in steps)


@pytest.mark.long
def test_the_commands_do_what_they_say(tree, compiled):
    """All files of tests in one pytest, whose start is most of what they cost."""
    commands = [
        line.split()
        for fences in EXAMPLES.values()
        for fence in fences
        if fence.language == "sh"
        for line in fence.body.splitlines()
    ]
    compiled()
    commands.remove(["make", "setup"])
    assert {command[0] for command in commands} == {".venv/bin/python"}
    tests = [file for _, _, module, *files in commands if module == "pytest" for file in files]
    new = {
        fence.path for fences in EXAMPLES.values() for fence in fences if fence.path and Path(fence.path).name.startswith("test_")
    }
    assert new <= set(tests)
    said = run(tree, "-m", "pytest", *tests)
    assert re.search(r"^\d+ passed", said, re.MULTILINE), said
    for _, *arguments in (command for command in commands if command[2] != "pytest"):
        run(tree, *arguments)


def test_each_example_shows_the_name_of_its_file():
    """A page shows no fence's first line."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for match in (match for match in FENCE.finditer(text) if match[3]):
        assert match[3] in text[: match.start()].rstrip().rpartition("\n")[2], match[3]


def test_an_edit_that_fits_no_more_is_named():
    assert edited("a\nb\n", " a\n+c\n", "x.py") == "a\nc\nb\n"
    assert edited("a\nb\nb\n", "-a\n+c\n b\n", "x.py") == "c\nb\nb\n"
    for text in ("b\n", "a\na\n", "aa\n"):
        with pytest.raises(AssertionError, match=r"edits x\.py, where these lines stand \d times:\s+a"):
            edited(text, " a\n+c\n", "x.py")
