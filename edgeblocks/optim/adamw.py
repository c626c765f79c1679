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
from edgeblocks.optim.rounding import SEGMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float32, Int8, Int64, UInt8
    from torch import Tensor

    from edgeblocks.optim.cuda_step import LibraryStep

    Tensors = tuple[Tensor, ...] | list[Tensor]

CHUNK_SIZE = 160 * 1024
GPU_CHUNK_SIZE = 2 * 1024 * 1024
"""With table lookups a step took 194, 118, 70 and 65 ps a parameter of an H100 in chunks of 1, 2, 8 and 32 Mi."""
_STEP_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ChunkBuffers:
    """What one thread needs to step one chunk."""

    exp_avg: Float32[Tensor, " numel"]
    exp_avg_sq: Float32[Tensor, " numel"]
    scratch: Scratch
    weights: Float32[Tensor, " rounded"]
    """Where the weights themselves are bfloat16; else empty, as the next one is."""
    bits: Int64[Tensor, " half"]

    @classmethod
    def empty(cls, numel: int, device: torch.device | str, *, rounds: bool) -> ChunkBuffers:
        return cls(
            exp_avg=torch.empty(numel, device=device),
            exp_avg_sq=torch.empty(numel, device=device),
            scratch=Scratch.empty(numel, device),
            weights=torch.empty(rounds * numel, device=device),
            bits=torch.empty(rounds * numel // 2, dtype=torch.int64, device=device),
        )

    def first(self, numel: int) -> ChunkBuffers:
        return ChunkBuffers(
            exp_avg=self.exp_avg[:numel],
            exp_avg_sq=self.exp_avg_sq[:numel],
            scratch=self.scratch.first(numel),
            weights=self.weights[:numel],
            bits=self.bits,
        )


class Workspace:
    """Every temporary of the 8-bit step, allocated once, for `num_threads` threads of `chunk_size` parameters each.

    A step allocates nothing else but views and single numbers. One workspace serves one step at a time. Results depend
    neither on `chunk_size` nor on `num_threads`.

    Args:
        library: what makes the step instead, with room of its own (`optim.cuda_step`); None: what is here.
        rounds: whether it is for weights of bfloat16 (`optim.rounded_update`), of which a chunk must be whole segments
            of random bits.

    Raises:
        ValueError: `chunk_size` is no positive multiple of `GROUP_SIZE`, or with `rounds` of `rounding.SEGMENT`; or
            `num_threads` is not positive.
    """

    def __init__(
        self,
        *,
        num_threads: int,
        chunk_size: int = CHUNK_SIZE,
        device: torch.device | str = "cpu",
        library: LibraryStep | None = None,
        rounds: bool = False,
    ) -> None:
        assert library is None or not rounds, "a library's step is for weights of float32"
        self.num_bytes = workspace_bytes(num_threads=num_threads, chunk_size=chunk_size, rounds=rounds)
        self.library, num_buffers = library, num_threads
        if library is not None:
            self.num_bytes, num_buffers = library.num_bytes + _STEP_BYTES, 0
        self.chunk_size = chunk_size
        self.step = torch.empty((), dtype=torch.float32, device=device)
        self.buffers = tuple(ChunkBuffers.empty(chunk_size, device, rounds=rounds) for _ in range(num_buffers))
        # Started now: a thread that is started where memory is short may never answer.
        self.helpers = _started_threads(num_threads - 1)

    @classmethod
    def for_device(cls, device: torch.device | str, *, rounds: bool = False) -> Workspace:
        """As the processor's threads share the step's work; as one thread gives it to a GPU, or to a library there."""
        from edgeblocks.optim.cuda_step import library_step  # which imports this module

        library = library_step(device, rounds=rounds)
        if library is None and torch.device(device).type == "cpu":
            return cls(num_threads=torch.get_num_threads(), rounds=rounds)
        return cls(num_threads=1, chunk_size=GPU_CHUNK_SIZE, device=device, library=library, rounds=rounds)


def workspace_bytes(*, num_threads: int, chunk_size: int = CHUNK_SIZE, rounds: bool = False) -> int:
    """Bytes of `Workspace(num_threads=.., chunk_size=.., rounds=..)`, without allocating it.

    >>> workspace_bytes(num_threads=2), workspace_bytes(num_threads=2, rounds=True)
    (3937284, 6558724)

    Raises:
        ValueError: as `Workspace`.
    """
    whole = SEGMENT if rounds else GROUP_SIZE
    if chunk_size <= 0 or chunk_size % whole:
        raise ValueError(f"chunk_size is {chunk_size}; it must be a positive multiple of {whole}")
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; at least one thread must do the step")
    return num_threads * (2 * 4 * chunk_size + scratch_bytes(chunk_size) + rounds * 2 * 4 * chunk_size) + _STEP_BYTES


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
        fused_adamw_(
            parameters.split_with_sizes(given),
            gradients.split_with_sizes(given),
            exp_avg.split_with_sizes(given),
            exp_avg_sq.split_with_sizes(given),
            torch.tensor(float(step), dtype=torch.float32, device=parameters.device),
            learning_rate=learning_rate,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )


def fused_adamw_(
    parameters: Tensors,
    gradients: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: Float32[Tensor, ""],
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """torch's own kernel, on some tensors: contiguous, float32, and of the same sizes in every list."""
    torch._fused_adamw_(
        parameters,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        [step] * len(parameters),
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

    def step_chunk(chunk: slice, buffers: ChunkBuffers) -> None:
        # Chunks are whole groups, so no scale belongs to two of them and no order among threads can change a bit.
        groups = slice(chunk.start // GROUP_SIZE, chunk.stop // GROUP_SIZE)
        adamw_8bit_chunk_(
            parameters[chunk],
            gradients[chunk],
            exp_avg_codes[chunk],
            exp_avg_scales[groups],
            exp_avg_sq_codes[chunk],
            exp_avg_sq_scales[groups],
            buffers=buffers,
            step=workspace.step,
            learning_rate=learning_rate,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )

    for_each_chunk(step_chunk, numel, workspace, step=step)


def adamw_8bit_chunk_(
    parameters: Float32[Tensor, " numel"],
    gradients: Float32[Tensor, " numel"],
    exp_avg_codes: Int8[Tensor, " numel"],
    exp_avg_scales: Float32[Tensor, " groups"],
    exp_avg_sq_codes: UInt8[Tensor, " numel"],
    exp_avg_sq_scales: Float32[Tensor, " groups"],
    *,
    buffers: ChunkBuffers,
    step: Float32[Tensor, ""],
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_8bit_step_` of one chunk, on the calling thread; `buffers`, of the chunk's numel, is free afterwards."""
    exp_avg, exp_avg_sq, scratch = buffers.exp_avg, buffers.exp_avg_sq, buffers.scratch
    # Float32 for this chunk alone; then quantized again, so that both moments never exist in full.
    dequantize_(exp_avg, exp_avg_codes, exp_avg_scales, scratch=scratch)
    dequantize_(exp_avg_sq, exp_avg_sq_codes, exp_avg_sq_scales, scratch=scratch)
    fused_adamw_(
        [parameters],
        [gradients],
        [exp_avg],
        [exp_avg_sq],
        step,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )
    quantize_(exp_avg_codes, exp_avg_scales, exp_avg, scratch=scratch)
    quantize_(exp_avg_sq_codes, exp_avg_sq_scales, exp_avg_sq, scratch=scratch)


def _assert_numel(numel: int, *tensors: Tensor) -> None:
    # The fused kernel trusts its caller: a shorter or strided tensor is read past its end without an error.
    for tensor in tensors:
        assert tensor.numel() == numel and tensor.is_contiguous(), f"{tuple(tensor.shape)} is not {numel} in a row"


def for_each_chunk(
    step_chunk: Callable[[slice, ChunkBuffers], None], numel: int, workspace: Workspace, *, step: int
) -> None:
    """Call `step_chunk` on every chunk of `numel` parameters, on as many threads as there are buffers and work for.

    Args:
        step_chunk: gets a chunk and buffers of its numel; finds the step in the workspace.
        step: counts from 1.
    """
    assert step >= 1, f"step is {step}, it counts from 1"
    # Filled here and read by all threads: a tensor of its own in each chunk would be an allocation a chunk.
    workspace.step.fill_(step)
    starts = deque(range(0, numel, workspace.chunk_size))

    def work(own: ChunkBuffers) -> None:
        with torch.no_grad():  # gradient mode belongs to the thread
            while True:
                try:
                    start = starts.popleft()  # atomic: each thread takes its next chunk when it is done
                except IndexError:
                    return
                end = min(start + workspace.chunk_size, numel)
                step_chunk(slice(start, end), own if end - start == workspace.chunk_size else own.first(end - start))

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
