"""compare(): what can be wrong is refused before anything is sampled."""

import pytest

import cache4diffusion as c4d
from cache4diffusion.errors import Cache4DiffusionError


class Pipeline:
    """Takes prompts; nothing may run it."""

    def __call__(self, prompt, num_inference_steps=50, height=64):
        raise AssertionError("sampled")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompts": "a red circle"}, r"compare\(prompts='a red circle'\): give a list"),
        ({"methods": "fora"}, r"compare\(methods='fora'\): give a list"),
        ({"prompts": []}, "needs prompts and methods: 0 and 1"),
        ({"methods": []}, "needs prompts and methods: 2 and 0"),
        ({"seeds": []}, "one seed per prompt: 0 for 2"),
        ({"seeds": [1, 2, 3]}, "one seed per prompt: 3 for 2"),
        ({"steps": 0}, "use 1 or more"),
        ({"batch": 0}, "use 1 or more"),
        ({"call": {"heigth": 8}}, "did you mean 'height'"),
        ({"results": "/"}, "/ cannot be written: it is a folder"),
        ({"report": __file__ + "/report.html"}, "is no folder"),
        ({}, "has no denoiser"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(changed, words):
    arguments = {"prompts": ["one", "two"], "methods": ["fora"], **changed}
    with pytest.raises(Cache4DiffusionError, match=words):
        c4d.compare(Pipeline(), **arguments)
