"""From images to depth, and from a data set to scores: what validation, evaluation and prediction share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from finetune.depth_data import DepthFileError, DepthSample, DepthSet, EvalTransform
from finetune.depth_data.sample import file_error
from finetune.families import evaluator_of
from finetune.figures import Triptych
from finetune.heads import DepthOutput
from finetune.model import DepthModel
from finetune.protocols import Protocol
from finetune.scoring import merge_flipped, metric_prediction, resize
from spark.run import ignore_stop_signals


def transform_of(model: DepthModel, image_size: tuple[int, int] | None = None) -> EvalTransform:
    """The image preparation that a model asks for, at its own size unless another (H, W) is given."""
    size = image_size or model.image_size
    if size is None:
        raise ValueError(
            "the model does not record an image_size: say at which size [height, width] it is to see images."
        )
    return EvalTransform(size, model.mean, model.std)


def chosen_device(name: str) -> torch.device:
    """The device of an option auto, cpu or cuda; ValueError if there is no GPU to choose."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU here: use auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_protocol(model: DepthModel, protocol: Protocol) -> None:
    """Refuse to score a model without metres under a protocol that stands on them; ValueError says what to use."""
    if (
        protocol.supervision == "metric"
        and protocol.family != "relations"
        and protocol.alignment != "disparity"
        and "depth" not in model.outputs
    ):
        raise ValueError(
            f"head {model.head_name} gives no metres, and protocol {protocol.name} compares metres: use --protocol"
            " nyu-affine, which fits scale and shift of each image"
        )


def check_ground_truth(data: DepthSet, protocol: Protocol) -> None:
    """Refuse to score on data without the ground truth that a protocol compares with.

    Raises:
        ValueError: It has none, or of another size than the protocol takes, or names a pair twice, or a header tells
            that a file cannot be used.
    """
    if data.supervision != protocol.supervision:
        has = {"metric": "depth in metres", "ordinal": "relations of points", "affine": "relative depth"}
        raise ValueError(
            f"{data} has no {has[protocol.supervision]} to validate on or score against, only {has[data.supervision]}:"
            " name data that has it, or a protocol for what it has (diw for relations, redweb for relative depth)"
        )
    first: dict[str, int] = {}
    for index, name in enumerate(data.names()):
        if (before := first.setdefault(name, index)) != index:
            raise ValueError(
                f"{name}{data.origin(before)} is to be scored a second time{data.origin(index)}: name each pair once"
            )
    data.check_headers()  # these refuse now, not after the first epoch
    first_sample = data[0]
    protocol.seen_at((first_sample.image.shape[0], first_sample.image.shape[1]))
    if protocol.supervision == "metric":
        protocol.crop_at(first_sample.metres.shape)


@torch.inference_mode()
def predict_depth(model: DepthModel, images: Tensor, protocol: Protocol | None = None) -> np.ndarray:
    """Predict depth for images [B, 3, H, W] in evaluation mode; the model returns to the mode it was in.

    Under a protocol whose space is inverse depth, and for a model that gives no metres, it is that, larger is nearer.

    Args:
        model: On any device; the images are moved to it.
        images: Normalised as the model expects.
        protocol: Averages with the prediction of the mirror image where this protocol says so.

    Returns:
        Depth [B, H, W] [m] (or inverse depth, see above), float32, or float64 where two predictions were averaged.
    """
    was_training = model.training
    model.eval()
    try:
        images = images.to(next(model.parameters()).device)
        inverse = gives_inverse(model, protocol)
        depth = _map(model, images, inverse)
        if protocol is not None and protocol.flip_average:
            mirrored = _map(model, images.flip(-1), inverse)
            depth = np.stack([merge_flipped(protocol, *pair) for pair in zip(depth, mirrored, strict=True)])
    finally:
        model.train(was_training)
    return depth


def gives_inverse(model: DepthModel, protocol: Protocol | None) -> bool:
    """Whether `predict_depth` gives inverse depth."""
    return "depth" not in model.outputs or (protocol is not None and protocol.space == "disparity")


def _map(model: DepthModel, images: Tensor, inverse: bool) -> np.ndarray:
    output: DepthOutput = model(images)
    values = output.disparity() if inverse else output.depth
    assert values is not None
    return values[:, 0].float().cpu().numpy()


def score(
    model: DepthModel,
    data: DepthSet,
    protocol: Protocol,
    transform: EvalTransform,
    *,
    batch_size: int = 8,
    workers: int = 0,
    draw: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> tuple[dict[str, Any], list[Triptych]]:
    """Evaluate a model on RGB-D pairs.

    Every image, or what the protocol shows of it, is resized to the size of `transform`, predicted, and handed to the
    protocol, which resizes the prediction to the ground truth. Images without a pixel that counts are left out and
    listed in the results.

    Args:
        model: The model.
        data: Pairs with their ground truth at its native size.
        protocol: What counts and how, flip averaging included.
        transform: Size and normalisation that the model was trained with.
        batch_size: Images of one forward.
        workers: Processes that read pairs.
        draw: How many images to return for drawing, spread evenly over the data; only maps of depth are drawn.
        progress: Called with the number of images of each batch done.

    Returns:
        The results as `Evaluator.results` has them, with the `image_size` that the model saw, and the triptychs.

    Raises:
        ValueError: A pair cannot be read (leaving it out would change what is measured), or no image has a valid
            pixel.
    """
    evaluator = evaluator_of(protocol, skip_empty=True)
    inverse = gives_inverse(model, protocol)
    draws = protocol.family != "relations"
    count = len(data)
    drawn = set(np.linspace(0, count - 1, min(draw, count)).round().astype(int).tolist())
    rows: list[Triptych] = []
    loader = DataLoader(
        _Prepared(data, transform, protocol),
        batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,
    )
    done = 0
    for pairs in loader:
        for pair in pairs:
            if isinstance(pair, DepthFileError):
                raise pair
        predictions = predict_depth(model, torch.stack([image for _, image in pairs]), protocol)
        for (sample, _), prediction in zip(pairs, predictions, strict=True):
            prediction = whole_frame(protocol, prediction, sample.image.shape[:2])
            row = evaluator.add(sample, prediction, inverse=inverse)
            if draws and done in drawn:
                caption = summary(row) if row else "no pixel of the ground truth counts"
                if row and protocol.alignment != "none":
                    prediction = metric_prediction(protocol, prediction, sample.metres, inverse=inverse)
                rows.append(Triptych(sample.image, sample.metres, prediction, sample.name, caption))
            done += 1
        if progress is not None:
            progress(len(pairs))
    return {**evaluator.results(), "image_size": list(transform.image_size)}, rows


def whole_frame(protocol: Protocol, prediction: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The prediction for an image of (H, W) `size`, of which the model saw what the protocol shows: continued by its
    edge over the rest of the frame, `[H, W]`; as it is where the model saw all of it."""
    if protocol.sees == "frame":
        return prediction
    top, bottom, left, right = protocol.seen_at((size[0], size[1]))
    inner = resize(prediction.astype(np.float64), (bottom - top, right - left), protocol.align_corners)
    return np.pad(inner, ((top, size[0] - bottom), (left, size[1] - right)), "edge")


def summary(metrics: dict[str, float]) -> str:
    """The numbers that the field quotes, in one line."""
    if "whdr" in metrics:
        return f"WHDR {metrics['whdr']:.3f}   accuracy {metrics['accuracy']:.3f}   WKDR {metrics['wkdr']:.3f}"
    return f"delta1 {metrics['delta1']:.3f}   AbsRel {metrics['abs_rel']:.3f}   RMSE {metrics['rmse']:.3f} m"


class _Prepared(Dataset):
    """Pairs with their network input; an unreadable pair comes as its error (raised in a worker it is a
    traceback)."""

    def __init__(self, data: DepthSet, transform: EvalTransform, protocol: Protocol) -> None:
        self.data, self.transform, self.protocol = data, transform, protocol

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[DepthSample, Tensor] | DepthFileError:
        try:
            sample = self.data[index]
            top, bottom, left, right = self.protocol.seen_at((sample.image.shape[0], sample.image.shape[1]))
            return sample, self.transform.prepare(np.ascontiguousarray(sample.image[top:bottom, left:right]))
        except DepthFileError as error:
            return error
        except ValueError as error:
            return file_error(self.data.names()[index], str(error))
