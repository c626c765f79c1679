"""The 8-bit step by bitsandbytes: by its operator for processors, and by what its CUDA kernel computes, in torch.

The operator for processors takes zeros for 2e-5 of a group's largest value with any code whose values lie closer than
that, so only its first step is held against ours.
"""

import pytest
import torch
from support.adam_moments import adam_moments, update_error
from support.cuda_kernel import blockwise_adam, used_here  # noqa: F401

from edgeblocks.optim import cuda_step
from edgeblocks.optim.adamw import Workspace, adamw_8bit_state, adamw_8bit_step_, adamw_step_
from edgeblocks.optim.cuda_step import (
    OURS,
    LibraryStep,
    choice_on,
    difference,
    library_operator,
    signed_table,
    unsigned_table,
)
from edgeblocks.optim.moments import GROUP_SIZE, SIGNED, UNSIGNED, Scratch, dequantize_

pytest.importorskip("bitsandbytes")
ADAMW = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
kernels = pytest.mark.parametrize(
    "kernel", [pytest.param(lambda: blockwise_adam, id="cuda"), pytest.param(library_operator, id="processor")]
)


def normal(numel: int, *, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def workspace(operator=None, chunk_size: int = 2 * GROUP_SIZE) -> Workspace:
    """For our own step, or for a library's."""
    library = operator and LibraryStep(operator, device="cpu", chunk_size=chunk_size)
    return Workspace(num_threads=1, chunk_size=chunk_size, library=library)


def moments(state) -> tuple[torch.Tensor, torch.Tensor]:
    found = tuple(torch.empty(state[0].numel()) for _ in range(2))
    for out, codes, scales in zip(found, state[::2], state[1::2], strict=True):
        dequantize_(out, codes, scales, scratch=Scratch.empty(out.numel()))
    return found


@kernels
def test_a_first_step_is_ours_and_ours_reads_its_state(kernel):
    """Parameters to rounding, for more than one call; moments within half a step of the code, as far as it is finer
    than the processor's operator is."""
    numel = 5 * GROUP_SIZE
    gradients = normal(numel, seed=1)
    results = []
    for operator in (None, kernel()):
        parameters, state = normal(numel, seed=0), adamw_8bit_state(numel)
        adamw_8bit_step_(parameters, gradients, *state, step=1, workspace=workspace(operator), **ADAMW)
        results.append((parameters, *moments(state)))
    (ours, *_), (theirs, exp_avg, exp_avg_sq) = results
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(exp_avg, 0.1 * gradients, rtol=0.07, atol=2e-5)
    torch.testing.assert_close(exp_avg_sq, 0.01 * gradients**2, rtol=0.07, atol=4e-6)


def test_what_the_cuda_kernel_computes_is_our_step():
    """From equal states, groups of zeros and of tiny gradients among them, it makes equal parameters and codes that are
    at most one step apart."""
    assert difference(LibraryStep(blockwise_adam, device="cpu", chunk_size=GROUP_SIZE), "cpu") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given | {"step": given["step"] + 1}, "its update of usual gradients is another one"),
        (lambda given: given | {"qmap1": given["qmap1"].flip(0)}, "its codes of the first moment of usual"),
        (lambda given: given | {"qmap2": given["qmap2"] * 2}, "its codes of the second moment of usual"),
        (lambda given: given | {"absmax2": given["absmax2"].clone()}, "its scale of the second moment of usual grad"),
    ],
    ids=["step", "order", "values", "scale"],
)
def test_a_kernel_that_does_something_else_is_not_taken(change, message):
    """The try says what is wrong: of a library whose operator means something else by its arguments."""
    names = blockwise_adam.__code__.co_varnames[: blockwise_adam.__code__.co_argcount]

    def other(*given):
        blockwise_adam(**change(dict(zip(names, given, strict=False))))

    assert difference(LibraryStep(other, device="cpu"), "cpu").startswith(message)


def test_zeros_are_where_the_processors_operator_fails():
    """Its codes of small values are some nine steps from ours, so that it is not taken on a processor."""
    wrong = difference(LibraryStep(library_operator(), device="cpu"), "cpu")
    assert wrong.startswith("its codes of the first moment of usual gradients are up to ")


@pytest.mark.parametrize(("spread", "percent"), [(1.0, 2.3), (2.0, 18)])
def test_updates_err_as_the_module_says(spread, percent):
    """Moments that are rounded to the nearest value of our code: as ours but for the widest spread of gradients."""
    exact = adam_moments(spread)
    tables = signed_table()[1:].double(), unsigned_table()[1:].double()
    found = []
    for values, table in zip(exact, tables, strict=True):
        scales = values.view(-1, GROUP_SIZE).abs().amax(1).repeat_interleave(GROUP_SIZE).double()
        found.append(table[torch.bucketize(values / scales, (table[1:] + table[:-1]) / 2)] * scales)
    assert 100 * update_error(exact, tuple(found)) == pytest.approx(percent, rel=0.05)


def test_a_run_that_one_began_goes_on_with_the_other():
    """Forty steps by turns end as near to fp32's as ours alone do, with gradients of very different sizes."""
    numel = 4 * GROUP_SIZE
    exact, exp_avg, exp_avg_sq = normal(numel, seed=0), torch.zeros(numel), torch.zeros(numel)
    sizes = normal(numel, seed=99).exp()
    ours, turns = ((normal(numel, seed=0), adamw_8bit_state(numel)) for _ in range(2))
    for step in range(1, 41):
        gradients = sizes * normal(numel, seed=step)
        adamw_step_(exact, gradients, exp_avg, exp_avg_sq, step=step, **ADAMW)
        for (parameters, state), operator in ((ours, None), (turns, blockwise_adam if step % 20 > 9 else None)):
            adamw_8bit_step_(parameters, gradients, *state, step=step, workspace=workspace(operator), **ADAMW)
    moved = (exact - normal(numel, seed=0)).norm()
    assert (turns[0] - exact).norm() < 1.2 * (ours[0] - exact).norm() < 0.2 * moved
    assert not torch.equal(turns[0], ours[0])


@kernels
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_broken_gradient_is_loud(kernel, broken):
    """What is no number shows in the parameters at once, and its group and no other is NaN after the next step."""
    numel = 3 * GROUP_SIZE
    parameters, state, gradients = torch.ones(numel), adamw_8bit_state(numel), torch.ones(numel)
    gradients[GROUP_SIZE + 7] = broken
    own = slice(GROUP_SIZE, 2 * GROUP_SIZE)
    for step in (1, 2):
        adamw_8bit_step_(parameters, gradients, *state, step=step, workspace=workspace(kernel()), **ADAMW)
        if broken != 1e30:  # of which the square overflows, and stops the parameter first
            assert parameters[own].isnan().any()
        gradients[GROUP_SIZE + 7] = 1.0
    assert parameters[own].isnan().all()
    assert torch.cat([parameters[: own.start], parameters[own.stop :]]).isfinite().all()


@pytest.mark.parametrize("first_gradient", [0.0, 1e-6, 1.0])
def test_parameters_without_gradient_do_not_explode(first_gradient):
    """As with our step: parameters whose gradient vanishes move less than one step a step, and at 0 stay there."""
    numel = 2 * GROUP_SIZE
    idle = torch.arange(numel) % 3 == 0
    parameters, state, space = torch.zeros(numel), adamw_8bit_state(numel), workspace(blockwise_adam)
    for step in range(1, 121):
        gradients = normal(numel, seed=step)
        gradients[idle] = first_gradient if step == 1 else 0.0
        before = parameters.clone()
        adamw_8bit_step_(parameters, gradients, *state, step=step, workspace=space, **ADAMW | {"weight_decay": 0.0})
        assert ((parameters - before)[idle].abs() <= 1.01 * ADAMW["learning_rate"]).all()
    if first_gradient == 0.0:
        assert (parameters[idle] == 0).all()


@pytest.mark.parametrize("spread", [0, 1, 3, 8])
def test_codes_that_ours_never_gives_are_not_given(spread):
    """However far apart a group's values are, no code is 0 in the second moment or -128 in the first."""
    numel = 16 * GROUP_SIZE
    state = adamw_8bit_state(numel)
    gradients = normal(numel, seed=3) * normal(numel, seed=4).abs() ** spread
    gradients[:100] = 0.0
    for step in (1, 2):
        adamw_8bit_step_(torch.zeros(numel), gradients, *state, step=step, workspace=workspace(blockwise_adam), **ADAMW)
    assert state[0].dtype == SIGNED and state[0].min() == -127 and state[0].max() == 127
    assert state[2].dtype == UNSIGNED and state[2].min() == 1 and state[2].max() == 255


def test_its_room_is_counted_and_less_than_ours_on_a_gpu():
    """Tables and the look at gradients, 0.5 MB where our chunks of 2 Mi take 25; and a step allocates nothing else."""
    numel, space = 4 * GROUP_SIZE, workspace(lambda *given: None)
    parameters, gradients, state = torch.zeros(numel), normal(numel, seed=1), adamw_8bit_state(numel)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        adamw_8bit_step_(parameters, gradients, *state, step=1, workspace=space, **ADAMW)
        canary = torch.empty(1000)
    allocations = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert [size for size in allocations if size > 8] == [canary.nbytes]
    assert space.num_bytes == 2 * 256 * 4 + 2 * 2 * 4 + 4 and not space.buffers
    assert LibraryStep(blockwise_adam, device="cpu").num_bytes < 600_000


def test_a_processor_does_not_ask_for_the_library():
    """There the step is ours, and there is nothing to explain."""
    choice = choice_on("cpu")
    assert (choice.name, choice.operator, choice.reason) == (OURS, None, None)


@pytest.mark.usefixtures("used_here")
def test_where_it_works_it_is_taken_by_name_and_version():
    """And a workspace for that device has it, and no buffers of ours."""
    assert choice_on("cpu").name.startswith("bitsandbytes 0.")
    assert Workspace.for_device("cpu").library is not None


@pytest.mark.usefixtures("used_here")
def test_where_it_does_not_work_the_step_is_ours_and_says_why(monkeypatch):
    """A library whose operator raises, or that is not installed."""

    def broken(*given):
        raise RuntimeError("Method 'cadam' not available in CPU-only version of bitsandbytes.\nReinstall it")

    monkeypatch.setattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise", broken)
    choice = choice_on("cpu")
    assert choice.name == OURS and choice.operator is None
    assert "does not work here: RuntimeError: Method 'cadam' not available" in choice.reason
    assert Workspace.for_device("cpu").library is None
    cuda_step._choice.cache_clear()
    monkeypatch.setattr(cuda_step.importlib.util, "find_spec", lambda name: None)
    assert choice_on("cpu").reason.startswith("bitsandbytes is not installed")
