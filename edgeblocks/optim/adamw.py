"""AdamW on flat tensors, as pure functions: the state is passed in and updated in place.

Both steps rest on `torch._fused_adamw_`, one pass over memory and no temporaries. It is called directly because
constructing any torch.optim optimizer imports dynamo: 70 MB resident and 2.4 s.

The 8-bit step walks the parameters in chunks: dequantize the two moments, step, quantize them again. Its figures, in
ns a parameter (9M parameters, two cores of an Intel Ice Lake that others used too, torch 2.13, medians of 17 steps):

    chunk                                64 Ki   96 Ki   128 Ki   160 Ki   192 Ki   256 Ki
    one thread                           13.1    11.8    11.0     11.6     11.4     12.3
    two Python threads (the way taken)   12.7    10.2     9.2      9.0      8.8      8.9
    the dynamic code by table lookups, 128 Ki, in the same runs: 27.0 on one thread, 15.1 on two
    fp32: 1.5 and 1.0

Chunks must be large because some sixty calls cost 60 us a chunk, more where two threads wait for the interpreter's
lock, and small because a thread's temporaries are 12 bytes a parameter of the chunk, 2 MB as it is.

On a GPU the same operations run in chunks of 2 Mi from one thread, so that both targets make the same step up to
rounding. With table lookups they took 0.1 ns on an H100, where the kernel of bitsandbytes, one pass over memory and not
twenty, takes 0.03: where that library is installed it makes the step (`optim.cuda_step`). With this code neither was
yet run on a GPU.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2; the 8-bit
state: `optim.moments`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgeblocks.optim.moments import GROUP_SIZE, SIGNED, UNSIGNED, Scratch, dequantize_, quantize_, scratch_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float32, Int8, UInt8
    from torch import Tensor

    from edgeblocks.optim.cuda_step import LibraryStep

CHUNK_SIZE = 160 * 1024
GPU_CHUNK_SIZE = 2 * 1024 * 1024
"""With table lookups a step took 194, 118, 70 and 65 ps a parameter of an H100 in chunks of 1, 2, 8 and 32 Mi."""
_STEP_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class _ChunkBuffers:
    """What one thread needs to step one chunk."""

    exp_avg: Float32[Tensor, " numel"]
    exp_avg_sq: Float32[Tensor, " numel"]
    scratch: Scratch

    @classmethod
    def empty(cls, numel: int, device: torch.device | str) -> _ChunkBuffers:
        return cls(
            exp_avg=torch.empty(numel, device=device),
            exp_avg_sq=torch.empty(numel, device=device),
            scratch=Scratch.empty(numel, device),
        )

    def first(self, numel: int) -> _ChunkBuffers:
        return _ChunkBuffers(
            exp_avg=self.exp_avg[:numel], exp_avg_sq=self.exp_avg_sq[:numel], scratch=self.scratch.first(numel)
        )


class Workspace:
    """Every temporary of the 8-bit step, allocated once, for `num_threads` threads of `chunk_size` parameters each.

    A step allocates nothing else but views and single numbers. One workspace serves one step at a time. Results depend
    neither on `chunk_size` nor on `num_threads`.

    Args:
        library: what makes the step instead, with room of its own (`optim.cuda_step`); None: what is here.

    Raises:
        ValueError: `chunk_size` is no positive multiple of `GROUP_SIZE`, or `num_threads` is not positive.
    """

    def __init__(
        self,
        *,
        num_threads: int,
        chunk_size: int = CHUNK_SIZE,
        device: torch.device | str = "cpu",
        library: LibraryStep | None = None,
    ) -> None:
        self.num_bytes = workspace_bytes(num_threads=num_threads, chunk_size=chunk_size)
        self.library, num_buffers = library, num_threads
        if library is not None:
            self.num_bytes, num_buffers = library.num_bytes + _STEP_BYTES, 0
        self.chunk_size = chunk_size
        self.step = torch.empty((), dtype=torch.float32, device=device)
        self.buffers = tuple(_ChunkBuffers.empty(chunk_size, device) for _ in range(num_buffers))
        # Started now: a thread that is started where memory is short may never answer.
        self.helpers = _started_threads(num_threads - 1)

    @classmethod
    def for_device(cls, device: torch.device | str) -> Workspace:
        """As the processor's threads share the step's work; as one thread gives it to a GPU, or to a library there."""
        from edgeblocks.optim.cuda_step import library_step  # which imports this module

        library = library_step(device)
        if library is None and torch.device(device).type == "cpu":
            return cls(num_threads=torch.get_num_threads())
        return cls(num_threads=1, chunk_size=GPU_CHUNK_SIZE, device=device, library=library)


def workspace_bytes(*, num_threads: int, chunk_size: int = CHUNK_SIZE) -> int:
    """Bytes of `Workspace(num_threads=.., chunk_size=..)`, without allocating it.

    >>> workspace_bytes(num_threads=2)
    3937284

    Raises:
        ValueError: as `Workspace`.
    """
    if chunk_size <= 0 or chunk_size % GROUP_SIZE:
        raise ValueError(f"chunk_size is {chunk_size}; it must be a positive multiple of {GROUP_SIZE}")
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; at least one thread must do the step")
    return num_threads * (2 * 4 * chunk_size + scratch_bytes(chunk_size)) + _STEP_BYTES


def adamw_step_(
    parameters: Float32[Tensor, " numel"],
    gradients: Float32[Tensor, " numel"],
    exp_avg: Float32[Tensor, " numel"],
    exp_avg_sq: Float32[Tensor, " numel"],
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    sizes: Sequence[int] | None = None,
) -> None:
    """One AdamW step; `step` counts from 1. Updates `parameters` and both moments, which start as zeros.

    Equal to `torch.optim.AdamW(fused=True)` bit for bit on the tensors of these `sizes` that lie one behind the other;
    None: on one.

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- p - learning_rate (weight_decay p + m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps))
    """
    assert step >= 1, f"step is {step}, it counts from 1"
    _assert_numel(parameters.numel(), parameters, gradients, exp_avg, exp_avg_sq)
    with torch.no_grad():
        # Tensor by tensor: torch computes the last elements of each one by one and rounds some of them differently.
        # Stepped as one stretch, a bias of 32 values differed in one by its last bit after four steps (AVX-512).
        given = [parameters.numel()] if sizes is None else list(sizes)
        torch._fused_adamw_(
            parameters.split_with_sizes(given),
            gradients.split_with_sizes(given),
            exp_avg.split_with_sizes(given),
            exp_avg_sq.split_with_sizes(given),
            [],
            [torch.tensor(float(step), dtype=torch.float32, device=parameters.device)] * len(given),
            lr=learning_rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def adamw_8bit_state(
    numel: int, device: torch.device | str = "cpu"
) -> tuple[Int8[Tensor, " numel"], Float32[Tensor, " groups"], UInt8[Tensor, " numel"], Float32[Tensor, " groups"]]:
    """exp_avg_codes, exp_avg_scales, exp_avg_sq_codes and exp_avg_sq_scales before the first step."""
    exp_avg_codes, exp_avg_sq_codes = (torch.zeros(numel, dtype=kind, device=device) for kind in (SIGNED, UNSIGNED))
    exp_avg_scales, exp_avg_sq_scales = torch.zeros(2, numel // GROUP_SIZE, device=device)
    return exp_avg_codes, exp_avg_scales, exp_avg_sq_codes, exp_avg_sq_scales


def adamw_8bit_step_(
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
    workspace: Workspace,
) -> None:
    """`adamw_step_` with both moments in 8 bits (`optim.moments`): 2.03 bytes of state a parameter instead of 8.

    numel is a multiple of `GROUP_SIZE`, groups = numel / `GROUP_SIZE`. Updates `parameters` and the state, which starts
    as zeros. A NaN or infinite gradient makes its parameter NaN now (with a library its group's first) and its whole
    group NaN at the next step. The result is the same for every chunk size and number of threads.
    """
    numel = parameters.numel()
    assert step >= 1, f"step is {step}, it counts from 1"
    assert numel % GROUP_SIZE == 0, f"{numel} parameters are not whole groups of {GROUP_SIZE}"
    _assert_numel(numel, parameters, gradients, exp_avg_codes, exp_avg_sq_codes)
    _assert_numel(numel // GROUP_SIZE, exp_avg_scales, exp_avg_sq_scales)
    if workspace.library is not None:
        workspace.library.step_(
            parameters,
            gradients,
            exp_avg_codes,
            exp_avg_scales,
            exp_avg_sq_codes,
            exp_avg_sq_scales,
            step=step,
            learning_rate=learning_rate,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )
        return
    # Filled here and read by all threads: a tensor of its own in each chunk would be an allocation a chunk.
    workspace.step.fill_(step)

    def step_chunk(start: int, buffers: _ChunkBuffers) -> None:
        # Chunks are whole groups, so no scale belongs to two of them and no order among threads can change a bit.
        end = min(start + workspace.chunk_size, numel)
        chunk, groups = slice(start, end), slice(start // GROUP_SIZE, end // GROUP_SIZE)
        if end - start < workspace.chunk_size:
            buffers = buffers.first(end - start)
        exp_avg, exp_avg_sq, scratch = buffers.exp_avg, buffers.exp_avg_sq, buffers.scratch
        m_codes, m_scales = exp_avg_codes[chunk], exp_avg_scales[groups]
        v_codes, v_scales = exp_avg_sq_codes[chunk], exp_avg_sq_scales[groups]
        # Float32 for this chunk alone; then quantized again, so that both moments never exist in full.
        dequantize_(exp_avg, m_codes, m_scales, scratch=scratch)
        dequantize_(exp_avg_sq, v_codes, v_scales, scratch=scratch)
        torch._fused_adamw_(
            [parameters[chunk]],
            [gradients[chunk]],
            [exp_avg],
            [exp_avg_sq],
            [],
            [workspace.step],
            lr=learning_rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        quantize_(m_codes, m_scales, exp_avg, scratch=scratch)
        quantize_(v_codes, v_scales, exp_avg_sq, scratch=scratch)

    _for_each_chunk(step_chunk, deque(range(0, numel, workspace.chunk_size)), workspace)


def _assert_numel(numel: int, *tensors: Tensor) -> None:
    # The fused kernel trusts its caller: a shorter or strided tensor is read past its end without an error.
    for tensor in tensors:
        assert tensor.numel() == numel and tensor.is_contiguous(), f"{tuple(tensor.shape)} is not {numel} in a row"


def _for_each_chunk(step_chunk: Callable[[int, _ChunkBuffers], None], starts: deque[int], workspace: Workspace) -> None:
    """Call `step_chunk` on every start, on as many threads as there are buffers and work for them."""

    def work(own: _ChunkBuffers) -> None:
        with torch.no_grad():  # gradient mode belongs to the thread
            while True:
                try:
                    start = starts.popleft()  # atomic: each thread takes its next chunk when it is done
                except IndexError:
                    return
                step_chunk(start, own)

    busy = workspace.buffers[: max(1, len(starts))]
    # torch's own threads wait actively at their barriers: where another process holds a core, each of some thousand
    # barriers a step was seen to lose 4-8 ms. These threads meet once, at the end.
    with _one_torch_thread():
        futures = [workspace.helpers.submit(work, own) for own in busy[1:]]
        work(busy[0])
        for future in futures:
            future.result()


def _started_threads(count: int) -> ThreadPoolExecutor:
    """Threads that run already, each with torch set to use no others."""
    pool = ThreadPoolExecutor(max(count, 1), thread_name_prefix="edgeblocks-step")
    together = threading.Barrier(max(count, 1))

    def start() -> None:
        together.wait()  # so that no thread takes a second one's start
        torch.ones(1).add_(1)

    with _one_torch_thread():
        for future in [pool.submit(start) for _ in range(count)]:
            future.result()
    return pool


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """torch operations run on their caller's thread only; threads started meanwhile inherit that."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
