"""Reconstruction panels: what a model makes of masked images. Drawing them changes nothing in a run."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import functional
from torchvision.utils import make_grid

from spark.files import write_whole
from spark.model.hog import draw_hog
from spark.model.spark import SparK

_GAP = 2  # [px] between pictures
_HEADER = 16  # [px] for the titles
_READABLE = 128  # [px] smaller images are enlarged by a whole factor up to this width


@torch.no_grad()
def reconstruction_panels(
    model: SparK, images: Tensor, visible: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Image.Image:
    """Draw a row "input, masked, reconstruction" for each image; for histograms of oriented gradients "input, masked,
    HOG, HOG predicted", the last as true in visible patches and as predicted in masked ones.

    Masked patches are brought back to image space with the mean and deviation of the true patch. The model runs in
    evaluation mode and is left in the mode it was in.

    Args:
        model: not wrapped for several processes.
        images: [B, C, H, W] on the model's device, normalised by `mean` and `std`. One channel is shown in grey, of two
            the first, of more than three the first three.
        visible: [B, 1, fh, fw] bool, True = seen.
        mean: per channel, on the scale 0 to 1.
        std: likewise.

    Returns:
        An RGB picture with B rows of three or four images, small ones enlarged.
    """
    was_training = model.training
    model.eval()
    output = model(images, visible)
    model.train(was_training)

    seen = F.interpolate(visible.float(), size=images.shape[2:]) > 0
    masked = images.where(seen, 0.0)  # the mean colour of the data set
    columns = {"input": _displayable(images, mean, std), "masked": _displayable(masked, mean, std)}
    if model.target == "hog":
        true, predicted = (
            draw_hog(x).cpu().expand(-1, 3, -1, -1) for x in (output.target, output.prediction)
        )
        columns |= {"HOG": true, "HOG predicted": true.where(seen.cpu(), predicted)}
    else:
        columns["reconstruction"] = _displayable(model.reconstruct(images, output), mean, std)
    rows = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    zoom = max(1, _READABLE // images.shape[3])
    rows = rows.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = functional.to_pil_image(make_grid(rows, nrow=len(columns), padding=_GAP, pad_value=1.0))

    caption = "" if _is_colour(mean) else _caption(len(mean))
    header = 2 * _HEADER if caption else _HEADER
    picture = Image.new("RGB", (grid.width, grid.height + header), "white")
    picture.paste(grid, (0, header))
    width = rows.shape[3]
    draw = ImageDraw.Draw(picture)
    draw.text((_GAP, 2), caption, fill="black")
    for column, title in enumerate(columns):
        draw.text((_GAP + column * (width + _GAP), header - _HEADER + 2), title, fill="black")
    return picture


def panels_path(output_dir: str | Path, step: int) -> Path:
    """``output_dir/figures/panels_NNNNNNN.png``, the panels of a step."""
    return Path(output_dir) / "figures" / f"panels_{step:07d}.png"


def save_panels(picture: Image.Image, output_dir: str | Path, step: int) -> Path:
    """Write panels to `panels_path` and return that path."""
    content = BytesIO()
    picture.save(content, format="PNG")
    return write_whole(panels_path(output_dir, step), content.getvalue())


def _is_colour(mean: Sequence[float]) -> bool:
    """Whether channels of this mean are shown as they are: colour or grey, between 0 and 1."""
    return len(mean) in (1, 3) and min(mean) >= 0 and max(mean) <= 1


def _caption(channels: int) -> str:
    """What the panels of other images show, see `_displayable`."""
    shown = "1-3" if channels >= 3 else "1"
    return f"channel{'s' * (channels >= 3)} {shown} of {channels}, black to white: mean -3 to +3 std"


def _displayable(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[B, C, H, W] normalised -> [B, 3, H, W] on the CPU, between 0 and 1.

    Colour and grey of values between 0 and 1 come back as they were; of other images black is the mean less 3 standard
    deviations, white the mean plus as many.
    """
    images = images.float().cpu()
    scale, shift = (
        torch.tensor(list(values)).view(1, -1, 1, 1)
        for values in ((std, mean) if _is_colour(mean) else ([1 / 6] * len(mean), [0.5] * len(mean)))
    )
    images = (images * scale + shift).nan_to_num(0.0).clamp(0, 1)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
