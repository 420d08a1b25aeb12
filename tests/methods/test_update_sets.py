"""BAC's update sets: the best there are, and upstream parts that follow feed-forward ones."""

import itertools
import random

import pytest

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.update_sets import bubbled, caching_error, update_steps


def matrix(count, seed):
    draw = random.Random(seed)
    return [[draw.random() if j != i else 1.0 for j in range(count)] for i in range(count)]


def worth(similarity, steps):
    """How alike the steps are to what stands for them, summed up one by one."""
    return sum(similarity[max(c for c in steps if c <= j)][j] for j in range(len(similarity)) if j not in steps)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_update_steps_are_the_best_of_all_subsets(count, seed):
    similarity = matrix(count, seed)
    for budget in range(1, count + 1):
        found = update_steps(similarity, budget)
        every = [(0, *rest) for rest in itertools.combinations(range(1, count), budget - 1)]
        assert found in every
        assert worth(similarity, found) == pytest.approx(max(worth(similarity, steps) for steps in every))


def test_with_a_budget_of_all_steps_nothing_is_cached_and_nothing_lost():
    similarity = matrix(7, 0)
    assert update_steps(similarity, 7) == tuple(range(7))
    assert caching_error(similarity, range(7)) == 0


def test_of_equal_sets_the_earlier_steps_are_taken():
    assert update_steps([[0.5] * 6 for _ in range(6)], 3) == (0, 1, 2)


def test_similarities_of_neighbours_alone_spare_the_most_alike_transitions():
    """If only neighbours count, the best set refreshes behind the least similar transitions."""
    neighbours = [0.9, 0.2, 0.8, 0.1, 0.7]  # of step i and i + 1
    similarity = [[neighbours[j - 1] if j else 1.0 for j in range(6)] for _ in range(6)]
    assert update_steps(similarity, 3) == (0, 2, 4)


def test_the_caching_error_is_what_the_similarity_lacks():
    similarity = matrix(8, 3)
    steps = update_steps(similarity, 3)
    assert caching_error(similarity, steps) == pytest.approx(8 - 3 - worth(similarity, steps))


ORDER = ["0.attn", "0.cross", "0.ffn", "1.attn", "1.cross", "1.ffn"]
UPDATES = {name: (0, 2 + i) for i, name in enumerate(ORDER)}
ERRORS = {"0.attn": 0.1, "0.cross": 0.9, "0.ffn": 0.5, "1.attn": 0.8, "1.cross": 0.2, "1.ffn": 0.0}
READERS = ["0.ffn", "1.ffn"]


@pytest.mark.parametrize("sources", range(7))
def test_bubbling_only_adds_steps_and_keeps_sources_in_step_with_their_readers(sources):
    found = bubbled(UPDATES, ERRORS, READERS, sources)
    assert list(found) == ORDER
    assert all(set(UPDATES[name]) <= set(found[name]) for name in ORDER)
    for reader in READERS:
        upstream = sorted(ORDER[: ORDER.index(reader)], key=lambda name: -ERRORS[name])[:sources]
        assert all(set(found[reader]) <= set(found[name]) for name in upstream)


def test_without_sources_nothing_changes():
    assert bubbled(UPDATES, ERRORS, READERS, 0) == UPDATES


def test_bubbling_goes_from_late_to_early_parts():
    """The last part's steps reach the first feed-forward part, and with it the part in front of that."""
    found = bubbled(UPDATES, {**ERRORS, "0.ffn": 1.0}, READERS, 1)
    assert found == {**UPDATES, "0.ffn": (0, 4, 7), "0.cross": (0, 3, 4, 7)}


@pytest.mark.parametrize("budget", [0, 5])
def test_a_budget_that_cannot_be_is_refused(budget):
    with pytest.raises(SettingError, match="budget must be 1 to 4 steps"):
        update_steps(matrix(4, 0), budget)
