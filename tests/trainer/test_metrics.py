"""The record of a run survives kills: what is in the file after any of them is what a run without the kill would hold."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest

from rollout.errors import InputError
from trainer.metrics import METRICS_FILE, MetricsWriter, comparable, number, read_metrics


def train(step: int, **values) -> dict:
    return {"kind": "train", "step": step, **values}


def test_rows_come_back_as_written(tmp_path):
    rows = [
        {"kind": "eval", "step": 0, "name": "heldout", "pass@1": 0.25},
        train(1, **{"entropy/mean": 0.1 + 0.2, "path/loss": "融合"}),
    ]
    with MetricsWriter(tmp_path, resume_after=None) as writer:
        for row in rows:
            writer.write(row)
            assert read_metrics(tmp_path)[-1] == row, "a row must be in the file before the next step begins"
    assert read_metrics(tmp_path) == rows


def test_not_a_number_becomes_null_and_stays_json(tmp_path):
    with MetricsWriter(tmp_path, resume_after=None) as writer:
        writer.write(train(1, **{"loss/total": math.nan, "ratio/max": math.inf, "lr": 1e-6}))
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == train(1, **{"loss/total": None, "ratio/max": None, "lr": 1e-6})
    assert number(json.loads(text), "loss/total") is None


def test_resume_drops_later_rows_and_the_torn_line(tmp_path):
    with MetricsWriter(tmp_path, resume_after=None) as writer:
        writer.write({"kind": "eval", "step": 0, "name": "heldout"})
        for step in (1, 2, 3, 4):
            writer.write(train(step))
        writer.write({"kind": "eval", "step": 2, "name": "heldout"})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')
    with MetricsWriter(tmp_path, resume_after=2) as writer:
        assert writer.has_evaluation(2, "heldout")
        assert not writer.has_evaluation(2, "other")
        writer.write(train(3, again=True))
    assert [(row["kind"], row["step"]) for row in read_metrics(tmp_path)] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert read_metrics(tmp_path)[-1]["again"]
    assert not (tmp_path / f"{METRICS_FILE}.tmp").exists()


def test_a_complete_last_row_without_its_newline_is_kept_apart_from_the_next(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "step": 1}')
    with MetricsWriter(tmp_path, resume_after=1) as writer:
        writer.write(train(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_new_run_in_an_old_folder_keeps_the_old_record_beside(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "step": 7}\n')
    with MetricsWriter(tmp_path, resume_after=None) as writer:
        writer.write(train(1))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert '"step": 7' in (tmp_path / f"{METRICS_FILE}.old").read_text()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, resume_after=None) as writer:
        for step in (1, 2, 3):
            writer.write(train(step, **{"reward/mean": float(step), "path/loss": "fused", "grad_norm": math.nan}))
    with MetricsWriter(tmp_path, resume_after=1) as writer:
        writer.write(train(2, **{"reward/mean": 20.0}))
        writer.write({"kind": "eval", "step": 2, "name": "heldout", "pass@1": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"reward/mean", "eval/heldout/pass@1"}
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.parametrize("row", [{"step": 1}, {"kind": "train"}, {"kind": "train", "step": 1.5}])
def test_a_row_that_no_resume_could_place_is_refused(tmp_path, row):
    with MetricsWriter(tmp_path, resume_after=None) as writer, pytest.raises(ValueError, match="metrics row needs"):
        writer.write(row)
    assert read_metrics(tmp_path) == []


def test_missing_and_corrupt_files_are_one_line_naming_the_place(tmp_path):
    with pytest.raises(InputError, match=METRICS_FILE) as missing:
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "step": 1}\nnot json\n{"kind": "train", "step": 3}\n')
    with pytest.raises(InputError, match="line 2") as corrupt:
        read_metrics(tmp_path)
    assert "\n" not in str(missing.value) + str(corrupt.value)


def test_comparable_drops_what_the_clock_decides_and_nothing_else():
    row = train(1, **{"time/step": 1.0, "rate/sample": 2.0, "memory/rss_gib": 3.0, "ratio/max": 1.1, "lr": 1e-6})
    assert comparable(row) == train(1, **{"ratio/max": 1.1, "lr": 1e-6})


def test_reading_and_drawing_need_no_torch():
    modules = "trainer.metrics, trainer.console, trainer.plot, trainer.plot_draw, trainer.summary"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_steps_score_is_the_mean_over_its_sets_and_survives_a_resume(tmp_path):
    def row(step, name, score):
        return {"kind": "eval", "step": step, "name": name, "pass@1": score}

    with MetricsWriter(tmp_path, resume_after=None) as writer:
        for each in (row(0, "a", 0.5), row(0, "b", 0.25), row(2, "a", 0.75), row(2, "b", None), row(4, "a", 1.0)):
            writer.write(each)
        assert [writer.score(step) for step in (0, 1, 2, 4)] == [0.375, None, None, 1.0]
    with MetricsWriter(tmp_path, resume_after=2) as writer:
        assert [writer.score(step) for step in (0, 2, 4)] == [0.375, None, None]


class Full:
    """A file on a disk that takes so many bytes, and then none until it is mended."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(content[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


@pytest.mark.parametrize("room", [0, 5, 41])
def test_rows_that_the_disk_refuses_wait_and_none_is_lost(tmp_path, room):
    notes = []
    with MetricsWriter(tmp_path, resume_after=None, note=notes.append) as writer:
        writer.write(train(1))
        disk = writer._file = Full(writer._file, room)
        for step in (2, 3, 4):
            writer.write(train(step))
        assert len(notes) == 1
        where = f"{tmp_path}/{METRICS_FILE}"
        assert notes[0] == f"{where}: No space left on device: rows wait in memory until it takes them; free space there"
        assert [row["step"] for row in read_metrics(tmp_path)][:1] == [1], "what is torn is at the end, and readers know that"
        disk.room = 1 << 20
        writer.write(train(5))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert notes[1:] == [f"{where}: takes rows again; all that waited are written"]


def test_rows_that_wait_hinder_a_checkpoint_and_are_written_at_the_end_if_they_can_be(tmp_path):
    notes = []
    with MetricsWriter(tmp_path, resume_after=None, note=notes.append) as writer:
        assert writer.hindrance() is None
        disk = writer._file = Full(writer._file, 0)
        for step in (1, 2):
            writer.write(train(step))
        assert writer.hindrance() == f"{tmp_path}/{METRICS_FILE}: 2 rows cannot be written"
        disk.room = 1 << 20
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert len(notes) == 2
    with MetricsWriter(tmp_path, resume_after=2, note=notes.append) as writer:
        writer._file = Full(writer._file, 0)
        writer.write(train(3))
    assert notes[-1] == (
        f"{tmp_path}/{METRICS_FILE}: 1 rows cannot be written, and are lost; the checkpoints are of steps before them"
    )


def test_tensorboard_is_a_view_and_ends_no_run(tmp_path):
    notes = []

    class Broken:
        def add_scalar(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = add_scalar

    with MetricsWriter(tmp_path, resume_after=None, note=notes.append) as writer:
        writer._tensorboard.close()
        writer._tensorboard = Broken()
        for step in (1, 2):
            writer.write(train(step, loss=0.5))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    (note,) = notes
    assert note.startswith("TensorBoard's files cannot be written ([Errno 28] No space left on device): no more of them")


def test_a_second_start_from_nothing_takes_no_records_place(tmp_path):
    for start in (1, 2, 3):
        with MetricsWriter(tmp_path, resume_after=None) as writer:
            if start < 3:
                writer.write(train(10 * start))
    with MetricsWriter(tmp_path, resume_after=None):
        pass
    assert "10" in (tmp_path / f"{METRICS_FILE}.old").read_text()
    assert "20" in (tmp_path / f"{METRICS_FILE}.old.2").read_text()
    assert len(list(tmp_path.glob(f"{METRICS_FILE}*"))) == 3, "an empty one is nobody's record"
