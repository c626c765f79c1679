"""Kernels that edgeblocks and its libraries rest on: each is run once, timed, and compared with an exact one."""

import copy
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from edgeblocks.onnx_runtime import onnxruntime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import NodeProto
    from torch import Tensor

    Float32s = NDArray[np.float32]
    Values = TypeVar("Values", Tensor, Float32s)


def _compared(
    call: Callable[[], object], *, error: float, tolerance: float, fp32: Callable[[], object] | None = None
) -> dict[str, object]:
    """The fields of a `Kernel` whose result differs from the exact one by `error`."""
    works = error <= tolerance  # not for NaN
    time_s, fp32_time_s = best_times(call, fp32) if fp32 else (*best_times(call), None)
    return {
        "works": works,
        "time_s": time_s,
        "fp32_time_s": fp32_time_s,
        "error": error if math.isfinite(error) else None,
        "tolerance": tolerance,
        "reason": None if works else f"its error is {error:.2g}, at most {tolerance:.2g} is right",
    }


def best_times(*calls: Callable[[], object]) -> list[float]:
    """The shortest time of each call, taken in turns for some tenths of a second: what they take undisturbed."""
    best = [math.inf] * len(calls)
    began = time.perf_counter()
    rounds = 0
    while rounds < 4 or (time.perf_counter() - began < 0.25 and rounds < 200):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - started)
        rounds += 1
    return best


def _relative_error(found: "Values", exact: "Values") -> float:
    """In the Frobenius norm."""
    return float(((found - exact) ** 2).sum() ** 0.5 / (exact**2).sum() ** 0.5)


_NUM_PARAMETERS = 2**22  # more than a processor's caches hold
_NUM_CHECKED_STEPS = 2
_ADAMW: dict[str, Any] = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}


def _adamw_problem() -> tuple["Tensor", list["Tensor"]]:
    """Parameters, and the gradients of some steps."""
    import torch

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(_NUM_PARAMETERS, generator=generator) for _ in range(1 + _NUM_CHECKED_STEPS)]
    return drawn[0], drawn[1:]


def _fp32_steps() -> tuple["Tensor", Callable[[], object]]:
    """Parameters after some fused fp32 steps, and a function that does one more."""
    import torch

    from edgeblocks.optim.adamw import adamw_step_

    parameters, gradients = _adamw_problem()
    state = torch.zeros_like(parameters), torch.zeros_like(parameters)
    for step, gradient in enumerate(gradients, start=1):
        adamw_step_(parameters, gradient, *state, step=step, **_ADAMW)
    after = parameters.clone()
    return after, lambda: adamw_step_(parameters, gradients[0], *state, step=9, **_ADAMW)


def _torch_fused_adamw() -> dict[str, object]:
    """Against the definition of AdamW in double precision; the error is that of the parameters' movement."""
    import torch

    drawn, gradients = _adamw_problem()
    checked = slice(0, 2**16)
    start = drawn[checked].double()
    exact, exp_avg, exp_avg_sq = start, torch.zeros_like(start), torch.zeros_like(start)
    for step, gradient in enumerate(gradients, start=1):
        exp_avg = _ADAMW["beta1"] * exp_avg + (1 - _ADAMW["beta1"]) * gradient[checked].double()
        exp_avg_sq = _ADAMW["beta2"] * exp_avg_sq + (1 - _ADAMW["beta2"]) * gradient[checked].double() ** 2
        mean, mean_sq = exp_avg / (1 - _ADAMW["beta1"] ** step), exp_avg_sq / (1 - _ADAMW["beta2"] ** step)
        update = mean / (mean_sq**0.5 + _ADAMW["eps"]) + _ADAMW["weight_decay"] * exact
        exact = exact - _ADAMW["learning_rate"] * update
    after, call = _fp32_steps()
    return _compared(call, error=_relative_error(after[checked] - start, exact - start), tolerance=1e-3)


def _edgeblocks_adamw8bit() -> dict[str, object]:
    import torch

    from edgeblocks.optim.adamw import Workspace, adamw_8bit_state, adamw_8bit_step_

    start, gradients = _adamw_problem()
    parameters = start.clone()
    state = adamw_8bit_state(_NUM_PARAMETERS)
    workspace = Workspace(num_threads=torch.get_num_threads())

    def one_step(gradient: "Tensor", step: int) -> None:
        adamw_8bit_step_(parameters, gradient, *state, step=step, workspace=workspace, **_ADAMW)

    for step, gradient in enumerate(gradients, start=1):
        one_step(gradient, step)
    exact, fp32 = _fp32_steps()
    error = _relative_error(parameters - start, exact - start)
    return _compared(lambda: one_step(gradients[0], 9), error=error, tolerance=0.05, fp32=fp32)


def _bitsandbytes_adamw8bit() -> dict[str, object]:
    """On the GPU where there is one. Not yet run on a GPU."""
    import torch

    bitsandbytes = importlib.import_module("bitsandbytes")
    start, gradients = _adamw_problem()
    on_gpu = torch.cuda.is_available()
    parameters = torch.nn.Parameter(start.clone().to("cuda" if on_gpu else "cpu"))
    optimizer = bitsandbytes.optim.AdamW8bit(
        [parameters],
        lr=_ADAMW["learning_rate"],
        betas=(_ADAMW["beta1"], _ADAMW["beta2"]),
        eps=_ADAMW["eps"],
        weight_decay=_ADAMW["weight_decay"],
    )

    def one_step() -> None:
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    for gradient in gradients:
        parameters.grad = gradient.to(parameters.device)
        one_step()
    after = parameters.detach().cpu()
    exact, fp32 = _fp32_steps()
    error = _relative_error(after - start, exact - start)
    return _compared(one_step, error=error, tolerance=0.05, fp32=None if on_gpu else fp32)


_TOKENS, _WIDTH, _HIDDEN_WIDTH = 256, 384, 1536


def _linear_problem() -> tuple["Float32s", "Float32s"]:
    """Activations [tokens, width] and a weight [width, hidden width], as a small transformer's MLP has them."""
    import numpy as np

    generator = np.random.default_rng(0)
    activations = generator.standard_normal((_TOKENS, _WIDTH), dtype=np.float32)
    return activations, generator.standard_normal((_WIDTH, _HIDDEN_WIDTH), dtype=np.float32) / _WIDTH**0.5


def _int8_weight(weight: "Float32s") -> tuple["NDArray[np.int8]", float]:
    """A weight as int8 with one scale."""
    scale = float(abs(weight).max()) / 127
    return (weight / scale).round().astype("int8"), scale


def _torch_int8_linear() -> dict[str, object]:
    import warnings

    import torch

    activations, weight = (torch.from_numpy(array) for array in _linear_problem())
    rows = weight.T.contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to take these functions away; until then they are the fast ones
        scale = float(rows.abs().max()) / 127
        packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(rows, scale, 0, torch.qint8), None)

        def call() -> "Tensor":
            # Without the reduced range, processors without VNNI saturate.
            out: Tensor = torch.ops.quantized.linear_dynamic(activations, packed, reduce_range=True)
            return out

        error = _relative_error(call(), activations @ weight)
        return _compared(call, error=error, tolerance=0.05, fp32=lambda: activations @ weight)


def _torch_bf16_matmul() -> dict[str, object]:
    import torch

    activations, weight = (torch.from_numpy(array) for array in _linear_problem())
    half = activations.bfloat16(), weight.bfloat16()
    error = _relative_error((half[0] @ half[1]).float(), activations @ weight)
    return _compared(lambda: half[0] @ half[1], error=error, tolerance=0.02, fp32=lambda: activations @ weight)


def _torchao_int8_linear() -> dict[str, object]:
    """On the GPU where there is one. Not yet run on a GPU."""
    import torch

    quantization = importlib.import_module("torchao.quantization")
    activations, weight = (torch.from_numpy(array) for array in _linear_problem())
    on_gpu = torch.cuda.is_available()
    activations = activations.to("cuda" if on_gpu else "cpu")
    with torch.no_grad():
        linear = torch.nn.Linear(_WIDTH, _HIDDEN_WIDTH, bias=False, device=activations.device)
        linear.weight.copy_(weight.T)
        quantized = torch.nn.Sequential(copy.deepcopy(linear))  # quantize_ replaces the linears inside a module
        quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())

        def run(network: torch.nn.Module) -> "Tensor":
            output: Tensor = network(activations)
            if on_gpu:
                torch.cuda.synchronize()
            return output

        error = _relative_error(run(quantized), run(linear))
        return _compared(lambda: run(quantized), error=error, tolerance=0.03, fp32=lambda: run(linear))


def _onnx_session(
    nodes: Sequence["NodeProto"], constants: Mapping[str, "NDArray[np.generic]"]
) -> Callable[["Float32s"], "Float32s"]:
    """A session as a function from the activations `x` to `y`."""
    import onnx

    graph = onnx.helper.make_graph(
        list(nodes),
        "probe",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [_TOKENS, _WIDTH])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [_TOKENS, _HIDDEN_WIDTH])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    # Old numbers on purpose: onnx writes newer ones than the installed onnxruntime may read.
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda activations: session.run(None, {"x": activations})[0]


def _onnx_fp32(weight: "Float32s") -> Callable[["Float32s"], "Float32s"]:
    import onnx

    return _onnx_session([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight})


def _onnxruntime_matmul() -> dict[str, object]:
    activations, weight = _linear_problem()
    run = _onnx_fp32(weight)
    error = _relative_error(run(activations), activations @ weight)
    return _compared(lambda: run(activations), error=error, tolerance=1e-4)


def _onnxruntime_int8() -> dict[str, object]:
    import numpy as np
    import onnx

    activations, weight = _linear_problem()
    integers, scale = _int8_weight(weight)
    node = onnx.helper.make_node
    run = _onnx_session(
        [
            node("DynamicQuantizeLinear", ["x"], ["x_integers", "x_scale", "x_zero"]),
            node("MatMulInteger", ["x_integers", "w_integers", "x_zero", "w_zero"], ["sums"]),
            node("Cast", ["sums"], ["float_sums"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["x_scale", "w_scale"], ["scale"]),
            node("Mul", ["float_sums", "scale"], ["y"]),
        ],
        {"w_integers": integers, "w_zero": np.array(0, np.int8), "w_scale": np.array(scale, np.float32)},
    )
    fp32 = _onnx_fp32(weight)
    error = _relative_error(run(activations), activations @ weight)
    return _compared(lambda: run(activations), error=error, tolerance=0.05, fp32=lambda: fp32(activations))


@dataclass(frozen=True, kw_only=True)
class KernelProbe:
    """A kernel of a library, and the function that runs it and gives the fields of a `Kernel`."""

    what: str
    library: str
    run: Callable[[], dict[str, object]]


KERNELS = {
    "edgeblocks_adamw8bit": KernelProbe(what="edgeblocks AdamW 8-bit", library="torch", run=_edgeblocks_adamw8bit),
    "torch_fused_adamw": KernelProbe(what="torch fused AdamW fp32", library="torch", run=_torch_fused_adamw),
    "bitsandbytes_adamw8bit": KernelProbe(
        what="bitsandbytes AdamW 8-bit", library="bitsandbytes", run=_bitsandbytes_adamw8bit
    ),
    "torch_int8_linear": KernelProbe(what="torch dynamic int8 linear", library="torch", run=_torch_int8_linear),
    "torch_bf16_matmul": KernelProbe(what="torch bf16 matrix product", library="torch", run=_torch_bf16_matmul),
    "onnxruntime_matmul": KernelProbe(
        what="onnxruntime fp32 matrix product", library="onnxruntime", run=_onnxruntime_matmul
    ),
    "onnxruntime_int8": KernelProbe(
        what="onnxruntime dynamic int8 product", library="onnxruntime", run=_onnxruntime_int8
    ),
    "torchao_int8_linear": KernelProbe(
        what="torchao int8 weight-only linear", library="torchao", run=_torchao_int8_linear
    ),
}


def kernel_names(library: str) -> tuple[str, ...]:
    """The kernels that need a library."""
    return tuple(name for name, probe in KERNELS.items() if probe.library == library)
