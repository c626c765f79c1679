"""The 8-bit step by bitsandbytes' CUDA kernel, on the state of `optim.moments`. Not yet run on a GPU.

Our step makes some twenty passes over memory, theirs one: 65 to 118 ps a parameter against 29 on an H100 (docs/gpu.md).
It has groups of 256 with a float32 scale each, as ours, and takes any 256 values in rising order for its code. With
those of our code the state stays ours, and a run goes on with either of the two. Where they differ, and what is done:

- A code of theirs is an index from 0, a signed one of ours a step from -127: they differ in the highest bit alone,
  which is turned in place before the kernel and after it, 4 bytes of traffic beside its 16.
- It rounds to the nearest value, we round the root. Adam's update errs as in the table of `optim.moments`: by 1.1, 1.4,
  2.3, 18 and 49 %, where the root has 13 and 41 in the last two. So with the same state both make the same parameters,
  and codes that differ by at most a step.
- Codes that ours never gives (0 of the second moment, -128 of the first) have values beyond the others in the table, so
  that no value is nearest to them. They are left in groups of zeros, whose scale is 0.
- It leaves a parameter as it is whose gradient is no number, and looks for a group's largest magnitude past NaN: a
  broken gradient would vanish. A look at each group's gradients makes its scale NaN, and its first parameter at once.
- It multiplies by the weight decay after the update. That is done in a pass of its own before, as in AdamW.

Source: bitsandbytes 0.50, the operator `bitsandbytes::optimizer_update_8bit_blockwise` and csrc/cuda/optimizers.cu.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from edgeblocks.optim.adamw import Workspace, adamw_8bit_state, adamw_8bit_step_
from edgeblocks.optim.moments import GROUP_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float32, Int8, UInt8
    from torch import Tensor

OURS = "edgeblocks"
"""The name of the step that `optim.adamw` makes itself."""
KINDS = ("cuda",)
"""The devices on which the library is asked for. Its step for processors takes zeros for 2e-5 of a group's largest."""
LEAST_CAPABILITY = (6, 0)
"""Of a GPU. Asked to run on an older one, the library ends the process. Source: its installation guide, 0.48 and on."""
CHUNK_SIZE = 16 * 2**20
"""Parameters in one call: it counts in int32. Some eight calls of 5 us each are then 2 ps a parameter."""
_SIGN = 0x80


class LibraryStep:
    """The library's operator with its tables, and room for the look at gradients, on a device."""

    def __init__(
        self, operator: Callable[..., object], *, device: torch.device | str, chunk_size: int = CHUNK_SIZE
    ) -> None:
        assert chunk_size % GROUP_SIZE == 0, f"{chunk_size} parameters are not whole groups of {GROUP_SIZE}"
        self._operator, self._chunk_size = operator, chunk_size
        self._exp_avg_table, self._exp_avg_sq_table = (table.to(device) for table in (signed_table(), unsigned_table()))
        self._extremes = torch.empty(2, chunk_size // GROUP_SIZE, device=device)

    @property
    def num_bytes(self) -> int:
        """What it holds of the device's memory."""
        return self._exp_avg_table.nbytes + self._exp_avg_sq_table.nbytes + self._extremes.nbytes

    def step_(
        self,
        parameters: Float32[Tensor, " numel"],
        gradients: Float32[Tensor, " numel"],
        exp_avg_codes: Int8[Tensor, " numel"],
        exp_avg_scales: Float32[Tensor, " groups"],
        exp_avg_sq_codes: UInt8[Tensor, " numel"],
        exp_avg_sq_scales: Float32[Tensor, " groups"],
        *,
        step: int,
        learning_rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        """`adamw_8bit_step_`, where what is given was checked."""
        indices = exp_avg_codes.view(torch.uint8)
        with torch.no_grad():
            if weight_decay:
                parameters.mul_(1 - learning_rate * weight_decay)
            for start in range(0, parameters.numel(), self._chunk_size):
                chunk = slice(start, start + self._chunk_size)
                groups = slice(start // GROUP_SIZE, (start + self._chunk_size) // GROUP_SIZE)
                scales = exp_avg_scales[groups], exp_avg_sq_scales[groups]
                indices[chunk].bitwise_xor_(_SIGN)
                self._operator(
                    "adam",
                    gradients[chunk],
                    parameters[chunk],
                    indices[chunk],
                    exp_avg_sq_codes[chunk],
                    beta1,
                    beta2,
                    0.0,  # of another optimizer, as is the next
                    0.0,
                    eps,
                    step,
                    learning_rate,
                    self._exp_avg_table,
                    self._exp_avg_sq_table,
                    *scales,
                    0.0,  # weight decay
                    1.0,  # what gradients are multiplied with
                )
                indices[chunk].bitwise_xor_(_SIGN)
                self._break_groups_(parameters[chunk], gradients[chunk], scales)

    def _break_groups_(self, parameters: Tensor, gradients: Tensor, scales: tuple[Tensor, Tensor]) -> None:
        """Make NaN what a gradient that is no number, or a moment past float32's range, has broken."""
        smallest, largest = self._extremes[:, : scales[0].numel()].unbind()
        torch.aminmax(gradients.view(-1, GROUP_SIZE), dim=1, out=(smallest, largest))  # NaN where there is one
        broken = smallest.add_(largest).mul_(0.0)  # 0, or NaN of infinity
        parameters.view(-1, GROUP_SIZE)[:, 0].add_(broken)
        scales[0].add_(broken)
        for scale in scales:
            # An infinite second moment would freeze its group in silence.
            scale.add_(torch.mul(scale, 0.0, out=largest))


def signed_table() -> Float32[Tensor, " codes"]:
    """The values of codes -128 to 127 over their scale, of which -128 is below all others."""
    steps = torch.arange(-127, 128, dtype=torch.float64) / 127
    return torch.cat([steps.new_tensor([-2.0]), steps**3 * steps.abs()]).float()


def unsigned_table() -> Float32[Tensor, " codes"]:
    """The values of codes 0 to 255 over their scale; that of code 0 is so far below that a zero is nearer to code 1."""
    steps = torch.arange(1, 256, dtype=torch.float64) / 255
    return torch.cat([steps.new_tensor([-1.0]), steps**4]).float()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What makes the 8-bit step on a device.

    Args:
        name: "edgeblocks", or the library with its version.
        operator: the library's; None: ours.
        reason: why it is ours where it could be the library's; None where there is no choice.
    """

    name: str = OURS
    operator: Callable[..., object] | None = None
    reason: str | None = None


def choice_on(device: torch.device | str, *, rounds: bool = False) -> Choice:
    """What makes the 8-bit step on a device: the library where it is there and its step is ours, tried once.

    Args:
        rounds: whether weights are bfloat16 (`optim.rounded_update`): the library rounds them to the nearest.
    """
    kind = torch.device(device).type
    if kind not in KINDS:
        return Choice()
    if rounds:
        return Choice(reason="master=bf16 rounds weights at random, which bitsandbytes does not")
    return _choice(kind)


def library_step(device: torch.device | str, *, rounds: bool = False) -> LibraryStep | None:
    """The library's step on a device, with room of its own; None where the step is ours."""
    operator = choice_on(device, rounds=rounds).operator
    return None if operator is None else LibraryStep(operator, device=device)


@functools.cache
def _choice(kind: str) -> Choice:
    if importlib.util.find_spec("bitsandbytes") is None:
        return Choice(reason="bitsandbytes is not installed; with it (pip install 'edgeblocks[gpu]') it is one kernel")
    if kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return Choice(reason="bitsandbytes has no kernel for a GPU of compute capability below 6")
    name = f"bitsandbytes {metadata.version('bitsandbytes')}"
    try:
        operator = library_operator()
        wrong = difference(LibraryStep(operator, device=kind, chunk_size=GROUP_SIZE), kind)
    except Exception as error:  # whatever a library raises, and a GPU without room
        wrong = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Choice(reason=f"{name} does not work here: {wrong}") if wrong else Choice(name=name, operator=operator)


def library_operator() -> Callable[..., object]:
    """The library's operator. Importing the library takes seconds and 120 MB of the process.

    Raises:
        Exception: whatever the library raises where it does not work; an AttributeError before version 0.46.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels, which are not used
    importlib.import_module("bitsandbytes")
    operator: Callable[..., object] = torch.ops.bitsandbytes.optimizer_update_8bit_blockwise
    return operator


def difference(library: LibraryStep, device: torch.device | str) -> str | None:
    """How the library's step differs from ours on a processor, by more than rounding; None where it does not."""
    kinds = ("usual gradients", "zeros", "tiny gradients")
    numel = len(kinds) * GROUP_SIZE
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.0, 1e-10]).repeat_interleave(GROUP_SIZE)
    parameters, state = torch.randn(numel, generator=generator), adamw_8bit_state(numel)
    workspace = Workspace(num_threads=1, chunk_size=GROUP_SIZE)
    adamw: dict[str, Any] = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    for step in (1, 2, 3):
        gradients = spread * torch.randn(numel, generator=generator) ** 3
        theirs = [tensor.to(device, copy=True) for tensor in (parameters, gradients, *state)]
        before = parameters.clone()
        library.step_(*theirs, step=step, **adamw)
        adamw_8bit_step_(parameters, gradients, *state, step=step, workspace=workspace, **adamw)
        found = [tensor.cpu() for tensor in theirs]
        # Their divisions and powers are quick ones, right to some 1e-5.
        allowed = 1e-3 * (parameters - before).abs() + 1e-6
        for group, kind in enumerate(kinds):
            part = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
            if not ((found[0] - parameters).abs() <= allowed)[part].all():
                return f"its update of {kind} is another one"
            for codes, scales, what in ((2, 3, "first"), (4, 5, "second")):
                scale, their_scale = state[scales - 2][group], found[scales][group]
                if not (their_scale - scale).abs() <= 1e-4 * scale:
                    return f"its scale of the {what} moment of {kind} is {their_scale:.3g}, not {scale:.3g}"
                apart = (found[codes][part].int() - state[codes - 2][part].int()).abs().max()
                if scale > 0 and apart > 1:
                    return f"its codes of the {what} moment of {kind} are up to {apart} steps from ours"
    return None
