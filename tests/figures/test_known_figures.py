"""Figures whose value is known: a set against itself, known shifts, known strengths, and what each refuses."""

import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.figures import image_pairs, mouth_shape, sets, sync, votes


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_set_against_itself(rng):
    x = rng.normal(size=(30, 80))
    trace = np.trace(np.cov(x.T))
    assert abs(sets.frechet(x, x)) <= 1e-9 * trace
    assert abs(sets.frechet(x, x[::-1])) <= 1e-9 * trace
    assert abs(sets.cmmd(x, x)) <= 1e-9


def test_frechet_of_shifted_and_scaled_gaussians(rng):
    x = rng.normal(size=(50, 6))
    trace = np.trace(np.cov(x.T))
    assert sets.frechet(x, x + 2) == pytest.approx(6 * 4)
    assert sets.frechet(x, (x - x.mean(0)) * 3 + x.mean(0)) == pytest.approx(4 * trace)


def test_cmmd_of_two_points():
    assert sets.cmmd(np.zeros((1, 3)), np.full((1, 3), 10.0)) == pytest.approx(1000 * (2 - 2 * np.exp(-1.5)))


@pytest.mark.parametrize(("figure", "least"), [(sets.cmmd, 1), (sets.frechet, 2)])
def test_sets_that_are_too_small_or_of_two_widths_are_refused(figure, least):
    with pytest.raises(KeySyncError, match=f"at least {least}"):
        figure(np.zeros((least - 1, 4)), np.zeros((5, 4)))
    with pytest.raises(KeySyncError, match="one width"):
        figure(np.zeros((5, 3)), np.zeros((5, 4)))


@pytest.mark.parametrize("shift", [*range(-10, 0), *range(1, 11)])
def test_a_known_shift_is_found_exactly(rng, shift):
    audio = rng.normal(size=(80, 16))
    found = sync.synchrony(np.roll(audio, shift, axis=0), audio)
    assert found.offset == shift
    assert found.lse_c > 0


def test_sound_and_features_that_cannot_be_compared_are_refused():
    with pytest.raises(KeySyncError, match="no sound"):
        sync.mfcc(np.zeros(0))
    with pytest.raises(KeySyncError, match="one shape"):
        sync.synchrony(np.zeros((4, 2)), np.zeros((5, 2)))


def test_a_picture_against_itself(rng):
    a = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    assert image_pairs.ssim(a, a) == pytest.approx(1)
    assert image_pairs.psnr(a, a) == np.inf
    assert image_pairs.psnr(np.zeros_like(a), np.full_like(a, 255)) == 0
    assert image_pairs.sharpness(np.full((8, 8, 3), 90, np.uint8)) == 0
    with pytest.raises(KeySyncError, match="one size"):
        image_pairs.ssim(a, a[:-1])
    with pytest.raises(KeySyncError, match="11 pixels"):
        image_pairs.ssim(a[:10], a[:10])


def test_a_mouth_that_only_moves_is_at_no_distance(rng):
    face = rng.uniform(20, 90, (5, 68, 2))
    moved = face + rng.uniform(-9, 9, (5, 1, 2))
    assert mouth_shape.landmark_distance(moved, face) == pytest.approx(np.zeros(5), abs=1e-9)
    with pytest.raises(KeySyncError, match="one length"):
        mouth_shape.landmark_distance(face, face[1:])


def test_a_similarity_is_recovered(rng):
    turn = np.array([[0.6, -0.8], [0.8, 0.6]]) * 2.5
    points = rng.normal(size=(5, 2))
    matrix = mouth_shape.similarity(points, points @ turn.T + [3, -4])
    assert matrix == pytest.approx(np.column_stack([turn, [3, -4]]))
    with pytest.raises(KeySyncError, match="coincide"):
        mouth_shape.similarity(np.ones((5, 2)), points)


def test_strengths_are_recovered_and_impossible_ones_refused(rng):
    truth = np.array([900.0, 1000.0, 1100.0])
    share = 1 / (1 + 10 ** ((truth[None] - truth[:, None]) / 400))
    assert votes.bradley_terry(100 * share * (1 - np.eye(3))) == pytest.approx(truth, abs=0.01)
    never_lost = np.array([[0.0, 5, 5], [0, 0, 3], [0, 3, 0]])
    with pytest.raises(KeySyncError, match="--prior 1"):
        votes.bradley_terry(never_lost)
    assert votes.bradley_terry(never_lost, prior=1)[0] > 1000


def test_no_vote_leaves_elo_at_its_start():
    nothing = np.zeros(0, int)
    assert (votes.elo(nothing, nothing, nothing, 3) == 1000).all()
