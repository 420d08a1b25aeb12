"""The checker accepts what was drawn, and nothing else."""

import random

import numpy as np
import pytest
from PIL import Image

from cache4diffusion.reference.checker import check, contradict, find_objects, label_components, parse_caption
from cache4diffusion.reference.scenes import FAMILIES, Scene, SceneObject, draw_scene, render


def rates(family: str, n: int) -> tuple[float, float]:
    """Share accepted with the true caption, and with one demand changed."""
    true = false = 0
    for i in range(n):
        scene = draw_scene(random.Random(f"{family} {i}"), family, held_out=i % 2 == 1)
        image = render(scene)
        true += check(image, scene.caption).ok
        false += check(image, contradict(scene.caption, i)).ok
    return true / n, false / n


@pytest.mark.parametrize("family", FAMILIES)
def test_true_captions_pass_and_changed_ones_do_not(family):
    true, false = rates(family, 200)
    assert true >= 0.995
    assert false <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_true_captions_pass_and_changed_ones_do_not_in_thousands(family):
    true, false = rates(family, 4000)
    assert true >= 0.995
    assert false <= 0.005


def picture(*objects: SceneObject, background: str = "gray") -> np.ndarray:
    return render(Scene("", "", background, objects))


RED_CIRCLE, BLUE_STAR = SceneObject("circle", "red", 32, 60, 40), SceneObject("star", "blue", 96, 64, 40)


def test_each_demand_is_reported_by_name():
    image = picture(RED_CIRCLE, BLUE_STAR)
    assert check(image, "a red circle left of a blue star on a gray background").met == {
        "background": True,
        "count": True,
        "objects": True,
        "colours": True,
        "position": True,
    }

    def missed(caption):
        return {demand for demand, met in check(image, caption).met.items() if not met}

    assert missed("a red circle left of a blue star on a white background") == {"background"}
    assert missed("a red circle above a blue star on a gray background") == {"position"}
    assert missed("a blue circle and a red star on a gray background") == {"colours"}
    assert missed("a red circle and a blue ring on a gray background") == {"objects", "colours"}
    assert missed("a circle on a gray background") == {"count", "objects"}
    assert not missed("a star and a circle on a gray background")
    assert not missed("a blue star right of a red circle on a gray background")


def test_equal_objects_may_take_either_part():
    image = picture(SceneObject("circle", "red", 32, 60, 40), SceneObject("circle", "blue", 96, 64, 40))
    assert check(image, "a blue circle and a red circle on a gray background").ok
    assert check(image, "a red circle left of a blue circle on a gray background").ok
    assert not check(image, "a blue circle left of a red circle on a gray background").ok


def test_an_extra_object_is_a_fault_but_a_speck_is_not():
    caption = "a red circle on a gray background"
    extra = picture(RED_CIRCLE, BLUE_STAR)
    assert not check(extra, caption).met["count"]
    speck = picture(RED_CIRCLE)
    speck[100:105, 100:105] = 0
    assert check(speck, caption).ok


def test_noise_and_other_sizes_are_tolerated_and_blank_images_are_not():
    caption = "a red circle left of a blue star on a gray background"
    image = picture(RED_CIRCLE, BLUE_STAR)
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    assert check(noisy, caption).ok
    assert check(Image.fromarray(image), caption).ok
    assert check(Image.fromarray(image).resize((256, 256)), caption).ok
    assert not check(np.full_like(image, 140), caption).ok
    assert not check(np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8), caption).ok


def test_a_two_coloured_or_shapeless_thing_has_no_name():
    image = picture(RED_CIRCLE)
    half = image.copy()
    half[:60][half[:60, :, 0] > 180] = (40, 80, 220)
    assert find_objects(half)[1][0].colour is None
    bar = np.full_like(image, 140)
    bar[60:70, 20:100] = (220, 40, 40)
    assert find_objects(bar)[1][0].shape is None


def flood(mask: np.ndarray) -> np.ndarray:
    """The slow way to number components."""
    labels, n = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if not labels[start]:
            n, todo = n + 1, [start]
            while todo:
                y, x = todo.pop()
                if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not labels[y, x]:
                    labels[y, x] = n
                    todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return labels


@pytest.mark.parametrize("density", [0.0, 0.4, 0.6, 0.9, 1.0])
def test_components_are_those_of_a_flood_fill(density):
    mask = np.random.default_rng(1).random((24, 31)) < density
    fast, slow = label_components(mask), flood(mask)
    assert np.array_equal(fast > 0, mask)
    assert fast.max() == slow.max()
    pairs = set(zip(fast.ravel().tolist(), slow.ravel().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_contradictions_differ_in_what_they_ask():
    for family in FAMILIES:
        for seed in range(100):
            caption = draw_scene(seed, family).caption
            assert parse_caption(contradict(caption, seed)) != parse_caption(caption)


@pytest.mark.parametrize(
    "caption",
    ["", "a red circle", "a red heart on a gray background", "five red circles on a gray background", "a cat on a mat"],
)
def test_captions_of_another_language_are_errors(caption):
    with pytest.raises(ValueError, match=r"does not describe a scene; write for example .* Shapes: circle"):
        parse_caption(caption)


def test_wrong_images_are_errors():
    with pytest.raises(ValueError, match=r"must be square and RGB, uint8 \[H, H, 3\]; this one is float32 \[8, 8, 3\]"):
        check(np.zeros((8, 8, 3), np.float32), "a circle on a gray background")
