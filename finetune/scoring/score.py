"""From a data set to scores: what validation and evaluation share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from finetune.depth_data import DepthFileError, DepthSample, DepthSet, EvalTransform
from finetune.depth_data.sample import file_error
from finetune.model.depth_model import DepthModel
from finetune.protocols import Protocol
from finetune.scoring.evaluators import evaluator_of
from finetune.scoring.pictures import Triptych, WorstRows
from finetune.scoring.sources import ModelSource, Source
from spark.images.loader import load_batches

T = TypeVar("T")


def score(
    model: DepthModel,
    data: DepthSet,
    protocol: Protocol,
    transform: EvalTransform,
    *,
    batch_size: int = 8,
    workers: int = 0,
    draw: int = 0,
    worst: WorstRows | None = None,
) -> tuple[dict[str, Any], list[Triptych]]:
    """Evaluate a model under one protocol; see `score_all`. The model sees each image, or what the protocol shows of
    it, at the size of `transform`."""
    source = ModelSource(model, transform, {})
    kept = None if worst is None else [worst]
    (scored,) = score_all(
        source, [data], [protocol], batch_size=batch_size, workers=workers, draw=draw, worst=kept
    )
    return scored


def score_all(
    source: Source,
    sets: Sequence[DepthSet],
    protocols: Sequence[Protocol],
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 8,
    workers: int = 0,
    draw: int = 0,
    worst: Sequence[WorstRows] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[tuple[dict[str, Any], list[Triptych]]]:
    """Score predictions, made once, under several protocols.

    Pairs are read, and what the source needs is prepared, while the batch before is predicted and scored. Images
    without a pixel that counts are left out and listed in the results.

    Args:
        source: Of the predictions.
        sets: The data of each protocol, ground truth at its native size: the same images in the same order, of which
            only the ground truth may differ.
        protocols: What counts and how.
        indices: Which samples; None: all.
        batch_size: Images of one forward.
        workers: Processes that read pairs; 0 is a thread.
        draw: How many images to return for drawing, spread evenly over the data; only maps of depth are drawn.
        worst: Of each protocol, receives the rows with the largest AbsRel for drawing.
        progress: Called with the number of images of each batch done.

    Returns:
        Of each protocol the results as `Evaluator.results` has them, with the entries of the source, and the
        triptychs.

    Raises:
        ValueError: A pair or a prediction cannot be read (leaving it out would change what is measured), or no image
            has a valid pixel.
    """
    evaluators = [evaluator_of(protocol, skip_empty=True) for protocol in protocols]
    unique = list({id(data): data for data in sets}.values())
    place = [next(i for i, one in enumerate(unique) if one is data) for data in sets]
    prepared = _Prepared(unique, source, protocols)
    chosen = range(len(unique[0])) if indices is None else indices
    drawn = set(np.linspace(0, len(chosen) - 1, min(draw, len(chosen))).round().astype(int).tolist())
    rows: list[list[Triptych]] = [[] for _ in protocols]
    worst = worst or [WorstRows(0) for _ in protocols]
    options = {"batch_size": batch_size, "collate_fn": list}
    loader = load_batches(Subset(prepared, chosen), workers, torch.device("cpu"), **options)
    done = 0
    for batch in loader if workers else ahead(loader):
        for entry in batch:
            if isinstance(entry, DepthFileError):
                raise entry
        predictions = source.predict([ready for _, ready in batch], protocols)
        for (samples, _), predicted in zip(batch, predictions, strict=True):
            for number, (evaluator, prediction) in enumerate(zip(evaluators, predicted, strict=True)):
                sample = samples[place[number]]
                values, inverse = prediction.under(evaluator.protocol, sample.image.shape[:2])
                row = evaluator.add(sample, values, inverse=inverse)
                error = row.get("abs_rel") if row else None
                bad = error is not None and worst[number].wants(error)
                picture = None
                if bad or done in drawn:
                    picture = evaluator.picture(sample, values, inverse, row)
                if picture is not None and done in drawn:
                    rows[number].append(picture)
                if picture is not None and error is not None and bad:
                    worst[number].add(error, picture)
            done += 1
        if progress is not None:
            progress(len(batch))
    return [
        ({**evaluator.results(), **source.about}, drawings)
        for evaluator, drawings in zip(evaluators, rows, strict=True)
    ]


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before is used (decoding and NumPy leave the others running)."""
    end: Any = object()
    iterator: Iterator[Any] = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item


class _Prepared(Dataset):
    """Samples of several data sets with what the source of predictions needs of them; an unreadable one comes as its
    error (raised in a worker it is a traceback)."""

    def __init__(self, sets: Sequence[DepthSet], source: Source, protocols: Sequence[Protocol]) -> None:
        self.sets, self.source, self.protocols = sets, source, protocols

    def __len__(self) -> int:
        return len(self.sets[0])

    def __getitem__(self, index: int) -> tuple[list[DepthSample], Any] | DepthFileError:
        try:
            samples = [data[index] for data in self.sets]
            return samples, self.source.prepare(samples[0], self.protocols)
        except DepthFileError as error:
            return error
        except ValueError as error:
            return file_error(self.sets[0].names()[index], str(error))
