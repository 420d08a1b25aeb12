"""Moving scenes and their checker: what was drawn passes, anything else does not."""

import random

import numpy as np
import pytest

from cache4diffusion.reference.motion import (
    DIRECTIONS,
    FRAME_SIZE,
    FRAMES,
    MIN_TRAVEL,
    check_clip,
    contradict_motion,
    draw_clip,
    format_motion,
    held_out_clips,
    held_out_motions,
    parse_motion,
    render_clip,
)


def clips(n=8):
    return [(clip, render_clip(clip)) for clip in (draw_clip(seed) for seed in range(n))]


def test_true_captions_pass_and_changed_ones_do_not():
    for seed, (clip, frames) in enumerate(clips(6)):
        assert frames.shape == (FRAMES, FRAME_SIZE, FRAME_SIZE, 3)
        assert check_clip(frames, clip.caption).ok, clip
        changed = contradict_motion(clip.caption, seed)
        verdict = check_clip(frames, changed)
        assert changed != clip.caption
        assert sum(not is_met for is_met in verdict.met.values()) == 1, (clip, changed)


def test_the_track_is_where_the_shape_was_drawn():
    for clip, frames in clips(3):
        track = check_clip(frames, clip.caption).track
        assert abs(track[0].x - clip.first[0]) <= 2
        assert abs(track[-1].x - clip.last[0]) <= 2
        if clip.shape in ("circle", "square", "ring", "cross"):  # others are not as tall as their box
            assert abs(track[-1].y - clip.last[1]) <= 2


def test_what_does_not_move_so_fails_on_motion_alone():
    clip, frames = clips(1)[0]
    still = np.stack([frames[3]] * FRAMES)
    there_and_back = np.concatenate([frames, frames[-2:-6:-1]])
    shuffled = frames[random.Random(1).sample(range(FRAMES), FRAMES)]
    for wrong in (still, frames[::-1], there_and_back, shuffled):
        met = check_clip(wrong, clip.caption).met
        assert [name for name, is_met in met.items() if not is_met] == ["motion"]


def test_a_shape_that_vanishes_or_changes_is_noticed():
    (clip, frames), *others = clips(8)
    gone = frames.copy()
    gone[4] = frames[4, 0, 0]
    assert not check_clip(gone, clip.caption).met["count"]
    other = next(f for c, f in others if c.shape != clip.shape and c.colour != clip.colour)
    for count, is_met in ((2, True), (3, False)):
        mixed = np.concatenate([frames[:-count], other[-count:]])
        assert check_clip(mixed, clip.caption).met["objects"] is is_met
        assert check_clip(mixed, clip.caption).met["colours"] is is_met


def test_captions_are_read_as_they_are_written():
    for clip, _ in clips(5):
        assert format_motion(parse_motion(clip.caption)) == clip.caption
    with pytest.raises(ValueError, match="does not describe a moving scene"):
        parse_motion("a red circle on a gray background")
    with pytest.raises(ValueError, match="two frames or more, got 1"):
        check_clip(render_clip(draw_clip(0))[:1], draw_clip(0).caption)


def test_training_never_draws_what_is_held_out_and_evaluation_nothing_else():
    rng = random.Random(0)
    kinds = {(c.direction, c.colour, c.shape) for c in (draw_clip(rng) for _ in range(3000))}
    assert kinds.isdisjoint(held_out_motions())
    assert len(kinds | held_out_motions()) == 4 * 48
    judged = held_out_clips(40)
    assert {(c.direction, c.colour, c.shape) for c in judged} <= held_out_motions()
    assert [c.direction for c in judged[:4]] == list(DIRECTIONS)
    assert judged == held_out_clips(60)[:40]


def test_every_clip_moves_far_enough_and_stays_inside():
    for seed in range(300):
        clip = draw_clip(seed)
        travel = np.subtract(clip.last, clip.first) @ DIRECTIONS[clip.direction]
        assert travel >= MIN_TRAVEL + 8
        for x, y in (clip.first, clip.last):
            assert clip.size // 2 + 2 <= min(x, y)
            assert max(x, y) <= FRAME_SIZE - clip.size // 2 - 2
