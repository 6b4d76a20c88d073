"""One self-contained HTML page about a pretraining run and the depth runs that followed it.

    python tools/report.py --pretrain RUN --depth scratch=RUN1 --depth SparK=RUN2 --output report.html

Curves from metrics.jsonl, panels from figures/, settings from config.yaml, and one table of all results.json (or
evaluation.json) under one protocol, with the difference of every label to the first one. A label may be given several
times: those runs count as seeds of the same thing. All images are inside the page. What a run does not have is said in
the page; results that must not stand in one table are an error.

`--figure FILE.png` also draws a small figure for a README: images, masked images and reconstructions, then images, true
depth and the depth of the first run of each label, for images spread evenly over the validation list.
"""

import argparse
import base64
import html
import io
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import matplotlib
import numpy as np
import timm
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

from finetune.depth_data import DepthSample, open_depth_data
from finetune.figures import Page, colourise, depth_colours, save_figure, shared_range
from finetune.files import write_whole
from finetune.inference import predict_depth, transform_of
from finetune.model import load_depth_model
from finetune.protocols import get_protocol
from spark import SparK
from spark.checkpoint import find_run
from spark.images import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from spark.masking import visible_at
from spark.run import read_rows

METRICS = {
    "delta1": ("δ<sub>1</sub>", "", True),
    "delta2": ("δ<sub>2</sub>", "", True),
    "delta3": ("δ<sub>3</sub>", "", True),
    "abs_rel": ("AbsRel", "", False),
    "sq_rel": ("SqRel", "m", False),
    "rmse": ("RMSE", "m", False),
    "rmse_log": ("RMSE log", "", False),
    "log10": ("log10", "", False),
    "silog": ("SILog", "", False),
}  # name in results.json -> heading, unit, whether larger is better
FEW_IMAGES = 200  # below it, and with a single seed, the page says how little it measures
MAX_WIDTH = 1500  # [px] of an image in the page
"""


"""
