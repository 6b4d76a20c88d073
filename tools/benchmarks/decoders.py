"""Decoders of ours, by the options that shape them."""

import argparse
from typing import Any, NamedTuple

from spark.errors import UserError


class Decoder(NamedTuple):
    """`decoder_width`, `decoder_stages` (None: up to the image's resolution) and `densify_kernel` of SparK."""

    width: int = 768
    stages: int | None = None
    kernel: int = 3

    @classmethod
    def parse(cls, text: str) -> "Decoder":
        """From WIDTH or WIDTH/STAGES/KERNEL, as `str` writes it."""
        try:
            numbers = [int(part) for part in text.split("/")]
            if len(numbers) not in (1, 3) or min(numbers) < 1:
                raise UserError(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no decoder: write WIDTH, such as 256, or WIDTH/STAGES/KERNEL, such as 256/4/1"
            ) from error
        return cls(*numbers)

    def __str__(self) -> str:
        return str(self.width) if self.stages is None else f"{self.width}/{self.stages}/{self.kernel}"

    @property
    def options(self) -> dict[str, Any]:
        """As SparK and the config name them."""
        return {
            "decoder_width": self.width,
            "decoder_stages": self.stages,
            "densify_kernel": self.kernel,
        }


ORIGINAL_DECODER = Decoder()
"""That of the original; what all its released weights have."""
