"""Where scores fall short of the full measurement of their protocol, in sentences for tables and model cards."""

from collections.abc import Mapping
from typing import Any

from finetune.protocols.metrics import METRIC
from finetune.scoring.evaluators import evaluator_class
from finetune.scoring.metrics import count

READING = {
    "ground_truth": "ground truth",
    "white_border": "white border",
    "polarity": "polarity",
    "depth_scale": "metres of one unit of depth files",
    "bad_depth": "bad depth",
}
"""Entries of results.json on how images and ground truth were read, and their names for people."""


def caveats(results: Mapping[str, Any]) -> list[str]:
    """Sentences on what a reader of the metrics must know, without capital and full stop.

    Args:
        results: The results of one protocol. Older files hold less, and get fewer sentences.
    """
    found = []
    settings = results.get("settings", {})
    evaluator = evaluator_class(settings)
    expected, depth = settings.get("expected_images"), settings.get("depth")
    if None not in (expected, results.get("images")) and results["images"] != expected:
        found.append(
            f"the official list of this protocol has {expected} images, here are {results['images']}: published"
            " numbers stand on those"
        )
    if settings.get("alignment", "none") != "none":
        found.append(f"fitted to the ground truth of each image (alignment {settings['alignment']})")
    # A layout that does not know is taken for raw: most are, or are what the raw protocols were measured on.
    truth = results.get("ground_truth")
    if depth is not None and settings.get("tables", True) and (truth or "raw") != depth:
        has = "this layout does not say which it has" if truth is None else f"this is {truth} depth"
        found.append(f"stands on {depth} depth, and {has}: published numbers stand on the former")
    if settings.get("flip_average") and "predictions" in results:
        found.append("averages over flips, which files are taken to have been")
    if results.get("skipped"):
        found.append(
            f"{len(results['skipped'])} of {results['images'] + len(results['skipped'])} images left out for want of a"
            f" pixel that counts, the first is {results['skipped'][0]}"
        )
    if results.get("missing"):
        found.append(
            f"{count(len(results['missing']), 'image')} without a prediction left out, the first is"
            f" {results['missing'][0]}"
        )
    if unusable := results.get("unusable"):
        listed = ", ".join(unusable[:10]) + (", ..." if len(unusable) > 10 else "")
        scored = evaluator.unusable_text(settings)
        found.append(
            f"no value of the prediction could be used of {count(len(unusable), 'image')}, {scored}: {listed}"
        )
    if "wkdr_threshold" in results:
        found.append(
            f"threshold of equally far points {results['wkdr_threshold']['value']:g}, chosen on these very images: give"
            " it as --threshold to score others"
        )
    if results.get("unpredicted_pixels"):
        found.append(f"{count(results['unpredicted_pixels'], 'pixel')} without a prediction above 0 left out")
    replaced = "unpredicted_pixels" not in results
    if replaced and results.get("nonfinite_pixels"):
        scored = evaluator.nonfinite_text(settings)
        found.append(
            f"{count(results['nonfinite_pixels'], 'predicted value')}, in"
            f" {count(results['nonfinite_images'], 'image')}, not finite: {scored}"
        )
    if replaced and results.get("nonpositive_pixels"):
        end = "farthest" if settings.get("space") == "disparity" else "nearest"
        found.append(
            f"{count(results['nonpositive_pixels'], 'predicted value')}, in"
            f" {count(results['nonpositive_images'], 'image')}, 0 or negative: scored as the {end} depth"
        )
    if results.get("beyond_pixels"):
        scored = "scored as that depth" if settings.get("clip", True) else "scored as they are"
        unit = ": are they in another unit than metres (--scale)?" if results["beyond_share"] > 0.5 else ""
        found.append(
            f"{count(results['beyond_pixels'], 'predicted value')}, in {count(results['beyond_images'], 'image')},"
            f" beyond {settings.get('max_depth', 10):g} m, the farthest depth of the protocol: {scored}{unit}"
        )
    if results.get("resized_images"):
        found.append(
            f"{count(results['resized_images'], 'prediction')} of another size than the image, brought to the size of"
            " the ground truth (bilinearly)"
        )
    if border := results.get("run_white_border"):
        found.append(
            f"the run of this model read its images with white border {border}, here it is"
            f" {results.get('white_border')}: --data.white_border {border} reads them as the run did"
        )
    found += [
        f"{count(number, 'image')} without {METRIC[name].heading}"
        for name, number in results.get("undefined", {}).items()
    ]
    return found
