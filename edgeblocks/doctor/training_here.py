"""What a training would use on the devices that are here: precision, the 8-bit step, attention. In a child process."""

from typing import TYPE_CHECKING, Any

from edgeblocks.doctor.findings import TrainingUse

if TYPE_CHECKING:
    import torch

_ATTENTION = {
    "FLASH_ATTENTION": "flash attention",
    "EFFICIENT_ATTENTION": "memory-efficient attention",
    "CUDNN_ATTENTION": "cuDNN's attention",
    "MATH": "products that hold all scores",
}
_PRODUCT = 2048
"""Rows of the matrices that are multiplied."""


def training_uses() -> list[TrainingUse]:
    """The processor's, and the GPU's that torch uses where it sees one."""
    import torch

    return [_on_processor(), *([_on_gpu()] if torch.cuda.is_available() else [])]


def _on_processor() -> TrainingUse:
    from edgeblocks.families.precision import bf16_instructions
    from edgeblocks.profiling.precisions import WORTH_IT

    instructions, precision = bf16_instructions(), None
    reason = f"bf16 where a step is {WORTH_IT}x as fast in it, which is measured at the start ({instructions} is here)"
    if instructions == "none":
        precision, reason = "fp32", "this processor has no instructions for bf16 and would emulate it"
    return TrainingUse(target="cpu", precision=precision, reason=reason, **_kernels("cpu", precision or "bf16"))


def _on_gpu() -> TrainingUse:
    """Not yet run on a GPU."""
    import torch

    from edgeblocks.registry import build_target

    precision = build_target("cuda").half_precision()
    assert precision is not None
    major, minor = torch.cuda.get_device_capability()
    reason = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; bf16 begins with 8.0"
    return TrainingUse(
        target="cuda",
        precision=precision,
        reason=reason,
        half_product_gain=_product_gain("cuda", precision),
        **_kernels("cuda", precision),
    )


def _kernels(device: str, precision: str) -> dict[str, Any]:
    from edgeblocks.optim.cuda_step import choice_on

    choice = choice_on(device)
    return {
        "adamw8bit": choice.name,
        "adamw8bit_reason": choice.reason,
        "attention": attention_backend(device, _dtype(precision), masked=False),
        "attention_with_mask": attention_backend(device, _dtype(precision), masked=True),
    }


def attention_backend(device: str, dtype: "torch.dtype", *, masked: bool) -> str:
    """The kernel of attention that torch takes on a device, for heads of width 64."""
    import torch
    from torch.nn.attention import SDPBackend

    heads = torch.zeros(1, 2, 64, 64, dtype=dtype, device=device, requires_grad=True)
    mask = torch.zeros(64, 64, dtype=dtype, device=device) if masked else None
    name = SDPBackend(torch._fused_sdp_choice(heads, heads, heads, mask)).name
    return _ATTENTION.get(name, name)


def _dtype(precision: str) -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _product_gain(device: str, precision: str) -> float:
    """How many times as fast a product of matrices is in half precision as in fp32."""
    import torch

    from edgeblocks.doctor.kernels import best_times

    matrix = torch.randn(_PRODUCT, _PRODUCT, device=device)
    half = matrix.to(_dtype(precision))

    def multiply(x: torch.Tensor) -> None:
        torch.mm(x, x)
        torch.cuda.synchronize()

    single_s, half_s = best_times(lambda: multiply(matrix), lambda: multiply(half))
    return single_s / half_s
