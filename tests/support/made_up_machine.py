"""A machine without problems, and control groups to examine instead of the real ones."""

from dataclasses import replace

from edgeblocks.doctor import surroundings
from edgeblocks.doctor.findings import Budgets, Disk, Kernel, Memory, PresetFit, Processor, Report, TrainingUse
from edgeblocks.planning.plans import Machine

GB = 10**9
LIMIT_BYTES = 2 * GB


def groups(folder, files=None):
    """A folder like /sys/fs/cgroup."""
    for name, content in (files or {"memory.max": LIMIT_BYTES, "memory.current": 0}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content}\n")
    return folder


def healthy():
    """A report of a machine without problems."""
    processor = Processor(
        name="a processor",
        cores=4,
        physical_cores=2,
        allowed_cores=4,
        quota_cores=None,
        load_1min=0.1,
        others_share=0.02,
        omp_num_threads=None,
    )
    memory = Memory(
        total_bytes=16 * GB,
        limit_bytes=None,
        limit_file=None,
        available_bytes=12 * GB,
        swap_total_bytes=2 * GB,
        swap_used_bytes=0,
        data_limit_bytes=None,
        address_limit_bytes=None,
    )
    disk = Disk(
        folder="/data",
        mount_point="/",
        file_system="ext4",
        total_bytes=500 * GB,
        free_bytes=200 * GB,
        file_limit_bytes=None,
        probe_bytes=2**28,
        write_bytes_per_s=400e6,
        read_bytes_per_s=900e6,
        read_way="direct",
        sync_s=0.002,
        reason=None,
    )
    kernel = Kernel(
        name="torch_bf16_matmul",
        what="torch bf16 matrix product",
        works=True,
        time_s=2e-3,
        fp32_time_s=1e-3,
        error=0.003,
        tolerance=0.02,
    )
    use = TrainingUse(
        target="cpu",
        precision="fp32",
        reason="this processor has no instructions for bf16",
        adamw8bit="edgeblocks",
        adamw8bit_reason=None,
        attention="flash attention",
        attention_with_mask="flash attention",
    )
    fit = PresetFit(
        preset="dit-tiny",
        example="8x8x1",
        parameters=3_800_000,
        smallest_bytes=318_000_000,
        budget_bytes=8 * GB,
        fits=True,
        sensible=True,
        blocks=3,
        layers_per_block=4,
        micro_batch=64,
        checkpointing=False,
        tier="ram",
        predicted_peak_bytes=500_000_000,
        disk_bytes=10**8,
        step_s=0.06,
        steps=1000,
        total_s=180.0,
    )
    return Report(
        system="Linux",
        processor=processor,
        memory=memory,
        disk=disk,
        gpus=(),
        gpu_note="torch is built without CUDA",
        machine=Machine(
            name="cpu",
            runtime_bytes=270_000_000,
            flops_per_s=2e11,
            memory_bytes_per_s=1e10,
            operator_s=2e-6,
            disk_read_bytes_per_s=1e9,
            disk_write_bytes_per_s=1e9,
        ),
        versions=surroundings.installed_versions(),
        training=(use,),
        kernels=(kernel,),
        presets=(fit,),
        budgets=Budgets(smallest_bytes=318_000_000, half_bytes=8 * GB, largest_bytes=11 * GB),
        problems=(),
        unknown={},
        seconds=12.0,
    )


def with_part(part, **changes):
    """The healthy report with a part's fields changed."""
    report = healthy()
    return replace(report, **{part: replace(getattr(report, part), **changes)})
