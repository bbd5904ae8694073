"""What a rank holds once it has given freed memory back: looked at before each checkpoint's bytes are in hand, and told."""

from unittest.mock import patch

from test_repeatable import train
from tiny_run import write_config

from trainer import host_memory
from trainer.checkpoint import Checkpoints
from trainer.hang_report import Health
from trainer.metrics import read_metrics
from trainer.report_writer import health_path

GIB = 2**30


def test_a_rank_says_at_each_checkpoint_what_it_holds(tiny, tmp_path):
    run = tmp_path / "run"
    order = []
    look, save = host_memory.held, Checkpoints.save

    def looked():
        order.append(look())
        return order[-1]

    def saved(self, actor, state, *more):
        order.append(state.step)
        save(self, actor, state, *more)

    with patch("trainer.host_memory.held", looked), patch.object(Checkpoints, "save", saved):
        train(write_config(tiny, run, ("every: 1, keep: 20", "every: 3, keep: 20")))
    held, steps = order[::2], order[1::2]
    assert steps == [3, 6, 7]
    assert all(0.1 * GIB < value < 24 * GIB for value in held)
    rows = [row for row in read_metrics(run) if row["kind"] == "train"]
    expected = [None] * 3 + [held[0] / GIB] * 3 + [held[1] / GIB]
    assert [row.get("memory/held_gib") for row in rows] == expected
    assert Health.from_json(health_path(run, 0).read_text(encoding="utf-8")).held == held[-1]
