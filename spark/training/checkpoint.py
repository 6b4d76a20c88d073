"""Checkpoints of a run.

One is a folder `checkpoints/step_NNNNNNN/` with `model.safetensors`, `state.pt` (optimizer, gradient
scaler, step, and what else the loop keeps), of a run that averages its weights `ema.safetensors`, and `SHA256SUMS` of
these. It is written under a hidden name and renamed when all of it is on the disk, so what has its final name is whole;
the checksums tell of what a disk or a copy did to it later. Nothing is ever unpickled: safetensors, and
`torch.load(weights_only=True)`.
"""

import contextlib
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spark.errors import UserError
from spark.files import checksum, whole_folder, write_tensors
from spark.model.encoder import without_unneeded
from spark.weights.encoder import EMA, STATE, WEIGHTS, description
from spark.weights.keys import fit, placed
from spark.weights.official import read_torch_file

logger = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"  # in the form that `sha256sum --check` reads
_FILES = (WEIGHTS, STATE, EMA, CHECKSUMS)
_STEP_FOLDER = re.compile(r"step_(\d+)")
# A checkpoint that was about to be replaced by another one of its step, see `spark.files.whole_folder`.
_RETIRED = re.compile(r"\.step_(\d+)\.old-\d+")


def save_run(
    output_dir: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: Any = None,
    ema: nn.Module | None = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    moments: dict[str, Any] | None = None,
) -> Path:
    """Write the state of a run after optimizer step `step`; only the main process calls it, with whole weights.

    Older checkpoints beyond the newest `keep` are removed once the new one is on the disk. Checkpoints of later steps,
    of a course that the run has left, and a folder of this step with foreign files are renamed to `superseded_step_*`.

    Args:
        output_dir: Folder of the run.
        step: Optimizer steps done.
        model: Wrappers for several processes or compilation are taken off.
        optimizer: Its optimizer.
        scaler: Gradient scaler, if there is one.
        ema: A model of the same architecture that holds averaged weights, if the run keeps them.
        extra: What else the loop needs to go on: tensors and plain values only.
        keep: Whole checkpoints to keep, at least 1; damaged ones between them stay as long.
        moments: The optimizer's state dict, where the optimizer's own is sharded.

    Returns:
        The folder `output_dir/checkpoints/step_NNNNNNN`.

    Raises:
        OSError: Nothing half-written is left, and older checkpoints stay.
        UserError: Something in `extra` could not be read back safely.
    """
    extra = {} if extra is None else extra
    _require_plain(extra, "extra")
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    metadata = {}
    if isinstance(encoder := getattr(model, "encoder", None), nn.Module):
        # What is neither timm's nor says what maps it yields cannot be exported from the checkpoint, but it resumes.
        with contextlib.suppress(ValueError):
            metadata["encoder"] = json.dumps(description(encoder))

    folder = Path(output_dir) / "checkpoints" / f"step_{step:07d}"
    if folder.exists() and any(entry.name not in _FILES for entry in folder.iterdir()):
        _set_aside(folder)
    with whole_folder(folder, _FILES) as temporary:
        write_tensors(model, temporary / WEIGHTS, metadata)
        if ema is not None:
            write_tensors(ema, temporary / EMA, metadata)
        state = {
            "step": step,
            "optimizer": optimizer.state_dict() if moments is None else moments,
            "optimizer_kind": _kind(optimizer),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": ema is not None,
            "extra": extra,
        }
        with open(temporary / STATE, "wb") as file:
            torch.save(state, file)
        sums = {path.name: checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / CHECKSUMS).write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))

    for leftover in folder.parent.glob(".step_*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    whole = 0
    for other_step, other in _step_folders(folder.parent):
        if other_step > step:
            _set_aside(other)
            continue
        if whole < keep:  # a torn one does not count: what it would push out can be resumed from
            whole += _damage(other) is None
            continue
        doomed = other.with_name(f".{other.name}.old")
        other.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return folder


def _set_aside(folder: Path) -> None:
    """Rename a folder that is not a checkpoint of this course of the run; nothing of it is deleted."""
    superseded = folder.with_name(f"superseded_{folder.name}")
    shutil.rmtree(superseded, ignore_errors=True)
    folder.rename(superseded)
    logger.warning("%s is not of this course of the run: renamed to %s", folder, superseded.name)


def _require_plain(value: Any, where: str) -> None:
    """Refuse what `torch.load(weights_only=True)` would not read back, while nothing is lost yet."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _require_plain(key, f"a key of {where}")
            _require_plain(entry, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _require_plain(entry, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)) and not isinstance(value, Tensor):
        raise UserError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, lists and dicts only"
        )


def _kind(optimizer: Any) -> str:
    """Class name of an optimizer; Accelerate's wrapper is taken off."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _step_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first.

    One that was to be replaced counts where the process was killed between moving it away and naming its successor.
    """
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if path.is_dir()]
    retired = {int(match[1]): path for path in folders if (match := _RETIRED.fullmatch(path.name))}
    named = {int(match[1]): path for path in folders if (match := _STEP_FOLDER.fullmatch(path.name))}
    return sorted({**retired, **named}.items(), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = _STEP_FOLDER.search(checkpoint.name)
    assert match
    return int(match[1])


def find_run(output_dir: str | Path, resume: bool | str | Path, before: float = math.inf) -> Path | None:
    """Find the checkpoint to go on from; None if there is none.

    Args:
        output_dir: Folder of the run.
        resume: True: the newest whole checkpoint of `output_dir`; damaged, altered or foreign folders are passed over
            with a warning. A path: that checkpoint, or the newest whole one of the run in that folder. False: none.
        before: With True: only checkpoints of earlier steps than this one.

    Raises:
        UserError: `resume` names a folder that is not a whole checkpoint.
    """
    if resume is False:
        return None
    if resume is True:
        for step, folder in _step_folders(Path(output_dir) / "checkpoints"):
            if step >= before:
                continue
            problem = _damage(folder) or _altered(folder)
            if problem is None:
                return folder
            logger.warning("%s is passed over: %s", folder, problem)
        return None
    folder = Path(resume)
    if (folder / "checkpoints").is_dir():
        newest = find_run(folder, True)
        if newest is None:
            raise UserError(f"{folder} is a run without a whole checkpoint")
        return newest
    problem = _damage(folder) or _altered(folder)
    if problem is not None:
        raise UserError(
            f"cannot resume from {folder}: {problem}. Name a folder checkpoints/step_NNNNNNN of a run"
        )
    return folder


def refuse_new_beginning(output_dir: str | Path) -> None:
    """Refuse to begin anew in a folder with checkpoints, none of which is whole: that would throw the run away."""
    folders = _step_folders(Path(output_dir) / "checkpoints")
    if folders:
        reasons = "; ".join(
            f"{folder.name}: {_damage(folder) or _altered(folder)}" for _, folder in folders[:3]
        )
        raise UserError(
            f"none of the checkpoints in {output_dir} is whole ({reasons}): bring one back from a copy, or move the "
            "folder checkpoints away to begin anew"
        )


def _damage(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, or None. Reads headers only, not the tensors."""
    if not folder.is_dir():
        return "there is no such folder"
    missing = [name for name in (WEIGHTS, STATE) if not (folder / name).is_file()]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        return f"{WEIGHTS} is cut short or damaged ({error})"
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # on other bytes than its own, torch's unpickler raises nearly everything
        return f"{STATE} is cut short or damaged"
    if not isinstance(state, dict) or not {"step", "optimizer", "extra"} <= state.keys():
        return f"{STATE} is not the state of a run"
    if state.get("ema"):
        try:
            with safe_open(folder / EMA, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            return f"{EMA} is missing, cut short or damaged ({error})"
    named = _STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != state["step"]:
        return f"its name says another step than its state, {state['step']}"
    return None


def _altered(folder: Path) -> str | None:
    """Which file of a checkpoint is not as it was written, or None. Reads all of it; older checkpoints do not say."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    for line in path.read_text(errors="replace").splitlines():
        value, _, name = line.partition("  ")
        if name not in _FILES or not (folder / name).is_file() or checksum(folder / name) != value:
            return (
                f"{name if name in _FILES else CHECKSUMS} is not as it was written ({CHECKSUMS}): the disk or a copy "
                f"damaged it; if it was changed on purpose, remove {CHECKSUMS}"
            )
    return None


def load_run(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: Any = None,
    ema: nn.Module | None = None,
) -> dict[str, Any]:
    """Restore a run in place; every process calls it. Nothing is changed unless model and optimizer both fit.

    Args:
        path: A folder from `find_run`.
        model: Wrappers for several processes or compilation are taken off.
        optimizer: Of the same kind, over the same groups.
        scaler: Gradient scaler, if the run uses one.
        ema: Model for the averaged weights, if the run keeps them; of a checkpoint without, the average starts from its
            weights.

    Returns:
        `{"step": optimizer steps done, **extra}`.

    Raises:
        UserError: The checkpoint is not whole, or is of another architecture or optimizer; the first difference is
            named.
    """
    path = Path(path)
    problem = _damage(path)
    if problem is not None:
        raise UserError(f"{path} is not a whole checkpoint: {problem}")
    state = read_torch_file(path / STATE)
    difference = _optimizer_difference(state, optimizer)
    if difference:
        raise UserError(
            f"{path} was made with another optimizer or model: {difference}. Resume with the options of its "
            "run (config.yaml), or start a new run in another output_dir"
        )
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    fit(
        without_unneeded(load_file(path / WEIGHTS), model),
        model,
        source=str(path),
        name="the model of this run",
        advice="Resume with the options of the run that wrote it (its config.yaml), or start a new run elsewhere",
    )
    if ema is not None and not state.get("ema"):
        logger.warning("%s holds no averaged weights: the average starts from its weights", path)
    if ema is not None:
        averages = without_unneeded(load_file(path / (EMA if state.get("ema") else WEIGHTS)), ema)
        own = ema.state_dict()
        ema.load_state_dict({name: placed(value, own[name]) for name, value in averages.items()})
    optimizer.load_state_dict(_placed_moments(state["optimizer"], optimizer))
    if scaler is not None:
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        else:
            logger.warning(
                "%s holds no gradient scaler (another precision): the loss scale starts afresh", path
            )
    return {**state["extra"], "step": state["step"]}


def _placed_moments(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with what has the shape of its parameter laid out, or sharded, as the parameter."""
    order = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: placed(value, parameter)
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape
            else value
            for name, value in saved["state"][number].items()
        }
        for number, parameter in zip(order, parameters, strict=True)
        if number in saved["state"]
    }
    return {**saved, "state": state}


def _optimizer_difference(state: dict[str, Any], optimizer: Optimizer) -> str:
    """In words, why an optimizer's state does not belong to this optimizer; empty if it does."""
    if state["optimizer_kind"] != _kind(optimizer):
        return f"{state['optimizer_kind']}, here it is {_kind(optimizer)}"
    theirs, ours = state["optimizer"]["param_groups"], optimizer.param_groups
    if len(theirs) != len(ours):
        return f"{len(theirs)} parameter groups, here there are {len(ours)}"
    for index, (there, here) in enumerate(zip(theirs, ours, strict=True)):
        label = here.get("name", f"number {index}")
        if there.get("name") != here.get("name"):
            return f"group number {index} is {there.get('name')}, here {label}"
        if len(there["params"]) != len(here["params"]):
            return f"group {label} has {len(there['params'])} parameters, here {len(here['params'])}"
        for option in ("lr_scale", "weight_decay_scale", "betas", "eps", "momentum"):
            before, now = there.get(option), here.get(option)
            if there.get("momentum_scheduled") and option in ("betas", "momentum"):
                continue  # that of its step, which the loop sets anew
            if before != now and not (isinstance(before, list | tuple) and list(before) == list(now or ())):
                return f"group {label} has {option} {before}, here {now}"
    return ""
