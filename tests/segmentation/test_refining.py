"""Which of SAM 2's masks are believed, and what it is asked, with a segmenter whose answers are given."""

import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.segmentation.click_prompts import Prompt
from keysync_jax.segmentation.refining import prompts_of, refine, stretches

N, H, W = 80, 40, 60
LANDMARKS = np.zeros((N, 68, 2))
LANDMARKS[:, 36:42] = (20, 8)
LANDMARKS[:, 42:48] = (40, 8)
LANDMARKS[:, 27] = (30, 10)


class Fixed:
    """Follows by the book: on every frame that it is asked about, the mask of `answers`."""

    def __init__(self, answers):
        self.answers, self.calls = answers, []

    def follow(self, frames, prompts, reverse=False, limit=None):
        start = min(prompt.frame for prompt in prompts)
        self.calls.append((start, tuple(prompts), reverse, limit))
        order = range(start, max(start - limit, 0) - 1, -1) if reverse else range(start, min(start + limit, len(frames) - 1) + 1)
        for frame in order:
            yield frame, np.where(self.answers[frame], 1.0, -1.0)[None]


def detected():
    masks = np.zeros((N, H, W), bool)
    masks[30:36, 20:34, 10:30] = True
    masks[33, 20:38, 10:30] = True
    masks[33, 22:28, 50:58] = True
    return masks


def test_a_stretch_is_asked_for_where_most_is_covered_part_by_part():
    masks = detected()
    assert stretches(masks) == [(30, 35)]
    large, small = prompts_of(masks, LANDMARKS, (30, 35))
    assert large.frame == small.frame == 33 and (large.object, small.object) == (1, 2)
    assert large.box == (10.0, 20.0, 30.0, 38.0) and small.box == (50.0, 22.0, 58.0, 28.0)
    assert large.inside == (True, False, False, False) and large.points[1:] == ((20.0, 8.0), (40.0, 8.0), (30.0, 10.0))
    for prompt in (large, small):
        x, y = prompt.points[0]
        assert masks[33, int(y), int(x)]
    masks[33, 5:12, 15:25] = True  # over an eye: it is not said to be outside
    assert all((20.0, 8.0) not in prompt.points for prompt in prompts_of(masks, LANDMARKS, (30, 35)))


def test_it_is_followed_past_the_stretch_and_no_further():
    answers = np.zeros((N, H, W), bool)
    answers[:, 19:36, 9:31] = True
    segmenter = Fixed(answers)
    done = refine(segmenter, np.zeros((N, H, W, 3), np.uint8), detected(), LANDMARKS)
    assert [(start, reverse, limit) for start, _, reverse, limit in segmenter.calls] == [(33, False, 27), (33, True, 28)]
    np.testing.assert_array_equal(np.flatnonzero(done.followed), np.arange(5, 61))
    np.testing.assert_array_equal(done.masks[5:61], answers[5:61])
    assert not done.masks[:5].any() and not done.masks[61:].any() and not done.refused.any()


def test_what_cannot_be_is_not_believed():
    seen, answers = detected(), np.zeros((N, H, W), bool)
    answers[30] = True  # the whole picture
    answers[31, 2:14, 5:55] = True  # both eyes
    answers[32, 30:40, 40:60] = True  # somewhere else
    answers[34, 18:36, 8:32] = True  # right
    answers[37, 20:30, 10:20] = True  # right, where the detector saw nothing
    done = refine(Fixed(answers), np.zeros((N, H, W, 3), np.uint8), seen, LANDMARKS)
    assert np.flatnonzero(done.refused).tolist() == [30, 31, 32] and np.flatnonzero(done.followed).tolist() == [34, 37]
    for i in (30, 31, 32, 33, 35):
        np.testing.assert_array_equal(done.masks[i], seen[i])  # the detector's own stands; frame 33 got no answer at all
    for i in (34, 37):
        np.testing.assert_array_equal(done.masks[i], answers[i])


def test_a_persons_clicks_are_believed_and_joined():
    seen, answers = np.zeros((N, H, W), bool), np.zeros((N, H, W), bool)
    answers[20:25] = True
    done = refine(Fixed(answers), np.zeros((N, H, W, 3), np.uint8), seen, LANDMARKS, [Prompt(22, ((3, 3),), (True,))])
    np.testing.assert_array_equal(done.masks, answers)
    assert np.flatnonzero(done.followed).tolist() == list(range(20, 25))
    with pytest.raises(KeySyncError, match="80 masks for 79 frames"):
        refine(Fixed(answers), np.zeros((79, H, W, 3), np.uint8), seen)
