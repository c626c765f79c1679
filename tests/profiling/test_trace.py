"""The trace's promises, checked against real steps in processes of their own."""

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from support.modules_in_the_way import put_in_the_way

from edgeblocks.errors import EdgeblocksError
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.dit import Dit, DitSettings
from edgeblocks.offload.block_buffer import BlockLayout
from edgeblocks.offload.sections import network_of, stages_of
from edgeblocks.planning.layer_costs import Growth, StepCost, at_samples
from edgeblocks.planning.memory import HALF_SCRATCH_BYTES
from edgeblocks.profiling import step_trace
from edgeblocks.profiling import trace as trace_module
from edgeblocks.profiling.step_trace import traced_step
from edgeblocks.profiling.trace import TRACING_BYTES, NoRoomToTraceError, trace, trace_in_subprocess

SETTINGS = DitSettings(width=64, depth=6, heads=4, patch=2)
DATA = ImageInfo(channels=3, height=16, width=16, num_classes=10, mean=0.5, scale=2.0)
FAMILY = Dit(SETTINGS, DATA)
SAMPLE_COUNTS = (1, 4, 16)
MB = 10**6


@pytest.fixture(scope="module")
def costs():
    return trace(FAMILY, SAMPLE_COUNTS)


REAL_STEPS = """
import ctypes, json, os, sys
from pathlib import Path
# Every tensor above 64 KB gets pages of its own until it dies: the resident set follows live tensors.
libc = ctypes.CDLL(None)
assert libc.mallopt(-3, 65536) and libc.mallopt(-1, 65536) and libc.mallopt(-8, 1)
import torch
from torch.profiler import ProfilerActivity, profile
torch.set_num_threads(1)
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.dit import Dit, DitSettings
from edgeblocks.families.precision import computing_in

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def step_of(settings, data, kind, num_layers, samples, precision):
    family = Dit(DitSettings(**settings), ImageInfo(**data))
    block = family.block(num_layers=num_layers, checkpointing=kind == "checkpointed")
    block.reset_tables_()
    block.init_(torch.Generator().manual_seed(0))
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def batch_of(samples):
        shapes = family.batch_spec(samples).items()
        batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes}
        batch["sigma"] += 0.5
        batch["eps"].normal_()
        return batch

    def step(batch):
        with torch.set_grad_enabled(kind != "forward"), computing_in(precision):
            loss = family.loss(block, batch)
        if kind != "forward":
            loss.sum().backward()

    step(batch_of(1))
    return step, batch_of(samples)

def resident(step, batch):
    libc.malloc_trim(0)
    before = status("VmRSS:")
    step(batch)
    return status("VmHWM:") - before

def allocated(step, batch):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = allocated = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        allocated = max(allocated, live)
    return allocated

requests = json.load(sys.stdin)
for request in requests:
    # In a process of its own, which has imported torch and run none of its operators.
    if os.fork() == 0:
        print(resident(*step_of(*request)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, request
for request in requests:
    print(allocated(*step_of(*request)))
"""


REAL_KINDS = list(itertools.product(("plain", "checkpointed", "forward"), ("fp32", "bf16")))


@pytest.fixture(scope="module")
def real_peaks():
    """Peaks of real steps of 4 layers on 64 samples: torch's allocator, and growth of the resident set.

    (After a step on one sample.)
    """
    asked = json.dumps([[asdict(SETTINGS), asdict(DATA), kind, 4, 64, precision] for kind, precision in REAL_KINDS])
    done = subprocess.run([sys.executable, "-c", REAL_STEPS], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = [int(line) for line in done.stdout.splitlines()]
    resident, allocated = numbers[: len(REAL_KINDS)], numbers[len(REAL_KINDS) :]
    return dict(zip(REAL_KINDS, zip(allocated, resident, strict=True), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "precision"), REAL_KINDS)
def test_the_traced_peak_is_what_a_real_step_takes(real_peaks, kind, precision):
    """A real step of 4 layers on 64 samples: the allocator's peak is the trace's to 0.1 %, the resident to 8 %.

    In half precision attention packs keys and values anew, 1 %, and the library of products keeps what the plan has
    as `HALF_SCRATCH_BYTES`.

    The table of positions, [64, 64] numbers, is traced and lies in memory before the real step.
    """
    traced = traced_step(FAMILY, 4, 64, kind, precision=precision).peak_bytes
    assert traced > 4_000_000
    allocated, resident = real_peaks[kind, precision]
    half = precision == "bf16"
    assert allocated + 4 * 64 * SETTINGS.width == pytest.approx(traced, rel=0.015 if half else 1e-5)
    assert traced * 0.92 <= resident <= traced * 1.08 + (HALF_SCRATCH_BYTES if half else 0)


def test_attention_stays_fused_when_a_layer_is_run_again():
    """At 1,024 tokens the matrix of attention would dwarf all else: in no trace, checkpointed or not, is it counted.

    Four times the tokens then take about four times the bytes, and checkpointing lowers the peak.
    """
    peaks = {}
    for kind in ("plain", "checkpointed", "forward"):
        for size in (32, 64):
            family = Dit(SETTINGS, replace(DATA, height=size, width=size))
            peaks[kind, size] = traced_step(family, 4, 1, kind).peak_bytes
        assert peaks[kind, 64] == pytest.approx(4 * peaks[kind, 32], rel=0.1)
    assert peaks["checkpointed", 64] < peaks["plain", 64] / 2


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "forward"])
def test_five_layers_cost_what_three_layers_foretell(costs, kind):
    """Growth at 5 layers, from traces of 1 to 3, is within 2 % of a direct trace of 5: peak, traffic and operators."""
    step_cost = next(cost for cost in getattr(costs, kind) if cost.samples == 4)
    direct = traced_step(FAMILY, 5, 4, kind)
    for name in ("peak_bytes", "touched_bytes", "operators"):
        assert getattr(step_cost, name).at(5) == pytest.approx(getattr(direct, name), rel=0.02), name


def test_checkpointing_lowers_the_peak_and_costs_operators(costs):
    """With checkpointing a further layer keeps far less than without, and runs more operators; forward keeps least."""
    plain, checkpointed, forward = costs.plain[-1], costs.checkpointed[-1], costs.forward[-1]

    def slope(growth):
        return growth.three - growth.two

    assert slope(checkpointed.peak_bytes) < slope(plain.peak_bytes) / 8
    assert slope(checkpointed.operators) > slope(plain.operators)
    assert slope(forward.peak_bytes) == 0
    assert forward.peak_bytes.three < checkpointed.peak_bytes.three < plain.peak_bytes.three


def test_the_peak_grows_with_the_samples(costs):
    """More samples never need less, and a line between traced counts does not lie below a direct trace."""
    for kind in ("plain", "checkpointed", "forward"):
        steps = getattr(costs, kind)
        assert [cost.samples for cost in steps] == list(SAMPLE_COUNTS)
        peaks = [cost.peak_bytes.at(2) for cost in steps]
        assert peaks == sorted(set(peaks))
        between = at_samples(steps, 8, lambda cost: cost.peak_bytes.at(2))
        assert between >= 0.999 * traced_step(FAMILY, 2, 8, kind).peak_bytes


@pytest.mark.parametrize("num_layers", [1, 3, 6])
@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_parameters_and_optimizer_state_are_those_of_the_block_file(costs, num_layers, optimizer):
    """Parameters and moment bytes of any block, from ends and layers, equal the layout of a real block."""
    with torch.device("meta"):
        layout = BlockLayout.of(FAMILY.block(num_layers=num_layers, checkpointing=False), optimizer)
    assert costs.parameters(num_layers) == layout.num_parameters
    assert costs.moment_bytes(num_layers, optimizer) == layout.part_span("optimizer")[1]
    assert 8 * costs.parameters(num_layers) + costs.moment_bytes(num_layers, optimizer) == layout.num_bytes


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_a_stage_is_counted_with_the_ends_that_it_has(costs, optimizer):
    """The first one has the stem alone, the last one the readout alone, others neither: as in their files."""
    sections = dict(zip(("first", "middle", "last"), stages_of((3, 1, 2)), strict=True))
    for ends, section in sections.items():
        with torch.device("meta"):
            layout = BlockLayout.of(network_of(FAMILY, section), optimizer)
        assert costs.parameters(section.num_layers, ends) == layout.num_parameters, ends
        assert costs.moment_bytes(section.num_layers, optimizer, ends) == layout.part_span("optimizer")[1], ends
    assert costs.parameters(0) == sum(costs.parameters(0, ends) for ends in sections)
    assert costs.parameters(0, "middle") == 0 < costs.parameters(0, "last") < costs.parameters(0, "first")


def test_flops_are_those_of_the_matrices(costs):
    """A layer's forward pass: 2 T (4 w^2 + 8 w^2) for its maps, 2 x 6 w^2 for modulation, 4 T^2 w in attention."""
    tokens, width = 64, SETTINGS.width
    maps, modulation, attention = 2 * tokens * 12 * width**2, 12 * width**2, 4 * tokens**2 * width
    assert costs.layer_flops_per_sample == pytest.approx(maps + modulation + attention, rel=0.01)


def test_a_batchs_bytes_are_those_of_its_tensors(costs):
    """clean and eps in fp32, sigma in fp32, labels in int64."""
    assert costs.batch_bytes_per_sample == 2 * 3 * 16 * 16 * 4 + 4 + 8


REQUEST = ("dit", asdict(SETTINGS), asdict(DATA))
ASKS = f"""
import json, sys
from dataclasses import asdict
from pathlib import Path
from edgeblocks.profiling.trace import trace_in_subprocess
traced = trace_in_subprocess(*{REQUEST!r}, {SAMPLE_COUNTS!r}, cache=Path(sys.argv[1]))
print(json.dumps([sorted({{"sympy", "torch"}} & set(sys.modules)), asdict(traced)]))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What a program that asks a child process holds afterwards of the libraries, the answer, and where it is kept.

    The folder that it is started in has files that no child may run.
    """
    users, cache = tmp_path_factory.mktemp("user"), tmp_path_factory.mktemp("costs")
    put_in_the_way(users)
    program = [sys.executable, "-P", "-c", ASKS, cache]
    done = subprocess.run(program, cwd=users, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout), cache


@pytest.fixture
def known(asked, tmp_path):
    """A copy of the kept answers."""
    return shutil.copytree(asked[2], tmp_path / "costs")


@contextlib.contextmanager
def no_child_process():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "executable", "/nonexistent")
        yield


def test_the_trace_in_a_process_of_its_own_is_the_same_and_leaves_nothing_behind(asked, costs):
    """trace_in_subprocess gives what trace gives, and the asking process holds neither sympy nor torch for it.

    The child runs no file of the folder that the command is started in.
    """
    modules, answer, _ = asked
    assert modules == []
    # How many threads an optimizer step uses is the process's business.
    assert answer["costs"] == json.loads(json.dumps(asdict(costs)))


def test_a_kept_trace_is_taken_again_and_a_damaged_one_made_again(asked, known):
    """The second answer needs no child process and is the same; a damaged file, or other settings, are traced anew."""
    with no_child_process():
        again = trace_in_subprocess(*REQUEST, SAMPLE_COUNTS, cache=known)
        assert json.loads(json.dumps(asdict(again))) == asked[1]
        first = trace_in_subprocess(*REQUEST, [1], cache=known)
        with pytest.raises(FileNotFoundError):
            trace_in_subprocess("dit", asdict(SETTINGS) | {"width": 32}, asdict(DATA), [1], cache=known)
    for path in known.iterdir():
        if json.loads(path.read_text().splitlines()[0])["plain"][0]["samples"] != 1:
            path.unlink()
    (kept,) = known.iterdir()
    text = kept.read_text()
    place = text.index('"peak_bytes"') + 22  # a digit of a size
    flipped = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
    for content in ("{}", text[:-20], flipped):
        kept.write_text(content)
        with no_child_process(), pytest.raises(FileNotFoundError):  # what is damaged is not believed
            trace_in_subprocess(*REQUEST, [1], cache=known)
    assert trace_in_subprocess(*REQUEST, [1], cache=known, room_bytes=TRACING_BYTES).costs == first.costs
    assert [path.name for path in known.iterdir()] == [kept.name]


def test_only_sample_counts_that_are_not_known_are_traced(known, monkeypatch):
    """Another list of micro-batches takes what former ones left; the answer is that of a trace of all, in any order."""
    asked = []

    def child(command, *, input, **options):
        asked.append(json.loads(input)["sample_counts"])
        return run(command, input=input, **options)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", child)
    former = trace_in_subprocess(*REQUEST, [4, 1], cache=known).costs
    assert asked == []
    more = trace_in_subprocess(*REQUEST, [4, 3, 1], cache=known).costs
    assert asked == [[3]]
    assert former == trace(FAMILY, [1, 4])
    assert more == trace(FAMILY, [1, 3, 4])


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "forward"])
def test_known_results_are_those_of_the_operators(kind, monkeypatch):
    """A step traced without looking results up has the same storages; looked up, hardly an operator is run again."""
    looked_up = traced_step(FAMILY, 4, 5, kind)
    run = []

    def always_run(operator, args, kwargs):
        run.append(operator)
        return operator(*args, **kwargs)

    monkeypatch.setattr(step_trace._results, "of", always_run)
    real = traced_step(FAMILY, 4, 5, kind)
    assert len(run) == real.operators > 100
    for name in ("peak_bytes", "heap_bytes", "touched_bytes", "operators", "live_bytes"):
        assert getattr(looked_up, name) == getattr(real, name), name


def test_only_results_with_their_own_memory_are_looked_up():
    """A view, a tensor that is given back as it is, and one that is given another shape come from the operators."""
    results, aten = step_trace._KnownResults(), torch.ops.aten
    for _ in range(2):
        x = torch.empty(4, 6, device="meta")
        assert results.of(aten.t.default, (x,), {})._base is x
        assert results.of(aten.add.Tensor, (x, x), {}).shape == (4, 6)
        assert results.of(aten.add_.Tensor, (x, x), {}) is x
        assert results.of(aten.resize_.default, (x, [2, 2]), {}).shape == x.shape == (2, 2)
        assert [part.shape for part in results.of(aten.split.Tensor, (x, 1), {})] == [(1, 2), (1, 2)]
    found = {key[0].__name__: value for key, value in results._made.items()}
    assert [found[name] for name in ("t.default", "resize_.default", "split.Tensor", "add_.Tensor")] == [
        None,
        None,
        None,
        "first",
    ]
    assert found["add.Tensor"].tensors == ((torch.Size([4, 6]), (6, 1), torch.float32),)


def test_results_that_are_written_to_a_given_place_or_left_out_are_looked_up():
    """`out=` is given back, unless it had another shape; a gradient that nobody asked for is None again."""
    results, aten = step_trace._KnownResults(), torch.ops.aten
    for is_known in (False, True):
        x, place, small = (torch.empty(size, 6, device="meta") for size in (4, 4, 0))
        statistics = torch.empty(4, 1, device="meta")
        assert results.of(aten.add.out, (x, x), {"out": place}) is place
        assert results.of(aten.mul.out, (x, x), {"out": small}) is small and small.shape == (4, 6)
        backward = (x, x, [6], statistics, statistics, None, None, [True, False, False])
        gradient, *others = results.of(aten.native_layer_norm_backward.default, backward, {})
        assert gradient.shape == (4, 6) and gradient is not x and others == [None, None], is_known
    found = {key[0].__name__: value for key, value in results._made.items()}
    assert (found["add.out"], found["mul.out"]) == ("out", None)
    assert found["native_layer_norm_backward.default"].tensors[1:] == (None, None)


USES_COMPILER = """
from edgeblocks.families.dit import Dit
class Own(Dit):
    name = "own"
    def loss(self, network, batch):
        {use}
        return super().loss(network, batch)
"""


@pytest.mark.parametrize(
    "use", ["import torch._dynamo.config", "from torch._dynamo import mark_static; mark_static(batch['eps'])"]
)
def test_a_network_that_uses_the_compiler_is_traced_with_it(use, tmp_path, monkeypatch):
    """The module that stands for an unused compiler gives way; costs are the same as without."""
    (tmp_path / "uses_compiler.py").write_text(USES_COMPILER.format(use=use))
    place = {"path": "uses_compiler:Own", "folder": str(tmp_path), "sha256": ""}
    monkeypatch.setattr("edgeblocks.profiling.trace.own_family", lambda name: place if name == "own" else None)
    costs = trace_in_subprocess("own", asdict(SETTINGS), asdict(DATA), [1]).costs
    assert costs.plain == trace(FAMILY, [1]).plain


def test_a_failed_trace_says_why():
    """A family that cannot be traced is an error that names it and shows the child's own message."""
    with pytest.raises(EdgeblocksError, match=r"(?s)'dit'.*patch=5"):
        trace_in_subprocess("dit", asdict(SETTINGS) | {"patch": 5}, asdict(DATA), [1])


def test_building_a_block_on_the_meta_device_imports_no_symbolic_libraries():
    """A training process builds, binds and initialises a block with torch alone: no sympy, no dynamo."""
    program = f"""
import sys, torch
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.dit import Dit, DitSettings
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, bind_parameters_
family = Dit(DitSettings(**{asdict(SETTINGS)!r}), ImageInfo(**{asdict(DATA)!r}))
with torch.device("meta"):
    block = family.block(num_layers=2, checkpointing=False)
layout = BlockLayout.of(block, "adamw8bit")
block.reset_tables_()
buffer = BlockBuffer(layout)
bind_parameters_(block, buffer.tensors("weights"), torch.zeros(layout.num_parameters))
block.init_(torch.Generator().manual_seed(0))
assert all(parameter.isfinite().all() for parameter in block.parameters())
print(sorted({{"sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def step_cost(samples, peak):
    growth = Growth(one=peak, two=peak, three=peak)
    return StepCost(samples=samples, peak_bytes=growth, heap_bytes=growth, touched_bytes=growth, operators=growth)


@pytest.mark.parametrize(("samples", "peak"), [(2, 20), (3, 30), (4, 40), (10, 160), (1, 10), (16, 280), (32, 600)])
def test_samples_between_traced_counts_lie_on_a_line(samples, peak):
    """Between traced counts, and beyond the last, the line through the nearest two; below the first, in proportion."""
    costs = [step_cost(2, 20), step_cost(4, 40), step_cost(16, 280)]
    assert at_samples(costs, samples, lambda cost: cost.peak_bytes.at(1)) == peak
    assert at_samples(costs[:1], 3, lambda cost: cost.peak_bytes.at(1)) == 30


def test_the_child_tells_what_it_took_and_is_not_started_in_less_room(asked):
    """What it takes beside the libraries' code. (In enough room costs are the same: a damaged one is made again so.)"""
    taken = asked[1]
    assert 50 * MB < taken["own_bytes"] < taken["peak_bytes"] < 400 * MB
    assert taken["own_bytes"] < TRACING_BYTES
    with no_child_process(), pytest.raises(NoRoomToTraceError):
        trace_in_subprocess(*REQUEST, [1], room_bytes=TRACING_BYTES - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the cap needs Linux")
def test_a_child_that_is_refused_memory_says_so(monkeypatch):
    """It is no failure of the family."""
    monkeypatch.setattr(trace_module, "TRACING_BYTES", 0)
    with pytest.raises(NoRoomToTraceError):
        trace_in_subprocess(*REQUEST, [1], room_bytes=10 * MB)


@pytest.mark.parametrize(("tokens", "head_width", "rows", "columns"), [(17, 40, 128, 64), (256, 192, 256, 192)])
def test_in_half_precision_a_gpus_attention_adds_up_apart(tokens, head_width, rows, columns):
    """Its backward pass has float32 sums of the queries' gradients besides, in whole tiles, for as long as it lasts."""
    peaks = []
    for apart in (False, True):
        storages = step_trace.LiveStorages()
        with step_trace._cpu_attention(), step_trace._Follow(storages, accumulates_apart=apart):
            heads = torch.empty(2, 3, tokens, head_width, dtype=torch.bfloat16, device="meta", requires_grad=True)
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()
        peaks.append(storages.peak_bytes)
    assert peaks[1] - peaks[0] == 4 * 2 * 3 * rows * (columns + 1)
