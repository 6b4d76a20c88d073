"""The benchmark suite: nobody is timed who computes something else, and its numbers are what they are called.

No timing is asserted. With SPARK_ORIGINAL naming a clone of github.com/keyu-tian/SparK, the original takes part.
"""

import csv
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import PIL
import pytest
import timm
import torch
import torchvision
from functorch.compile import make_boxed_func, nop
from PIL import Image
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from spark import SparK
from spark.images.transform import PretrainTransform
from spark.model.normalise import Normalise
from tests.together import server
from tools import benchmark
from tools.benchmarks import contenders, loader, memory, original, processes, steps, timing
from tools.benchmarks.contenders import ORIGINAL_DECODER, Bench, Case, Decoder
from tools.benchmarks.flops import count_flops, flops_per_image
from tools.benchmarks.loader import LoaderCase, check_pictures, write_photos
from tools.benchmarks.parity import check_parity, checked

TINY = Case("test_resnet", batch=2, size=(64, 64), decoder=Decoder(32))
TINIEST = ["--model", "test_resnet", "--busy", "--threads", "1", "--batch", "2", "--size", "64"]
SMALL = ["--rounds", "2", *TINIEST]


@pytest.fixture(autouse=True)
def torch_as_before():
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("kind", ["step", "encoder"])
@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_both_layouts_agree(model, kind):
    bench = checked(Case(model, batch=2, size=(64, 96), decoder=Decoder(32)), kind)
    assert list(bench.contenders) == ["masked", "packed"]
    assert bench.visible_share == pytest.approx(2 / 6)


@pytest.mark.parametrize("kind", ["step", "encoder"])
def test_a_wrong_weight_is_refused(kind):
    bench = Bench(TINY)
    with torch.no_grad():
        bench.contenders["packed"].model.encoder.conv1[0].weight.mul_(-1.1)
    with pytest.raises(
        ValueError, match=r"test_resnet: packed and masked differ in their (loss|features 0) by"
    ):
        check_parity(bench, kind)


@pytest.mark.parametrize("of", ["gradient", "gradient of the images"])
def test_a_wrong_backward_is_refused(of):
    bench = Bench(TINY)
    head = bench.contenders["packed"].model.decoder.head
    if of == "gradient":
        head.weight.register_hook(lambda grad: 1.1 * grad)
    else:
        head.register_forward_hook(
            lambda module, args, out: args[0].register_hook(lambda g: 1.1 * g) and None
        )
    with pytest.raises(ValueError, match=f"packed and masked differ in their {of} by"):
        check_parity(bench, "step")


def test_nan_is_refused():
    bench = Bench(TINY)
    for images in bench.images.values():
        images[:] = float("nan")
    with pytest.raises(ValueError, match="masked gives a loss that is not finite in fp64"):
        check_parity(bench, "step")


def test_nothing_is_printed_or_written_without_parity(monkeypatch, capsys, tmp_path):
    build = contenders._build

    def build_one_wrong(case, names):
        built = build(case, names)
        with torch.no_grad():
            built[-1].model.decoder.head.weight.add_(1)
        return built

    monkeypatch.setattr(contenders, "_build", build_one_wrong)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["step", *SMALL, "--decoder", "32", "--csv", str(tmp_path / "a.csv")])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: test_resnet: packed and masked differ in their loss by")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- numbers and rows


def test_summary_of_hand_made_times():
    row = timing.summary([1.0, 2.0, 4.0], [2.0, 2.0, 2.0], batch=8)
    assert row == {
        "seconds_median": "2.000000",
        "seconds_quartile_low": "1.500000",
        "seconds_quartile_high": "3.000000",
        "images_per_second": "4.000",
        "speedup_median": "1.000",  # of 2, 1, 0.5: not the ratio of the medians of other turns
        "speedup_quartile_low": "0.750",
        "speedup_quartile_high": "1.500",
    }


def test_contenders_take_turns():
    turns = []
    seconds = timing.interleaved({name: lambda n=name: turns.append(n) for name in "ab"}, 3, "cpu")
    assert "".join(turns) == "abbaabbaab"  # two turns warm up, each begins with another
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_busy_machine_is_refused_and_a_fading_load_waited_for(monkeypatch):
    loads, slept = [2.0, 1.5, 1.6], []
    monkeypatch.setattr(os, "getloadavg", lambda: (loads.pop(0), 0.0, 0.0))
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    with pytest.raises(ValueError, match=r"busy \(load 1.6\)"):
        timing.refuse_busy_machine(allowed=False)
    loads = [2.0, 0.9, 0.4]
    timing.refuse_busy_machine(allowed=False)
    assert (slept, loads) == ([10] * 4, [])
    timing.refuse_busy_machine(allowed=True)


@pytest.mark.parametrize("command", ["step", "encoder"])
def test_rows_of_a_timing(command, tmp_path, capsys):
    width = [] if command == "encoder" else ["--decoder", "32"]
    benchmark.main([command, *SMALL, "--mask_ratio", "0.75", *width, "--csv", str(tmp_path / "a.csv")])
    assert logging.getLogger("spark.weights.official").level == logging.NOTSET  # was silenced meanwhile
    masked, packed = read(tmp_path / "a.csv")
    assert (masked["contender"], packed["contender"], packed["base"]) == ("masked", "packed", "masked")
    assert (packed["kind"], packed["batch"], packed["height"], packed["rounds"]) == (command, "2", "64", "2")
    assert (packed["visible_share"], packed["channels_last"]) == ("0.2500", "true")  # ours always
    assert (packed["threads"], packed["processes"]) == ("1", "1")
    assert packed["decoder"] == ("768" if command == "encoder" else "32")
    assert masked["speedup_median"] == masked["speedup_quartile_low"] == "1.000"
    assert 0 < float(packed["seconds_quartile_low"]) <= float(packed["seconds_median"])
    assert float(packed["images_per_second"]) == pytest.approx(2 / float(packed["seconds_median"]), rel=1e-2)
    assert float(masked["gflops"]) > float(masked["gflops_limit"]) > 0
    assert (packed["torch"], packed["timm"]) == (torch.__version__, timm.__version__)
    assert "packed" in capsys.readouterr().out


def test_scaling_measures_every_combination_and_draws(tmp_path):
    benchmark.main(
        [
            *("scaling", *SMALL, "96", "--mask_ratio", "0.5", "0.75", "--decoder", "32"),
            *("--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")),
        ]
    )
    rows = read(tmp_path / "a.csv")
    points = [(row["height"], row["mask_ratio"], row["contender"]) for row in rows]
    assert points == [(s, r, c) for s in ("64", "96") for r in ("0.5", "0.75") for c in ("masked", "packed")]
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > image.height > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--size", "64", "96", "128"], "--size takes one number, or H W"),
        (["step", "--rounds", "1"], "--rounds must be 2 or more"),
        (["step", "--device", "foo"], "--device is cpu, cuda or cuda:N"),
        (["step", "--device", "cuda:99"], "GPUs here"),
        (["step", "--layouts", "masked"], "argument --layouts: invalid choice: 'masked'"),
        (["step", "--decoder", "256/4"], "'256/4' is no decoder"),
        (["step", "--original_precision", "fp32"], "name its folder by --official, too"),
        (["loader", "--busy", "--size", "32"], "--size must be 64 or more"),
        (
            ["loader", "--busy", "--data", "nowhere"],
            "there is no image folder, list of images, tar shard or array",
        ),
        (["scaling", "--processes", "2", "--official", "SparK"], "take part in a single process only"),
        (["step", "--layouts", "spconv", "--compile", "packed"], "name packed among --layouts, too"),
        (["scaling", "--threads", "3", "--processes", "2"], "--threads 3 cannot be shared out evenly"),
        (["step", "--busy", "--model", "resnet18", "--size", "60"], "no multiple of the patch size 32"),
        (["against", "nowhere"], "nowhere is no checkout of this project"),
    ],
)
def test_what_does_not_fit_is_said(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_are_said_before_anything_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "refuse_busy_machine", lambda allowed: pytest.fail("waited"))
    (tmp_path / "file").touch()
    for arguments, message in (
        (["step", "--model", "test_resnet", "resnet_18"], "resnet_18"),
        (["scaling", "--model", "test_resnet", "--mask_ratio", "0.5", "1.0"], "mask_ratio 1.0"),
        (["encoder", "--csv", str(tmp_path)], "cannot be written: name a file"),
        (["loader", "--csv", str(tmp_path / "file" / "a.csv")], "cannot be written: name a file"),
        (["step", "--official", str(tmp_path)], "is no clone of github.com/keyu-tian/SparK"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert message in capsys.readouterr().err


def test_memory_that_is_full_is_said(monkeypatch, capsys):
    for error, message in (
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nmuch"),
            "the GPU's memory is full, lower --batch",
        ),
        (benchmark.BrokenProcessPool(), "was ended from outside: if the memory was full, lower --batch"),
    ):
        memory_command = benchmark.COMMANDS["memory"]._replace(measure=Mock(side_effect=error))
        monkeypatch.setitem(benchmark.COMMANDS, "memory", memory_command)
        with pytest.raises(SystemExit):
            benchmark.main(["memory", *TINIEST])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_compiled_takes_part(tmp_path, monkeypatch):
    """Traced, forward and backward, and checked like the others; without the C++ compiler that Inductor needs."""
    monkeypatch.setattr(contenders.torch, "compile", partial(torch.compile, backend="aot_eager"))
    to = ["--compile", "packed", "--csv", str(tmp_path / "a.csv")]
    benchmark.main(["step", *SMALL, "--model", "test_convnext", "--decoder", "32", *to])
    rows = read(tmp_path / "a.csv")
    assert [row["contender"] for row in rows] == ["masked", "packed", "packed, compiled"]
    assert [bool(row["gflops"]) for row in rows] == [True, True, False]


def broken(*_):
    raise RuntimeError("no C++ compiler")


@pytest.mark.parametrize(
    "backend",
    [broken, aot_autograd(fw_compiler=nop, bw_compiler=lambda *_: make_boxed_func(broken))],
    ids=["forward", "backward"],
)
def test_what_cannot_be_compiled_is_said(backend, monkeypatch, capsys):
    monkeypatch.setattr(contenders.torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["encoder", *SMALL, "--compile", "masked"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: torch.compile fails on test_resnet (")
    assert "no C++ compiler" in message


def test_the_original_in_a_precision_of_its_own():
    """As it is shipped, in fp32, beside ours in bf16: what is timed, and how closely they must agree."""
    case = Case("test_resnet", 2, (64, 64), decoder=Decoder(32), precision="bf16", original_precision="fp32")
    bench = Bench(case)
    ours = bench.contenders["packed"]
    shipped = contenders._original(
        SimpleNamespace(),
        SimpleNamespace(fmap_h=2, fmap_w=2),
        replace(TINY, precision="bf16", original_precision="fp32"),
    )
    assert (ours.precision, shipped.precision) == ("bf16", "fp32")
    for contender, dtype in (ours, torch.bfloat16), (replace(ours, precision="fp32"), torch.float32):
        features = bench.forward(contender, "encoder")
        assert features[-1].dtype == dtype
    # bf16 of one against fp32 of the other errs as bf16 does; two in fp32 have to agree as fp32 does.
    bench.contenders = {"masked": replace(ours, precision="fp32"), "packed": ours}
    weight = ours.model.decoder.head.weight

    def off_by_a_hundredth(images, visible):
        return ours.loss(images, visible) * (1.0 if weight.dtype == torch.float64 else 1.01)

    off = replace(ours, loss=off_by_a_hundredth)
    bench.contenders["packed"] = off
    check_parity(bench, "step")
    bench.contenders["packed"] = replace(off, precision="fp32")
    with pytest.raises(
        ValueError, match=r"packed and masked differ in their loss by 1.0e-02 \(relative, fp32\)"
    ):
        check_parity(bench, "step")


def test_flops_counted_by_hand():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(lambda: conv(torch.zeros(2, 3, 4, 4))) == 2 * (2 * 4 * 4) * 8 * (3 * 9)


def test_limit_of_an_encoder_is_its_visible_share():
    computed, limit = flops_per_image(Bench(TINY), "encoder")
    assert limit == pytest.approx(computed["masked"] * 2 / 4)
    _, whole = flops_per_image(Bench(TINY), "step")
    assert whole > limit


# ------------------------------------------------------------------------------------------------------------ memory


def test_saved_bytes_counted_by_hand():
    linear = torch.nn.Linear(4, 3)
    x = torch.zeros(5, 4)
    # The input, 5 x 4 floats, for the weight's gradient; the output of exp, 5 x 3; the weight itself is no extra.
    assert memory.saved_bytes(lambda: linear(x.requires_grad_()).exp(), linear) == 4 * (5 * 4 + 5 * 3)
    # sin keeps its input and cos the same one: counted once; a view of a storage of 100 floats keeps all of it.
    y = torch.zeros(100, requires_grad=True)
    assert memory.saved_bytes(lambda: y[:10].sin() + y[:10].cos(), torch.nn.Identity()) == 400
    norm = torch.nn.BatchNorm1d(3).eval()  # saves its running statistics: buffers, no extra
    assert memory.saved_bytes(lambda: norm(torch.zeros(2, 3)), norm) == 4 * 2 * 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_in_a_process_of_its_own():
    # Enough images that activations are 64 KiB and more: what is smaller stays in the heap, resident from step to step.
    peak = memory.peak_alone(replace(TINY, batch=32), "packed")
    parameters = sum(p.numel() for p in Bench(TINY, ["packed"]).contenders["packed"].model.parameters())
    assert peak is not None
    assert 4 * parameters < peak < 2**30  # the gradients at least


def test_rows_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "peak_alone", lambda case, name: {"masked": 1000, "packed": 400}[name])
    benchmark.main(["memory", *TINIEST, "--decoder", "32", "--csv", str(tmp_path / "a.csv")])
    masked, packed = read(tmp_path / "a.csv")
    assert (packed["peak_step_bytes"], packed["peak_step_ratio"], masked["peak_step_ratio"]) == (
        "400",
        "0.400",
        "1.000",
    )
    assert 0 < int(packed["saved_encoder_bytes"]) < int(packed["saved_step_bytes"])
    ratio = int(packed["saved_step_bytes"]) / int(masked["saved_step_bytes"])
    assert float(packed["saved_step_ratio"]) == pytest.approx(ratio, abs=1e-3)


# ------------------------------------------------------------------------------------------------- several processes


def test_rows_of_two_processes(tmp_path, monkeypatch, capsys):
    run_group, drawn = processes.run_group, []
    alive = set(multiprocessing.active_children())  # of other tests

    def one_here(case, rounds, check):
        if case.processes == 2:
            return run_group(case, rounds, check)
        processes._member(0, case, rounds, check, str(tmp_path))
        return json.loads((tmp_path / "seconds.json").read_text())

    monkeypatch.setattr(processes, "PASSES", 1)
    monkeypatch.setattr(processes, "spawn", partial(start_processes, start_method=server.get_start_method()))
    monkeypatch.setattr(processes, "run_group", one_here)
    monkeypatch.setattr(steps, "plot_scaling", lambda rows, path: drawn.extend(rows))
    case = [
        "--mask_ratio",
        "0.75",
        "--decoder",
        "32",
        "--threads",
        "2",
        "--processes",
        "2",
        "--device",
        "cpu",
    ]
    benchmark.main(["scaling", *SMALL, *case, "--csv", str(tmp_path / "a.csv"), "--plot", "a.png"])
    rows = read(tmp_path / "a.csv")
    assert [(row["processes"], row["threads"], row["contender"]) for row in rows] == [
        ("1", "2", "masked"),
        ("1", "2", "packed"),
        ("2", "1", "masked"),
        ("2", "1", "packed"),
    ]
    assert {row["batch"] for row in rows} == {row["rounds"] for row in rows} == {"2"}
    assert [row["speedup_median"] for row in rows[::2]] == ["1.000"] * 2
    for one, two in zip(rows[:2], rows[2:], strict=True):
        assert float(two["images_per_second"]) == pytest.approx(4 / float(two["seconds_median"]), rel=1e-2)
        assert one["efficiency"] == one["efficiency_low"] == one["efficiency_high"] == "1.000"
        ratio = float(two["images_per_second"]) / float(
            one["images_per_second"]
        )  # of two on the threads of one
        assert float(two["efficiency"]) == pytest.approx(ratio, rel=1e-2, abs=2e-3)
    assert drawn == rows[:2]
    printed = capsys.readouterr().out
    assert all(row["efficiency"] in printed for row in rows)
    assert "model test_resnet, base masked, batch 2, height 64, width 64, mask_ratio 0.75" in printed
    assert set(multiprocessing.active_children()) <= alive


def test_efficiency_is_for_equal_hardware():
    passes = [
        {1: {"packed": [2.0, 2.0]}, 2: {"packed": [4.0, 4.0]}},
        {1: {"packed": [2.0]}, 2: {"packed": [5.0]}},
    ]
    assert processes.efficiencies(TINY, passes, 1, "packed") == [1, 1]
    assert processes.efficiencies(TINY, passes, 2, "packed") == [1, 0.8]
    on_gpus = Case("test_resnet", device="cuda")
    assert processes.efficiencies(on_gpus, passes, 2, "packed") == [0.5, 0.4]


def test_statistics_are_over_all_processes_only_where_there_are_several():
    assert processes.shared_case(Case("test_resnet", threads=8), 4) == Case(
        "test_resnet", threads=2, processes=4
    )
    for count in (1, 2):
        case = processes.shared_case(TINY, count)
        assert [c.model.sync_bn for c in Bench(case).contenders.values()] == [count == 2] * 2


def test_processes_that_a_machine_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes.check_counts([1, 2], threads=3, device="cuda")
    processes.check_counts([1], threads=3, device="cuda:1")
    with pytest.raises(ValueError, match="--processes 4 needs 4 GPUs, one each, and this machine has 2"):
        processes.check_counts([1, 4], threads=4, device="cuda")
    with pytest.raises(ValueError, match="or on --device cuda, where process i takes GPU i; not on cuda:1"):
        processes.check_counts([1, 2], threads=4, device="cuda:1")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (KeyboardInterrupt(), None),
        (
            ProcessRaisedException("-- Process 1\nTraceback:\nValueError: what to do\n", 1, 7),
            "process 1 of 2 failed: what to do",
        ),
        (
            ProcessExitedException("terminated with signal SIGKILL", 0, 7, -9),
            r"process 0 of 2 was ended from outside \(terminated with signal SIGKILL\): if the memory was full",
        ),
    ],
)
def test_no_process_outlives_its_group(monkeypatch, end, message):
    started = [multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,)) for _ in range(2)]

    def join():
        raise end

    def spawn(*args, **options):
        for process in started:
            process.start()
        return SimpleNamespace(processes=started, join=join)

    monkeypatch.setattr(processes, "spawn", spawn)
    with pytest.raises(
        KeyboardInterrupt if isinstance(end, KeyboardInterrupt) else ValueError, match=message
    ):
        processes.run_group(processes.shared_case(TINY, 2), rounds=2, check=False)
    assert [process.is_alive() for process in started] == [False, False]


# -------------------------------------------------------------------------------------------------------- the loader


def test_rows_of_the_loader(tmp_path, capsys):
    table = tmp_path / "a.csv"
    benchmark.main(
        [
            "loader",
            "--busy",
            "--rounds",
            "2",
            "--batch",
            "2",
            "--size",
            "64",
            "--workers",
            "1",
            "--csv",
            str(table),
        ]
    )
    plain, ours = read(table)
    assert (plain["contender"], ours["contender"], ours["base"], ours["kind"]) == (
        "plain",
        "ours",
        "plain",
        "loader",
    )
    assert (ours["data"], ours["files"], ours["file_height"], ours["file_width"]) == (
        "synthetic",
        "8",
        "375",
        "500",
    )
    assert 60_000 < int(ours["file_bytes"]) < 200_000  # as photos of ImageNet
    assert (ours["batch"], ours["height"], ours["width"], ours["workers"]) == ("2", "64", "64", "1")
    assert plain["speedup_median"] == "1.000"
    for row in (plain, ours):
        rate = 4 * 2 / float(row["seconds_median"])
        assert float(row["images_per_second"]) == pytest.approx(rate, rel=1e-2)
        assert row["images_per_second_per_core"] == row["images_per_second"]
    assert (ours["pillow"], ours["torchvision"]) == (PIL.__version__, torchvision.__version__)
    assert ours["device"].startswith("cpu")
    assert "images_per_second_per_core" in capsys.readouterr().out


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    return write_photos(tmp_path / "photos", 10)


def test_a_turn_is_the_same_files_for_both(photos):
    read_by = {}
    case = LoaderCase("photos", photos[:3], size=64, batch=2)
    both = loader.loaders(case)
    assert isinstance(both["plain"].dataset, loader.PlainImages)
    for name, images in both.items():
        read_by[name] = [index for batch in images.batch_sampler for _, index in batch]
    assert read_by["plain"] == read_by["ours"]
    assert sorted(read_by["ours"][:3]) == [0, 1, 2]
    assert len(read_by["ours"]) == 8
    assert [batch.shape for batch in both["plain"]] == [(2, 3, 64, 64)] * 4
    assert [(b["image"].shape, b["visible"].shape) for b in both["ours"]] == [
        ((2, 3, 64, 64), (2, 1, 2, 2))
    ] * 4
    assert len(loader.loaders(LoaderCase("photos", photos, 64, 2, workers=2))["ours"]) == 8


def test_the_files_of_a_turn_are_spread_over_the_data(photos, monkeypatch):
    read_of = []
    monkeypatch.setattr(
        loader, "interleaved", lambda turns, rounds, device: {name: [1.0, 1.0] for name in turns}
    )
    monkeypatch.setattr(loader, "check_pictures", lambda case: read_of.extend(case.files))
    (row, _) = loader.loader_rows(photos[0].parent, size=32, batch=1, workers=0, rounds=2)
    assert read_of == [photos[i] for i in (0, 2, 5, 7)]
    assert (row["data"], row["files"], row["images_per_second"]) == ("photos", "4", "4.000")


def test_pictures_of_both_are_equal(photos):
    images = loader.data_sets(LoaderCase("photos", photos, size=48))
    torch.manual_seed(loader.derive_seed(0, 7))
    ours, transform = images["ours"][7, 2]["image"], images["ours"].reader.transform
    difference = Normalise(transform.mean, transform.std, fused=True)(ours) - images["plain"][7, 2]
    assert difference.abs().mean() * 0.225 < 0.01
    check_pictures(LoaderCase("photos", photos, size=48))


@pytest.mark.parametrize(
    "wrong", [{"hflip": 1.0}, {"crop_scale": (0.5, 0.6)}, {"mean": (0.0, 0.0, 0.0)}, {"std": (0.5, 0.5, 0.5)}]
)
def test_another_picture_is_refused(photos, monkeypatch, wrong, capsys):
    monkeypatch.setattr(loader, "PretrainTransform", lambda size: PretrainTransform(size, **wrong))
    with pytest.raises(SystemExit):
        benchmark.main(["loader", "--busy", "--data", str(photos[0].parent), "--batch", "2", "--size", "64"])
    captured = capsys.readouterr()
    assert "ours and plain make different pictures of it" in captured.err
    assert captured.out == ""


def test_files_that_the_two_read_differently_or_not_at_all_are_named(photos):
    with Image.open(photos[3]) as image:
        exif = image.getexif()
        exif[0x0112] = 3  # upside down
        image.save(photos[3], exif=exif)
    with pytest.raises(ValueError, match=r"00003.jpg: ours and plain .* name upright RGB photos"):
        check_pictures(LoaderCase("photos", photos, size=48))
    photos[1].write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"00001.jpg: not an image of a known kind.*: repair the file, or name a list"
    ):
        check_pictures(LoaderCase("photos", photos, size=48))


# ------------------------------------------------------------------------------------------------- the original code

# Stands for a clone: the imports of the real files, their names, and what they do to timm; no line of theirs.
CLONE = {
    "encoder.py": """
        import torch.nn as nn
        from timm.models.layers import DropPath
        _cur_active = None
        class SparseEncoder(nn.Module):
            def __init__(self, cnn, input_size, sbn=False):
                super().__init__()
                self.sp_cnn, self.input_size = cnn, input_size
                self.downsample_raito = cnn.get_downsample_ratio()
            def forward(self, x):
                return [x * _cur_active.float().mean()]
    """,
    "decoder.py": """
        import torch.nn as nn
        from timm.models.layers import trunc_normal_
        from utils.misc import is_pow2n
        class LightDecoder(nn.Module):
            def __init__(self, up_sample_ratio, width=768, sbn=True):
                super().__init__()
                assert is_pow2n(up_sample_ratio) and not is_pow2n(up_sample_ratio + 1)
                self.width = width
    """,
    "spark.py": """
        import torch.nn as nn
        import encoder
        from decoder import LightDecoder
        class SparK(nn.Module):
            def __init__(self, sparse_encoder, dense_decoder, mask_ratio=0.6, densify_norm="bn", sbn=False):
                super().__init__()
                print("much about itself")
                self.sparse_encoder, self.dense_decoder = sparse_encoder, dense_decoder
                self.mask_ratio, self.densify_norm = mask_ratio, densify_norm
                self.downsample_raito = sparse_encoder.downsample_raito
    """,
    "models/__init__.py": "raise RuntimeError('not to be run')",
    "models/convnext.py": """
        import torch.nn as nn
        from timm.models.registry import register_model
        from encoder import SparseEncoder
        @register_model
        def convnext_tiny(pretrained=False, **kwargs):
            cnn = nn.Identity()
            cnn.options, cnn.get_downsample_ratio = kwargs, lambda: 32
            return cnn
    """,
    "models/resnet.py": """
        from timm.models.resnet import ResNet
        ResNet.get_downsample_ratio = lambda self: 32
        ResNet.forward = lambda self, x, hierarchical=False: "forward of the clone"
    """,
}


@pytest.fixture
def clone(tmp_path):
    for name, text in CLONE.items():
        path = tmp_path / "SparK" / "pretrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "SparK"


def test_importing_a_clone_leaves_no_trace(clone, monkeypatch):
    mine = ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    modules, path, forward = dict(sys.modules), list(sys.path), timm.models.resnet.ResNet.forward
    code = original.import_original(clone)
    assert code.spark.encoder is code.encoder
    assert sys.path == path
    assert sys.modules["utils"] is mine
    assert {n: m for n, m in sys.modules.items() if n in modules} == modules
    assert not {"encoder", "decoder", "models", "models.resnet", "utils.misc"} & set(sys.modules)
    assert timm.models.resnet.ResNet.forward is forward
    assert timm.model_entrypoint("convnext_tiny").__module__ == "timm.models.convnext"


def test_models_of_a_clone(clone, capsys):
    code = original.import_original(clone)
    resnet = original.build_original(code, "resnet18", (64, 64), 0.5)
    assert resnet.densify_norm == "bn"
    assert resnet.sparse_encoder.sp_cnn(torch.zeros(1)) == "forward of the clone"
    convnext = original.build_original(code, "convnext_tiny", (64, 64), 0.5)
    assert (convnext.densify_norm, convnext.dense_decoder.width, convnext.mask_ratio) == ("ln", 768, 0.5)
    assert convnext.sparse_encoder.sp_cnn.options == {"sparse": True, "num_classes": 0}
    assert capsys.readouterr().out == ""
    visible = torch.tensor([[[[True, False], [False, False]]]])
    (features,) = original.original_features(code, convnext, torch.ones(1, 3, 64, 64), visible)
    assert features[:, :, :32, :32].unique().tolist() == [0.25]
    assert features[:, :, 32:].unique().tolist() == [0]
    with pytest.raises(ValueError, match="square images only, not 64x96"):
        original.build_original(code, "resnet18", (64, 96), 0.5)


def test_commit_of_a_clone(clone):
    assert original.commit_of(clone) == "unknown"
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert original.commit_of(clone) == commit[:12]
    (clone / "pretrain" / "decoder.py").write_text("changed")
    assert original.commit_of(clone) == commit[:12] + "+"


def test_a_folder_that_is_no_clone(tmp_path, clone, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["step", *SMALL, "--official", str(tmp_path)])
    assert f"error: {tmp_path} is no clone of github.com/keyu-tian/SparK" in capsys.readouterr().err
    (clone / "pretrain" / "decoder.py").write_text("import a_module_that_is_nowhere")
    with pytest.raises(ValueError, match="does not import: No module named 'a_module_that_is_nowhere'"):
        original.import_original(clone)
    assert "encoder" not in sys.modules


def test_a_model_that_the_original_lacks_runs_without_it(clone, tmp_path, capsys):
    arguments = ["encoder", *SMALL, "--official", str(clone), "--csv", str(tmp_path / "a.csv")]
    benchmark.main(arguments)
    assert "note: the original has no test_resnet, so only ours are compared" in capsys.readouterr().err
    assert [row["base"] for row in read(tmp_path / "a.csv")] == ["masked", "masked"]


@pytest.mark.skipif("SPARK_ORIGINAL" not in os.environ, reason="SPARK_ORIGINAL names no clone")
@pytest.mark.parametrize("model", ["resnet18", "convnext_tiny"])
def test_ours_equals_the_original(model):
    case = Case(model, batch=4, size=(96, 96), official=Path(os.environ["SPARK_ORIGINAL"]))
    for kind in ("step", "encoder"):
        assert list(checked(case, kind).contenders) == ["original", "masked", "packed"]


# --------------------------------------------------------------------------------------------- layouts, other commits


def test_decoder_reads_what_it_writes():
    for text in ("768", "256/4/1"):
        assert str(Decoder.parse(text)) == text
    assert Decoder.parse("768") == ORIGINAL_DECODER
    model = SparK("test_resnet", 64, 0.5, **Decoder(32, 2, 1).options)
    assert len(model.decoder.blocks) == 2


@pytest.mark.slow
def test_this_tree_against_itself(tmp_path):
    given = ["--kind", "step", "--model", "test_resnet", "--batch", "1", "--size", "64", "--width", "32"]
    output = [
        "--rounds",
        "2",
        "--threads",
        "1",
        "--busy",
        "--device",
        "cpu",
        "--csv",
        str(tmp_path / "a.csv"),
    ]
    benchmark.main(["against", str(Path(__file__).resolve().parents[2]), *given, *output])
    other, this = read(tmp_path / "a.csv")
    assert (other["contender"], this["contender"], other["speedup_median"]) == ("other", "this", "1.000")
    assert int(this["peak_step_bytes"]) > 0
    assert other["commit"] == this["commit"]


def test_every_command_of_a_committed_result_is_there():
    results = Path(__file__).resolve().parents[2] / "docs" / "results"
    kinds = {row["kind"].split()[0] for path in results.glob("benchmark_*.csv") for row in read(path)}
    assert kinds <= set(benchmark.COMMANDS)
