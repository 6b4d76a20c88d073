"""From sparse features to a dense prediction: densify, then the light decoder.

Source: SparK (ICLR 2023), section 3.2 and the official code's `LightDecoder`.  Both work deepest stage first: entry 0
has the encoder's total stride, every later entry half the stride of the one before and half the decoder width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from spark.errors import UserError
from spark.model.decoder_cpu import hooked, run_block
from spark.sparse import SparseTensor
from spark.sparse.batch_norm import SyncBatchNorm2d
from spark.sparse.filled_conv import Filled, filled_conv, filled_conv_pays


class Densify(nn.Module):
    """Norm over the visible sites, a learned token at the masked ones, then a projection to the decoder's width.

    Args:
        channels: of the encoder stage.
        width: of the decoder block that receives the result.
        norm: "bn" or "ln".
        kernel_size: of the projection: 1 at the deepest stage, 3 above.
        identity_if_equal: skip the projection when channels == width (the official rule at the deepest stage).
        sync_bn: batch statistics over all processes.
        has_token: False for maps without masked sites, those of a dense encoder that has filled them itself.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        norm: str,
        kernel_size: int,
        identity_if_equal: bool,
        sync_bn: bool,
        has_token: bool = True,
    ):
        super().__init__()
        self.norm = (
            SyncBatchNorm2d(channels, sync=sync_bn) if norm == "bn" else LayerNorm2d(channels, eps=1e-6)
        )
        if has_token:
            self.token = mask_token(channels)
        if identity_if_equal and channels == width:
            self.projection = nn.Identity()
        else:
            self.projection = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=True)
        self.pointwise = isinstance(self.projection, nn.Conv2d) and kernel_size == 1

    def forward(self, x: SparseTensor | Tensor, dense: bool = True) -> Tensor | Filled:
        """[B, channels, h, w], sparse if there is a token -> [B, width, h, w].

        With `dense` False, a map whose masked sites are all equal is handed on as rows and token, where that saves
        work.
        """
        x = self.norm(x)
        if isinstance(x, Tensor):
            return self.projection(x)
        if not isinstance(self.projection, nn.Conv2d) or self.pointwise:
            # Site by site: of the visible sites, and once of the token.
            filled = Filled(self.projection(x), self.projection(self.token))
            return filled.dense() if dense or hooked(self) or not filled_conv_pays(filled.x) else filled
        if filled_conv_pays(x) and not hooked(self.projection):
            return filled_conv(x, self.token, self.projection.weight, self.projection.bias)
        return self.projection(x.to_dense(self.token))


def mask_token(channels: int) -> nn.Parameter:
    """What stands at masked places, [1, channels, 1, 1]: normal around 0, deviation 0.02, cut at 0.02."""
    token = nn.Parameter(torch.zeros(1, channels, 1, 1))
    trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    return token


class DecoderBlock(nn.Module):
    """Double the resolution, halve the width: transposed conv, conv-BN-ReLU6, conv-BN."""

    def __init__(self, in_chans: int, out_chans: int, sync_bn: bool):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_chans, in_chans, 4, stride=2, padding=1, bias=True)
        self.conv1 = nn.Conv2d(in_chans, in_chans, 3, padding=1, bias=False)
        self.norm1 = SyncBatchNorm2d(in_chans, sync=sync_bn)
        self.act = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False)
        self.norm2 = SyncBatchNorm2d(out_chans, sync=sync_bn)

    def forward(self, x: Tensor | Filled, head: nn.Conv2d | None = None) -> Tensor:
        """[B, in_chans, h, w] -> [B, out_chans, 2h, 2w], or what a 1x1 convolution makes of that, if one is given."""
        return run_block(self, x, head)

    def plain(self, x: Tensor, head: nn.Conv2d | None = None) -> Tensor:
        """The same, module by module: the reference of `run_block`."""
        return self.finish(self.conv1(self.upsample(x)), head)

    def finish(self, y: Tensor, head: nn.Conv2d | None) -> Tensor:
        """What follows the first convolution."""
        y = self.norm2(self.conv2(self.act(self.norm1(y))))
        return y if head is None else head(y)


class LightDecoder(nn.Module):
    """A chain of blocks; each stage's densified features are added to the input of its block.

    With fewer blocks than it takes to reach the image's resolution, the head predicts the pixels of what is left at
    once: every position `upscale` x `upscale` of them.

    Args:
        width: channels at the deepest stage; halved by every block, so a multiple of 2 ** num_blocks.
        num_blocks: log2 of the encoder's total stride in the official decoder, fewer in leaner ones.
        out_chans: channels of the image.
        sync_bn: batch statistics over all processes.
        upscale: side of the square of pixels that each position of the last block predicts.
    """

    def __init__(
        self, width: int, num_blocks: int, out_chans: int = 3, sync_bn: bool = True, upscale: int = 1
    ):
        super().__init__()
        if width % 2**num_blocks:
            raise UserError(
                f"decoder_width {width} is halved {num_blocks} times: use a multiple of {2**num_blocks}"
            )
        self.widths = [width // 2**i for i in range(num_blocks + 1)]
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        self.blocks = nn.ModuleList(DecoderBlock(a, b, sync_bn) for a, b in pairs)
        self.head = nn.Conv2d(self.widths[-1], out_chans * upscale**2, 1, bias=True)
        self.upscale = upscale
        self.apply(_init_weights)

    @property
    def takes_filled(self) -> bool:
        """Whether the deepest features may come as `Filled`: unless someone looks at what the decoder receives."""
        return not hooked(self, self.blocks[0])

    def forward(self, features: Sequence[Tensor | Filled]) -> Tensor:
        """Features, deepest first, [B, widths[i], h * 2**i, w * 2**i] -> [B, out_chans, H, W]."""
        x, *others = features
        last = self.blocks[-1]
        together = len(others) < len(self.blocks) and not hooked(
            last
        )  # nothing stands between last block and head
        for i, block in enumerate(self.blocks):
            x = block(x, self.head if together and block is last else None)
            if i < len(others):
                x = x + others[i]
        if not together:
            x = self.head(x)
        assert isinstance(x, Tensor)
        return F.pixel_shuffle(x, self.upscale)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
