"""What spark-compare does, once its options are read."""

import csv
import difflib
import io
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest, wilcoxon

from finetune.options import CompareConfig
from finetune.protocols.metrics import METRIC
from finetune.report.terminal import say
from finetune.scoring.evaluators import EVALUATORS
from finetune.scoring.intervals import LEVEL, draws, interval, resampled
from finetune.scoring.metrics import read_results
from spark.errors import UserError
from spark.files import write_whole

READING = ("white_border", "polarity", "depth_scale", "bad_depth")
"""Options of reading that both results must share."""
NEEDED = ("protocol", "protocol_hash", "metrics", "settings", "per_image")


def compare_files(config: CompareConfig) -> None:
    """Compare, print, and write the table where an output is given."""
    if len(config.results) < 2:
        raise UserError("a comparison needs two results.json or more")
    base, *others = (read_one(path, config.protocol) for path in config.results)
    for path, other in zip(config.results[1:], others, strict=True):
        check_same(config.results[0], base, path, other)
    rows, console = [], Console()
    for path, other in zip(config.results[1:], others, strict=True):
        compared = compare(base, other)
        show(console, config.results[0], path, base, other, compared, config.images)
        rows += [{"base": config.results[0], "other": path, **row} for row in compared]
    if config.output:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(config.output, text.getvalue().encode())
        say(console, f"written to {config.output}")


def read_one(path: str, protocol: str | None) -> dict[str, Any]:
    """Results of one protocol in a file of spark-evaluate."""
    every = read_results(path)
    chosen = [one for one in every if protocol is None or one.get("protocol") == protocol]
    if len(chosen) != 1:
        names = [str(one.get("protocol")) for one in every]
        near = difflib.get_close_matches(protocol or "", names, n=1)
        hint = f", not of {protocol}" + (f" (did you mean {near[0]}?)" if near else "") if protocol else ""
        raise UserError(
            f"{path} holds results of {', '.join(names)}{hint}: choose one of them with --protocol"
        )
    if missing := [key for key in NEEDED if key not in chosen[0]]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: score again with spark-evaluate, older results do not say how"
            " they were measured"
        )
    if chosen[0]["settings"].get("family") not in EVALUATORS:
        raise UserError(
            f"{path} is of a kind of protocol that this version does not know: update this project"
        )
    return chosen[0]


def check_same(first: str, base: dict[str, Any], path: str, other: dict[str, Any]) -> None:
    """Refuse two results that were not measured alike: ValueError."""
    if base["protocol_hash"] != other["protocol_hash"]:
        differ = sorted(
            key
            for key in base["settings"].keys() | other["settings"].keys()
            if base["settings"].get(key) != other["settings"].get(key)
        )
        raise UserError(
            f"{first} is of protocol {base['protocol']} and {path} of {other['protocol']}, which differ in"
            f" {', '.join(differ) or 'fields that one of them lacks'}: score both under the same"
        )
    truths = [one["ground_truth"] for one in (base, other) if "ground_truth" in one]
    if len(truths) == 2 and truths[0] != truths[1]:
        raise UserError(
            f"{first} was scored against {truths[0] or 'unnamed'} depth and {path} against {truths[1] or 'unnamed'}"
            " depth: score both against the same (--data.depth of spark-evaluate)"
        )
    for key in READING:
        values = [one[key] for one in (base, other) if key in one]
        if len(values) == 2 and values[0] != values[1]:
            raise UserError(
                f"{first} was scored with data.{key} {values[0]} and {path} with {values[1]}: score both alike"
            )
    names = [{row["name"] for row in one["per_image"]} for one in (base, other)]
    if names[0] != names[1]:
        alone = sorted(names[0] ^ names[1])
        raise UserError(
            f"{first} and {path} are not of the same images: {len(alone)} are in one of them only, the first is"
            f" {alone[0]}. Score both on the same list"
        )


def compare(base: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric: both values, their difference (other - base) with its interval, tests, counts of images.

    `images_better` counts the images on which the other is better. Wilcoxon's and the sign test leave out ties; of
    pooled protocols they are on the scores of single images too.
    """
    rows = {row["name"]: row for row in other["per_image"]}
    other = {**other, "per_image": [rows[row["name"]] for row in base["per_image"]]}
    counts = draws(len(base["per_image"]))
    left, right = resampled(base, counts), resampled(other, counts)
    compared = []
    for name in (name for name in base["metrics"] if name in left and name in other["metrics"]):
        differences = per_image(base, other, name)
        sign = 1 if METRIC[name].better == "higher" else -1
        better = int((sign * differences > 0).sum())
        changed = int((differences != 0).sum())
        between = interval(right[name] - left[name]) if len(rows) > 1 else None
        compared.append(
            {
                "metric": name,
                "base_value": base["metrics"][name],
                "other_value": other["metrics"][name],
                "difference": other["metrics"][name] - base["metrics"][name],
                "low": None if between is None else between[0],
                "high": None if between is None else between[1],
                "images": len(differences),
                "images_better": better,
                "images_worse": changed - better,
                "wilcoxon_p": float(np.asarray(wilcoxon(differences))[1]) if changed else 1.0,
                "sign_p": float(binomtest(better, changed).pvalue) if changed else 1.0,
            }
        )
    return compared


def per_image(base: dict[str, Any], other: dict[str, Any], name: str) -> np.ndarray:
    """Differences of a metric (other - base) at the images at which both have it, in the order of both."""
    pairs = [
        (after.get(name), before.get(name))
        for before, after in zip(base["per_image"], other["per_image"], strict=True)
    ]
    return np.array([after - before for after, before in pairs if after is not None and before is not None])


def show(
    console: Console,
    first: str,
    path: str,
    base: dict[str, Any],
    other: dict[str, Any],
    compared: list[dict[str, Any]],
    images: int,
) -> None:
    """Print a comparison, and the images at which the two differ most."""
    say(console, f"{path} against {first}, protocol {base['protocol']}, {len(base['per_image'])} images")
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("metric", "base", "other", "change", f"{LEVEL:.0%}", "better", "p rank", "p sign"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for row in compared:
        between = "" if row["low"] is None else f"{row['low']:+.3f}..{row['high']:+.3f}"
        table.add_row(
            METRIC[row["metric"]].column,
            f"{row['base_value']:.3f}",
            f"{row['other_value']:.3f}",
            f"{row['difference']:+.3f}",
            between,
            f"{row['images_better']}/{row['images']}",
            p_text(row["wilcoxon_p"]),
            p_text(row["sign_p"]),
        )
    console.print(table)
    name = next((one for one in ("abs_rel", "whdr", "wkdr") if one in base["metrics"]), None)
    after = {row["name"]: row.get(name) for row in other["per_image"]}
    changes = sorted(
        (after[row["name"]] - row[name], row["name"])
        for row in base["per_image"]
        if name is not None and row.get(name) is not None and after[row["name"]] is not None
    )
    for word, some in (("less", changes[:images]), ("more", changes[::-1][:images])):
        listed = [
            f"{image} {change:+.3f}" for change, image in some if (change < 0) == (word == "less") and change
        ]
        if listed and name is not None:
            say(console, f"{METRIC[name].heading} {word}: {', '.join(listed)}")


def p_text(p: float) -> str:
    """A p value in a narrow column."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
