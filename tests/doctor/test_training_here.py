"""What a training here would use: found out on this processor, and as text for a GPU."""

from dataclasses import asdict, replace

import pytest
import torch
from support.cuda_kernel import used_here  # noqa: F401
from support.made_up_machine import healthy

from edgeblocks.doctor import examination as doctor
from edgeblocks.doctor import probes
from edgeblocks.doctor.training_here import attention_backend, training_uses
from edgeblocks.families import precision
from edgeblocks.optim.cuda_step import choice_on


def test_a_processor_with_instructions_measures_each_network(monkeypatch):
    """With them the precision depends on the network and the instructions are named; without it is fp32."""
    monkeypatch.setattr(precision, "bf16_instructions", lambda: "amx_bf16")
    (use,) = (use for use in training_uses() if use.target == "cpu")
    assert use.precision is None and "measured at the start (amx_bf16 is here)" in use.reason
    monkeypatch.setattr(precision, "bf16_instructions", lambda: "none")
    (use,) = (use for use in training_uses() if use.target == "cpu")
    assert use.precision == "fp32" and "no instructions for bf16" in use.reason
    assert use.adamw8bit == "edgeblocks" and use.adamw8bit_reason is None


def test_the_kernel_of_attention_is_the_one_that_torch_takes(monkeypatch):
    """Flash attention, and where that is switched off the products that hold all scores."""
    for masked in (False, True):
        assert attention_backend("cpu", torch.float32, masked=masked) == "flash attention"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_backend("cpu", torch.float32, masked=False) == "products that hold all scores"


@pytest.mark.usefixtures("used_here")
def test_the_8_bit_step_is_named_as_the_training_takes_it():
    """By bitsandbytes where it makes the step, in the probe's answer and in the text."""
    (use,) = (use for use in probes._run_probe("training", {}) if use["target"] == "cpu")
    assert use["adamw8bit"] == choice_on("cpu").name != "edgeblocks"
    report = replace(healthy(), training=tuple(training_uses()))
    assert f"8-bit AdamW step  by {use['adamw8bit']}\n" in doctor.report_text(report)


def test_the_text_of_a_gpu_has_reasons_and_both_kernels_of_attention():
    """Why the step is ours, what a mask changes, and how fast products are; and JSON has the same."""
    use = replace(
        healthy().training[0],
        target="cuda",
        precision="bf16",
        reason="NVIDIA RTX 3060 has compute capability 8.6",
        adamw8bit_reason="bitsandbytes is not installed",
        attention_with_mask="memory-efficient attention",
        half_product_gain=3.24,
    )
    report = replace(healthy(), training=(*healthy().training, use))
    text = doctor.report_text(report)
    assert "bf16: NVIDIA RTX 3060 has compute capability 8.6; products are 3.2x as fast as in fp32" in text
    assert "by edgeblocks (bitsandbytes is not installed)" in text
    assert "flash attention, with a mask memory-efficient attention" in text
    assert report.to_json()["training"][1] == asdict(use)
    assert "what a training here would use\n  not found out\n" in doctor.report_text(replace(report, training=None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_asked():
    """Its half precision, the card, and kernels of attention that do not hold all scores."""
    use = training_uses()[1]
    assert use.precision in ("bf16", "fp16") and torch.cuda.get_device_name() in use.reason
    assert "all scores" not in use.attention + use.attention_with_mask and use.half_product_gain > 0
