"""The report as text."""

import re
from dataclasses import replace
from importlib import metadata

import pytest
from support.made_up_machine import GB, healthy, with_part

from edgeblocks.doctor import examination as doctor
from edgeblocks.doctor import surroundings
from edgeblocks.doctor.findings import Gpu, Kernel, PresetFit

HOUR_S = 3600.0


def test_the_text_says_what_could_not_be_found_out():
    """Unknown values are question marks, and their reasons stand below."""
    report = replace(
        with_part("disk", read_bytes_per_s=None, read_way=None),
        machine=None,
        gpus=None,
        unknown={"disk.read_bytes_per_s": "this system has no way to read past its page cache", "gpus": "it crashed"},
    )
    text = doctor.report_text(report)
    assert "read ?," in text
    assert "disk.read_bytes_per_s  this system has no way" in text
    assert "gpu             not found out" in text


@pytest.mark.parametrize(
    ("time_s", "said"), [(0.5, "2.0x as fast"), (0.98, "about as fast"), (1.04, "about as fast"), (2.0, "2.0x slower")]
)
def test_kernels_that_are_about_as_fast_as_others_are_called_so(time_s, said):
    """Five percent are what the same call differs by from time to time."""
    kernel = Kernel(name="bf16", what="bf16 products", works=True, time_s=time_s, fp32_time_s=1.0, error=1e-3)
    text = doctor.report_text(replace(healthy(), kernels=(kernel,)))
    assert re.search(rf"bf16 products +works .*{said} (as|than) fp32", text)


def test_the_text_of_a_gpu():
    """Name, memory and both directions of the link; and how to train on it."""
    gpu = Gpu(
        name="RTX 3060", total_bytes=12 * GB, free_bytes=11 * GB, to_gpu_bytes_per_s=12e9, from_gpu_bytes_per_s=None
    )
    text = doctor.report_text(replace(healthy(), gpus=(gpu,)))
    assert "RTX 3060, 11 GB free of 12 GB; 12 GB/s to it and ? from it" in text
    assert "--target cuda uses it" in text


def test_the_text_of_presets_that_do_not_fit_or_take_too_long():
    """What does not fit says so, long times are days, and no preset is called sensible."""
    fit = healthy().presets[0]
    slow = replace(fit, preset="dit-b", sensible=False, steps=20000, total_s=500 * HOUR_S)
    large = PresetFit(
        preset="dit-xl",
        example="32x32x3",
        parameters=682_000_000,
        smallest_bytes=9 * GB,
        budget_bytes=8 * GB,
        fits=False,
        sensible=False,
    )
    unknown = PresetFit(preset="other", budget_bytes=8 * GB, reason="ValueError: no images")
    text = doctor.report_text(replace(healthy(), presets=(slow, large, unknown)))
    assert "20000: 21 days" in text
    assert re.search(r"9002MB +does not fit", text)
    assert "not found out: ValueError: no images" in text
    assert "no preset finishes its own steps within 7 days" in text


def test_the_versions_are_those_that_are_installed():
    """Versions come from the packages' metadata; what is not installed is None."""
    versions = surroundings.installed_versions()
    assert versions["torch"] == metadata.version("torch")
    assert set(versions) == {"python", *surroundings.LIBRARIES}
