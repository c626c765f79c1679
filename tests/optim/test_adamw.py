import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.optim.adamw import Workspace, adamw_8bit_state, adamw_8bit_step_, adamw_step_, workspace_bytes
from edgeblocks.optim.moments import GROUP_SIZE, Scratch, dequantize_

SETTINGS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def normal(numel: int, *, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def train_8bit(numel, *, workspace, num_steps=4, settings=SETTINGS):
    """Parameters and state after some steps with gradients of very different sizes."""
    parameters, state = normal(numel, seed=0), adamw_8bit_state(numel)
    for step in range(1, num_steps + 1):
        gradients = normal(numel, seed=step) ** 5
        adamw_8bit_step_(parameters, gradients, *state, step=step, workspace=workspace, **settings)
    return (parameters, *state)


@pytest.mark.parametrize("numel", [1, 15, 257, 100_003])
@pytest.mark.parametrize(("form", "tolerance"), [({"fused": True}, 0.0), ({"fused": False, "foreach": False}, 1e-6)])
def test_adamw_is_that_of_torch(numel, form, tolerance):
    """adamw_step_ equals torch.optim.AdamW: fused bit for bit, the loop of plain operations within 1e-6."""
    ours, exp_avg, exp_avg_sq = normal(numel, seed=0), torch.zeros(numel), torch.zeros(numel)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, **form)
    for step in range(1, 6):
        gradients = normal(numel, seed=step)
        theirs.grad = gradients.clone()
        optimizer.step()
        adamw_step_(ours, gradients, exp_avg, exp_avg_sq, step=step, **SETTINGS)
    torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


def test_tensors_that_lie_one_behind_the_other_are_stepped_as_torch_steps_each():
    """Bit for bit, of whatever sizes: where a tensor ends its last elements are rounded in their own way (AVX-512).

    Weights start as zeros, so that a step's last bit is not lost beside a weight of 1.
    """
    sizes = [27, 32, 5, 1003, 1, 64]
    ours, exp_avg, exp_avg_sq = (torch.zeros(sum(sizes)) for _ in range(3))
    theirs = [part.clone().requires_grad_() for part in ours.split(sizes)]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(1, 41):
        gradients = normal(sum(sizes), seed=step)
        for parameter, gradient in zip(theirs, gradients.split(sizes), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        adamw_step_(ours, gradients, exp_avg, exp_avg_sq, step=step, sizes=sizes, **SETTINGS)
    assert torch.equal(ours, torch.cat([parameter.detach() for parameter in theirs]))


def test_leaf_parameters_can_be_stepped():
    """Both steps update a tensor that requires a gradient, on any thread, and record nothing for autograd."""
    parameters = torch.ones(4 * GROUP_SIZE, requires_grad=True)
    gradients = torch.ones(4 * GROUP_SIZE)
    adamw_step_(parameters, gradients, torch.zeros_like(gradients), torch.zeros_like(gradients), step=1, **SETTINGS)
    workspace = Workspace(num_threads=2, chunk_size=GROUP_SIZE)
    adamw_8bit_step_(parameters, gradients, *adamw_8bit_state(4 * GROUP_SIZE), step=1, workspace=workspace, **SETTINGS)
    assert parameters.is_leaf
    assert (parameters < 1).all()


def test_the_first_8bit_step_is_the_fp32_step():
    """Before anything was quantized both optimizers do the same to the last bit."""
    numel = 3 * GROUP_SIZE
    expected, gradients = normal(numel, seed=0), normal(numel, seed=1) ** 5
    adamw_step_(expected, gradients, torch.zeros(numel), torch.zeros(numel), step=1, **SETTINGS)
    parameters, *_ = train_8bit(numel, workspace=Workspace(num_threads=1, chunk_size=512), num_steps=1)
    assert torch.equal(parameters, expected)


def regression_curve(update):
    """Losses over 200 steps of a noisy linear regression; `update(weight, gradients, step)` changes the weight."""
    num_inputs, num_outputs = 64, 32
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(512, num_inputs, generator=generator) * torch.logspace(0, -1, num_inputs)
    clean = inputs @ torch.randn(num_inputs, num_outputs, generator=generator)
    labels = clean + 0.05 * torch.randn(clean.shape, generator=generator)
    weight = torch.zeros(num_inputs * num_outputs)
    curve = []
    for step in range(1, 201):
        batch = torch.randint(0, 512, (128,), generator=torch.Generator().manual_seed(step))
        error = inputs[batch] @ weight.view(num_inputs, num_outputs) - labels[batch]
        update(weight, (inputs[batch].T @ error / 128).view(-1), step)
        curve.append(float((inputs @ weight.view(num_inputs, num_outputs) - labels).square().mean()))
    return curve


def test_8bit_follows_fp32_and_bitsandbytes_on_a_regression():
    """The 8-bit loss stays within 15 % of fp32's, which falls a thousandfold, and ends below bitsandbytes'."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    hyper = SETTINGS | {"learning_rate": 3e-2, "weight_decay": 0.0}
    moments, state, workspace = (
        (torch.zeros(2048), torch.zeros(2048)),
        adamw_8bit_state(2048),
        Workspace(num_threads=1, chunk_size=1024),
    )

    def fp32_step(weight, gradients, step):
        adamw_step_(weight, gradients, *moments, step=step, **hyper)

    def our_step(weight, gradients, step):
        adamw_8bit_step_(weight, gradients, *state, step=step, workspace=workspace, **hyper)

    leaf = torch.nn.Parameter(torch.zeros(2048))
    optimizer = bitsandbytes.optim.AdamW8bit(
        [leaf], lr=3e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, min_8bit_size=1
    )

    def their_step(weight, gradients, step):
        leaf.grad = gradients
        optimizer.step()
        weight.copy_(leaf.detach())

    fp32, ours, theirs = (regression_curve(update) for update in (fp32_step, our_step, their_step))
    assert optimizer.state[leaf]["state1"].dtype == torch.uint8
    assert fp32[-1] < fp32[0] / 1000
    assert max(abs(a - b) / a for a, b in zip(fp32, ours, strict=True)) < 0.15
    assert ours[-1] < theirs[-1]


@pytest.mark.parametrize("first_gradient", [0.0, 1e-6, 1.0])
def test_parameters_without_gradient_do_not_explode(first_gradient):
    """Parameters whose gradient vanishes while their group's neighbours learn on move less than one step a step.

    The second moment fades below the smallest code while the first does not; divided by zero it would fly off.
    """
    numel, num_steps = 2 * GROUP_SIZE, 1000
    idle = torch.arange(numel) % 3 == 0
    parameters, state, workspace = torch.zeros(numel), adamw_8bit_state(numel), Workspace(num_threads=1, chunk_size=512)
    hyper = SETTINGS | {"weight_decay": 0.0}
    for step in range(1, num_steps + 1):
        gradients = normal(numel, seed=step)
        gradients[idle] = first_gradient if step == 1 else 0.0
        before = parameters.clone()
        adamw_8bit_step_(parameters, gradients, *state, step=step, workspace=workspace, **hyper)
        assert ((parameters - before)[idle].abs() <= 1.01 * hyper["learning_rate"]).all()
    if first_gradient == 0.0:
        assert (parameters[idle] == 0).all()


@given(
    num_groups=st.integers(1, 40),
    chunk_groups=st.integers(1, 45),
    num_threads=st.integers(1, 4),
)
def test_chunks_and_threads_change_nothing(num_groups, chunk_groups, num_threads):
    """Every chunk size and number of threads gives the same parameters and state, bit for bit."""
    numel = num_groups * GROUP_SIZE
    expected = train_8bit(numel, workspace=Workspace(num_threads=1, chunk_size=numel))
    got = train_8bit(numel, workspace=Workspace(num_threads=num_threads, chunk_size=chunk_groups * GROUP_SIZE))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_large_chunks_and_slices_change_nothing():
    """The default chunk, for which torch would use its own threads, equals small ones, also on unaligned slices."""
    numel = 300 * 1024
    expected = train_8bit(numel, workspace=Workspace(num_threads=1, chunk_size=1024))
    got = train_8bit(numel, workspace=Workspace(num_threads=2))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    buffer = torch.zeros(numel + 3)
    buffer[3:] = normal(numel, seed=0)
    state = adamw_8bit_state(numel)
    for step in range(1, 5):
        gradients = normal(numel, seed=step) ** 5
        adamw_8bit_step_(
            buffer[3:], gradients, *state, step=step, workspace=Workspace(num_threads=2, chunk_size=2048), **SETTINGS
        )
    assert torch.equal(buffer[3:], expected[0])


def test_a_saved_state_goes_on_as_if_nothing_happened():
    """Steps after a copy of parameters and state into new tensors and a new workspace equal uninterrupted ones."""
    numel = 5 * GROUP_SIZE
    whole = train_8bit(numel, workspace=Workspace(num_threads=1, chunk_size=512), num_steps=6)
    saved = [t.clone() for t in train_8bit(numel, workspace=Workspace(num_threads=1, chunk_size=512), num_steps=3)]
    workspace = Workspace(num_threads=2, chunk_size=256)
    for step in range(4, 7):
        adamw_8bit_step_(
            saved[0], normal(numel, seed=step) ** 5, *saved[1:], step=step, workspace=workspace, **SETTINGS
        )
    assert all(torch.equal(a, b) for a, b in zip(whole, saved, strict=True))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_a_broken_gradient_is_loud(broken):
    """NaN, infinity and a gradient whose square overflows make the parameters of their group NaN, and of no other."""
    numel = 2 * GROUP_SIZE
    parameters, state, workspace = (
        torch.ones(numel),
        adamw_8bit_state(numel),
        Workspace(num_threads=1, chunk_size=numel),
    )
    gradients = torch.ones(numel)
    gradients[7] = broken
    for step in (1, 2):
        adamw_8bit_step_(parameters, gradients, *state, step=step, workspace=workspace, **SETTINGS)
        gradients[7] = 1.0
    assert parameters[:GROUP_SIZE].isnan().all()
    assert parameters[GROUP_SIZE:].isfinite().all()


def test_the_number_of_torch_threads_is_left_as_found():
    """A step restores torch's thread count, also when it fails."""
    before = torch.get_num_threads()
    numel = 8 * GROUP_SIZE
    workspace = Workspace(num_threads=2, chunk_size=GROUP_SIZE)
    train_8bit(numel, workspace=workspace)
    assert torch.get_num_threads() == before
    codes, scales, *rest = adamw_8bit_state(numel)
    with pytest.raises(KeyError, match="int16"):
        adamw_8bit_step_(
            scales.new_zeros(numel),
            scales.new_zeros(numel),
            codes.short(),
            scales,
            *rest,
            step=1,
            workspace=workspace,
            **SETTINGS,
        )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("short", range(6))
def test_tensors_that_do_not_match_are_refused(short):
    """A tensor too short for the others stops the step; torch's kernel would read past its end in silence."""
    numel = 4 * GROUP_SIZE
    tensors = [torch.zeros(numel), torch.zeros(numel), *adamw_8bit_state(numel)]
    tensors[short] = tensors[short][:-1]
    with pytest.raises(AssertionError, match=r"in a row|whole groups"):
        adamw_8bit_step_(*tensors, step=1, workspace=Workspace(num_threads=1, chunk_size=GROUP_SIZE), **SETTINGS)


@given(num_threads=st.integers(1, 4), chunk_groups=st.integers(1, 300))
def test_workspace_bytes_are_true(num_threads, chunk_groups):
    """The formula, the attribute and the tensors held agree to the byte."""
    size = {"num_threads": num_threads, "chunk_size": chunk_groups * GROUP_SIZE}
    workspace = Workspace(**size)
    held = [workspace.step]
    for own in workspace.buffers:
        held += [own.exp_avg, own.exp_avg_sq, own.scratch.magnitudes, own.scratch.factors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert workspace.num_bytes == workspace_bytes(**size) == sum(storages.values())


def test_a_step_allocates_nothing():
    """Beside the workspace torch allocates nothing but single numbers during a step, inside its kernels included."""
    numel, workspace = 10 * GROUP_SIZE, Workspace(num_threads=1, chunk_size=4 * GROUP_SIZE)
    parameters, gradients, state = torch.zeros(numel), normal(numel, seed=1), adamw_8bit_state(numel)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        adamw_8bit_step_(parameters, gradients, *state, step=1, workspace=workspace, **SETTINGS)
        canary = torch.empty(1000)
    allocations = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert [size for size in allocations if size > 8] == [canary.nbytes]


def test_a_step_leaves_nothing_to_mkl():
    """torch gives roots, exponentials and the like to MKL, which starts threads of its own beside ours.

    Then more threads are known than there are cores, and from that step on every operation's threads sleep where they
    waited actively before.
    """
    numel = 4 * GROUP_SIZE
    parameters, gradients, state = torch.zeros(numel), normal(numel, seed=1), adamw_8bit_state(numel)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        adamw_8bit_step_(
            parameters, gradients, *state, step=1, workspace=Workspace(num_threads=1, chunk_size=numel), **SETTINGS
        )
    called = {event.name.rstrip("_") for event in profile.events()}
    assert "aten::rsqrt" in called
    assert not called & {f"aten::{name}" for name in ("sqrt", "exp", "log", "pow", "tanh", "erf", "sin", "cos", "ceil")}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_threads": 1, "chunk_size": 300}, "chunk_size is 300; it must be a positive multiple of 256"),
        ({"num_threads": 1, "chunk_size": 0}, "chunk_size is 0; it must be a positive multiple of 256"),
        ({"num_threads": 0}, "num_threads is 0; at least one thread must do the step"),
    ],
)
def test_wrong_sizes_are_refused(size, message):
    """A workspace of an impossible size is refused before it is allocated, with the number and the rule."""
    with pytest.raises(ValueError, match=message):
        Workspace(**size)


def test_state_decodes_to_the_moments():
    """After one step the state holds (1 - beta1) g and (1 - beta2) g^2 within the code's relative error."""
    numel = GROUP_SIZE
    gradients = torch.linspace(0.5, 1.0, numel)
    state, scratch = adamw_8bit_state(numel), Scratch.empty(numel)
    workspace = Workspace(num_threads=1, chunk_size=numel)
    adamw_8bit_step_(torch.zeros(numel), gradients, *state, step=1, workspace=workspace, **SETTINGS)
    exp_avg, exp_avg_sq = torch.empty(numel), torch.empty(numel)
    dequantize_(exp_avg, state[0], state[1], scratch=scratch)
    dequantize_(exp_avg_sq, state[2], state[3], scratch=scratch)
    torch.testing.assert_close(exp_avg, 0.1 * gradients, rtol=0.019, atol=0)
    torch.testing.assert_close(exp_avg_sq, 0.01 * gradients**2, rtol=0.016, atol=0)
