"""What was measured of an export before it was finished, as it stands in manifest.json."""

from typing import Annotated, Literal

from pydantic import Field

from edgeblocks.files.checked import Checked, NotNegative, Positive, Text


class ChainVerified(Checked):
    """How far the graph of the whole chain was from torch, and from its blocks that were run one after the other.

    torch_difference: None where weights are rounded: what that costs is in `rounding`.

    Differences are those of final images in model space, of probabilities, or, of text by unmasking, the share of the
    texts that are others.
    """

    torch_difference: NotNegative | None
    walk_difference: NotNegative
    limit: Positive


class Verified(Checked):
    """How far onnxruntime was from torch when the directory was written.

    output_max_abs_error: of `outputs` final images in model space, or of the classes' probabilities of as many images.
    output_equal_share: the share of pixel values that were the same after rounding, or of images with the same class.
    real_inputs: whether the blocks also saw images of the run's data, not only random ones.
    """

    block_max_abs_error: NotNegative
    block_limit: Positive
    output_max_abs_error: NotNegative
    output_limit: Positive
    output_equal_share: NotNegative
    outputs: Annotated[int, Field(ge=1, le=2**63)]
    real_inputs: bool


class Rounding(Checked):
    """As what matrices are written, and how much worse that is than float32, which `verified` is about.

    part: of the data, which the examples are of.
    loss_fp32, loss: the family's own, per noise level, see `validation_loss`; nats of text and of classes.
    accuracy_fp32, accuracy: the share of tokens at these noise levels, or of images by the whole chain, that is right;
        None for images that are made.
    probability_fp32, probability: the mean of those that the whole chain gives an image's own class; None for what is
        no classifier.
    loss_error, accuracy_error, probability_error: standard errors of what the two differ by, over examples that both
        have seen with the same noise; None where these are too few for one.
    judged: which of them tells whether rounding costs too much.
    mean_abs_difference, relative_difference: of the blocks' outputs (denoised images in model space, or probabilities),
        and as a share of their mean size.
    """

    weights: Literal["int8", "int4"]
    examples: Annotated[int, Field(ge=1, le=2**63)]
    part: Text
    loss_fp32: NotNegative
    loss: NotNegative
    accuracy_fp32: NotNegative | None = None
    accuracy: NotNegative | None = None
    probability_fp32: NotNegative | None = None
    probability: NotNegative | None = None
    loss_error: NotNegative | None = None
    accuracy_error: NotNegative | None = None
    probability_error: NotNegative | None = None
    judged: Literal["loss", "probability"] = "loss"
    mean_abs_difference: NotNegative
    relative_difference: NotNegative
    bytes_fp32: Annotated[int, Field(ge=1, le=2**63)]

    @property
    def cost(self) -> tuple[float, float | None]:
        """By what share the judged figure is worse than in float32, and its standard error."""
        if self.judged == "probability":
            assert self.probability is not None and self.probability_fp32 is not None
            whole, error = self.probability_fp32, self.probability_error
            worse = whole - self.probability
        else:
            worse, error, whole = self.loss - self.loss_fp32, self.loss_error, self.loss_fp32
        whole = max(whole, 1e-30)
        return worse / whole, None if error is None else error / whole
