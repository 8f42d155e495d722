"""extractor.py and test.py: any recording in, one voice out, one line for what is wrong."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import CORPORA, DEMO, score

import audio
import corpora
import test as script_under_test
from extractor import Extractor, Voice
from model import Config, Network
from utils import ROOT, UserError

REFERENCE = DEMO / "reference.opus"
MIXTURE = DEMO / "mixture.flac"


@pytest.fixture(scope="module")
def extractor(checkpoint):
    """One that extracts from recordings what it would from a stream."""
    return Extractor(checkpoint, rehearsal_seconds=0)


@pytest.fixture(scope="module")
def voice(extractor):
    return extractor.enroll(audio.read(REFERENCE))


@pytest.fixture(scope="module")
def mixture():
    return audio.read(MIXTURE)


@pytest.mark.parametrize("rate", [16000, 44100, 8000])
def test_a_stream_equals_the_whole_whatever_the_chunks(extractor, voice, mixture, rate):
    mixture = resampled(mixture, rate)[: 2 * rate + 11]
    whole = extractor.extract(mixture, voice, rate)
    assert whole.shape == mixture.shape
    for lengths in ([1, 100, 255, 256, 257, 5000], [16000], [7]):
        stream, heard, start, turn = extractor.stream(voice, rate), [], 0, 0
        while start < len(mixture):
            length = lengths[turn % len(lengths)] if turn < 40 else 4096
            heard.append(stream.feed(mixture[start : start + length]))
            start = min(start + length, len(mixture))
            turn += 1
            assert start - sum(map(len, heard)) <= stream.delay
        heard = np.concatenate([*heard, stream.flush()])
        assert heard.shape == mixture.shape
        assert np.abs(heard - whole).max() < 1e-5 * np.abs(whole).max()


def resampled(samples, rate):
    resampler = audio.Resampler(16000, rate)
    return np.concatenate([resampler.feed(samples), resampler.flush()])


def test_streams_are_independent_and_may_go_together(extractor, voice, mixture):
    """Streams of other voices, phases and chunks, fed in one go, are what each is alone."""
    mixtures = [mixture[:20000], mixture[5000:21000], 0.1 * mixture[:24000]]
    voices = [voice, extractor.enroll(mixture), None]
    alone = [extractor.extract(*pair) for pair in zip(mixtures, voices, strict=True)]
    streams = [extractor.stream(voice) for voice in voices]
    heard = [[] for _ in streams]
    for start in range(0, 24000, 640):
        estimates = extractor.feed(streams, [samples[start : start + 640] for samples in mixtures])
        for blocks, estimate in zip(heard, estimates, strict=True):
            blocks.append(estimate)
    for blocks, stream, expected in zip(heard, streams, alone, strict=True):
        whole = np.concatenate([*blocks, stream.flush()])
        assert whole.shape == expected.shape
        assert np.abs(whole - expected).max() < 1e-5 * np.abs(expected).max()


def test_long_recordings_are_extracted_in_pieces_that_equal_the_whole(extractor, voice, mixture, monkeypatch):
    whole = extractor.extract(mixture, voice)
    monkeypatch.setattr("extractor.NETWORK_HOPS", 16)
    assert np.abs(extractor.extract(mixture, voice) - whole).max() < 1e-5 * np.abs(whole).max()


def test_the_start_of_a_recording_is_heard_twice(checkpoint, extractor, voice, mixture):
    """Its estimate is what comes the second time of a recording with that start twice."""
    mixture = mixture[:48000].copy()
    mixture[32000 - extractor.stft.hop : 32000] = 0  # as the STFT begins anew
    rehearsed = Extractor(checkpoint, rehearsal_seconds=2.0).extract(mixture, voice)
    twice = extractor.extract(np.concatenate([mixture[:32000], mixture]), voice)[32000:]
    assert np.abs(rehearsed - twice).max() < 1e-5 * np.abs(twice).max()
    assert np.abs(rehearsed - extractor.extract(mixture, voice)).max() > 0.01 * np.abs(twice).max()


@pytest.mark.parametrize("rate", [16000, 44100])
def test_what_is_heard_twice_does_not_depend_on_the_blocks(checkpoint, voice, mixture, rate):
    extractor = Extractor(checkpoint, rehearsal_seconds=1.0)
    samples = resampled(mixture, rate)[: 2 * rate]
    whole = extractor.extract(samples, voice, rate)
    for cuts in ([1, 1000], [rate, rate + 1], range(500, 2 * rate, 500)):
        blocks = list(extractor.extract_blocks(iter(np.split(samples, cuts)), voice, rate))
        assert np.abs(np.concatenate(blocks) - whole).max() < 1e-5 * np.abs(whole).max()


def test_a_recording_without_samples_has_no_estimate(checkpoint):
    assert Extractor(checkpoint).extract(np.zeros(0, dtype=np.float32)).shape == (0,)
    assert np.concatenate(list(Extractor(checkpoint).extract_blocks([]))).shape == (0,)


def test_a_voice_is_saved_and_loaded(extractor, voice, tmp_path):
    voice.save(tmp_path / "anna.voice")
    assert torch.equal(Voice.load(tmp_path / "anna.voice").dvector, voice.dvector)
    assert (tmp_path / "anna.voice").stat().st_size < 5000
    (tmp_path / "broken.voice").write_bytes((tmp_path / "anna.voice").read_bytes()[:500])
    for name, message in (("broken.voice", "not a saved voice"), ("missing.voice", "no such voice")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            Voice.load(tmp_path / name)


def test_a_voice_is_replaced_without_a_click(extractor, voice, mixture):
    """The estimate after the change is a new voice's; no step between samples is larger than without a change."""
    kept, changed = extractor.stream(voice), extractor.stream(voice)
    first = kept.feed(mixture[:16000]), changed.feed(mixture[:16000])
    changed.voice = extractor.enroll(mixture)
    second = kept.feed(mixture[16000:]), changed.feed(mixture[16000:])
    difference = second[1] - second[0]
    assert np.abs(difference).max() > 1e-3
    steps = [np.abs(np.diff(np.concatenate([a, b]))).max() for a, b in zip(first, second, strict=True)]
    around = [np.abs(np.diff(np.concatenate([a[-300:], b[:300]]))).max() for a, b in zip(first, second, strict=True)]
    assert around[1] <= max(around[0], 0.5 * max(steps))
    assert np.abs(difference[:4]).max() < 0.05 * np.abs(second[0]).max()  # it fades over


@pytest.mark.parametrize("length", [1, 100, 256, 4000])
def test_short_mixtures_keep_their_length(extractor, voice, mixture, length):
    assert extractor.extract(mixture[:length], voice).shape == (length,)


@pytest.mark.parametrize(("rate", "channels", "suffix"), [(44100, 2, ".wav"), (8000, 1, ".wav"), (48000, 3, ".flac")])
def test_the_output_is_mono_at_the_rate_and_length_of_the_input(
    extractor, voice, mixture, tmp_path, rate, channels, suffix
):
    samples = audio.Resampler(16000, rate).feed(mixture)
    samples = np.stack([samples] * channels, axis=1)[:33333]
    soundfile.write(tmp_path / f"in{suffix}", samples, rate)
    script_under_test.extract_file(extractor, voice, tmp_path / f"in{suffix}", tmp_path / "out.wav")
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.channels, info.frames) == (rate, 1, len(samples))


def test_other_rates_are_extracted_in_time(checkpoint, mixture, tmp_path, monkeypatch):
    """With a mask of ones what comes out is what went in, at 44.1 kHz too."""
    extractor = Extractor(checkpoint)
    monkeypatch.setattr(
        type(extractor.network), "forward", lambda self, spectrum, dvector, state=None: (spectrum, state)
    )
    samples = resampled(mixture, 44100)
    soundfile.write(tmp_path / "in.wav", samples, 44100, subtype="FLOAT")
    script_under_test.extract_file(extractor, None, tmp_path / "in.wav", tmp_path / "out.wav")
    heard, _ = soundfile.read(tmp_path / "out.wav")
    inner = slice(2000, -2000)
    assert np.abs(heard[inner] - samples[inner]).max() < 2e-3


def test_silence_gives_silence(extractor, voice, tmp_path):
    audio.write(tmp_path / "silence.wav", np.zeros(30000))
    script_under_test.extract_file(extractor, voice, tmp_path / "silence.wav", tmp_path / "out.wav")
    assert np.abs(audio.read(tmp_path / "out.wav")).max() == 0


def test_one_file_in_one_file_out_with_figures_and_a_picture(script, checkpoint, tmp_path):
    output = tmp_path / "out.wav"
    done = script(
        "test.py", MIXTURE, "--reference", REFERENCE, "--target", DEMO / "target.flac",
        "--output", output, "--checkpoint", checkpoint, "--no-play",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert soundfile.info(output).frames == soundfile.info(MIXTURE).frames
    assert "SI-SDR: mixture" in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    before = score(audio.read(MIXTURE), audio.read(DEMO / "target.flac"))
    assert f"mixture {before:.1f} dB" in done.stdout


def test_without_a_reference_it_listens_for_one(script, checkpoint, tmp_path):
    """Recordings of 5 s or more are heard twice, and it says what the reference was; shorter ones are not."""
    mixture = audio.read(MIXTURE)
    audio.write(tmp_path / "long.wav", np.concatenate([np.zeros(32000), np.tile(mixture, 3)[: 6 * 16000]]))
    audio.write(tmp_path / "short.wav", mixture[: 4 * 16000])
    arguments = ["--output", tmp_path / "out", "--checkpoint", checkpoint, "--no-play"]
    done = script("test.py", tmp_path / "long.wav", tmp_path / "short.wav", *arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"long.wav: the reference is what was heard from [23] to [78] s", done.stdout)
    assert "short.wav: the" not in done.stdout
    first = audio.read(tmp_path / "out" / "long_estimate.wav")
    done = script("test.py", tmp_path / "long.wav", "--no-self-enroll", *arguments)
    assert "the reference is" not in done.stdout
    assert np.abs(first - audio.read(tmp_path / "out" / "long_estimate.wav")).max() > 1e-3


def test_the_primary_speaker_is_where_the_estimate_is_loud_and_sustained(extractor, monkeypatch):
    monkeypatch.setattr(extractor, "extract_blocks", lambda blocks: blocks)
    monkeypatch.setattr(extractor, "enroll_alike", lambda reference, estimate: (reference, estimate))
    speech = np.random.default_rng(0).normal(0, 0.1, 20 * 16000).astype(np.float32)
    speech[: 7 * 16000] *= 0.3
    speech[13 * 16000 :] *= 0.3
    speech[2 * 16000 : 3 * 16000] *= 30  # loud, but not sustained
    (reference, around), start = extractor.enroll_primary(np.split(speech, [100, 50000, 200000]))
    assert start in (7, 8)
    assert np.array_equal(reference, speech[int(start) * 16000 :][: 5 * 16000])
    assert np.array_equal(around, speech[int(start - 5) * 16000 :][: 15 * 16000])
    assert extractor.enroll_primary([np.zeros(10 * 16000, dtype=np.float32)]) == (None, None)
    assert extractor.enroll_primary([speech[: 4 * 16000]]) == (None, None)


def test_what_sounds_like_the_primary_speaker_makes_the_voice_better_and_others_change_nothing(extractor):
    pairs = list(itertools.islice(utterances(5 * audio.SAMPLE_RATE), 0, 10, 2))  # neighbours may be one voice, higher
    for (one, more), (other, _) in itertools.pairwise(pairs):
        known, whole = extractor.enroll(one).dvector, extractor.enroll(np.concatenate([one, more])).dvector
        among_others = extractor.enroll_alike(one, np.concatenate([other, one, other])).dvector
        among_its_own = extractor.enroll_alike(one, np.concatenate([more, one, np.zeros_like(one)])).dvector
        assert among_others @ known > 0.95
        assert among_its_own @ whole > known @ whole
        assert among_its_own.norm().item() == pytest.approx(1, abs=1e-5)


def utterances(samples):
    """Two signals of so many samples of each of several voices."""
    folder = CORPORA / "LibriSpeech" / "dev-clean"
    folder = folder if folder.exists() else DEMO / "voices"
    recordings = corpora.find([str(folder)], "speech", folder)
    for _, spoken in itertools.groupby(recordings, lambda recording: recording.speaker):
        spoken = np.concatenate([audio.read(recording.path) for recording in itertools.islice(spoken, 8)])
        if len(spoken) >= 2 * samples:
            yield spoken[:samples], spoken[samples : 2 * samples]


def test_five_seconds_at_any_rate_are_enough_to_listen_for_a_voice(extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(extractor, "enroll_primary", lambda blocks: (sum(map(len, blocks)), 0))
    for rate in (8000, 16000, 44100, 48000):
        audio.write(tmp_path / "five.wav", np.full(5 * rate, 0.1, dtype=np.float32), rate)
        assert script_under_test.primary(extractor, tmp_path / "five.wav", None) == 5 * audio.SAMPLE_RATE


def test_nothing_that_was_given_is_overwritten(script, checkpoint, tmp_path):
    shutil.copy(MIXTURE, tmp_path / "a.flac")
    audio.write(tmp_path / "a_estimate.wav", audio.read(REFERENCE))
    before = (tmp_path / "a_estimate.wav").read_bytes()
    arguments = ["--output", tmp_path, "--checkpoint", checkpoint, "--no-play"]
    given = ["--reference", tmp_path / "a_estimate.wav"], [tmp_path / "a_estimate.wav"]
    for more in given:
        done = script("test.py", tmp_path / "a.flac", *more, *arguments)
        assert done.returncode == 2
        assert "a_estimate.wav: is one of the recordings given" in done.stderr
        assert (tmp_path / "a_estimate.wav").read_bytes() == before


@pytest.mark.parametrize("hop", [192, 320])
def test_long_blocks_lose_nothing_whatever_the_hop(hop):
    extractor = Extractor.__new__(Extractor)
    extractor.rehearsal_seconds = 0
    extractor.network, extractor.device, extractor.graph = Network(Config(n_fft=2 * hop, hop=hop)).eval(), "cpu", None
    mixture = np.random.default_rng(0).normal(0, 0.1, 2**17 + 50 * hop).astype(np.float32)
    estimate = extractor.extract(mixture)
    assert np.abs(estimate - 0.5 / (1 + 0.25 / 4) ** 0.5 * mixture)[:-hop].max() < 1e-4  # an untrained network's mask


def test_one_bad_input_among_several_does_not_stop_the_others(script, checkpoint, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    shutil.copy(MIXTURE, tmp_path / "good.flac")
    done = script(
        "test.py", tmp_path / "bad.wav", tmp_path / "good.flac", "--reference", REFERENCE,
        "--output", tmp_path / "out", "--checkpoint", checkpoint, "--no-play",
    )  # fmt: skip
    assert done.returncode == 2
    assert "bad.wav: not audio" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good_estimate.wav"]


def test_an_absent_target_gets_its_own_figure(capsys):
    mixture = np.ones(1000, dtype=np.float32)
    script_under_test.print_scores({"mixture": mixture, "target": 0 * mixture, "estimate": 0.1 * mixture})
    assert "20.0 dB quieter" in capsys.readouterr().out


def test_without_a_mixture_it_shows_a_validation_example(script, checkpoint, store, tmp_path):
    done = script("test.py", "--data", store, "--checkpoint", checkpoint, "--output", tmp_path, "--no-play")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mixture.wav", "target.wav", "estimate.wav", "spectrograms.png"}
    assert "improvement" in done.stdout
    mixture, target = audio.read(tmp_path / "mixture.wav"), audio.read(tmp_path / "target.wav")
    assert f"mixture {score(mixture, target):.1f} dB" in done.stdout


def bad_inputs(folder):
    """(name of a bad mixture, what its error says)."""
    tone = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    (folder / "text.wav").write_text("no sound")
    (folder / "empty.wav").touch()
    (folder / "folder.wav").mkdir()
    audio.write(folder / "short.wav", tone[:100])
    soundfile.write(folder / "nan.wav", np.where(np.arange(16000) == 9000, np.nan, tone), 16000, subtype="FLOAT")
    for suffix in (".wav", ".flac", ".ogg", ".opus"):
        audio.write(folder / f"whole{suffix}", np.tile(tone, 5))
        data = (folder / f"whole{suffix}").read_bytes()
        (folder / f"broken{suffix}").write_bytes(data[: len(data) // 2])
    return {
        "missing.wav": "no such file",
        "text.wav": "not audio",
        "empty.wav": "is empty",
        "folder.wav": "is a folder",
        "short.wav": "6.2 ms is too short",
        "nan.wav": "not numbers",
        "broken.wav": "breaks off",
        "broken.flac": "breaks off",
        "broken.ogg": "breaks off",
        "broken.opus": "breaks off",
    }


def test_each_bad_mixture_is_one_line_and_leaves_nothing(script, checkpoint, tmp_path):
    expected = bad_inputs(tmp_path)
    paths = [tmp_path / name for name in expected]
    done = script(
        "test.py", *paths[:5], "--reference", REFERENCE, "--output", tmp_path / "out",
        "--checkpoint", checkpoint, "--no-play",
    )  # fmt: skip
    rest = script(  # a folder is wanted, and two of these have one stem
        "test.py", paths[5], "--reference", REFERENCE, "--output", tmp_path / "out" / "x.wav",
        "--checkpoint", checkpoint, "--no-play",
    )  # fmt: skip
    assert (done.returncode, rest.returncode) == (2, 2)
    lines = (done.stderr + rest.stderr).strip().splitlines()
    assert len(lines) == 6, lines
    for line, (name, message) in zip(lines, list(expected.items())[:6], strict=True):
        assert name in line
        assert message in line
    assert "Traceback" not in done.stderr + rest.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_broken_recordings_are_refused(extractor, voice, tmp_path):
    for name, message in list(bad_inputs(tmp_path).items())[6:]:
        with pytest.raises(script_under_test.UserError, match=f"{name}: .*{message}"):
            script_under_test.extract_file(extractor, voice, tmp_path / name, tmp_path / "out.wav")
        assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", REFERENCE], "needs a MIXTURE"),
        ([MIXTURE, "--reference", "missing.wav"], "missing.wav: no such file"),
        ([MIXTURE, "--reference", "{short}"], "0.50 s of reference is too short; give at least 1 s"),
        ([MIXTURE, "--reference", "{silence}"], "no speech"),
        ([MIXTURE, "--reference", REFERENCE, "--checkpoint", MIXTURE], "not a whole checkpoint"),
        ([MIXTURE, "--reference", REFERENCE, "--output", "/proc/no/out.wav"], "/proc/no/out.wav: cannot be written"),
        ([MIXTURE, "--reference", REFERENCE, "--output", "out.doc"], "cannot write .doc"),
        ([MIXTURE, MIXTURE, "--reference", REFERENCE], "same name"),
        ([MIXTURE, "--reference", REFERENCE, "--output", MIXTURE], "is one of the recordings given"),
        ([MIXTURE, "--reference", REFERENCE, "--target", REFERENCE], "not as long as"),
        ([MIXTURE, "--reference", REFERENCE, "--device", "cuda:77"], "--device cuda:77: cannot be used"),
        (["--data", "nowhere"], "nowhere: no examples here"),
        (["--example", "100000", "--data", "{store}"], "no validation example 100000"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(refusal, checkpoint, store, tmp_path, arguments, message):
    audio.write(tmp_path / "short.wav", audio.read(REFERENCE)[:8000])
    audio.write(tmp_path / "silence.wav", np.zeros(32000))
    places = {"short": tmp_path / "short.wav", "silence": tmp_path / "silence.wav", "store": store}
    arguments = [str(argument).format(**places) for argument in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", checkpoint]
    assert message in refusal(script_under_test.main, *arguments, "--no-play")


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
def test_video_and_m4a_go_through_ffmpeg(extractor, voice, tmp_path):
    for name in ("sound.m4a", "sound.webm"):
        subprocess.run(["ffmpeg", "-v", "error", "-i", MIXTURE, tmp_path / name], check=True)
        script_under_test.extract_file(extractor, voice, tmp_path / name, tmp_path / "out.wav")
        assert abs(soundfile.info(tmp_path / "out.wav").duration - soundfile.info(MIXTURE).duration) < 0.1


PEAK_MEMORY = """
import pathlib, re, sys
import test, torch
import onnxruntime, librosa
def peak_kilobytes():  # getrusage would begin with the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
torch.nn.LSTM(2, 2)(torch.zeros(1, 2, 2))
before = peak_kilobytes()
try:
    test.main(sys.argv[1:])
finally:
    print("over the libraries", (peak_kilobytes() - before) // 1024)
"""


@pytest.mark.long
def test_an_hour_needs_no_more_memory_than_a_minute(checkpoint, tmp_path, mixture):
    """44.1 kHz stereo: under 500 MB over the libraries, and 20 times faster than real time."""
    minute = resampled(np.resize(mixture, 60 * 16000), 44100)
    minute = np.stack([minute, 0.5 * minute], axis=1)
    used = []
    for minutes in (1, 60):
        with audio.Writer(tmp_path / f"{minutes}.wav", 44100, channels=2) as writer:
            for _ in range(minutes):
                writer.write(minute)
        command = [sys.executable, "-c", PEAK_MEMORY, tmp_path / f"{minutes}.wav", "--reference", REFERENCE]
        command += ["--output", tmp_path / "out.wav", "--checkpoint", checkpoint, "--no-play"]
        began = time.monotonic()
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
        seconds = time.monotonic() - began
        used.append(int(done.stdout.split("over the libraries ")[1]))
        print(f"{minutes} min: {used[-1]} MB over the libraries, {seconds:.0f} s")
        assert soundfile.info(tmp_path / "out.wav").frames == minutes * 60 * 44100
    assert used[1] < used[0] + 60
    assert used[1] < 500
    assert seconds < 3600 / 20
    os.remove(tmp_path / "60.wav")
