"""Two rounds over many clips: what each window is given, where results go, and that neighbours do not matter."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bounds
import jax
import numpy as np
import pytest
import rounds_worker

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.guidance import AudioIdentityGuidance
from keysync_jax.inference import two_stage
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.inference.window_plan import make_plan

T, SIDE = 4, 2


class Echo:
    """A stage without a network: latents are the known ones plus the stage's offset, and windows whose audio is negative become NaN."""

    def __init__(self, offset):
        self.config = SimpleNamespace(audio_encoder="words")
        self.windows = []
        self._offset = offset

    def __call__(self, windows):
        for window in windows:
            self.windows.append(window)
            yield np.full_like(window.known, np.nan) if window.audio.min() < 0 else window.known + np.float32(self._offset)


def make_clip(number, lengths=(6,), bad_frame=None, scales=(5.0, 2.0), **options):
    """A clip whose known latents are 100 x clip + frame, counted through its stretches; its results by (stretch, frame)."""
    out, stretches, first = {}, [], 0
    for index, length in enumerate(lengths):
        known = (
            np.broadcast_to(np.arange(first, first + length, dtype=np.float32)[:, None, None, None], (length, SIDE, SIDE, 4)) + 100 * number
        )
        audio = np.zeros((length, 2, 3), np.float32)
        if bad_frame is not None and first <= bad_frame < first + length:
            audio[bad_frame - first] = -1
        stretches.append(
            two_stage.Stretch(
                make_plan(length, T),
                {"words": audio},
                lambda frames, known=known: known[frames],
                np.ones((length, SIDE, SIDE), bool),
                lambda frame, latent, index=index: out.__setitem__((index, frame), latent),
            )
        )
        first += length
    guidance = AudioIdentityGuidance(*map(np.float32, scales)).needed()
    return two_stage.Clip(stretches, 7 + number, 10, {"keyframe": guidance, "interpolation": guidance}, **options), out


def run(clips, stages=("keyframe", "interpolation")):
    samplers = {stage: Echo({"keyframe": 0.25, "interpolation": 0.5}[stage]) for stage in stages}
    seen = []
    two_stage.generate(samplers, clips, PhaseProgress(on_progress=lambda *report: seen.append(report)))
    return samplers, seen


def test_every_frame_arrives_once_and_keyframes_stand_at_the_ends():
    clip, out = make_clip(1, (6, 4))
    samplers, seen = run([clip])
    assert sorted(out) == [(0, f) for f in range(6)] + [(1, f) for f in range(4)] and clip.error is None and clip.finished
    values = [float(out[key].mean()) for key in sorted(out)]
    # Frames 0 and 3 of each stretch are keyframes; frame 5 is the last of a segment whose end lies past the clip.
    assert values == [100.25, 101.5, 102.5, 103.25, 104.5, 105.5] + [106.25, 107.5, 108.5, 109.25]
    assert [w.index for w in samplers["keyframe"].windows] == [0, 1] and [w.index for w in samplers["interpolation"].windows] == [0, 1, 2]
    assert seen == [("keyframes", n, 2) for n in range(3)] + [("interpolate", n, 3) for n in range(4)]
    first, segment = samplers["keyframe"].windows[1], samplers["interpolation"].windows[0]
    assert first.latents.shape == (SIDE, SIDE, 4) and (first.latents == 106).all()  # the identity: the first frame of the stretch
    assert segment.latents.shape == (2, SIDE, SIDE, 4) and list(segment.latents.mean((1, 2, 3))) == [100.25, 103.25]
    assert segment.mask.shape == (T, SIDE, SIDE, 1) and segment.mask.dtype == np.float32


def test_seed_guidance_and_numbers_are_each_window_s_own():
    clips = [make_clip(0, scales=(5, 2))[0], make_clip(1, scales=(3, 1.5), first_index=4096)[0]]
    samplers, _ = run(clips)
    for windows, count in ((samplers["keyframe"].windows, 1), (samplers["interpolation"].windows, 2)):
        assert [int(w.seed) for w in windows] == [7] * count + [8] * count
        assert [int(w.index) for w in windows] == [*range(count), *range(4096, 4096 + count)]
        assert [float(w.guidance.audio) for w in windows] == [5] * count + [3] * count


def test_windows_of_one_program_lie_side_by_side_and_find_back():
    plain, guided = (1.0, 1.0), (5.0, 2.0)
    made = [make_clip(number, scales=(guided, plain)[number % 2]) for number in range(4)]
    samplers, _ = run([clip for clip, _ in made])
    for sampler in samplers.values():
        structures = [jax.tree.structure(window) for window in sampler.windows]
        changes = sum(a != b for a, b in zip(structures, structures[1:], strict=False))
        assert len(set(structures)) == 2 and changes == 1
    for number, (_, out) in enumerate(made):
        assert [float(out[0, f].mean()) // 100 for f in range(6)] == [number] * 6


def test_steps_are_a_program_of_their_own():
    made = [make_clip(number)[0] for number in range(3)]
    made[1].steps = 12
    samplers, _ = run(made)
    assert [window.steps for window in samplers["keyframe"].windows] == [10, 10, 12]


@pytest.mark.parametrize(("bad_frame", "words"), [(3, "keyframe window 0"), (1, "interpolation window 0")])
def test_a_window_that_is_not_finite_fails_its_clip_alone(bad_frame, words):
    made = [make_clip(0), make_clip(1, (6, 4), bad_frame), make_clip(2)]
    samplers, _ = run([clip for clip, _ in made])
    errors = [clip.error for clip, _ in made]
    assert errors[0] is errors[2] is None and str(errors[1]).startswith(f"{words}: 64 of 64 values are not finite")
    for number in (0, 2):
        alone, expected = make_clip(number)
        run([alone])
        assert all((made[number][1][key] == expected[key]).all() for key in expected) and made[number][1].keys() == expected.keys()
    if words.startswith("keyframe"):
        assert not made[1][1] and len(samplers["interpolation"].windows) == 4  # it takes no part in the second round


def test_nothing_is_computed_for_clips_that_have_all_failed():
    clip, _ = make_clip(0, (4,) * 9, bad_frame=0)
    samplers, seen = run([clip])
    assert len(samplers["keyframe"].windows) == 1 and not samplers["interpolation"].windows
    assert seen == [("keyframes", 0, 9), ("keyframes", 1, 9)]


def test_a_disk_that_is_full_for_one_clip_is_not_for_the_others():
    (full, _), (other, out) = make_clip(0), make_clip(1)

    def write(frame, latent):
        raise KeySyncError("no space left")

    full.stretches[0].write = write
    run([full, other])
    assert str(full.error) == "no space left" and not full.finished and other.error is None and other.finished and len(out) == 6


def test_the_first_round_alone_leaves_the_keyframes():
    clip, out = make_clip(0, (6,))
    run([clip], ("keyframe",))
    assert {number: float(latent.mean()) for number, latent in clip.stretches[0].keyframes.items()} == {
        0: 0.25,
        1: 3.25,
        2: 5.25,
    } and not out


# Programs on fake devices. ----------------------------------------------------------------------------------------------------

# Of what was rounded in another order: some thirty layers and eleven evaluations (seen: 4 units). Another window differs by 1e5 units.
ULPS = 100
SETUPS = [(devices, microbatch) for devices in (1, 8) for microbatch in (1, 2, 3)]


@pytest.fixture(scope="module", params=["small", pytest.param("unet", marks=pytest.mark.slow)])
def beside(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("rounds") / "out.npz"
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, str(Path(rounds_worker.__file__)), str(path), request.param], env=env, check=True)
    with np.load(path) as stored:
        return dict(stored)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", rounds_worker.CASES)
def test_a_clip_does_not_depend_on_its_neighbours(beside, setup, case):
    at = "{}/{}".format(*setup)
    for place, clip in enumerate(rounds_worker.CASES[case]):
        made, alone = beside[f"{at}/{case}/{clip}"], beside[f"{at}/alone/{clip}"]
        if (case, clip) == ("spoilt", rounds_worker.SPOILT):
            assert str(made).startswith("keyframe window 0: ")
        elif place % setup[1] == 0:
            # The first row of a microbatch, as alone: the same program on the same numbers, and no operation mixes rows.
            np.testing.assert_array_equal(made, alone)
        else:
            # In another row a kernel may sum in another order.
            bounds.close(made, alone, ULPS, wrong=beside[f"{at}/alone/{(clip + 1) % rounds_worker.CLIPS}"])


@pytest.mark.parametrize("microbatch", [1, 2, 3])
@pytest.mark.parametrize("case", ["alone", "together"])
def test_devices_do_not_matter_at_all(beside, microbatch, case):
    for clip in range(rounds_worker.CLIPS):  # each device runs the same program, and a window keeps its row: the same bits
        np.testing.assert_array_equal(beside[f"8/{microbatch}/{case}/{clip}"], beside[f"1/{microbatch}/{case}/{clip}"])


@pytest.mark.parametrize("setup", SETUPS)
def test_short_clips_share_a_call_of_the_devices(beside, setup):
    devices, microbatch = setup
    assert beside[f"{devices}/{microbatch}/calls"] == -(-rounds_worker.CLIPS // (devices * microbatch))  # on eight devices one, not five
