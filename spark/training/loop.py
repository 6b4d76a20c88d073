"""The loop that trains every task.

One principle makes a run exact to resume and independent of the number of processes: every random number is a function
of the run's seed and of a position. The stream is an endless chain of shuffled passes over the samples; position n is
the n-th sample of it. A batch takes the next positions, the processes divide them among themselves, and whatever is
drawn for a sample is seeded by its position. So a checkpoint needs no state of any generator.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from spark.seeds import Purpose, derive_seed
from spark.training.accelerator import reduce_sum
from spark.training.run import Outcome, Run
from spark.training.task import Task


def train(task: Task, run: Run) -> None:
    """Train a task to the end of its run, or to a request to stop.

    Args:
        task: what is trained.
        run: that the task was made for.

    Raises:
        UserError: the checkpoint does not fit, the loss is not finite, too many samples cannot be read; the sentence
            says what to do.
        OSError: a file cannot be read or written; likewise.
    """
    run.begin(task)
    with run.under_way():
        batches = run.batches()
        while run.goes_on():
            run.export_if_asked()
            run.begin_step()
            with run.rescue():
                found = forward_backward(task, run, batches)
            verdict = run.judge(found)
            if verdict is not None and verdict.action == "rollback":
                run.roll_back(found, verdict)
                batches = run.batches()
                continue
            run.update(found, verdict)
            run.write_row(found)
            run.save_if_due()
            run.after_step()
        run.end()


def forward_backward(task: Task, run: Run, batches: Iterator[dict[str, Any]]) -> Outcome:
    """Forward and backward of a step, in parts; the processes average their gradients in the last one."""
    state, parts = run.state, run.config.accumulation
    found = Outcome()
    # sum over the micro-batches that define it, and their number: of the whole loss, and of each term
    sums = {name: torch.zeros(2, device=run.device) for name in ("loss", *task.terms)}
    failed: list[str] = []
    failed_shards: list[str] = []
    learnt = 0
    for part in range(parts):
        with run.pace.waiting():
            batch = next(batches)
        found.names += batch["name"]
        failed += batch["failed"]
        failed_shards += batch.get("failed_shards", ())
        position = (run.step + state.offset) * parts + part
        torch.manual_seed(derive_seed(run.config.seed, position, run.rank, Purpose.STEP))
        with nullcontext() if part == parts - 1 else run.accelerator.no_sync(run.wrapped):
            result = task.loss(run.model, batch)
            run.accelerator.backward(result.loss / parts)
        if result.learns:
            learnt += 1
            for name, value in {"loss": result.loss.detach(), **result.terms}.items():
                sums[name] += torch.stack((value, torch.ones_like(value)))
        found.batch = batch

    flat = torch.stack(list(sums.values())).flatten().tolist()
    *flat, all_learnt, all_failed = reduce_sum(
        run.accelerator, [*flat, learnt, len(failed) + len(failed_shards)]
    )
    if all_failed:
        run.count_failures(failed, failed_shards)
    found.idle = run.world * parts - round(all_learnt)
    task.check(run, state.idle + found.idle)
    found.learns = all_learnt > 0
    found.losses = {
        name: total / count if count else math.nan
        for name, total, count in zip(sums, flat[::2], flat[1::2], strict=True)
    }
    if found.learns:
        most = run.config.optim.clip_grad or math.inf
        found.grad_norm = float(run.accelerator.clip_grad_norm_(task.modules.parameters(), most))  # type: ignore[arg-type]
    return found
