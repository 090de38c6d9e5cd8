"""The curves of runs, read from either record and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_python
from vqrae_ds.evaluation.curves import Curve, Curves, Histogram, read_curves, read_tensorboard
from vqrae_ds.evaluation.plot import PANELS, labels_of, panels_of
from vqrae_ds.monitoring.run_log import RunLog


def write_run(folder: Path, *, factor: float = 1.0) -> Path:
    """Both records of a run of 20 steps with two validations."""
    log = RunLog(folder, step=0)
    for step in range(1, 21):
        entry = {
            "samples": 16 * step,
            "loss/total": factor / step,
            "optim/gradient_norm_decoder": factor * step,
            "optim/gradient_norm_generator": 2 * factor * step,
            "extra/new_figure": step % 3,
            "codebook/histogram": [64 - step, step, 0, 3],
        }
        log.write(step, entry)
        if step % 10 == 0:
            log.write(step, {"validation/psnr": 20 + factor * step / 10})
    log.close()
    return folder


def test_both_records_give_the_same_numbers(tmp_path):
    folder = write_run(tmp_path / "a")
    written, shown = read_curves(folder), read_tensorboard(folder)
    assert written.curves["validation/psnr"] == ([10, 20], [21.0, 22.0])
    assert written.curves.keys() == shown.curves.keys()
    for name, (steps, values) in written.curves.items():
        assert shown.curves[name].steps == steps
        assert shown.curves[name].values == pytest.approx(values, rel=1e-6)
    assert written.histograms == shown.histograms
    assert written.histograms == {"codebook/histogram": Histogram(20, [44, 20, 0, 3])}


def test_every_curve_is_in_one_panel():
    names = [name for panel in PANELS for name in panel.names if name[-1] not in "/_"]
    names += ["optim/gradient_norm_x", "gan/logits_real", "retention/other", "samples"]
    runs = {"a": Curves({name: Curve([1], [1.0]) for name in names}, {}), "b": Curves({}, {})}
    panels = list(panels_of(runs))
    placed = sorted(name for panel in panels for name in panel.names)
    assert placed == sorted(set(names) - {"samples"})
    assert panels[-1].title == "retention/other", "what has no panel gets one"
    assert "MFU" not in [p.title for p in panels_of({"a": Curves({"loss/total": ([1], [1])}, {})})]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["gan/logits_fake", "gan/logits_real"], ["fake", "real"]),
        (["perf/images", "perf/images_per_gpu"], ["images", "images_per_gpu"]),
        (["codebook/usage", "validation/usage"], ["codebook/usage", "validation/usage"]),
    ],
)
def test_labels_say_what_tells_curves_apart(names, labels):
    assert labels_of(names) == labels


def test_the_tool_draws_runs_over_each_other(tmp_path):
    folders = [str(write_run(tmp_path / name, factor=f)) for name, f in (("a", 1.0), ("b", 3.0))]
    pictures = {}
    for name, arguments in {
        "one": folders[:1],
        "both": folders,
        "tensorboard": [*folders, "--tensorboard"],
    }.items():
        out = tmp_path / "new" / f"{name}.png"
        done = run_python("tools/plot_run.py", *arguments, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("run(s) up to step 20\n")
        pictures[name] = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert (pictures["both"] == pictures["tensorboard"]).mean() > 0.999
    orange = np.abs(pictures["both"] - [255, 127, 14]).sum(-1) < 30  # matplotlib's second colour
    assert orange.sum() > 500, "the second run is there"
    assert pictures["one"].std() > 5


@pytest.mark.parametrize(
    ("content", "message"), [(None, "it has no metrics.jsonl"), ("", "has logged no step yet")]
)
def test_a_folder_without_curves_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = run_python("tools/plot_run.py", str(tmp_path), "--out", str(tmp_path / "out.png"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_a_folder_without_events_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it has no tensorboard/"):
        read_tensorboard(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(ValueError, match="holds no TensorBoard events"):
        read_tensorboard(tmp_path)


def test_a_run_before_its_first_validation_can_be_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 0.0}\n{"step": 2, "lo')
    out = tmp_path / "out.svg"
    done = run_python("tools/plot_run.py", str(tmp_path), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "loss, total" in out.read_text()
