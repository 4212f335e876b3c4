"""The curriculum of docs/specification.md, section 3, stage by stage, written out by hand."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from dataset import Curriculum


def make(method="coconut", c_thought=1, per_stage=3, last=3, pad=True, enabled=True):
    return Curriculum(method, c_thought, per_stage, last, pad, enabled)


@pytest.mark.parametrize("method", ["coconut", "no_thoughts"])
def test_stage_counts_whole_groups_of_epochs_and_stops_one_past_the_maximum(method):
    stages = [make(method, per_stage=2, last=2).stage(epoch) for epoch in range(12)]
    assert stages == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]


def test_one_epoch_a_stage():
    assert [make(per_stage=1, last=1).stage(epoch) for epoch in range(5)] == [0, 1, 2, 2, 2]


def test_papers_gsm8k_schedule_has_its_last_stage_from_epoch_12():
    curriculum = make(c_thought=2, per_stage=3, last=3)
    assert [curriculum.stage(epoch) for epoch in (0, 2, 3, 11, 12, 24)] == [0, 0, 1, 3, 4, 4]


@pytest.mark.parametrize("method", ["cot", "no_cot"])
@pytest.mark.parametrize("enabled", [True, False])
def test_cot_and_no_cot_never_leave_stage_0(method, enabled):
    curriculum = make(method, per_stage=1, enabled=enabled)
    assert {curriculum.stage(epoch) for epoch in range(50)} == {0}
    assert curriculum.last_stage == 0


@pytest.mark.parametrize("method", ["coconut", "no_thoughts"])
def test_without_curriculum_every_epoch_is_the_last_stage(method):
    curriculum = make(method, per_stage=3, last=3, enabled=False)
    assert {curriculum.stage(epoch) for epoch in range(20)} == {4}


@pytest.mark.parametrize("c_thought", [1, 2])
def test_without_curriculum_all_steps_are_dropped_and_all_latents_are_there(c_thought):
    curriculum = make(c_thought=c_thought, last=3, enabled=False)
    plans = [curriculum.plan(curriculum.stage(0), num_steps) for num_steps in (0, 2, 3, 7)]
    assert plans == [(n, 3 * c_thought) for n in (0, 2, 3, 7)]


# (dropped steps, latent positions) at stages 0, 1, 2, 3, 4 with max_latent_stage 3
PLANS = [
    ("coconut", 1, True, 5, [(0, 0), (1, 1), (2, 2), (3, 3), (5, 3)]),
    ("coconut", 2, True, 5, [(0, 0), (1, 2), (2, 4), (3, 6), (5, 6)]),
    ("coconut", 1, False, 5, [(0, 0), (1, 1), (2, 2), (3, 3), (5, 3)]),
    ("coconut", 2, False, 5, [(0, 0), (1, 2), (2, 4), (3, 6), (5, 6)]),
    # fewer steps than stages: padded to the stage, or no more latents than steps
    ("coconut", 1, True, 2, [(0, 0), (1, 1), (2, 2), (2, 3), (2, 3)]),
    ("coconut", 2, True, 2, [(0, 0), (1, 2), (2, 4), (2, 6), (2, 6)]),
    ("coconut", 1, False, 2, [(0, 0), (1, 1), (2, 2), (2, 2), (2, 2)]),
    ("coconut", 2, False, 2, [(0, 0), (1, 2), (2, 4), (2, 4), (2, 4)]),
    ("coconut", 2, True, 0, [(0, 0), (0, 2), (0, 4), (0, 6), (0, 6)]),
    ("coconut", 2, False, 0, [(0, 0), (0, 0), (0, 0), (0, 0), (0, 0)]),
    ("no_thoughts", 2, True, 5, [(0, 0), (1, 0), (2, 0), (3, 0), (5, 0)]),
    ("no_thoughts", 1, False, 2, [(0, 0), (1, 0), (2, 0), (2, 0), (2, 0)]),
    ("cot", 2, True, 5, [(0, 0)] * 5),
    ("cot", 1, False, 0, [(0, 0)] * 5),
    ("no_cot", 2, True, 5, [(5, 0)] * 5),
    ("no_cot", 1, False, 0, [(0, 0)] * 5),
]


@pytest.mark.parametrize("method, c_thought, pad, num_steps, plans", PLANS)
def test_plan_of_every_stage(method, c_thought, pad, num_steps, plans):
    curriculum = make(method, c_thought, last=3, pad=pad)
    assert [curriculum.plan(stage, num_steps) for stage in range(5)] == plans


@pytest.mark.parametrize("pad", [True, False])
def test_far_past_the_maximum_the_latents_stay_at_it(pad):
    assert make(c_thought=2, last=3, pad=pad).plan(9, 12) == (12, 6)


def test_a_maximum_of_zero_drops_all_steps_at_once_without_latents():
    curriculum = make(last=0, per_stage=1)
    assert [curriculum.stage(epoch) for epoch in range(3)] == [0, 1, 1]
    assert [curriculum.plan(stage, 4) for stage in (0, 1)] == [(0, 0), (4, 0)]


@pytest.mark.parametrize("method", ["coconut", "no_thoughts"])
@pytest.mark.parametrize(
    "num_steps, stage", [([0, 0], 0), ([1, 0], 1), ([2, 3, 1], 3), ([4], 4), ([9, 2], 4)]
)
def test_first_stage_in_which_no_record_has_text_left(method, num_steps, stage):
    curriculum = make(method, last=3)
    assert curriculum.first_stage_without_text(np.array(num_steps)) == stage
    for s in range(5):
        has_text = any(curriculum.plan(s, steps)[0] < steps for steps in num_steps)
        assert has_text == (s < stage)


def test_schedule_cannot_change_during_a_run():
    with pytest.raises(FrozenInstanceError):
        make().c_thought = 3
