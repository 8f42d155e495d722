"""dynamic.py renders the voices that mixing.py would, other ones for other epochs, and training takes them."""

import dataclasses

import numpy as np
import pytest
import torch

import dataset
import downloader
import dynamic
import main
import mixing
from encoder import SpeakerEncoder
from utils import UserError

SIZE = 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(recordings, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic") / f"size={SIZE}"
    downloader.prepare(folder, settings, recordings, SIZE, workers=1, as_recordings=True)
    return folder


@pytest.fixture(scope="module")
def examples(folder):
    return dynamic.Examples(folder, "train", remix=True, device=CPU)


def test_voices_and_references_are_those_that_mixing_renders(examples, recordings, settings):
    stored = [recording for kind in downloader.split(recordings)["train"].values() for recording in kind]

    def rendered(pieces, curve):
        files = [stored[int(piece.recording.path.name)] for piece in pieces]
        files = [f.at(p.recording.speed, p.recording.formants) for f, p in zip(files, pieces, strict=True)]
        pieces = [dataclasses.replace(p, recording=f) for p, f in zip(pieces, files, strict=True)]
        samples = np.concatenate([mixing.load(piece) for piece in pieces])
        return mixing.equalise(torch.tensor(samples), torch.tensor(curve)).numpy()

    voices, references = examples.voices(chunks(examples)[0])
    rng = np.random.default_rng([0, 0, 0])
    speed = mixing.draw_speed(rng, settings)
    assert speed != 1
    likeness = []
    for voice, reference in zip(voices.numpy(), references, strict=True):
        name = examples.mixer.names[rng.integers(len(examples.mixer.names))]
        piece, pieces, equalise = examples.mixer.draw_target(rng, examples.mixer.draw_voice(rng, name, speed))
        if rng.random() < settings.partial:
            piece = mixing.shorten(rng, piece, settings.segment)
        curves = [mixing.random_curve(rng) * equalise for _ in range(2)]
        start = round(piece.offset * 16000)
        likeness.append(alike(voice[start:], rendered([piece], curves[0])))
        assert equalise or np.abs(voice[: max(0, start - 400)]).max(initial=0) < 1e-3 * np.abs(voice).max()
        likeness.append(alike(reference.numpy(), rendered(pieces, curves[1])))
    assert np.median(likeness) > 0.99
    assert np.mean(np.array(likeness) > 0.95) > 0.9
    dvectors = SpeakerEncoder().prefix_dvectors(references, [16000, 48000, 160000])
    assert torch.allclose(examples.dvectors, dvectors, atol=1e-3)


def alike(one, other):
    """The largest cross-correlation, 0 to 1, of signals that may be some samples apart."""
    size = min(len(one), len(other))
    one, other = (np.fft.rfft(signal[:size], 2 * size) for signal in (one, other))
    correlation = np.fft.irfft(one * other.conj())
    nearest = np.concatenate([correlation[:5], correlation[-5:]]).max()
    return nearest / np.sqrt(np.fft.irfft(abs(one) ** 2)[0] * np.fft.irfft(abs(other) ** 2)[0])


def chunks(examples, number=0):
    return dynamic.Chunks(examples.mixer, examples.first_samples, SIZE, examples.seed, number)


def test_what_is_rendered_is_at_one_level_or_silent(examples):
    signals = examples.stft.samples(torch.view_as_complex(examples.held.float()), examples.samples)
    assert len(signals) == SIZE + SIZE // 4
    powers = mixing.active_power(signals)
    sounds = powers > 0
    assert sounds[:SIZE].float().mean() > 0.9
    assert 0 < sounds[SIZE:].float().mean()
    assert torch.allclose(10 * powers[sounds].log10(), torch.tensor(-25.0).double(), atol=0.1)
    assert np.allclose(examples.powers[:, dataset.TARGET], powers[:SIZE], rtol=0.02)
    for n in (0, 1, SIZE - 1):
        rows = [examples.row(n, part) for part in range(3)]
        assert np.allclose(examples.powers[n], powers[rows], rtol=0.02)


def test_without_noise_and_music_there_are_voices_only(recordings, settings, tmp_path):
    downloader.prepare(tmp_path, settings, {"speech": recordings["speech"]}, SIZE, workers=1, as_recordings=True)
    examples = dynamic.Examples(tmp_path, "train", remix=True, device=CPU)
    assert not examples.held[SIZE:].any()
    assert not examples.powers[:, dataset.NOISE].any()
    assert examples.__getitems__(list(range(SIZE))).mixture.abs().sum() > 0


def test_other_epochs_have_other_voices_and_the_same_ones_come_back(folder, examples):
    first, dvectors = examples.held.clone(), examples.dvectors.clone()
    examples.epoch = dynamic.EPOCHS - 1
    assert torch.equal(examples.held, first)
    examples.epoch = dynamic.EPOCHS
    assert not torch.equal(examples.held, first)
    again = dynamic.Examples(folder, "train", remix=True, device=CPU)
    assert torch.equal(again.held, first)
    assert torch.equal(again.dvectors, dvectors)
    examples.epoch = 0
    assert torch.equal(examples.held, first)


def test_items_are_remixed_voices(examples):
    items = list(range(SIZE))
    batch, recipes = examples.__getitems__(items), examples.recipes(items)
    assert batch.mixture.shape == (SIZE, examples.stft.n_freq, examples.stft.frames(examples.samples))
    for n, recipe in enumerate(recipes):
        speakers = [examples.speakers[sound.example][sound.part] for sound in recipe.sounds]
        assert len(set().union(*speakers)) == sum(map(len, speakers))
        rows = [examples.held[examples.row(sound.example, sound.part)].float() * sound.gain for sound in recipe.sounds]
        assert torch.allclose(torch.view_as_real(batch.mixture[n]), sum(rows), atol=1e-4)
        assert batch.absent[n].item() == (recipe.target is None)
    assert any(sound.part == dataset.INTERFERENCE for recipe in recipes for sound in recipe.sounds)


def test_training_takes_them_and_goes_on(folder, tmp_path):
    options = main.Options(
        data=str(folder), output=str(tmp_path / "extractor"), logs=str(tmp_path / "runs"), steps=12, batch_size=8,
        every=5, channels=[8, 8, 8, 8], blocks=1, full_hidden=16, compile=False, bf16=False, threads=1, epochs=1,
    )  # fmt: skip
    trainer = main.Trainer(options, folder)
    trainer.train()
    assert trainer.step == SIZE // 8
    again = main.Trainer(dataclasses.replace(options, epochs=None), folder)
    again.resume()
    assert again.step == SIZE // 8
    again.train()
    assert again.step == 12
    assert len(again.curve) > 1


def test_what_is_not_whole_is_a_clear_error(folder, recordings, settings, tmp_path):
    with pytest.raises(UserError, match="dynamic True there, None now"):
        downloader.prepare(folder, settings, recordings, SIZE, workers=1)
    (tmp_path / "settings.json").write_text((folder / "settings.json").read_text())
    with pytest.raises(UserError, match="no recordings"):
        dynamic.Examples(tmp_path, "train", remix=True, device=CPU)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "recordings.json").write_text((folder / "train" / "recordings.json").read_text())
    (tmp_path / "train" / "samples.i16").write_bytes(b"0000")
    with pytest.raises(UserError, match="not whole"):
        dynamic.Examples(tmp_path, "train", remix=True, device=CPU)


def test_rooms_are_refused(refusal):
    assert "--reverb" in refusal(downloader.main, "--dynamic", "--reverb", 0.5)
