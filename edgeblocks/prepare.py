"""What comes before training: the budget, the data, the machine, the network's costs, and the plan made of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeblocks.checked_method import check_method, is_one_stage
from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.noise import NoisePartition, partition_noise
from edgeblocks.errors import DoesNotFitError
from edgeblocks.families.base import DataInfo, ImageInfo, TextInfo
from edgeblocks.methods import FEWEST_SHARED_STEPS, METHODS, USUAL_SHARE, Master
from edgeblocks.offload.device import Target
from edgeblocks.optim.cuda_step import choice_on
from edgeblocks.planning.corrections import corrected_by_run
from edgeblocks.planning.layer_costs import LayerCosts
from edgeblocks.planning.planner import make_plan
from edgeblocks.planning.plans import FEWEST_GOOD_LAYERS, Machine, Plan, PlanRequest
from edgeblocks.planning.reasons import reason
from edgeblocks.pretrained.autoencoder import LIBRARY_BYTES, autoencoder
from edgeblocks.profiling.budgets import TOGETHER_ABOVE_BYTES, budgets_here, budgets_of, with_budgets
from edgeblocks.profiling.kept_steps import KeptSteps
from edgeblocks.profiling.latents import grid_decoding_bytes
from edgeblocks.profiling.looks import expected_looks, grid_sample_bytes, pass_seconds, quality_bytes
from edgeblocks.profiling.measurement import (
    check_precision,
    measure,
    planning_does_not_fit,
    trace_costs,
    with_precision,
    with_timed_block,
)
from edgeblocks.progress import Listener
from edgeblocks.registry import build_family, build_target, family_type
from edgeblocks.runs.disk_room import check_work_dir, existing_folder
from edgeblocks.runs.load_weights import InitialWeights, initial_weights_of
from edgeblocks.runs.open_data import open_run_data, tokenizer_bytes, vocabulary_of
from edgeblocks.runs.written_plan import TrainablePlan, WrittenPlan, written_plan
from edgeblocks.settings.fields import Settings, precision_of
from edgeblocks.tasks import TASKS
from edgeblocks.units import advised_budget, format_bytes, parse_size

if TYPE_CHECKING:
    from edgeblocks.targets.profile import Profile

PREDICTED_FOR_A_GPU = (
    "this GPU's speeds and memory are taken from what others published of it; plans were held against measurements on "
    "one kind of GPU only, an H100 (docs/gpu.md)"
)
NOTHING_LEARNED = (
    "stage {stage}, which has the readout, is frozen and begins as a new network does: in the families that come with "
    "edgeblocks a new readout is zero, so that nothing is learned; give the weights with --init, or train it too"
)
NEVER_RAN_ON_A_GPU = (
    "--method {method} was not yet run on a GPU: on processors it was, with a device's memory and its host's kept apart"
)
A_GPU_IS_HERE = "torch sees a GPU here and training uses the processor; --target cuda uses the GPU"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known before training starts."""

    settings: Settings
    budget_bytes: int
    data_set: DataSet
    data: DataInfo
    """What the network must know of the data set, of the family's `data_type`."""
    costs: LayerCosts
    machine: Machine
    plan: Plan
    initial: InitialWeights | None = None
    """The file that the weights begin with; None where they come from the seed."""
    profile: "Profile | None" = None
    """The machine that the plan is for where it is not this one."""

    @property
    def partition(self) -> NoisePartition:
        run = self.settings.run
        noise = build_family(run.family, asdict(self.settings.family), asdict(self.data), run.method).noise
        blocks = len(self.plan.method.denoisers(self.plan.layers))
        return partition_noise(noise, num_blocks=blocks, kind=run.partition, overlap=run.overlap)

    @property
    def whole_s(self) -> float:
        """Of the whole run, about: its steps, with loading and storing, and the samples and evaluations."""
        run, chosen = self.settings.run, self.plan.chosen
        family = build_family(run.family, asdict(self.settings.family), asdict(self.data), run.method)
        again = chosen.checkpointing or self.plan.method.trained_together
        pass_s = pass_seconds(chosen.step_s, batch=run.batch, again=again)
        return self.plan.predicted_s + expected_looks(run, family, self.partition, self.data_set).seconds(pass_s)

    @property
    def whole_range_s(self) -> tuple[float, float]:
        """The shortest and the longest time to expect of the whole run."""
        correction = self.machine.correction
        return correction.least * self.whole_s, correction.most * self.whole_s

    @property
    def reason(self) -> str:
        """Why the plan is as it is, in words."""
        run = self.settings.run
        return reason(
            self.plan,
            asked_blocks=None if run.blocks == "auto" else run.blocks,
            preferred_blocks=family_type(run.family).preferred_blocks,
            streamed_by_user=run.tier == "disk",
            step_by_user=run.micro_batch != "auto" or run.checkpointing != "auto",
        )

    @property
    def written_plan(self) -> TrainablePlan:
        """The plan as plan.json has it."""
        return written_plan(self.plan, self.partition.ranges)

    def to_json(self) -> dict[str, object]:
        """What `plan --json` prints: the content of plan.json, and what only a plan that is not carried out needs."""
        content = self.written_plan.to_json()
        content |= {"why": self.reason.removeprefix("why: "), "predicted_s": self.whole_s}
        content["gb_written_a_day"] = self.plan.written_a_day_bytes / 1e9
        if self.profile is None:
            content["predicted_range_s"] = list(self.whole_range_s)
        else:
            del content["predicted_step_range_s"]  # its times are a bound
            content["target"] = self.profile.model_dump()
            content["host_breakdown"] = self.plan.chosen.host_breakdown
        return content


def prepare(settings: Settings, out: Path, listener: Listener, *, speeds: Machine | None = None) -> Prepared:
    """Open the data, measure the machine, trace the network's costs, and plan.

    Args:
        speeds: a former measurement, whose speeds are planned with; None: those that are measured now.
    """
    check_work_dir(settings.run.work_dir)
    target = build_target(settings.run.target)
    target.prepare()
    check_method(settings.run)
    settings = with_budgets(settings, beside_a_host=target.host_bytes() is not None)
    check_precision(settings, target.half_precision())
    run = settings.run
    budgets = budgets_here(run, target)
    data_set, data = _open_data(
        settings,
        listener,
        budget_bytes=budgets[1] or budgets[0],
        target=target,
        training_bytes=lambda: _least_to_train(settings, existing_folder(out), target, budgets, listener),
    )
    listener.stage("planning")
    settings = with_precision(settings, data, device=target.torch_device, half=target.half_precision())
    folder = existing_folder(Path(run.work_dir or out))
    costs, machine = measure(settings, data, folder, target, budget_bytes=budgets[1] or budgets[0])
    request = _request_on(data_set, settings, data, budgets)
    machine = _with_step_times(settings, data, costs, machine, request, target, speeds=speeds)
    plan = _plan_within(costs, machine, request)
    plan = _with_gpu_warnings(plan, elsewhere=False)
    if machine.host is not None and run.optimizer == "adamw8bit":
        listener.note(_eight_bit_step_on(target.torch_device, run.master))
    if run.target == "auto" and torch_sees_a_gpu():
        plan = replace(plan, warnings=(A_GPU_IS_HERE, *plan.warnings))
    initial = _initial_weights(settings, data_set, data, plan, listener)
    begins_new = initial is None or bool(initial.fresh)
    if begins_new and plan.trained is not None and plan.chosen.blocks - 1 not in plan.trained:
        plan = replace(plan, warnings=(*plan.warnings, NOTHING_LEARNED.format(stage=plan.chosen.blocks - 1)))
    return Prepared(
        settings=_with_share(settings, plan),
        budget_bytes=budgets[0],
        data_set=data_set,
        data=data,
        costs=costs,
        machine=machine,
        plan=plan,
        initial=initial,
    )


def torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _eight_bit_step_on(device: str, master: Master) -> str:
    """What makes the 8-bit AdamW step on a GPU, and why."""
    choice = choice_on(device, rounds=master == "bf16")
    return f"8-bit AdamW step on the GPU: {choice.name}" + (f" ({choice.reason})" if choice.reason else "")


def _with_gpu_warnings(plan: Plan, *, elsewhere: bool) -> Plan:
    """The plan; where it is for a GPU, with warnings of what was never tried on one."""
    if plan.machine.host is None:
        return plan
    warnings: tuple[str, ...] = (PREDICTED_FOR_A_GPU,) if elsewhere else ()
    warnings += () if plan.method.ran_on_a_gpu else (NEVER_RAN_ON_A_GPU.format(method=plan.method.name),)
    return replace(plan, warnings=(*warnings, *plan.warnings))


def _open_data(
    settings: Settings,
    listener: Listener,
    *,
    budget_bytes: int,
    target: Target,
    training_bytes: Callable[[], int] = lambda: 0,
) -> tuple[DataSet, DataInfo]:
    """The data set, and what a network must know of it; reports shapes that are impossible for it at once."""
    run = settings.run
    data_set = open_run_data(
        settings, listener, budget_bytes=budget_bytes, target=target, training_bytes=training_bytes
    )
    if run.batch > data_set.train_examples:
        listener.note(
            f"note: a batch of {run.batch} is more than the {data_set.train_examples:,} training examples: each is in "
            f"every step {run.batch / data_set.train_examples:.3g} times, with noise of its own; --batch "
            f"{data_set.train_examples} takes each once, in less time"
        )
    data = family_type(run.family).data_info(data_set)
    build_family(run.family, asdict(settings.family), asdict(data), run.method).check_network()
    return data_set, data


def _least_to_train(
    settings: Settings, folder: Path, target: Target, budgets: tuple[int, int | None], listener: Listener
) -> int:
    """The smallest budget that would train on data that are not read yet, as far as the settings tell their shape.

    It is 0 where they do not, and where the budget is enough to train.
    """
    run = settings.run
    if target.host_bytes() is not None:  # it is the host's memory that reading lacks
        return 0
    if family_type(run.family).reads == "text":
        data: DataInfo = TextInfo(vocabulary=vocabulary_of(run), length=run.length, packed=run.packing)
    elif run.image_size is not None:
        side, channels, of_latents = run.image_size, 3, {}
        if run.vae is not None:
            network = autoencoder(run.vae)
            of_latents = {"autoencoder": network.sha256(), "picture": (side, side, network.picture_channels)}
            channels, side, _ = network.latent_shape(side, side)
        image: dict[str, Any] = {"channels": channels, "height": side, "width": side, **of_latents}
        classes = 2 if family_type(run.family).task == "classes" else 0
        data = ImageInfo(**image, num_classes=classes, mean=0.5, scale=1.0)
    else:
        return 0
    listener.stage("planning")
    # A bound: whether half precision would pay is measured on the data as they are.
    half = target.half_precision()
    settings = with_precision(settings, data, device=target.torch_device, half=half, is_here=False)
    try:
        costs, machine = measure(settings, data, folder, target, budget_bytes=budgets[0])
        more_bytes = tokenizer_bytes(run)
        machine = replace(
            machine,
            runtime_bytes=machine.runtime_bytes + more_bytes,
            planning_together_bytes=machine.planning_together_bytes + more_bytes,
        )
        _plan_within(costs, machine, _request(settings, run.batch * data.example_bytes, data, budgets))
    except DoesNotFitError as error:
        return error.as_fixed_bytes
    return 0


def _initial_weights(
    settings: Settings, data_set: DataSet, data: DataInfo, plan: Plan, listener: Listener
) -> InitialWeights | None:
    """The file that the plan's blocks begin with, after a look at all of it."""
    run = settings.run
    if run.init is not None:
        listener.stage(f"reading {run.init}")
    family = build_family(run.family, asdict(settings.family), asdict(data), run.method)
    if family.only_exact and (fresh := family.fresh_parts(data_set.class_names)):
        listener.note(f"new for the {len(data_set.class_names)} classes of the data: {', '.join(fresh)}")
    return initial_weights_of(run, family, plan.layers, data_set.class_names)


def prepare_elsewhere(settings: Settings, profile: "Profile", listener: Listener) -> Prepared:
    """The same for a machine that is not this one: memory and speeds are its profile's, nothing is measured."""
    machine = profile.machine()
    check_method(settings.run)
    settings = with_budgets(settings, beside_a_host=machine.host is not None)
    device = "cpu" if machine.host is None else "cuda"
    check_precision(settings, profile.half_precision)
    host_bytes = None if machine.host is None else machine.host.memory_bytes
    budgets = budgets_of(settings.run, profile.memory_bytes, host_bytes, profile.name)
    data_set, data = _open_data(settings, listener, budget_bytes=budgets[1] or budgets[0], target=build_target("cpu"))
    listener.stage("planning")
    settings = with_precision(settings, data, device=device, half=profile.half_precision, is_here=False)
    traced = trace_costs(settings, data, device=device)
    costs, library_bytes = traced.costs, family_type(settings.run.family).library_bytes
    library_bytes += 0 if settings.run.vae is None else LIBRARY_BYTES
    machine = replace(machine, planning_bytes=traced.peak_bytes)
    if machine.host is None:
        machine = replace(machine, runtime_bytes=machine.runtime_bytes + library_bytes)
    else:
        host = replace(machine.host, runtime_bytes=machine.host.runtime_bytes + library_bytes)
        machine = replace(machine, host=host)
    plan = make_plan(costs, machine, _request_on(data_set, settings, data, budgets))
    plan = _with_gpu_warnings(plan, elsewhere=True)
    return Prepared(
        settings=_with_share(settings, plan),
        budget_bytes=budgets[0],
        data_set=data_set,
        data=data,
        costs=costs,
        machine=machine,
        plan=plan,
        initial=_initial_weights(settings, data_set, data, plan, listener),
        profile=profile,
    )


def replan(
    settings: Settings,
    data: DataInfo,
    data_set: DataSet,
    former: WrittenPlan,
    out: Path,
    target: Target,
    listener: Listener,
) -> Plan:
    """Another plan for a run's budget on this machine, with the blocks that the run has.

    The former plan's micro-batch is kept where it fits, because then not one bit of the result changes.

    Raises:
        DoesNotFitError: the blocks do not fit.
    """
    listener.stage("planning again")
    budgets = budgets_here(settings.run, target)
    folder = existing_folder(Path(settings.run.work_dir or out))
    costs, machine = measure(settings, data, folder, target, budget_bytes=budgets[1] or budgets[0])
    request = replace(
        _request_on(data_set, settings, data, budgets),
        blocks=len(former.layers_per_block),
        window=former.layers_per_block[-1] if METHODS[settings.run.method].grows else None,
    )
    machine = _with_step_times(settings, data, costs, machine, request, target)
    try:
        # Another micro-batch sums gradients in another order, and then the last bits of every weight differ.
        return _plan_within(costs, machine, replace(request, micro_batch=former.micro_batch, checkpointing=None))
    except DoesNotFitError:
        pass
    try:
        return _plan_within(costs, machine, replace(request, micro_batch=None, checkpointing=None, tier=None))
    except DoesNotFitError as error:
        raise DoesNotFitError(
            f"the run has {request.blocks} blocks, which were fixed when it was created, and they do not fit "
            f"{format_bytes(budgets[0] if error.flag == '--mem-budget' else budgets[1] or 0)} here: "
            f"{format_bytes(error.as_fixed_bytes)} are needed; go on with {error.flag} "
            f"{advised_budget(error.as_fixed_bytes)} or more",
            error.as_fixed_bytes,
            flag=error.flag,
        ) from error


def _with_step_times(
    settings: Settings,
    data: DataInfo,
    costs: LayerCosts,
    machine: Machine,
    request: PlanRequest,
    target: Target,
    *,
    speeds: Machine | None = None,
) -> Machine:
    """The machine, with what the network's steps took here: the smallest block's now, or those of a run before.

    Args:
        speeds: as of `prepare`. What was kept of this network is taken only where those speeds rest on a run as well:
            one real time and one predicted one are no comparison.
    """
    if speeds is None:
        machine = with_timed_block(settings, data, costs, machine, target, budget_bytes=request.budget_bytes)
    else:
        machine = machine.at_speeds_of(speeds)
    known = KeptSteps(settings, data, device=target.torch_device).read()
    if known is None or (speeds is not None and speeds.correction.origin != "run"):
        return machine
    return corrected_by_run(machine, costs, request, known)


def _request_on(data_set: DataSet, settings: Settings, data: DataInfo, budgets: tuple[int, int | None]) -> PlanRequest:
    return _request(settings, data_set.batch_resident_bytes(settings.run.batch), data, budgets)


def _request(settings: Settings, data_bytes: int, data: DataInfo, budgets: tuple[int, int | None]) -> PlanRequest:
    run = settings.run
    budget_bytes, ram_budget_bytes = budgets
    fixed = {
        name: None if getattr(run, name) == "auto" else getattr(run, name)
        for name in ("blocks", "window", "micro_batch", "checkpointing", "visit_steps", "tier")
    }
    if is_one_stage(run):
        fixed["blocks"] = 1
    family = build_family(run.family, asdict(settings.family), asdict(data), run.method)
    return PlanRequest(
        budget_bytes=budget_bytes,
        batch=run.batch,
        steps=run.steps,
        optimizer=run.optimizer,
        preferred_blocks=family_type(run.family).preferred_blocks,
        good_layers=good_layers(run.family),
        method=METHODS[run.method],
        shared=_begins_as_one(settings),
        trained=run.trained_blocks,
        clip_by=run.clip_by,
        boundaries=None if run.boundaries == "auto" else run.boundaries,
        # In half precision they have that type already.
        boundary_dtype=run.boundary_dtype if precision_of(run) == "fp32" else "float32",
        precision=precision_of(run),
        master=run.master,
        keeps_ema=run.keeps_ema,
        frozen=run.frozen,
        grow=run.grow,
        resident_bytes=family.resident_bytes,
        tied_bytes=family.tied_bytes,
        gap_bytes=family.gap_bytes,
        data_bytes=data_bytes,
        grid_samples=TASKS[family_type(run.family).task].grid_samples,
        sample_bytes=grid_sample_bytes(family),
        decoding_bytes=grid_decoding_bytes(run, data),
        quality_bytes=quality_bytes(run, data),
        previews=max(run.sample_grids, run.evaluations),
        max_disk_writes=None if run.max_disk_writes is None else parse_size(run.max_disk_writes),
        ram_budget_bytes=ram_budget_bytes,
        **fixed,
    )


def _begins_as_one(settings: Settings) -> bool | None:
    """Whether blocks begin as one denoiser; None where they do if they can be cut so."""
    run = settings.run
    if run.shared != "auto":
        return run.shared > 0
    could = not METHODS[run.method].one_network and run.init is None and hasattr(settings.family, "depth")
    return None if could and run.steps >= FEWEST_SHARED_STEPS else False


def _with_share(settings: Settings, plan: Plan) -> Settings:
    """The settings, with what the plan decided of blocks that may begin as one."""
    if settings.run.shared != "auto" or plan.method.one_network:
        return settings
    share = USUAL_SHARE if plan.begins_as_one else 0.0
    return replace(settings, run=settings.run.model_copy(update={"shared": share}))


def good_layers(family: str) -> int:
    """Of a block: the usual network in its usual cut is not warned of."""
    kind = family_type(family)
    depth: int = kind.settings_type().depth
    return min(FEWEST_GOOD_LAYERS, max(1, depth // kind.preferred_blocks))


def _plan_within(costs: LayerCosts, machine: Machine, request: PlanRequest) -> Plan:
    """The plan, where planning itself keeps to a budget which bounds its two processes together.

    Raises:
        DoesNotFitError: the training does not fit, or planning does not; the budget that is advised is enough for both.
    """
    flag, budget_bytes = "--mem-budget", request.budget_bytes
    needed_bytes, held_bytes = machine.planning_together_bytes, machine.runtime_bytes
    enough = replace(request, budget_bytes=max(budget_bytes, needed_bytes))
    if request.ram_budget_bytes is not None and machine.host is not None:
        flag, budget_bytes, held_bytes = "--ram-budget", request.ram_budget_bytes, machine.host.runtime_bytes
        enough = replace(request, ram_budget_bytes=max(budget_bytes, needed_bytes))
    try:
        plan = make_plan(costs, machine, request)
    except DoesNotFitError as error:
        if error.flag != flag or not TOGETHER_ABOVE_BYTES < error.as_fixed_bytes < needed_bytes:
            raise
        make_plan(costs, machine, enough)
        raise planning_does_not_fit(needed_bytes, held_bytes, budget_bytes, flag) from error
    if TOGETHER_ABOVE_BYTES < budget_bytes < needed_bytes:
        raise planning_does_not_fit(needed_bytes, held_bytes, budget_bytes, flag)
    return plan
