"""What the engine gives to depth runs as to pretraining: guard, rollback, time limit, sharded weights."""

import errno
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from finetune.losses.weighted import WeightedLoss
from finetune.model.depth_model import DepthModel, load_depth_model
from finetune.tasks.depth import DepthTraining
from spark.training.log import read_rows
from spark.training.state import RunState
from tests.finetune.tasks.test_depth_training import (
    STEADY,
    arguments,
    assert_same_weights,
    losses_of,
    rows_of,
    run,
    train_with_settled_norms,
    weights_of,
    with_settled_norms,
    world,
)
from tests.together import launched, together

__all__ = ["world"]  # a fixture


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def spoil(patch: pytest.MonkeyPatch, call: int) -> None:
    """The loss of this call, counted from 1, is NaN."""
    forward, calls = WeightedLoss.forward, []

    def spoiled(self: Any, *arguments: Any) -> Any:
        calls.append(0)
        total, parts = forward(self, *arguments)
        return (total * math.nan if len(calls) == call else total), parts

    patch.setattr(WeightedLoss, "forward", spoiled)


def test_a_step_without_a_finite_loss_can_be_skipped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(world, tmp_path / "whole", max_steps=4)
    spoil(monkeypatch, 3)
    rows = run(world, tmp_path / "run", max_steps=4, **{"guard.on_nonfinite": "skip"})
    assert [(row["step"], row.get("event")) for row in rows] == [(1, None), (2, None), (3, "skip"), (4, None)]
    assert rows[2]["reason"].startswith("the loss is nan")
    assert rows[2]["loss"] is None
    assert losses_of(rows[:2]) == losses_of(whole[:2])
    assert rows[3]["loss"] != whole[3]["loss"], "the step was left out, so its weights are others"
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())


def test_a_run_rolls_back_and_goes_on_behind_the_batch_that_failed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 4)
    options = {"guard.on_nonfinite": "rollback", "checkpoint_every": 2, "max_steps": 4}
    rows = run(world, tmp_path / "run", **options)
    courses = [(row["step"], row.get("event"), row.get("at_step")) for row in rows]
    assert courses == [(1, None, None), (2, None, None), (2, "rollback", 4), (3, None, None), (4, None, None)]
    extra = torch.load(tmp_path / "run" / "checkpoints" / "step_0000004" / "state.pt", weights_only=True)[
        "extra"
    ]
    assert extra["offset"] == 2, "steps 3 and 4 train on batches 5 and 6"


def test_a_run_stops_at_its_time_limit_and_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(world, tmp_path / "whole")
    forward = WeightedLoss.forward

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(WeightedLoss, "forward", slow)
        run(world, tmp_path / "run", time_limit=0.0001)  # 0.36 s
    assert "stopped and saved after step" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()
    rows = run(world, tmp_path / "run", resume="true", time_limit="null")
    assert losses_of(rows) == losses_of(whole)
    assert_same_weights(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


@pytest.mark.timeout(600)
def test_sharded_weights_train_as_whole_ones(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**STEADY, "optim.ema_decay": 0.5, "max_steps": 3, "select": "rmse"}
    done = together(
        with_settled_norms,
        arguments(world, tmp_path / "sharded", **options, checkpoint_every=2, validate_every=0.34),
        folder=tmp_path,
        **launched("gpu_8_fsdp.yaml"),
    )
    assert done.codes == [0, 0], done.stderr[-3000:]
    monkeypatch.setattr(DepthModel, "train", train_with_settled_norms)
    whole = run(world, tmp_path / "whole", **options, checkpoint_every=2, validate_every=0.34)
    rows = rows_of(tmp_path / "sharded")
    assert losses_of(rows) == pytest.approx(losses_of(whole), rel=1e-5)
    scores = [[row["val_rmse"] for row in each if "val_rmse" in row] for each in (rows, whole)]
    assert len(scores[0]) == 2, "after step 2 and at the end"
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    for name, value in weights_of(tmp_path / "whole").items():
        torch.testing.assert_close(weights_of(tmp_path / "sharded")[name], value, rtol=1e-4, atol=1e-5)
    assert load_depth_model(tmp_path / "sharded" / "best").head_name == "unetpp"

    # The main process alone knows that the state which the run goes on from has been validated.
    longer = {**options, "max_steps": 4, "resume": tmp_path / "sharded" / "checkpoints" / "step_0000002"}
    done = together(
        with_settled_norms,
        arguments(world, tmp_path / "sharded", **longer, checkpoint_every=2, validate_every=0.34),
        folder=tmp_path,
        **launched("gpu_8_fsdp.yaml"),
    )
    assert done.codes == [0, 0], done.stderr[-3000:]
    assert [row["step"] for row in rows_of(tmp_path / "sharded")] == [1, 2, 3, 4]


def test_a_rollback_takes_back_the_validations_of_the_weights_that_are_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run decides as one that is resumed from its rows would: by validations that are in them."""
    spoil(monkeypatch, 4)
    options = {"guard.on_nonfinite": "rollback", "checkpoint_every": 1, "max_steps": 6, "validate_every": 0.5}
    seen: list[list[tuple[int, float]]] = []
    ended = DepthTraining.ended

    def noted(self: DepthTraining, run: Any) -> bool:
        rows = read_rows(run.log.path)
        assert self.selection.scores == [(r["step"], r["val_abs_rel"]) for r in rows if "val_abs_rel" in r]
        seen.append(list(self.selection.scores))
        return ended(self, run)

    monkeypatch.setattr(DepthTraining, "ended", noted)
    monkeypatch.setattr(
        RunState, "rollback_target", lambda self, folder: Path(folder) / "checkpoints" / "step_0000001"
    )
    rows = run(world, tmp_path / "run", keep_checkpoints=9, **options)
    assert max(len(scores) for scores in seen) >= 2
    assert [len(scores) for scores in seen] != sorted(len(scores) for scores in seen), "some were taken back"
    assert [row["step"] for row in rows if row.get("event") == "rollback"] == [1]
    events = [row for row in rows if "event" in row]
    assert not any(name.startswith("val_") for row in events for name in row)


def test_a_full_disk_at_a_validation_follows_the_guard(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, tries = DepthModel.save, []

    def full(self: DepthModel, folder: str | Path) -> Path:
        tries.append(Path(folder).name)
        if tries[-1] == "best" and tries.count("best") == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return save(self, folder)

    monkeypatch.setattr(DepthModel, "save", full)
    options = {"max_steps": 4, "validate_every": 0.5}
    rows = run(world, tmp_path / "run", **options, **{"guard.on_save_error": "continue"})
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert "best/ after step" in said
    # The first validation does not count, and what is said to be in best/ is there.
    scores = [(row["step"], row["val_abs_rel"]) for row in rows if "val_abs_rel" in row]
    assert tries.count("best") > 1
    assert f"step {min(scores, key=lambda score: score[1])[0]}) is that of" in " ".join(said.split())
    tries.clear()
    with pytest.raises(SystemExit) as ended:
        run(world, tmp_path / "stops", **options)
    assert ended.value.code == 2
    assert "the disk is full" in capsys.readouterr().err
