"""Pretraining with weights sharded over two gloo processes (FSDP2, through Accelerate), as the whole weights of one."""

import os

import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file

from spark.training.log import read_rows
from tests.spark.test_pretrain import bad_batches, curve, fresh_accelerate, photos, run, small_run  # noqa: F401  (fixtures)
from tests.together import launched, together

# At 128 px batch norm has more than a handful of sites at the deepest stage, and with a large eps a gradient of nothing
# but rounding stays one: neither makes much of the last digits in which one process and two differ.
STEADY = ("--model.input_size=128", "--optim.eps=1e-3", "--max_steps=4", "--checkpoint_every=2")
LAMB = (
    *STEADY,
    "--model.name=test_convnext",
    "--accumulation=2",
    "--optim.ema_decay=0.5",
    "--panels_every=2",
)
ADAMW = (*STEADY, "--optim.name=adamw", "--optim.clip_grad=0.01")


def several_runs(rank, runs, bad):
    """Pretrainings one after another in the same processes; the loss of the `bad` batches is NaN."""
    # A run ends with it; the next one needs the group.
    PartialState.destroy_process_group = lambda self, group=None: None
    for arguments in runs:
        with pytest.MonkeyPatch.context() as patch:
            if bad:
                bad_batches(patch, set(bad))
            run(arguments)
    torch.distributed.destroy_process_group()


def in_two_processes(folder, *runs, bad=()):
    """What the same two processes print in several runs, each given by its arguments; `bad` batches have no loss."""
    folder.mkdir()
    done = together(several_runs, runs, bad, folder=folder, limit=600, **launched("gpu_8_fsdp.yaml"))
    assert done.codes == [0, 0], done.stderr[-3000:]
    return done.stdout


def assert_same(one, two, step, names=("model.safetensors",)):
    """Losses, weights and averages agree; the moments have the same places and shapes."""
    losses = [{row["step"]: row["loss"] for row in read_rows(each / "metrics.jsonl")} for each in (one, two)]
    for number, loss in losses[1].items():
        other = losses[0][number]
        assert (loss is None) == (other is None), f"step {number} had no loss in one of them"
        assert loss is None or loss == pytest.approx(other, rel=1e-5)
    assert any(loss is not None for loss in losses[1].values())
    folder = f"checkpoints/step_{step:07d}"
    for name in names:
        first, second = (load_file(each / folder / name) for each in (one, two))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert second[key].shape == value.shape
            error = second[key].double() - value.double()
            if value.ndim > 1:  # LAMB moves these by 1e-3 of themselves; norms of a part of them would show
                assert error.norm() <= 3e-5 * value.double().norm(), f"{name} {key}"
            else:
                assert error.abs().max() <= 3e-5, f"{name} {key}"
    states = [torch.load(each / folder / "state.pt", weights_only=True)["optimizer"] for each in (one, two)]
    assert [group["params"] for group in states[0]["param_groups"]] == [
        group["params"] for group in states[1]["param_groups"]
    ]
    for number, mine in states[0]["state"].items():
        for key, value in mine.items():
            assert states[1]["state"][number][key].shape == value.shape


@pytest.mark.timeout(900)
def test_sharded_runs_are_those_of_whole_weights(photos, tmp_path, capsys):  # noqa: F811
    def arguments(name, *options):
        return small_run(photos, tmp_path / name, *options)

    run(arguments("lamb_one", *LAMB))
    run(arguments("adamw_one", *ADAMW))
    half = tmp_path / "adamw_one" / "checkpoints" / "step_0000002"
    text = in_two_processes(
        tmp_path / "printed",
        arguments("lamb", *LAMB, "--monitor.every=2", "--monitor.max_share=1", "--export_ema=true"),
        arguments("adamw", *ADAMW, f"--resume={half}"),
    )
    assert "weights were whole in each process, are sharded (FSDP)" in text
    assert_same(tmp_path / "lamb_one", tmp_path / "lamb", 2, ("model.safetensors", "ema.safetensors"))
    assert_same(tmp_path / "lamb_one", tmp_path / "lamb", 4, ("model.safetensors", "ema.safetensors"))
    assert_same(tmp_path / "adamw_one", tmp_path / "adamw", 4)

    rows = curve(tmp_path / "lamb")
    measured = [row for row in rows if "rank" in row]
    assert [row["step"] for row in measured] == [2, 4]
    assert all(row["rank"] > 1 for row in measured)
    assert len(list((tmp_path / "lamb" / "figures").iterdir())) == 2
    exported = load_file(tmp_path / "lamb" / "encoder" / "model.safetensors")
    averaged = load_file(tmp_path / "lamb" / "checkpoints" / "step_0000004" / "ema.safetensors")
    for key, value in exported.items():
        assert torch.equal(value, averaged[f"encoder.{key}"]), key

    capsys.readouterr()
    run(arguments("back", *LAMB, f"--resume={tmp_path / 'lamb' / 'checkpoints' / 'step_0000002'}"))
    assert "weights were sharded (FSDP) in each process, are whole" in capsys.readouterr().out
    assert_same(tmp_path / "lamb_one", tmp_path / "back", 4, ("model.safetensors", "ema.safetensors"))


@pytest.mark.timeout(900)
def test_two_processes_roll_back_as_one(photos, tmp_path, monkeypatch):  # noqa: F811
    """Step 6 fails on batch 5, back to step 4; step 5 fails on batch 6, back to step 2; 3 to 6 take batches 7 to 10."""

    def arguments(name):
        policy = ("--guard.on_nonfinite=rollback", "--keep_checkpoints=9", "--optim.ema_decay=0.5")
        return small_run(photos, tmp_path / name, *STEADY, *policy, "--max_steps=6")

    in_two_processes(tmp_path / "printed", arguments("two"), bad=(5, 6))
    asked = bad_batches(monkeypatch, {5, 6})
    run(arguments("one"))
    assert asked[-11:] == list(range(11))
    courses = [
        [(row["step"], row.get("event"), row.get("at_step")) for row in curve(tmp_path / name)]
        for name in ("one", "two")
    ]
    assert courses[0] == courses[1]
    assert courses[1][2:4] == [(2, "rollback", 6), (2, "rollback", 5)]
    names = [sorted(os.listdir(tmp_path / name / "checkpoints")) for name in ("one", "two")]
    assert names[0] == names[1]
    assert "superseded_step_0000004" in names[1]
    # All losses, and the state behind the rollbacks; later on batch norm makes much of the last digits.
    assert_same(tmp_path / "one", tmp_path / "two", 2, ("model.safetensors", "ema.safetensors"))
    for step in (2, 6):
        states = [
            tmp_path / name / "checkpoints" / f"step_{step:07d}" / "state.pt" for name in ("one", "two")
        ]
        extras = [torch.load(path, weights_only=True)["extra"] for path in states]
        assert extras[0]["offset"] == extras[1]["offset"] == 5
        assert extras[0]["guard"]["rollbacks"] == extras[1]["guard"]["rollbacks"] == 2
