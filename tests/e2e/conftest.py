"""The model and the data of `tiny_run`, made once a session."""

import random

import pytest
from tiny_run import QUESTIONS, write_config, write_rows


@pytest.fixture(scope="session")
def one_thread():
    """As in the subprocesses: the order of a sum may depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, one_thread):
    """Folder with train.jsonl, warmup.jsonl, base/ and warm/."""
    from trainer import warmup
    from trainer.demo_task import write_base_model

    folder = tmp_path_factory.mktemp("tiny")
    generator = random.Random(0)
    rows = [{"id": f"q{number}", "question": f"digit {number}?", "answer": str(number % 4)} for number in range(QUESTIONS)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "warmup.jsonl", [row | {"solution": "hm", "answer": str(generator.randrange(4))} for row in rows])
    write_base_model(folder / "base", folder / "warmup.jsonl", 0)
    assert warmup.main([str(write_config(folder, folder / "run"))]) == 0
    return folder
