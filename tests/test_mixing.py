"""Examples are what their settings and plans say."""

import dataclasses

import numpy as np
import pytest
import scipy.signal
import torch

import audio
import corpora
import mixing
from utils import UserError


def mixer_of(recordings, **settings):
    kinds = {kind: recordings[kind] for kind in ("speech", "noise", "music")}
    return mixing.Mixer(mixing.Settings(**{"segment": 1.5, **settings}), **kinds)


def plans(mixer, count=300):
    return [mixer.draw(np.random.default_rng([5, n])) for n in range(count)]


def level_db(power):
    return 10 * np.log10(power)


def test_parts_have_the_stated_ratios_and_level(recordings):
    mixer = mixer_of(recordings, absent=0, no_voices=0, noise_share=1, more_voices=0.5)
    checked, clipped = 0, 0
    for plan in plans(mixer, 20):
        example = mixing.render(plan, mixer.settings)
        # where a part sounds is told before it is scaled
        gains = np.array(example.row["gains"])[:, None]
        if not gains.all():  # a piece of noise may have no sound in it
            continue
        checked += 1
        powers = mixing.active_power(torch.tensor(example.parts / gains)).numpy() * gains[:, 0] ** 2
        assert level_db(powers[0] / powers[1]) == pytest.approx(plan.sir_db, abs=0.1)
        assert level_db(powers[0] / powers[2]) == pytest.approx(plan.snr_db, abs=0.1)
        assert example.row["powers"] == pytest.approx(powers, rel=0.02)
        mixture = example.parts.sum(0)
        assert np.abs(mixture).max() < 1
        clipped += np.abs(mixture).max() > 0.985
        if np.abs(mixture).max() < 0.98 and np.abs(example.parts).max() < 0.98:
            assert level_db(np.mean(mixture**2)) == pytest.approx(plan.level_db, abs=0.1)
    assert checked > 10
    assert clipped < checked / 2


def test_voices_that_overlap_fully_have_the_stated_ratio_of_energies(recordings):
    long = {kind: [r for r in found if r.seconds > 4] for kind, found in recordings.items()}
    mixer = mixer_of(long, absent=0, no_voices=0, noise_share=0, music_share=0, more_voices=0, partial=0)
    for plan in plans(mixer, 10):
        target, interference, _ = np.square(mixing.render(plan, mixer.settings).parts, dtype=np.float64).sum(1)
        # parts that begin or end with silence make the small difference
        assert level_db(target / interference) == pytest.approx(plan.sir_db, abs=1.0)


def test_target_and_interference_are_never_one_speaker(recordings):
    for plan in plans(mixer_of(recordings, more_voices=0.6, max_voices=3)):
        speakers = [plan.speaker.speaker, *(piece.recording.speaker for piece in plan.interference)]
        assert len(set(speakers)) == len(speakers)
        assert len(plan.interference) <= 3
        assert {piece.recording.speaker for piece in plan.reference} == {plan.speaker.speaker}


def test_the_reference_never_overlaps_the_segment(recordings):
    same = 0
    for plan in plans(mixer_of(recordings, absent=0)):
        target = plan.target
        assert sum(piece.seconds for piece in plan.reference) >= mixing.MIN_REFERENCE_SECONDS - 1e-6
        assert sum(piece.seconds for piece in plan.reference) <= 10 + 1e-6
        for piece in plan.reference:
            if piece.recording == target.recording:
                same += 1
                assert piece.start + piece.seconds <= target.start + 1e-6 or target.start + target.seconds <= (
                    piece.start + 1e-6
                )
                assert plan.equalise
    assert same > 0 or all(len(group) > 1 for group in mixing.group(recordings["speech"]).values())


def test_voices_have_speeds_and_formants_of_their_own_and_so_do_their_references(recordings):
    def voice(piece):
        return piece.recording.speed, piece.recording.formants

    drawn = plans(mixer_of(recordings, absent=0, speed=[0.8, 1.25], formants=[0.9, 1.1]))
    voices = np.array([voice(piece) for plan in drawn for piece in (plan.target, *plan.interference)])
    for values, low, high in zip(voices.T, (0.8, 0.9), (1.25, 1.1), strict=True):
        assert low <= min(values) < low + 0.05
        assert high - 0.05 < max(values) <= high
    assert abs(np.corrcoef(voices.T)[0, 1]) < 0.2
    assert any(voice(plan.target) != voice(piece) for plan in drawn for piece in plan.interference)
    for plan in drawn:
        assert {voice(piece) for piece in plan.reference} == {voice(plan.target)}
    natural = mixer_of(recordings, speed=[1, 1], formants=[1, 1])
    assert all(voice(piece) == (1, 1) for plan in plans(natural) for piece in [*plan.reference, *plan.interference])
    rng = np.random.default_rng(0)
    natural.draw_voice(rng, natural.names[0])
    assert rng.random() == np.random.default_rng(0).random()  # the fixed lists stay as they are


def test_a_faster_voice_is_higher_and_shorter(tmp_path):
    moments = np.arange(4 * 16000) / 16000
    audio.write(tmp_path / "tone.wav", 0.1 * np.sin(2 * np.pi * 400 * moments) * (moments > 2))
    recording = corpora.Recording(tmp_path / "tone.wav", "speech", "", "one", 4.0).at(1.25)
    assert recording.seconds == pytest.approx(4 / 1.25)
    samples = mixing.load(mixing.Piece(recording, 1.5, 1.0))
    assert len(samples) == 16000
    assert np.abs(samples[: round((2 / 1.25 - 1.5) * 16000) - 50]).max() < 1e-3 < samples[2000:].max()
    assert np.abs(np.fft.rfft(samples)).argmax() == 500  # Hz
    assert recording.at(1).seconds == pytest.approx(4)


def shift_formants(samples, factor):
    return mixing.shift_formants(torch.tensor(samples).float()[None], torch.tensor([factor]))[0].numpy()


@pytest.mark.parametrize(("factor", "formant"), [(0.8, 800), (1.2, 1200)])
def test_formants_move_and_the_pitch_stays(factor, formant):
    pulses = (np.arange(16000) % 160 == 0).astype(float)  # 100 Hz
    ringing = scipy.signal.lfilter([1], np.poly(0.9 * np.exp([2j * np.pi / 16, -2j * np.pi / 16])).real, pulses)
    samples = shift_formants(ringing, factor)
    assert len(samples) == 16000
    before, after = (np.abs(np.fft.rfft(signal)) for signal in (ringing, samples))  # a bin is 1 Hz
    assert before.argmax() == 1000
    assert abs(after.argmax() - formant) <= 100
    assert np.square(after[::100]).sum() > 0.95 * np.square(after).sum()
    assert np.allclose(shift_formants(ringing, 1.0), ringing, atol=1e-3)
    assert np.allclose(shift_formants(ringing[:300], factor), ringing[:300])  # too short for a window
    assert not shift_formants(np.zeros(16000), factor).any()
    both = mixing.shift_formants(torch.tensor(np.stack([ringing, ringing])).float(), torch.tensor([1.0, factor]))
    assert np.allclose(both[1], samples, atol=1e-5)


def test_shares_are_as_set(recordings):
    drawn = plans(mixer_of(recordings, absent=0.2, no_voices=0.25, noise_share=0.5, music_share=0.3, more_voices=0.4))
    count = len(drawn)
    assert sum(p.target is None for p in drawn) / count == pytest.approx(0.2, abs=0.08)
    assert sum(not p.interference for p in drawn) / count == pytest.approx(0.8 * 0.25, abs=0.08)
    assert sum(len(p.interference) > 1 for p in drawn) / count == pytest.approx(0.8 * 0.4, abs=0.09)
    music = [any(piece.recording.kind == "music" for piece in p.noise) for p in drawn]
    assert np.mean(music) == pytest.approx(0.3, abs=0.08)
    assert all(p.noise for p in drawn if not p.interference)
    assert all(-5 <= p.sir_db <= 5 and 0 <= p.snr_db <= 20 and -35 <= p.level_db <= -15 for p in drawn)


def test_an_absent_target_is_silent_and_its_reference_another_speaker(recordings):
    mixer = mixer_of(recordings, absent=1)
    for plan in plans(mixer, 3):
        example = mixing.render(plan, mixer.settings)
        assert example.row["absent"]
        assert np.abs(example.parts[0]).max() == 0
        assert np.abs(example.parts[1]).max() > 0
        assert plan.speaker.speaker not in {piece.recording.speaker for piece in plan.interference}


def test_partial_overlap_leaves_silence(recordings):
    mixer = mixer_of(recordings, partial=1, absent=0, no_voices=0, noise_share=0, music_share=0)
    shares = [np.mean(mixing.render(plan, mixer.settings).parts[0] == 0) for plan in plans(mixer, 8)]
    assert max(shares) > 0.2


def test_reverberation_keeps_the_sum_and_the_length(recordings):
    mixer = mixer_of(recordings, reverb=1, absent=0, no_voices=0)
    plan = plans(mixer, 1)[0]
    assert plan.room
    example = mixing.render(plan, mixer.settings)
    dry = mixing.render(dataclasses.replace(plan, room=False), mixer.settings)
    assert example.parts.shape == dry.parts.shape == (3, mixer.settings.samples)
    alike = np.corrcoef(example.parts[0], dry.parts[0])[0, 1]
    assert abs(alike) < 0.99


def test_recorded_rooms_are_used(recordings, tmp_path):
    for place in range(4):  # each place of the room delays by another number of samples and nothing else
        response = np.zeros(800)
        response[100 * (place + 1)] = 1
        audio.write(tmp_path / "room" / f"{place}.wav", response)
    rooms = corpora.find([str(tmp_path)], "rooms", tmp_path)
    mixer = mixing.Mixer(mixing.Settings(segment=1.5, reverb=1, absent=0), recordings["speech"], rooms=rooms)
    plan = plans(mixer, 1)[0]
    wet = mixing.render(plan, mixer.settings, mixer.rooms).parts[0]
    dry = mixing.render(dataclasses.replace(plan, room=False), mixer.settings).parts[0]
    delay = np.argmax(np.correlate(wet, dry, "full")) - (len(dry) - 1)
    assert delay in (100, 200, 300, 400)


def test_the_equaliser_changes_the_spectrum_as_drawn():
    noise = np.random.default_rng(0).standard_normal(16000)
    curves = torch.tensor([[0.0] * 6, [6.0] * 6, [6.0] * 3 + [-6.0] * 3])
    same, louder, tilted = mixing.equalise(torch.tensor(np.stack([noise] * 3)), curves).numpy()
    assert np.allclose(same, noise)
    assert np.allclose(louder, noise * 10 ** (6 / 20))
    before, after = np.abs(np.fft.rfft(noise)), np.abs(np.fft.rfft(tilted))
    assert after[200] > 1.9 * before[200]
    assert after[5000] < 0.6 * before[5000]


def test_too_few_speakers_is_a_clear_error(recordings):
    speaker = recordings["speech"][0].speaker
    one = [r for r in recordings["speech"] if r.speaker == speaker]
    with pytest.raises(UserError, match="give at least 2"):
        mixing.Mixer(mixing.Settings(), one)
