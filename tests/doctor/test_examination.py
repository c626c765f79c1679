"""A whole examination: what it promises in JSON and in text, and what it leaves behind."""

import json

import pytest
from support.made_up_machine import LIMIT_BYTES, groups

from edgeblocks.doctor import examination as doctor
from edgeblocks.doctor.kernels import KERNELS
from edgeblocks.progress import Silent
from edgeblocks.settings.presets import preset_names


class Stages(Silent):
    """Keeps the stages it is told of."""

    def __init__(self):
        self.seen = []

    def stage(self, text):
        self.seen.append(text)


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """A whole examination in a container of 2 GB, with time to spare: report, work directory and stages."""
    folder, cgroups = tmp_path_factory.mktemp("work"), groups(tmp_path_factory.mktemp("cgroups"))
    stages = Stages()
    return doctor.examine(folder, stages, limit_s=600, cgroups=cgroups), folder, stages.seen


@pytest.mark.slow
def test_the_json_has_what_was_promised(examined):
    """All findings are plain JSON values, without NaN, under the documented names."""
    found = json.loads(json.dumps(examined[0].to_json(), allow_nan=False))
    assert set(found) == {
        *("system", "processor", "memory", "disk", "gpus", "gpu_note", "machine", "versions", "kernels", "presets"),
        *("budgets", "problems", "unknown", "seconds", "training"),
    }
    assert {"cores", "allowed_cores", "load_1min"} <= set(found["processor"])
    assert {"total_bytes", "limit_bytes", "available_bytes", "swap_used_bytes"} <= set(found["memory"])
    assert {"free_bytes", "read_bytes_per_s", "read_way", "write_bytes_per_s"} <= set(found["disk"])
    assert {"python", "edgeblocks", "torch", "onnxruntime", "bitsandbytes", "torchao"} <= set(found["versions"])
    assert all(set(item) == {"problem", "cure"} for item in found["problems"])


@pytest.mark.slow
def test_nothing_is_left_in_the_work_directory(examined):
    """The file that measured the disk is gone."""
    assert list(examined[1].iterdir()) == []


@pytest.mark.slow
def test_speeds_are_positive_and_their_way_is_told(examined):
    """Disk and processor have speeds, and the report says how the page cache was avoided."""
    report = examined[0]
    assert report.disk.write_bytes_per_s > 0
    assert report.disk.read_bytes_per_s > 0
    assert report.disk.sync_s > 0
    assert report.disk.read_way in ("direct", "cache dropped")
    assert report.machine.flops_per_s > 0
    assert report.machine.memory_bytes_per_s > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "edgeblocks_adamw8bit",
        "torch_fused_adamw",
        "bitsandbytes_adamw8bit",
        "torch_int8_linear",
        "torch_bf16_matmul",
        "onnxruntime_matmul",
        "onnxruntime_int8",
    ],
)
def test_kernels_that_are_expected_here_work(examined, name):
    """Each was run, was right within its tolerance, and has a time."""
    kernel = next(kernel for kernel in examined[0].kernels if kernel.name == name)
    assert kernel.works, kernel.reason
    assert 0 < kernel.error <= kernel.tolerance
    assert kernel.time_s > 0


@pytest.mark.slow
def test_a_library_that_is_missing_is_called_so(examined):
    """A kernel whose library is not installed is neither working nor broken, and says why."""
    missing = [kernel for kernel in examined[0].kernels if kernel.works is None]
    assert all(kernel.reason == "not installed" for kernel in missing)
    absent = {name for name, version in examined[0].versions.items() if version is None}
    assert {KERNELS[kernel.name].library for kernel in missing} <= absent


@pytest.mark.slow
def test_every_preset_is_planned_for_half_of_the_containers_memory(examined):
    """The budget is half of the container's limit; what fits stays below it, what does not says what it needs."""
    report = examined[0]
    assert {fit.preset for fit in report.presets} == set(preset_names())
    assert report.memory.limit_bytes == LIMIT_BYTES
    assert report.budgets.half_bytes == LIMIT_BYTES // 2
    for fit in report.presets:
        assert fit.reason is None
        assert fit.budget_bytes == report.budgets.half_bytes
        assert fit.fits == (fit.smallest_bytes <= fit.budget_bytes)
        if fit.fits:
            assert fit.predicted_peak_bytes <= fit.budget_bytes
            assert fit.step_s > 0
    assert report.presets[0].sensible
    assert any("a control group allows 2 GB" in item.problem for item in report.problems)


def test_the_smallest_presets_are_planned_first():
    """What a machine is most likely to train is known when the time is up; the order of names would leave out vit."""
    shapes = {"a-l": (24, 1024), "b-tiny": (12, 128), "c-s": (12, 384)}
    requests = {
        name: {"family": {"settings": {"depth": depth, "width": width}}} for name, (depth, width) in shapes.items()
    }
    assert doctor.smallest_first(requests) == ("b-tiny", "c-s", "a-l")


@pytest.mark.slow
def test_the_listener_hears_the_stages(examined):
    """What takes long is announced before it begins."""
    assert {"measuring the disk", "planning the presets"} <= set(examined[2])


@pytest.mark.slow
def test_the_text_of_a_real_report_names_everything(examined):
    """Each kernel, preset, library, problem and cure stands in the text."""
    report = examined[0]
    text = doctor.report_text(report)
    for words in (
        *(kernel.what for kernel in report.kernels),
        *(fit.preset for fit in report.presets),
        *report.versions,
        *(item.problem for item in report.problems),
        *(item.cure for item in report.problems),
    ):
        assert words in text


def test_the_table_of_presets_is_never_empty(tmp_path):
    """Where there was no time, each preset says so, and what to type is advised."""
    report = doctor.examine(tmp_path, limit_s=0.5)
    assert {fit.preset for fit in report.presets} == set(preset_names())
    assert all(fit.fits is None and "the time was up" in fit.reason for fit in report.presets)
    text = doctor.report_text(report)
    assert "vit-b" in text and "edgeblocks doctor --time 60 measures longer" in text
