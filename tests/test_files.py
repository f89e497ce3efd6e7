"""What a run leaves is whole or not there, on a full disk too; and what others leave beside it is theirs."""

import errno
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny
from run_factory import make_run
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_logging import FakeTrainer, Recorder

from rl_llm import files
from rl_llm.errors import RunFailed, UserError
from rl_llm.files import replacing, room_for, write_text
from rl_llm.launch.preflight import make_plan
from rl_llm.launch.resume import open_directory
from rl_llm.runs import checkpoint
from rl_llm.runs.jsonl import JsonlWriter, read_jsonl
from rl_llm.runs.run import Run
from rl_llm.runs.trackers import MLflow, WandB

NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(file: Path) -> None:
    file.write_text("ha")
    raise NO_ROOM


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_text(file, "whole")
    with pytest.raises(OSError, match="No space"), replacing(file) as aside:
        half_written(aside)
    assert (file.read_text(), list(tmp_path.iterdir())) == ("whole", [file])


def test_a_folder_that_cannot_be_written_is_as_it_was_and_takes_no_room(tmp_path: Path) -> None:
    with checkpoint.writing(tmp_path / "model") as aside:
        (aside / "weights").write_text("first")
    with pytest.raises(OSError, match="No space"), checkpoint.writing(tmp_path / "model") as aside:
        half_written(aside / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert checkpoint.damage(tmp_path / "model") is None
    with checkpoint.writing(tmp_path / "model") as aside:
        (aside / "weights").write_text("second")
    assert (tmp_path / "model" / "weights").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_line_for_which_there_is_no_room_is_not_begun(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(file)
    writer.write({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system writes as much as there is room for, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == '{"step": 1}\n'
    writer.write({"step": 2, "text": "\ud800"})
    writer.close()
    assert read_jsonl(file) == [{"step": 1}, {"step": 2, "text": "\ud800"}]


@pytest.mark.parametrize(
    "error",
    [
        NO_ROOM,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "quota", "arrow", "safetensors"],
)
def test_every_full_disk_is_named_with_its_remedy(error: Exception) -> None:
    expected = "disk full: no room to write runs/a; free room, then go on with resume=True"
    with pytest.raises(RunFailed, match=expected), room_for(Path("runs/a")):
        raise error
    with pytest.raises(RunFailed, match="no room to write /tmp/spill"), room_for(Path("runs/a")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/spill")
    for other in (UserError("No space left on device"), OSError(errno.EACCES, "Permission denied")):
        with pytest.raises(type(other)), room_for(Path("runs/a")):
            raise other


def test_a_run_whose_disk_is_full_goes_on_once_there_is_room(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def full(tensors: Any, file: Path) -> None:
        if len(tiny.metrics(path)) == 4:
            file.write_bytes(b"as much as there was room for")
            raise SafetensorError(f"Error while serializing: I/O error: {NO_ROOM}")
        save_file(tensors, file)

    def full_as_well(run: Path, summary: Any) -> None:
        raise NO_ROOM

    with monkeypatch.context() as patch:
        patch.setattr("rl_llm.learner.learner.save_file", full)
        with pytest.raises(RunFailed) as failed:
            tiny.train(tiny_run.config(), path)
    assert str(failed.value) == f"disk full: no room to write {path}; free room, then go on with resume=True"
    assert Run(path).summary["reason"] == str(failed.value)
    assert not list(path.rglob("*.partial"))
    with monkeypatch.context() as patch:
        patch.setattr("rl_llm.launch.record.write_summary", full_as_well)
        with pytest.raises(RunFailed, match="disk full"):
            tiny.train(tiny_run.config(), path, resume=True)
    assert Run(path).status == "running or killed"
    tiny.train(tiny_run.config(), path, resume=True)
    tiny.assert_same_run(path, tiny_run.undisturbed)


def test_a_run_is_finished_without_its_report_too(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Run) -> Path:
        raise ValueError("no charts today")

    monkeypatch.setattr("rl_llm.runs.run.write_report", fails)
    run = tiny.train(tiny_run.config(trainer={"steps": 1}), tmp_path / "run")
    assert run.status == "finished"
    assert (
        f"no report.html: ValueError: no charts today; make it with: rl-llm report {run.path}"
        in capsys.readouterr().out
    )


def test_broken_files_count_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", steps=2)
    for broken in ("", '{"status": "fin', "[]"):
        (run / "summary.json").write_text(broken)
        assert Run(run).status == "running or killed"
    tracker = Recorder()
    for module, sink, noted in (("wandb", WandB, "wandb_run_id.txt"), ("mlflow", MLflow, "mlflow_run_id.txt")):
        monkeypatch.setitem(sys.modules, module, tracker)
        (run / noted).write_text("")
        sink("mine").on_start(FakeTrainer(run, steps_done=4))
        assert (run / noted).read_text() == "run-1"
    assert [kwargs["id"] for _, kwargs in tracker.named("init")] == [None]
    assert [kwargs["run_id"] for _, kwargs in tracker.named("start_run")] == [None]
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: sections"):
        _ = Run(run).config


def test_what_others_leave_beside_a_runs_own_is_neither_counted_nor_read_nor_deleted(
    tiny_run: Tiny, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_run.undisturbed, tmp_path / "run")
    copies = {
        "checkpoints/step-000004": ["checkpoints/step-000004-good", "checkpoints/step-4"],
        "checkpoints/best/step-000000": ["checkpoints/best/step-000000-mine", "checkpoints/best/step-best"],
    }
    for own, theirs in copies.items():
        for name in theirs:
            shutil.copytree(path / own, path / name)
    table = shutil.copy(path / "rollouts/step-000001.parquet", path / "rollouts/step-000001-mine.parquet")
    config = tiny_run.config(trainer={"steps": 7}, checkpoint={"keep": 2, "every": 1}, logging={"rollouts": 2})
    run = tiny.train(config, path, resume=True)
    assert all(checkpoint.damage(path / name) is None for names in copies.values() for name in names)
    assert list(checkpoint.by_step(path / "checkpoints")) == [6, 7]
    assert (run.rollout_steps, table.exists()) == ([6, 7], True)


def test_the_same_checkpoint_can_be_damaged_twice(tiny_run: Tiny, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_run.undisturbed, tmp_path / "run")
    last, notes = path / "checkpoints/step-000006", []
    for _ in range(3):
        (last / "state.json").write_text("{")
        found = open_directory(make_plan(tiny_run.config(), {}), path, True, notes.append)
        assert found == path / "checkpoints/step-000004"
        shutil.copytree(found, last)
    refused = sorted(folder.name for folder in (path / "checkpoints").glob("refused-*"))
    assert refused == ["refused-step-000006", "refused-step-000006-2", "refused-step-000006-3"]
    assert len(notes) == 3


def test_steps_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        (tmp_path / checkpoint.step_name(step)).mkdir()
    assert list(checkpoint.by_step(tmp_path)) == [20, 999_999, 1_000_000]
    checkpoint.prune(tmp_path, 1)
    assert list(checkpoint.by_step(tmp_path)) == [1_000_000]


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    assert files.free_name(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").symlink_to("nowhere")
    (tmp_path / "a-2").mkdir()
    assert files.free_name(tmp_path / "a") == tmp_path / "a-3"
