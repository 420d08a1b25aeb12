"""Scenes: what is drawn is what the caption says, the same for every seed, and never what is held out."""

import random
from itertools import islice

import numpy as np
import pytest

from cache4diffusion.reference.checker import format_caption, parse_caption
from cache4diffusion.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    TRAINING_MIX,
    combinations_of,
    draw_scene,
    held_out_captions,
    held_out_combinations,
    held_out_scenes,
    render,
    shape_mask,
    training_scenes,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_draws_the_same_scene_and_image(family):
    first, second = draw_scene(7, family), draw_scene(7, family)
    assert first == second
    assert np.array_equal(render(first), render(second))
    assert first.family == family
    assert draw_scene(8, family) != first


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_name_what_is_drawn(family):
    for seed in range(200):
        scene = draw_scene(seed, family)
        demands = parse_caption(scene.caption)
        assert format_caption(demands) == scene.caption
        assert demands.background == scene.background
        assert len(demands.objects) == len(scene.objects)
        for thing, (colour, shape) in zip(scene.objects, demands.objects, strict=True):
            assert thing.shape == shape
            assert colour in (None, thing.colour)


def test_objects_lie_inside_the_image_and_apart():
    for scene in islice(training_scenes(3), 2000):
        for i, thing in enumerate(scene.objects):
            assert thing.size // 2 + 2 <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) <= IMAGE_SIZE - thing.size // 2 - 2
            for other in scene.objects[:i]:
                apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert apart >= (thing.size + other.size) / 2 + 4


def test_position_captions_are_true():
    unit = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
    for seed in range(300):
        scene = draw_scene(seed, "position")
        relation = parse_caption(scene.caption).relation
        first, second = scene.objects
        dx, dy = second.x - first.x, second.y - first.y
        along = dx * unit[relation][0] + dy * unit[relation][1]
        assert along > 2 * abs(dx * unit[relation][1] + dy * unit[relation][0])


def test_the_training_mix_is_a_distribution_over_the_families():
    assert tuple(TRAINING_MIX) == FAMILIES
    assert sum(TRAINING_MIX.values()) == pytest.approx(1)


def test_training_never_draws_a_held_out_combination():
    held_out = set(held_out_combinations())
    drawn = {combination for scene in islice(training_scenes(0), 20_000) for combination in combinations_of(scene)}
    assert not drawn & held_out
    assert len(drawn) > 800  # the other combinations do come up


def test_the_held_out_list_is_fixed_and_large_enough():
    combinations = held_out_combinations()
    assert len(set(combinations)) == len(combinations) == 48 + 24 + 48
    relations = [c for c in combinations if c.relation in RELATIONS]
    assert len(relations) == 48
    assert {c.subjects[0][0] for c in relations} == set(COLOURS)
    assert {c.subjects[0][1] for c in relations} == set(SHAPES)


def test_held_out_captions_are_balanced_and_use_every_held_out_relation():
    scenes = held_out_scenes(480)
    assert [scene.caption for scene in scenes] == held_out_captions(480) != held_out_captions(480, seed=1)
    assert all(sum(scene.family == family for scene in scenes) == 80 for family in FAMILIES)
    held_out = set(held_out_combinations())
    for family in ("position", "counting", "color_attr"):
        met = [c for scene in scenes if scene.family == family for c in combinations_of(scene)]
        assert len(met) == 80
        assert set(met) <= held_out
    met = {c for scene in scenes for c in combinations_of(scene)}
    assert met == held_out


def test_an_image_has_its_background_in_the_corners_unless_something_stands_there():
    scene = draw_scene(1, "single_object")
    image = render(scene)
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()
    assert corners == [list(BACKGROUNDS[scene.background])] * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_centred_and_touch_no_border(shape):
    mask = shape_mask(shape, 48)
    assert mask.shape == (52, 52)
    assert mask.min() == 0
    assert mask.max() == 1
    assert mask[[0, -1]].max() == mask[:, [0, -1]].max() == 0
    assert np.allclose(mask, mask[:, ::-1], atol=0.26)  # all six are symmetric, up to one sub-pixel column


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="unknown family 'colours'; the families are single_object"):
        draw_scene(random.Random(0), "colours")
    with pytest.raises(ValueError, match="unknown shape 'heart'"):
        shape_mask("heart", 40)
