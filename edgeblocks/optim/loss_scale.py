"""Loss scaling for float16, whose gradients would vanish below 6e-8: the loss is multiplied before the backward pass.

Gradients are divided by the same number when they are float32 again. Where one is no finite number the scale was too
large: that update is left out, and the scale is halved. After many steps without that it is doubled.

Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2; the numbers are those of `torch.amp.GradScaler`.
"""

from dataclasses import dataclass

from torch import Tensor

GROWTH_INTERVAL = 2000
LARGEST_EXPONENT = 24


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """A power of two, so that scaling and dividing round nothing. Saved with each block, as its step is."""

    exponent: int = 16
    steps: int = 0
    """Since it was changed, or since an update was left out."""

    @property
    def value(self) -> float:
        return 2.0**self.exponent

    def after(self, *, finite: bool) -> "LossScale":
        """The scale of the next step, given whether all gradients of this one were finite.

        >>> LossScale(exponent=5, steps=3).after(finite=False)
        LossScale(exponent=4, steps=0)

        Raises:
            FloatingPointError: gradients are not finite without scaling either.
        """
        if finite:
            if self.steps + 1 < GROWTH_INTERVAL:
                return LossScale(exponent=self.exponent, steps=self.steps + 1)
            return LossScale(exponent=min(self.exponent + 1, LARGEST_EXPONENT))
        if self.exponent == 0:
            raise FloatingPointError("the gradient is no number, though the loss is not scaled any more")
        return LossScale(exponent=self.exponent - 1)


def scaled(loss: Tensor, scale: LossScale | None) -> Tensor:
    """A loss as its backward pass begins with it; None leaves it as it is."""
    return loss if scale is None else loss * scale.value


def unscale_(gradients: Tensor, scale: LossScale | None) -> None:
    """Divide float32 gradients by what their loss was multiplied with."""
    if scale is not None:
        gradients.mul_(1 / scale.value)
