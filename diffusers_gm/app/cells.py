"""Runs as HTML: a row a sampler, a cell a number of calls, with the samples, the way to them and what they cost."""

import base64
import io
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from ..pictures import image_grid
from .runs import Run

# Of a batch, in a cell.
MAX_SHOWN = 32
# Calls of the way of one image, in a cell.
MAX_WAY = 8


def table(runs: Sequence[Run]) -> str:
    """All runs of a comparison, as far as they have come."""
    titles = {run.sampler.name: run.sampler.title for run in runs}
    rows = "".join(
        f'<section class="gm-sampler"><h3>{escape(title)}</h3><div class="gm-cells">'
        + "".join(cell(run) for run in runs if run.sampler.name == name)
        + "</div></section>"
        for name, title in titles.items()
    )
    return rows + note(DISTANCE if any(run.distance for run in runs) else "")


def cell(run: Run) -> str:
    """One run."""
    calls = f'<span class="gm-calls">{run.calls} call{"s" * (run.calls != 1)}</span>'
    if run.error:
        return f'<figure class="gm-cell gm-failed"><figcaption>{calls}</figcaption>{escape(run.error)}</figure>'
    if run.images is None:
        waiting = f'<figcaption>{calls}</figcaption><div class="gm-waiting">waiting</div>'
        return f'<figure class="gm-cell">{waiting}</figure>'
    if run.finished:
        facts = [f"{run.seconds:.2f} s"]
        facts += [f"{run.network_calls} made"] if run.network_calls != run.calls else []
        if run.distance is not None:
            ratio, spread = run.distance
            facts.append(f"{ratio:.2f} x floor" + ("" if spread is None else f" (± {spread:.2f})"))
    else:
        facts = [f"denoised at call {run.network_calls}"]
    caption = "".join(f"<span>{fact}</span>" for fact in facts)
    shown = run.images[:MAX_SHOWN]
    rows = f"first {len(shown)} of {len(run.images)}" if len(shown) < len(run.images) else f"{len(shown)}"
    what = f"{rows} {'samples' if run.finished else 'denoised images'} of {run.sampler.name}, {run.calls} calls"
    return (
        f'<figure class="gm-cell{" gm-finished" * run.finished}"><figcaption>{calls}{caption}</figcaption>'
        f"{picture(shown, min(8, len(shown)), what)}{way(run)}</figure>"
    )


DISTANCE = (
    "x floor: the sliced Wasserstein distance of the samples to the training images, over that of as many other real "
    "images; in brackets the spread of the latter. 1 is as near as real images are."
)


def way(run: Run) -> str:
    """The denoised image at the calls of a run, evenly chosen where they are many."""
    if not run.looks:
        return ""
    at = sorted({round(i * (len(run.looks) - 1) / (MAX_WAY - 1)) for i in range(MAX_WAY)})
    calls = ", ".join(str(i + 1) for i in at)
    chosen = len(at) < len(run.looks)
    text = "first image, denoised at " + (f"{len(at)} of {len(run.looks)} calls: " if chosen else "call ") + calls
    frames = torch.cat([run.looks[i].denoised for i in at])
    strip = f'<div style="width: {len(at) / MAX_WAY:.1%}">{picture(frames, len(at), text)}</div>'
    return f'<div class="gm-way"><span>{text}</span>{strip}</div>'


def picture(images: Tensor, columns: int, alt: str) -> str:
    """An `image_grid` of images in [-1, 1] as an `img`."""
    data = io.BytesIO()
    image_grid(images, columns).save(data, "PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{escape(alt)}">'


def error(text: str) -> str:
    """A sentence about what went wrong."""
    return f'<div class="gm-error" role="alert">{escape(sentence(text))}</div>'


def note(text: str) -> str:
    """A sentence about what there is."""
    return f'<div class="gm-note">{escape(text)}</div>' if text else ""


def sentence(text: str) -> str:
    """A message of an exception on one line, of a length that is read."""
    words = " ".join(text.split()) or "something went wrong"
    words = words if len(words) <= 400 else words[:400].rsplit(" ", 1)[0] + " ..."
    words = words[0].upper() + words[1:] if words.split()[0].isalpha() else words  # not the name of a model
    return words + ("" if words[-1] in ".?!" else ".")
