"""What a run remembers of the machine that it was created on."""

import json

from support.random_run import make_run

from edgeblocks.runs.create import changed_environment, environment
from edgeblocks.settings.fields import RunSettings


def test_what_decides_the_bits_is_compared_when_a_run_goes_on(tmp_path):
    """Vector instructions, processor and torch are named; a run of an earlier edgeblocks has no instructions."""
    run = make_run(tmp_path / "run", layers=(1,), width=16, heads=2).directory
    assert changed_environment(run) is None
    env = json.loads((run.path / "env.json").read_text())
    former = env.pop("instructions")
    env.pop("sha256")
    run.write_json("env.json", env)
    assert changed_environment(run) is None
    run.write_json("env.json", {**env, "instructions": "DEFAULT", "packages": {"torch": "1.0"}})
    changed = changed_environment(run)
    assert changed.startswith(f"its vector instructions 'DEFAULT', now {former!r}; torch '1.0', now '")
    run.write_json("env.json", {**env, "gpu": "NVIDIA H100", "adamw8bit": "bitsandbytes 0.50.2"})
    assert changed_environment(run) == "the 8-bit AdamW step by 'bitsandbytes 0.50.2', now 'edgeblocks'"
    (run.path / "env.json").write_text("{")
    assert changed_environment(run) is None


def test_what_makes_the_8_bit_step_is_looked_for_where_it_is_used():
    """With fp32 moments nothing is asked of a library, whose memory a plan has not counted."""
    assert environment(RunSettings())["adamw8bit"] == "edgeblocks"
    assert "adamw8bit" not in environment(RunSettings(optimizer="adamw"))
