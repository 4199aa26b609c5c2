"""The voice says what the mouth does and is no louder for an open vowel."""

import numpy as np
from bounds import approx

from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.data_pipeline.synthetic.phonemes import (
    CONTROL_RATE,
    VOWELS,
    Articulation,
    articulate,
    at_frames,
    audio_generator,
    sample_phonemes,
)
from keysync_jax.data_pipeline.synthetic.talker_figures import audio_probe
from keysync_jax.data_pipeline.synthetic.voice import formants, sample_voice, synthesize


def _held(opening: float, width: float, seconds: float = 0.6, **changes: float) -> Articulation:
    count = int(seconds * CONTROL_RATE)
    one = np.ones(count, np.float32)
    values = {"voice": 1.0, "noise": 0.0, "nasal": 0.0} | changes
    band = np.tile(np.float32([4200, 7600]), (count, 1))
    return Articulation(opening * one, width * one, values["voice"] * one, values["noise"] * one, band, values["nasal"] * one, one)


def _spectrum(art: Articulation, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Power of the middle of a held sound in 50 Hz bins, without room noise."""
    voice = sample_voice(seed, room_db=float("-inf"))
    samples = synthesize(art, voice, seed, len(art.opening) * SAMPLE_RATE // CONTROL_RATE)
    part = samples[2000:-2000]
    power = np.abs(np.fft.rfft(part * np.hanning(len(part)))) ** 2
    frequency = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE)
    bins = np.arange(0, 8000, 50)
    return bins, np.array([power[(frequency >= b) & (frequency < b + 50)].sum() for b in bins])


def test_vowels_have_their_formants_and_equal_loudness():
    levels, spectra = [], []
    for sound in VOWELS.values():
        bins, power = _spectrum(_held(sound.opening, sound.width))
        levels.append(10 * np.log10(power.sum()))
        spectra.append(np.log(np.convolve(power, np.ones(6) / 6, "same") + 1e-9))
    assert np.ptp(levels) < 3.0  # dB
    # F1: the low band's centre of mass rises with the opening.
    centres = []
    for opening in (0.1, 0.4, 0.7, 1.0):
        bins, power = _spectrum(_held(opening, 0.5))
        low = bins < 1150
        centres.append((bins[low] * power[low]).sum() / power[low].sum())
    assert all(b - a > 30 for a, b in zip(centres, centres[1:], strict=False)), centres
    distances = [np.abs(a - b).mean() for i, a in enumerate(spectra) for b in spectra[:i]]
    assert min(distances) > 0.3


def test_formants_are_ordered_and_scale_with_the_tract():
    opening, width = np.meshgrid(np.linspace(0, 1, 11), np.linspace(0, 1, 11))
    f1, f2, f3 = formants(opening, width, 1.0)
    assert (f2 - f1 > 0).all() and (f3 - f2 > 300).all()
    assert formants(opening, width, 1.2)[1] == approx(1.2 * f2)


def test_fricatives_hiss_and_nasals_hum():
    bins, hiss = _spectrum(_held(0.1, 0.7, voice=0.0, noise=0.6))
    assert hiss[bins > 3800].sum() > 20 * hiss[bins < 3000].sum()
    bins, hum = _spectrum(_held(0.0, 0.45, nasal=1.0))
    assert hum[bins < 600].sum() > 5 * hum[bins > 600].sum()


def test_lips_are_shut_through_every_closure_and_silence():
    for seed in range(6):
        phonemes = sample_phonemes(seed, 7.2)
        assert phonemes[0].start == 0 and phonemes[-1].end == approx(7.2, 64)  # a sum of some fifty
        assert all(a.end == approx(b.start) for a, b in zip(phonemes, phonemes[1:], strict=False))
        opening = at_frames(articulate(phonemes, 7.2, seed).opening, 180)
        centre = (np.arange(180) + 0.5) / 25
        shut = [p for p in phonemes if p.closure or p.name == "sil"]
        inside = np.any([(centre >= p.start) & (centre < p.end) for p in shut], axis=0)
        assert opening[inside].max() == 0
        assert (opening > 0.2 * opening.max()).mean() > 0.33
        assert any(p.closure for p in phonemes)


def test_silence_is_quiet_and_laughter_is_voiced_and_high():
    seconds = 6.0
    phonemes = sample_phonemes(5, seconds, laughter=1.0)
    assert {p.name for p in phonemes} == {"sil", "laugh_in", "laugh"}
    art = articulate(phonemes, seconds, 5)
    plain = articulate(sample_phonemes(5, seconds), seconds, 5)
    assert art.pitch.mean() > 1.15 * plain.pitch.mean()
    assert art.width[art.voice > 0.3].mean() > 0.7
    samples = synthesize(art, sample_voice(5), 5, int(seconds * SAMPLE_RATE))
    at = (np.arange(len(samples)) + 0.5) / SAMPLE_RATE
    quiet = np.any([(at > p.start + 0.05) & (at < p.end - 0.05) for p in phonemes if p.name == "sil"], axis=0)
    assert samples[quiet].std() < 0.1 * samples[~quiet].std()


def test_parts_of_an_audio_seed_are_independent_streams():
    draws = [audio_generator(7, part).standard_normal(4) for part in range(5)]
    assert len({d.tobytes() for d in draws}) == 5


def test_sound_tells_the_mouth_of_unheard_voices_and_loudness_does_not():
    probe = audio_probe(train=40, held_out=10, frames=150, features=600)
    assert probe.opening_r > 0.95
    assert probe.width_r > 0.85
    assert abs(probe.loudness_r) < 0.3
