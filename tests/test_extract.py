"""extractor.py and test.py: any recording in, one voice out, one line for what is wrong."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import DEMO

import audio
import test as script_under_test
from extractor import Extractor
from utils import ROOT

REFERENCE = DEMO / "reference.opus"
MIXTURE = DEMO / "mixture.flac"


@pytest.fixture(scope="module")
def extractor(checkpoint):
    return Extractor(checkpoint)


@pytest.fixture(scope="module")
def voice(extractor):
    return extractor.enroll(audio.read(REFERENCE))


@pytest.fixture(scope="module")
def mixture():
    return audio.read(MIXTURE)


def test_a_stream_equals_the_whole_whatever_the_chunks(extractor, voice, mixture):
    whole = extractor.extract(mixture, voice)
    assert whole.shape == mixture.shape
    for lengths in ([1, 100, 255, 256, 257, 5000], [16000], [7]):
        stream, heard, start, turn = extractor.stream(voice), [], 0, 0
        samples = mixture[: 117 * 256]  # whole hops, or the last would hold zeros where the whole goes on
        while start < len(samples):
            length = lengths[turn % len(lengths)] if turn < 40 else 4096
            heard.append(stream.feed(samples[start : start + length]))
            start, turn = start + length, turn + 1
        heard = np.concatenate([*heard, stream.flush()])
        assert len(heard) == len(samples) + stream.delay
        end = len(samples) - stream.delay
        assert np.abs(heard[stream.delay :][:end] - whole[:end]).max() < 1e-5 * np.abs(whole).max()


def test_streams_are_independent(extractor, voice, mixture):
    one, other = extractor.stream(voice), extractor.stream(voice)
    first = one.feed(mixture[:8192])
    other.feed(mixture[8192:20000])
    second = one.feed(mixture[8192:16384])
    alone = extractor.stream(voice).feed(mixture[:16384])
    assert np.allclose(np.concatenate([first, second]), alone, atol=1e-6)


def test_long_recordings_are_extracted_in_pieces_that_equal_the_whole(extractor, voice, mixture):
    long = np.tile(mixture, 6)  # more than one chunk
    whole = extractor.stream(voice)
    expected = np.concatenate([whole.feed(long), whole.flush()])[whole.delay :]
    assert np.abs(extractor.extract(long, voice) - expected).max() < 1e-5 * np.abs(expected).max()


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
        type(extractor.network), "forward", lambda self, spectrum, dvector, state=None: (spectrum, None)
    )
    resampler = audio.Resampler(16000, 44100)
    samples = np.concatenate([resampler.feed(mixture), resampler.flush()])
    soundfile.write(tmp_path / "in.wav", samples, 44100, subtype="FLOAT")
    script_under_test.extract_file(extractor, torch.ones(256), tmp_path / "in.wav", tmp_path / "out.wav")
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
    before = script_under_test.score(audio.read(MIXTURE), audio.read(DEMO / "target.flac"))
    assert f"mixture {before:.1f} dB" in done.stdout


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
    assert f"mixture {script_under_test.score(mixture, target):.1f} dB" in done.stdout


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
        ([MIXTURE], "whose voice?"),
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
import resource, sys
import test
try:
    test.main(sys.argv[1:])
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.long
def test_an_hour_needs_no_more_memory_than_a_minute(checkpoint, tmp_path, mixture):
    peaks = []
    for minutes in (1, 60):
        with audio.Writer(tmp_path / f"{minutes}.wav", 16000) as writer:
            for _ in range(minutes):
                writer.write(np.resize(mixture, 60 * 16000))
        command = [sys.executable, "-c", PEAK_MEMORY, tmp_path / f"{minutes}.wav", "--reference", REFERENCE]
        command += ["--output", tmp_path / "out.wav", "--checkpoint", checkpoint, "--no-play"]
        began = time.monotonic()
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split("peak ")[1]))
        print(f"{minutes} min: {peaks[-1]} MB, {time.monotonic() - began:.0f} s")
        assert soundfile.info(tmp_path / "out.wav").frames == minutes * 60 * 16000
    assert peaks[1] < peaks[0] + 60
    os.remove(tmp_path / "60.wav")
