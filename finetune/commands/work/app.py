"""What spark-app does, once its options are read."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, wraps
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from finetune.depth_data.depth_files import npy_bytes, png_bytes
from finetune.model.calibration import Calibration, Fit, Readings, Space, fit_calibration
from finetune.model.depth_model import DepthModel, load_depth_model
from finetune.model.prediction import read_photo, resized, seen_depths
from finetune.options import AppConfig
from finetune.predicting.camera import Intrinsics, camera_for
from finetune.predicting.pointcloud import point_cloud
from finetune.report.figures import colour_range, colourise
from spark.errors import UserError
from spark.training.accelerator import chosen_device

VIEWER = Path(__file__).parents[1] / "viewer"
VIEW_SIDE = 1024  # [px], longest side of the pictures and of the distances that the browser gets
FITS: dict[str, tuple[Space, Fit]] = {
    "scale": ("depth", "scale"),
    "scale and shift": ("depth", "scale_shift"),
    "scale and shift of inverse depth": ("disparity", "scale_shift"),
}
RELATIVE_FIT = ("disparity", "scale_shift")  # the only one for a head without metres
FOLDER = "depth-page-"
"""Beginning of the names of folders for files to download, one of each program that runs."""
LOCK = "lock"
"""File in it that the program locks."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
"""What the browser may load: from here alone. The page's framework makes functions of texts, hence unsafe-eval."""


@dataclass(frozen=True)
class Point:
    """A pixel of the photo, and its known distance [m] if it was given."""

    x: int
    y: int
    metres: float | None = None


@dataclass(frozen=True)
class Session:
    """What one open page shows.

    Args:
        name: of the photo's file.
        image: uint8 [H, W, 3].
        seen: the prediction without a calibration, float32 [h, w] [m], at the size at which it sees the photo;
            inverse depth if `relative`.
        camera: that took the photo.
        folder: for files to download; goes with the session.
        own: the calibration that the model brought.
        relative: the head gives inverse depth up to scale and shift.
        points: with their known distances.
        chosen: the point that was clicked last.
        calibration: fitted here, in place of the model's own.
        fitted: the points that it was fitted to.
        fit: what was fitted.
    """

    name: str
    image: np.ndarray
    seen: np.ndarray
    camera: Intrinsics
    folder: tempfile.TemporaryDirectory
    own: Calibration | None = None
    relative: bool = False
    points: tuple[Point, ...] = ()
    chosen: Point | None = None
    calibration: Calibration | None = None
    fitted: tuple[Point, ...] = ()
    fit: Fit = "scale"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the photo [px]."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def predicted(self) -> np.ndarray:
        """The prediction without a calibration at each pixel, float32 [H, W]; fits are to this."""
        return resized(self.seen, self.size)

    @property
    def depth(self) -> np.ndarray:
        """Depth as it is shown, float32 [H, W] [m]: calibrated, then resized, as a calibrated model's is."""
        calibration = self.calibration or self.own
        if calibration is None:
            return self.predicted
        return resized(calibration.metres(self.seen, self.relative).astype(np.float32), self.size)


def open_photo(
    model: DepthModel, path: str, max_pixels: int, folder: str, own: Calibration | None = None
) -> Session:
    """Read a photo, delete the file, and predict; files to download will be in a folder inside `folder`.

    Args:
        model: without its calibration: fits are to what the head gives, as those of spark-calibrate are.
        path: of the photo.
        max_pixels: most pixels of a photo.
        folder: for files to download.
        own: the calibration that was taken from the model.
    """
    name = Path(path).name
    try:
        image = read_photo(path, max_pixels)
        camera = camera_for(None, path, (image.shape[0], image.shape[1]))
    except UserError as error:
        raise UserError(f"{name} cannot be read: {str(error).rpartition(': ')[2]}") from error
    finally:
        with suppress(OSError):
            os.unlink(path)
    return Session(
        name,
        image,
        seen_depths(model, [image])[0],
        camera,
        tempfile.TemporaryDirectory(dir=folder),
        own,
        "depth" not in model.outputs,
    )


def pick(session: Session, x: Any, y: Any) -> Session:
    """Choose a pixel; ValueError if the photo has none there."""
    height, width = session.size
    if not (isinstance(x, int) and isinstance(y, int) and 0 <= x < width and 0 <= y < height):
        raise UserError(f"the photo has no pixel at column {x}, row {y}: click on the photo")
    return replace(session, chosen=Point(x, y))


def add_point(session: Session, metres: float | None) -> Session:
    """Give the chosen pixel its known distance; ValueError without one of the two."""
    if session.chosen is None:
        raise UserError("click on the photo first, where the distance is known")
    if metres is None or not 0 < metres < 1e5:
        raise UserError("a known distance is a number of metres above 0: type it, then add it")
    point = replace(session.chosen, metres=float(metres))
    others = [p for p in session.points if (p.x, p.y) != (point.x, point.y)]
    return replace(session, points=(*others, point), chosen=None)


def forget_points(session: Session) -> Session:
    """Without points, and without the calibration to them."""
    return replace(session, points=(), chosen=None, calibration=None, fitted=())


def calibrate(session: Session, model: DepthModel, kind: str) -> Session:
    """Fit a calibration to the points; UserError if they cannot be fitted."""
    if not session.points:
        raise UserError("there is no known distance yet: click on the photo, type the distance, and add it")
    space, fit = FITS[kind]
    predicted = session.predicted
    readings = Readings(
        np.array([predicted[p.y, p.x] for p in session.points], np.float64),
        np.array([p.metres for p in session.points], np.float64),
        np.arange(len(session.points)),
        [f"column {p.x}, row {p.y}" for p in session.points],
        session.relative,
    )
    limits = model.depth_range.min_depth, model.depth_range.max_depth
    found = fit_calibration(
        readings, space, fit, *limits, origin=f"{len(session.points)} points of {session.name}"
    )
    return replace(session, calibration=found, fitted=session.points, fit=fit)


def file_of(session: Session, kind: str) -> str:
    """Write the depth of a session as "npy", "png" or "ply" into its folder; the path."""
    depth = session.depth
    content = {
        "npy": lambda: npy_bytes(depth),
        "png": lambda: png_bytes(depth)[0],
        "ply": lambda: point_cloud(session.image, depth, session.camera),
    }[kind]()
    stem = re.sub(r"[^\w-]+", "_", Path(session.name).stem)[:80] or "photo"
    path = Path(session.folder.name) / f"{stem}_depth.{kind}"
    path.write_bytes(content)
    return str(path)


def view(session: Session | None) -> str:
    """What the viewer in the page shows, as JSON; see viewer/viewer.js."""
    if session is None:
        return ""
    depth = session.depth
    rows, columns = depth.shape
    scale = min(1.0, VIEW_SIDE / max(rows, columns))
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    # the pixel under the middle of each cell, as the viewer looks it up: no distance is shown that is not predicted
    down = ((np.arange(height) + 0.5) / height * rows).astype(int)
    across = ((np.arange(width) + 0.5) / width * columns).astype(int)
    small = depth[down[:, None], across]
    step = max(float(small.max()), 1e-3) / 65535
    near, far = colour_range(depth)
    ramp = colourise(np.linspace(near, far, 17)[None].clip(1e-3), near, far)[0]
    points = [{"x": p.x, "y": p.y, "label": f"{p.metres:g} m", "chosen": False} for p in session.points]
    if session.chosen:
        at = session.chosen
        points.append({"x": at.x, "y": at.y, "label": f"{depth[at.y, at.x]:.2f} m?", "chosen": True})
    shown = {
        "photo": data_address(session.image[down[:, None], across], "jpeg"),
        "colours": data_address(colourise(small, near, far), "png"),
        "ramp": ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in ramp.tolist()),
        "near": f"{near:.2f} m",
        "far": f"{far:.2f} m",
        "rows": rows,
        "columns": columns,
        "height": height,
        "width": width,
        "distances": base64.b64encode(np.rint(small / step).astype("<u2").tobytes()).decode(),
        "step": step,
        "points": points,
    }
    return json.dumps(shown)


def data_address(picture: np.ndarray, kind: str) -> str:
    """A picture uint8 [H, W, 3] as a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def words(session: Session | None, model_folder: str) -> str:
    """The text below the pictures, as Markdown whose values are code, so that no name is taken for markup."""
    if session is None:
        return (
            "Drop a photo above, or click there to choose one: its depth appears here. Then move over it to read"
            " distances; with a few known ones the page calibrates the model. The photo stays on this machine."
        )
    depth = session.depth
    lines = [
        f"Depth from **{depth.min():.2f} m** to **{depth.max():.2f} m**, median {np.median(depth):.2f} m;"
        f" {depth.shape[1]} × {depth.shape[0]} px. Camera for points: {_code(str(session.camera))}"
    ]
    if session.own and not session.calibration:
        lines.append(f"By the model's own calibration: {_code(str(session.own))}")
    if session.calibration:
        errors = {
            "before": "of the model without calibration",
            "after": "calibrated",
            "left_out": "at each point under a fit to the others",
        }
        stated = ", ".join(f"{100 * v:.1f} % {errors[k]}" for k, v in session.calibration.errors.items())
        points = "; ".join(f"{p.x},{p.y},{p.metres:.9g}" for p in session.fitted)
        options = {
            "model": model_folder,
            "image": session.name,
            "points": points,
            "space": session.calibration.space,
            "fit": session.fit,
            "output": "CALIBRATED",
        }
        command = ["spark-calibrate"]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        lines += [
            f"{_code(str(session.calibration))} Mean relative error {stated}.",
            f"The same for good: {_code(shlex.join(command))}",
        ]
        if session.own:
            lines.append(f"It takes the place of the model's own calibration: {_code(str(session.own))}")
        if session.points != session.fitted:
            lines.append("**The points have changed since: *Calibrate* fits to all of them.**")
    return "\n\n".join(lines)


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def build(model: DepthModel, model_folder: str, max_pixels: int, folder: str) -> Any:
    """The page as gradio's Blocks, with its files in `folder`; `launch` starts it.

    Takes the calibration out of the model: the page applies it.
    """
    import gradio as gr  # here, for it takes seconds and reads the environment that `main` sets

    own = model.calibration
    model.calibrate(None)
    relative = "depth" not in model.outputs
    fits = [name for name, (space, fit) in FITS.items() if not relative or (space, fit) == RELATIVE_FIT]

    def told(handler: Callable[..., tuple[Any, ...]], *unchanged: Any) -> Callable[..., tuple[Any, ...]]:
        """A handler whose error is the text of `problem`, its last output; the one before goes.

        Where there is one, the other outputs are `unchanged`, or stay as they are.
        """

        @wraps(handler)  # gradio reads the parameters
        def handle(*arguments: Any, **named: Any) -> tuple[Any, ...]:
            try:
                return *handler(*arguments, **named), gr.update(value="", visible=False)
            except (ValueError, OSError) as error:
                return *unchanged, gr.update(value=str(error), visible=True)

        return handle

    def changed(session: Session | None, change: Callable[..., Session], *arguments: Any) -> tuple[Any, ...]:
        """What the page shows of a session after a change."""
        if session is None:
            raise UserError("there is no photo yet: drop one above")
        return shown(change(session, *arguments))

    def shown(session: Session) -> tuple[Session, str, str]:
        return session, view(session), words(session, model_folder)

    def on_photo(path: str) -> tuple[Any, ...]:
        session = open_photo(model, path, max_pixels, folder, own)
        return *shown(session), None, None, gr.update(visible=True)

    def on_pick(session: Session | None, event: gr.EventData) -> tuple[Any, ...]:
        data: dict[str, Any] = event._data or {}
        return changed(session, pick, data.get("x"), data.get("y"))

    def on_add(session: Session | None, metres: float | None) -> tuple[Any, ...]:
        return *changed(session, add_point, metres), None

    def on_calibrate(session: Session | None, kind: str) -> tuple[Any, ...]:
        return *changed(session, calibrate, model, kind), None

    def on_clear(session: Session | None) -> tuple[Any, ...]:
        return *changed(session, forget_points), None

    def on_file(kind: str, session: Session | None) -> tuple[str | None]:
        return (None if session is None else file_of(session, kind),)

    def forget(session: Session | None) -> None:
        if session is not None:
            session.folder.cleanup()

    with gr.Blocks(title="Depth", analytics_enabled=False, delete_cache=(60, 600), fill_width=True) as page:
        session = gr.State(None, time_to_live=3600, delete_callback=forget)
        gr.Markdown("# Depth in metres")
        photo = gr.File(label="Photo", file_count="single", file_types=["image"], type="filepath", height=150)
        problem = gr.Textbox("", label="Problem", interactive=False, visible=False, elem_id="problem")
        viewer = gr.HTML(
            "",
            html_template=(VIEWER / "viewer.html").read_text(encoding="utf-8"),
            css_template=(VIEWER / "viewer.css").read_text(encoding="utf-8"),
            js_on_load=(VIEWER / "viewer.js").read_text(encoding="utf-8"),
            elem_id="viewer",
        )
        text = gr.Markdown(words(None, model_folder), elem_id="words")
        with gr.Column(visible=False) as controls:
            with gr.Row():
                with gr.Column(min_width=260):
                    info = "along the view, not slantwise to the point"
                    metres = gr.Number(None, label="Known depth there [m]", info=info, elem_id="metres")
                    with gr.Row():
                        add = gr.Button("Add point", elem_id="add", min_width=120)
                        clear = gr.Button("Forget points", elem_id="clear", min_width=120)
                with gr.Column(min_width=260, scale=2):
                    info = "two points and more for a shift"
                    kind = gr.Radio(fits, value=fits[0], label="Fit", info=info, elem_id="fit")
                    fit = gr.Button("Calibrate", variant="primary", elem_id="calibrate")
            with gr.Row():
                kinds = {
                    "npy": "NPY, metres",
                    "png": "16-bit PNG, millimetres",
                    "ply": "PLY, coloured points",
                }
                makers = {name: gr.Button(text, elem_id=name, min_width=220) for name, text in kinds.items()}
            download = gr.File(label="Download", interactive=False, elem_id="download", height=110)

        outputs = [session, viewer, text]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        same = (gr.skip(),) * len(outputs)
        read = told(on_photo, *same, None, gr.skip(), gr.skip())
        photo.upload(read, photo, [*outputs, photo, download, controls, problem], **quiet)
        viewer.pick(told(on_pick, *same), session, [*outputs, problem], **quiet)
        add.click(told(on_add, *same, gr.skip()), [session, metres], [*outputs, metres, problem], **quiet)
        made = [*outputs, download, problem]
        fit.click(told(on_calibrate, *same, gr.skip()), [session, kind], made, **quiet)
        clear.click(told(on_clear, *same, gr.skip()), session, made, **quiet)
        for kind_of_file, button in makers.items():
            make = told(partial(on_file, kind_of_file), gr.skip())
            button.click(make, session, [download, problem], **quiet)
    return page


class Policy:
    """ASGI layer that answers to known host names only, and adds the headers by which browsers fetch nothing from
    elsewhere and keep nothing.

    Args:
        app: the layer below.
        host: that the page is bound to.
        names: further names that it may be called by.
    """

    HEADERS = (
        (b"content-security-policy", POLICY.encode()),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    )

    def __init__(self, app: Any, host: str = "127.0.0.1", names: Sequence[str] = ()):
        self.app, self.host, self.names = app, host, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        called = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] in ("http", "websocket") and not is_known_host(called, self.host, self.names):
            await self.refuse(scope, called, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in self.HEADERS}
                kept = [(name, value) for name, value in message["headers"] if name.lower() not in names]
                message = {**message, "headers": [*kept, *self.HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)

    async def refuse(self, scope: Any, called: str, send: Any) -> None:
        """Answer that the page has not this name."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        text = f"this page does not go by the name {called}: start spark-app with --host_names, or use its address\n"
        headers = [(b"content-type", b"text/plain; charset=utf-8"), *self.HEADERS]
        await send({"type": "http.response.start", "status": 421, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})


def is_known_host(called: str, host: str, names: Sequence[str] = ()) -> bool:
    """Whether a page that is bound to `host` goes by the name in a request's header Host.

    It does by loopback's names, `host` and `names`; and by any IP address if other machines may reach it. An address
    cannot be pointed elsewhere, as a name can (DNS rebinding).
    """
    try:
        name = (urlsplit(f"//{called}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name in {"localhost", host.lower(), *(known.lower() for known in names)}:
        return True
    with suppress(ValueError):
        return ip_address(name).is_loopback or bool(check_host(host))
    return False


def launch(
    page: Any,
    host: str,
    port: int | None,
    max_megabytes: float,
    browser: bool = False,
    names: Sequence[str] = (),
) -> str:
    """Start serving in the background; returns the address. `names` are those of `Policy`."""
    from gradio.themes import Default
    from starlette.middleware import Middleware

    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=browser,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(max_megabytes * 1e6),
        max_threads=4,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(Policy, host=host, names=tuple(names))]},
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return address


def forget_killed(folder: str | Path) -> None:
    """Delete what killed programs left beside `folder`: folders of the same user that nobody locks."""
    mine = Path(folder).lstat()
    for other in Path(folder).parent.glob(f"{FOLDER}*"):
        with suppress(OSError, Timeout):
            about = other.lstat()
            is_own = stat.S_ISDIR(about.st_mode) and about.st_uid == mine.st_uid
            is_old = mine.st_mtime - about.st_mtime >= 60  # a newer one may be about to be locked
            if is_own and is_old and not other.samefile(folder):
                with FileLock(other / LOCK, timeout=0):
                    pass
                shutil.rmtree(other)


def check_host(host: str) -> str:
    """A sentence of warning for an address that other machines reach, "" for the loopback address."""
    with suppress(ValueError):
        if ip_address(host).is_loopback:
            return ""
    if host == "localhost":
        return ""
    return f"warning: {host} lets other machines open this page, without a password; 127.0.0.1 does not"


def serve(config: AppConfig) -> None:
    """Show the page until the program is stopped."""
    model = load_depth_model(config.model, config.encoder_name)
    if "depth" not in model.outputs:
        raise UserError(
            f"head {model.head_name} gives no metres: calibrate the model first with"
            " spark-calibrate, and give the calibrated copy"
        )
    model.to(chosen_device(config.device))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, so that nothing is left
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder, FileLock(Path(folder) / LOCK):
        forget_killed(folder)
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        try:
            page = build(model, config.model, config.max_pixels, folder)
        except ImportError as error:
            raise UserError(f"the page needs gradio ({error}): pip install 'spark-pretrain[app]'") from error
        if warning := check_host(config.host):
            print(warning, file=sys.stderr)
        browser, names = not config.no_browser, config.host_names
        address = launch(page, config.host, config.port, config.max_megabytes, browser, names)
        print(f"{address}   (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            try:
                page.block_thread()
            finally:
                page.close()
