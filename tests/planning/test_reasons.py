"""Why a plan is as it is, in words."""

import re
from dataclasses import replace

import pytest
from support.made_up_plans import GPU, MACHINE, MB, REQUEST, costs

from edgeblocks.methods import EXACT
from edgeblocks.planning.planner import make_plan
from edgeblocks.planning.reasons import reason

SLOW_DISK = replace(MACHINE, disk_read_bytes_per_s=2e6, disk_write_bytes_per_s=2e6)
FEW_MOVES = {"batch": 4096, "budget_bytes": 700 * MB}
CASES = {
    "only small steps fit": (
        MACHINE,
        FEW_MOVES,
        r"the budget decides: 3 blocks, .*holds all of them; micro-batches of \d+",
    ),
    "nothing is short": (MACHINE, {}, r"no limit is felt: 3 blocks, the usual number .* holds all of them; computing"),
    "fewer blocks do not fit": (
        MACHINE,
        {"budget_bytes": 265 * MB},
        r"the budget decides: \d+ blocks, because \d+ wou",
    ),
    "not all blocks fit": (MACHINE, {"budget_bytes": 290 * MB}, r"the budget decides: .*holds \d of them .* all would"),
    "--blocks": (MACHINE, {"blocks": 6}, r"--blocks decides: 6 blocks, as --blocks asks; the budget holds all of them"),
    "tier=disk": (MACHINE, {"tier": "disk"}, r"no limit is felt: .*blocks wait on disk, as tier=disk asks; moving"),
    "a slow disk": (
        SLOW_DISK,
        {"tier": "disk", "visit_steps": 1},
        r"the disk decides: .*moving blocks takes \d\d.\d% of",
    ),
    "exact": (
        MACHINE,
        {"method": EXACT, "boundaries": "ram"},
        r"no limit is felt: .* because the cut changes no resul",
    ),
    "a GPU": (GPU, {"budget_bytes": 1500 * MB}, r"no limit is felt: 3 blocks"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_names_the_limit_that_decides(case):
    machine, changes, told = CASES[case]
    request = replace(REQUEST, **changes)
    plan = make_plan(costs(), machine, request)
    said = reason(
        plan,
        asked_blocks=request.blocks,
        preferred_blocks=request.preferred_blocks,
        streamed_by_user=request.tier == "disk",
    )
    assert re.match(f"why: {told}", said), said
    fixed = reason(plan, asked_blocks=3, preferred_blocks=3, streamed_by_user=False, step_by_user=True)
    assert "the fastest that fit" not in fixed
    assert ("micro-batches of" in said) == (plan.chosen.accumulation > 1 or plan.chosen.checkpointing)
