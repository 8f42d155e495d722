"""The sounds in datasets/demo are fit to train and to test on, and voices.py still makes them."""

import shutil

import numpy as np
import pytest
import soundfile

import voices
from audio import SAMPLE_RATE
from utils import UserError

FILES = sorted(voices.DEMO.glob("*/*/*.opus"))


@pytest.fixture(scope="module")
def sounds():
    """Path to (samples, rate)."""
    return {path: soundfile.read(path) for path in FILES}


def level_db(samples):
    return 10 * np.log10(np.square(samples).mean() + 1e-12)


def folders(kind):
    return {path.name: len(list(path.glob("*.opus"))) for path in (voices.DEMO / kind).iterdir()}


def test_every_voice_noise_and_music_is_there():
    assert folders("voices") == {voice.name: voices.UTTERANCES for voice in voices.VOICES}
    assert folders("noise") == dict.fromkeys(voices.NOISES, voices.TAKES)
    assert folders("music") == dict.fromkeys(voices.MUSIC, voices.TAKES)


def test_there_are_enough_voices_of_both_sexes():
    assert len({voice.name for voice in voices.VOICES}) >= 16
    assert voices.UTTERANCES >= 4
    assert 0.4 <= np.mean([voice.sex == "f" for voice in voices.VOICES]) <= 0.6


def test_the_readme_names_every_voice():
    readme = (voices.DEMO / "README.md").read_text(encoding="utf-8")
    for voice in voices.VOICES:
        assert f"| {voice.name} |" in readme


def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in voices.DEMO.rglob("*") if path.is_file()) < 3_000_000


def test_sounds_are_mono_at_a_sane_level(sounds):
    for path, (samples, rate) in sounds.items():
        assert rate == SAMPLE_RATE, path
        assert samples.ndim == 1, path
        assert np.abs(samples).max() < 0.99, path
        assert -33 < level_db(samples) < -20, path


def test_speech_starts_at_once_and_lasts(sounds):
    for path, (samples, rate) in sounds.items():
        if path.is_relative_to(voices.DEMO / "voices"):
            assert 3 <= len(samples) / rate <= 8, path
            assert abs(level_db(samples) - voices.LEVEL_DB) < 1, path
            frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)
            loud = np.flatnonzero(np.square(frames).mean(1) > np.square(frames).mean(1).max() / 1000)
            assert loud[0] < 30, f"{path}: {loud[0]} frames of 10 ms before the speech"
            assert len(frames) - loud[-1] < 30, f"{path}: silence at the end"


@pytest.mark.parametrize("name", ["slt", "ked", "espeak_f2"])
def test_a_voice_can_be_made_again(name, sounds):
    voice, sentences = next(dealt for dealt in voices.dealt_sentences() if dealt[0].name == name)
    if not shutil.which(voice.program):
        pytest.skip(f"{voice.program} is not installed")
    try:
        samples = voices.speak(voice, sentences[0])
    except UserError as error:
        pytest.skip(f"its voice is not installed: {error}")
    committed, _ = sounds[voices.DEMO / "voices" / name / "00.opus"]
    assert len(samples) == pytest.approx(len(committed), rel=0.25)


def test_noise_and_music_follow_from_the_seed(sounds):
    for kind, names, make in (("noise", voices.NOISES, voices.noise), ("music", voices.MUSIC, voices.music)):
        for name in names:
            first, second = (make(np.random.default_rng(1), name, seconds=2) for _ in range(2))
            assert np.array_equal(first, second), (kind, name)
            assert not np.array_equal(first, make(np.random.default_rng(2), name, seconds=2)), (kind, name)
            assert np.isfinite(first).all(), (kind, name)


def test_a_missing_synthesizer_is_one_line_with_its_package(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "flite" else program)
    with pytest.raises(UserError, match="flite: not installed; on Debian: apt-get install flite$"):
        voices.main(["--output", "nowhere"])


def test_writing_keeps_the_level_and_does_not_clip(tmp_path):
    rng = np.random.default_rng(0)
    clicks = np.zeros(SAMPLE_RATE)
    clicks[::4000] = 1
    for name, samples in (("noise", rng.standard_normal(SAMPLE_RATE)), ("clicks", clicks)):
        voices.write(tmp_path / f"{name}.opus", samples)
        written, rate = soundfile.read(tmp_path / f"{name}.opus")
        assert (len(written), rate) == (SAMPLE_RATE, SAMPLE_RATE)
        assert np.abs(written).max() < 1
