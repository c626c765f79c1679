import re
from dataclasses import fields
from importlib import resources

import pytest

from edgeblocks.errors import ConfigError
from edgeblocks.planning.plans import Machine
from edgeblocks.targets.profile import Profile, load_profile, parse_profile, profile_names

GIB = 2**30
PCIE_BYTES_PER_S_A_LANE = {"3.0": 0.985e9, "4.0": 1.969e9}
PUBLISHED = {  # fp32 peak in FLOP/s, memory bandwidth in bytes/s
    "laptop-8gb": (4 * 1.6e9 * 32, 19.2e9),
    "laptop-16gb": (6 * 2.1e9 * 32, 51.2e9),
    "rtx3050-4gb": (7.13e12, 192e9),
    "rtx2060-6gb": (6.45e12, 336e9),
    "rtx3060ti-8gb": (16.2e12, 448e9),
    "rtx4060-8gb": (15.11e12, 272e9),
    "rtx3060-12gb": (12.74e12, 360e9),
    "rtx4060ti-16gb": (22.06e12, 288e9),
    "rtx3090-24gb": (35.58e12, 936e9),
    "rtx4090-24gb": (82.6e12, 1008e9),
}


@pytest.fixture(params=profile_names())
def profile(request):
    return load_profile(request.param)


def text_of(name):
    return (resources.files("edgeblocks.targets") / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")


def stated_gb(text, pattern):
    return int(re.search(pattern, text)[1])


def problems_of(text):
    with pytest.raises(ConfigError) as caught:
        parse_profile("mine", text)
    return caught.value.problems


def test_the_promised_machines_exist():
    """Two laptops without a GPU, and GPUs of 4, 6, 8, 12, 16 and 24 GB; each has its published figures in this file."""
    gpus = {stated_gb(name, r"-(\d+)gb$") for name in profile_names() if load_profile(name).device == "cuda"}
    cpus = {name for name in profile_names() if load_profile(name).device == "cpu"}
    assert gpus == {4, 6, 8, 12, 16, 24}
    assert cpus == {"laptop-8gb", "laptop-16gb"}
    assert set(PUBLISHED) == set(profile_names())


def test_a_machine_has_no_more_memory_than_its_name_and_description_say(profile):
    """The name states the device's GB and the description the RAM: a bit less of each is usable, never more."""
    on_device, ram = stated_gb(profile.name, r"-(\d+)gb$"), stated_gb(profile.description, r"(\d+) GB RAM")
    assert 0.85 * on_device * GIB < profile.memory_bytes < on_device * GIB
    assert 0.85 * ram * GIB < profile.host_memory_bytes < ram * GIB
    assert profile.runtime_bytes < 0.15 * profile.memory_bytes
    assert profile.host_runtime_bytes < 0.2 * profile.host_memory_bytes


def test_only_a_gpu_has_a_link_and_a_memory_of_its_own(profile):
    """On a cpu the device is the host; a GPU's copies are slower than the lanes that its description names."""
    if profile.device == "cpu":
        assert profile.link_bytes_per_s is None
        assert profile.memory_bytes == profile.host_memory_bytes
        assert profile.runtime_bytes == profile.host_runtime_bytes
    else:
        generation, lanes = re.search(r"PCIe (\d\.0) x(\d+)", profile.description).groups()
        assert 0.6 < profile.link_bytes_per_s / (PCIE_BYTES_PER_S_A_LANE[generation] * int(lanes)) < 0.85


def test_no_speed_comes_near_the_published_peak(profile):
    """Arithmetic stays below 0.6 of the vendor's peak, written bytes below half of the bandwidth: reads take half."""
    flops_per_s, bandwidth = PUBLISHED[profile.name]
    assert 0.35 < profile.flops_per_s / flops_per_s < 0.6
    assert 0.15 < profile.memory_bytes_per_s / bandwidth < 0.45
    assert profile.disk_write_bytes_per_s < profile.disk_read_bytes_per_s < 7e9
    assert 1e-6 < profile.operator_s < 2e-5


def test_every_figure_says_where_it_errs_and_every_file_what_is_assumed(profile):
    """Above each key stands whether it is pessimistic or optimistic (or neither); the sources end with assumptions."""
    remark, keys = "", []
    for line in text_of(profile.name).partition("\nsources:")[0].splitlines():
        if line.startswith("#"):
            remark += line.lower()
            continue
        key = line.partition(":")[0]
        if key and key not in ("description", "device"):
            keys.append(key)
            assert re.search("pessimistic|optimistic|neither way", remark), key
        remark = ""
    assert set(keys) == set(Profile.model_fields) - {"name", "description", "device", "sources"}
    assert len(profile.sources) >= 4
    assert profile.sources[-1].startswith("Assumed and nowhere measured: ")


def test_the_planner_gets_the_same_figures(profile):
    """`machine()` copies every figure that the planner's Machine has a field for."""
    machine = profile.machine()
    assert isinstance(machine, Machine)
    same = {field.name for field in fields(Machine)} & set(Profile.model_fields)
    assert len(same) >= 7
    for name in same:
        assert getattr(machine, name) == getattr(profile, name)


def test_a_misspelled_name_lists_all_and_names_the_closest():
    """An unknown machine is refused with all names; a path is not a name."""
    with pytest.raises(ConfigError) as caught:
        load_profile("rtx3060-8gb")
    assert "'rtx3060-8gb'" in str(caught.value)
    assert "did you mean 'rtx3060" in str(caught.value)
    assert all(name in str(caught.value) for name in profile_names())
    with pytest.raises(ConfigError, match="there is no machine profile"):
        load_profile("../profiles/laptop-8gb")


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("cores", "four", "a valid integer"),
        ("cores", "true", "a valid integer"),
        ("memory_bytes", "7.7e+9", "a valid integer"),
        ("runtime_bytes", "0", "greater than 0"),
        ("flops_per_s", "-1.0", "greater than 0"),
        ("flops_per_s", ".inf", "a finite number"),
        ("operator_s", ".nan", "a finite number"),
        ("operator_s", "null", "a valid number"),
        ("link_bytes_per_s", "fast", "a valid number"),
        ("device", "gpu", "'cpu' or 'cuda'"),
        ("description", "' '", "match pattern '\\S'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(key, value, needed):
    """Each key's type is checked; the message shows key, value and what is needed."""
    text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text_of("laptop-8gb"), flags=re.MULTILINE)
    (problem,) = problems_of(text)
    assert problem.startswith(f"machine profile mine: {key}=")
    assert problem.endswith(needed)


@pytest.mark.parametrize("sources", ["[]", "a book", "[1]"])
def test_a_machine_without_sources_is_refused(sources):
    """Sources are a list of texts with at least one."""
    text = text_of("laptop-8gb").partition("\nsources:")[0] + f"\nsources: {sources}\n"
    problems = problems_of(text)
    assert problems and all(problem.startswith("machine profile mine: sources") for problem in problems)


def test_all_problems_are_reported_at_once():
    """A missing key, an unknown one with the closest known, and a wrong value come in one error."""
    text = text_of("rtx3060-12gb").replace("\ncores:", "\ncorse:").replace("device: cuda", "device: tpu")
    problems = problems_of(text)
    assert len(problems) == 3
    assert any("unknown key 'corse'; did you mean 'cores'?" in problem for problem in problems)
    assert any("cores is missing" in problem for problem in problems)
    assert any("device='tpu'" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "old", "new", "key"),
    [
        ("rtx3060-12gb", "link_bytes_per_s: 12_000_000_000", "link_bytes_per_s: null", "link_bytes_per_s=None"),
        ("laptop-8gb", "link_bytes_per_s: null", "link_bytes_per_s: 1_000_000", "link_bytes_per_s=1e+06"),
        ("laptop-8gb", "host_memory_bytes: 7_700_000_000", "host_memory_bytes: 8_000_000_000", "host_memory_bytes="),
        ("rtx3060-12gb", "\nruntime_bytes: 600_000_000", "\nruntime_bytes: 600_000_000_000", "runtime_bytes="),
    ],
)
def test_figures_that_contradict_each_other_are_refused(name, old, new, key):
    """A GPU without a link, a cpu with one or with two memories, and a runtime larger than the memory are errors."""
    assert old in text_of(name)
    (problem,) = problems_of(text_of(name).replace(old, new))
    assert problem.startswith(f"machine profile mine: {key}")


@pytest.mark.parametrize(
    ("text", "word"), [("a: [", "not valid YAML"), ("", "found NoneType"), ("- laptop", "found list")]
)
def test_what_is_no_mapping_is_refused(text, word):
    """Damaged YAML, an empty file and a list are errors of the profile, not tracebacks."""
    (problem,) = problems_of(text)
    assert "machine profile mine" in problem
    assert word in problem


def test_a_profile_is_read_back_as_written():
    """Numbers keep their value and their type: bytes and cores whole, speeds not."""
    profile = load_profile("laptop-8gb")
    assert parse_profile("mine", text_of("laptop-8gb")) == profile.model_copy(update={"name": "mine"})
    assert (type(profile.memory_bytes), type(profile.flops_per_s)) == (int, float)
    assert (profile.operator_s, profile.cores) == (4e-6, 4)
