import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
from utils import ROOT, UserError

CORPORA = Path(os.environ.get("CORPORA", ROOT.parent / "shared" / "corpora"))

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def noise(seconds, rate=16000, level=0.1, seed=0):
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def sine(seconds, rate, hz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode(path, samples, rate=16000, **options):
    """Write with soundfile itself, so that reading is not tested against `audio.write`."""
    kind = {".opus": {"format": "OGG", "subtype": "OPUS"}, ".rf64": {"format": "RF64"}}.get(path.suffix, {})
    soundfile.write(path, samples, rate, **{**kind, **options})
    return path


def cut(path, part=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


def error_of(function, *args):
    """The one line of the `UserError` that `function(*args)` raises, which must name the file it was given first."""
    with pytest.raises(UserError) as caught:
        function(*args)
    line = str(caught.value)
    assert "\n" not in line
    assert "; " in line, "no remedy"
    return line


def read_error(path):
    line = error_of(audio.read, path)
    assert line.startswith(f"{path}: ")
    return line


# ---- Reading what can be read ----


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate", "channels"),
    [
        (".wav", "PCM_U8", 16000, 1),
        (".wav", "PCM_16", 8000, 1),
        (".wav", "PCM_24", 44100, 2),
        (".wav", "PCM_32", 96000, 1),
        (".wav", "FLOAT", 48000, 6),
        (".wav", "DOUBLE", 22050, 2),
        (".wav", "ULAW", 8000, 1),
        (".flac", "PCM_24", 48000, 2),
        (".aiff", "PCM_16", 44100, 2),
        (".w64", "PCM_16", 44100, 2),
        (".rf64", "PCM_16", 44100, 2),
        (".ogg", "VORBIS", 44100, 2),
        (".opus", "OPUS", 48000, 2),
        (".mp3", "MPEG_LAYER_III", 44100, 2),
    ],
)
def test_a_sine_keeps_its_frequency_and_level_in_every_format(tmp_path, suffix, subtype, rate, channels):
    levels = np.linspace(0.2, 0.6, channels)  # channels that differ show whether they are averaged
    samples = sine(1.0, rate, level=1.0)[:, None] * levels
    path = encode(tmp_path / f"sine{suffix}", samples, rate, subtype=subtype)
    with audio.Reader(path) as reader:
        assert reader.rate == rate
        assert reader.frames == rate
    read = audio.read(path)
    assert read.dtype == np.float32
    assert read.shape == (16000,)
    spectrum = np.abs(np.fft.rfft(read[4000:12000] * np.hanning(8000)))
    assert abs(np.argmax(spectrum) * 2 - 440) <= 2
    assert np.sqrt(2 * np.mean(read[4000:12000] ** 2)) == pytest.approx(levels.mean(), rel=0.03)
    expected = sine(1.0, 16000, level=levels.mean())
    if subtype not in ("VORBIS", "OPUS", "MPEG_LAYER_III"):
        tolerance = {"PCM_U8": 0.01, "ULAW": 0.02}.get(subtype, 1e-3)
        assert np.abs(read - expected)[500:-500].max() < tolerance  # in phase, too


def test_a_silent_recording_is_no_error(tmp_path):
    assert not audio.read(encode(tmp_path / "silence.wav", np.zeros(16000))).any()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus"])
@pytest.mark.parametrize("seconds", [0.01, 0.1237, 100])
def test_blocks_add_up_to_the_whole(tmp_path, suffix, seconds):
    path = encode(tmp_path / f"noise{suffix}", noise(3.3))
    whole, rate = soundfile.read(path, dtype="float32")
    with audio.Reader(path) as reader:
        blocks = list(reader.blocks(seconds))
    assert all(len(block) == round(seconds * rate) for block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_a_long_file_takes_no_more_memory_than_a_block(tmp_path):
    path = encode(tmp_path / "long.wav", np.zeros((60 * 16000, 2), dtype=np.int16))
    tracemalloc.start()
    try:
        with audio.Reader(path) as reader, audio.Writer(tmp_path / "copy.wav") as writer:
            for block in reader.blocks(1):
                writer.write(block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6, "the whole would take 7.7 MB, a block takes 0.13"
    assert soundfile.info(tmp_path / "copy.wav").frames == 60 * 16000


# ---- Sizes in the header that a writer into a pipe did not know ----


@pytest.mark.parametrize("told", [0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("riff_too", [True, False])
def test_a_wav_written_into_a_pipe_is_whole(tmp_path, told, riff_too):
    path = encode(tmp_path / "streamed.wav", noise(0.5))
    expected = soundfile.read(path, dtype="float32")[0]
    data = bytearray(path.read_bytes())
    at = data.find(b"data") + 4
    data[at : at + 4] = struct.pack("<I", told)
    if riff_too:
        data[4:8] = struct.pack("<I", told)
    path.write_bytes(data)
    np.testing.assert_array_equal(audio.read(path), expected)


@pytest.mark.parametrize("suffix", [".rf64", ".w64"])
def test_sizes_of_64_bits_that_were_left_at_zero(tmp_path, suffix):
    path = encode(tmp_path / f"streamed{suffix}", noise(0.5))
    expected = soundfile.read(path, dtype="float32")[0]
    data = bytearray(path.read_bytes())
    at = 28 if suffix == ".rf64" else data.find(b"data\xf3\xac") + 16
    assert struct.unpack_from("<Q", data, at)[0] in (16000, 16024)
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    np.testing.assert_array_equal(audio.read(path), expected)


@needs_ffmpeg
@pytest.mark.parametrize(
    "options", ["-f wav", "-f flac", "-f ogg", "-f w64", "-f aiff", "-rf64 always -f wav", "-f mp3", "-f opus"]
)
def test_what_ffmpeg_writes_into_a_pipe_is_whole(tmp_path, options):
    source = encode(tmp_path / "source.wav", noise(1.0, 48000), 48000)
    path = tmp_path / "streamed"
    with open(path, "wb") as out:
        subprocess.run(
            ["ffmpeg", "-v", "error", "-i", source, *options.split(), "-"], stdout=out, stderr=subprocess.DEVNULL
        ).check_returncode()
    assert abs(len(audio.read(path)) - 16000) < (1500 if "mp3" in options else 2)


# ---- Reading what cannot be read ----


def test_missing_and_folder_and_empty(tmp_path):
    assert "no such file" in read_error(tmp_path / "none.wav")
    assert "folder" in read_error(tmp_path)
    (tmp_path / "empty.wav").touch()
    assert "empty" in read_error(tmp_path / "empty.wav")


@pytest.mark.parametrize("suffix", [".wav", ".ogg", ".aiff"])
def test_no_frames(tmp_path, suffix):
    assert "no audio" in read_error(encode(tmp_path / f"none{suffix}", np.zeros(0)))


def test_shorter_than_10_ms(tmp_path):
    assert "9.9 ms" in read_error(encode(tmp_path / "short.wav", noise(0.0099)))
    assert len(audio.read(encode(tmp_path / "enough.wav", noise(0.01)))) == 160


@pytest.mark.parametrize("name", ["text.wav", "text.txt", "text.raw", "text.mp3"])
@pytest.mark.parametrize("ffmpeg", [pytest.param(True, marks=needs_ffmpeg), False])
def test_text_is_not_audio(tmp_path, name, ffmpeg, monkeypatch):
    if not ffmpeg:
        monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / name
    path.write_text("It was a dark and stormy night.\n" * 100)
    line = read_error(path)
    assert "not audio" in line
    assert ("install ffmpeg" in line) != ffmpeg


@pytest.mark.parametrize("suffix", [".wav", ".rf64", ".w64", ".aiff", ".flac", ".ogg", ".opus"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.97])
def test_truncated(tmp_path, suffix, part):
    path = encode(tmp_path / f"whole{suffix}", noise(4.0))
    assert len(audio.read(path)) == 64000
    assert "breaks off" in read_error(cut(path, part))


@pytest.mark.parametrize(("suffix", "mark"), [(".ogg", b"OggS\x00"), (".opus", b"OggS\x00"), (".flac", b"\xff\xf8")])
def test_truncated_between_two_pages_or_frames(tmp_path, suffix, mark):
    path = encode(tmp_path / f"whole{suffix}", noise(4.0))
    data = path.read_bytes()
    at = data.find(mark, len(data) // 2)
    while at >= 0:
        path.write_bytes(data[:at])
        assert "breaks off" in read_error(path)
        at = data.find(mark, at + 1)


def test_truncated_in_the_header(tmp_path):
    path = encode(tmp_path / "header.wav", noise(1.0))
    path.write_bytes(path.read_bytes()[:20])
    assert "breaks off" in read_error(path)


def test_truncation_is_noticed_when_opening(tmp_path):
    """So that nothing is computed for an hour first; only a FLAC has to be read to the break."""
    for suffix in (".wav", ".ogg", ".opus"):
        error_of(audio.Reader, cut(encode(tmp_path / f"whole{suffix}", noise(4.0))))


def test_a_damaged_flac(tmp_path):
    path = encode(tmp_path / "hole.flac", noise(4.0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    assert "damaged" in read_error(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_no_numbers(tmp_path, bad, channels):
    samples = np.tile(noise(1.0)[:, None], channels)
    samples[12345, -1] = bad
    path = encode(tmp_path / "nan.wav", samples, subtype="FLOAT")
    assert "not numbers" in read_error(path)
    assert "not numbers" in error_of(audio.read_segment, path, 0.5, 0.4)


# ---- Through ffmpeg ----


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".m4a", ".mka", ".mp4"])
def test_other_formats_through_ffmpeg(tmp_path, suffix):
    stereo = np.stack([sine(2.0, 44100, level=0.2), sine(2.0, 44100, level=0.6)], axis=1)
    source = encode(tmp_path / "source.wav", stereo, 44100)
    path = tmp_path / f"-odd: name{suffix}"
    video = ["-f", "lavfi", "-i", "testsrc=s=64x64:d=2"] if suffix == ".mp4" else []
    subprocess.run(["ffmpeg", "-v", "error", *video, "-i", source, "-c:a", "aac", f"file:{path}"], check=True)
    with audio.Reader(path) as reader:
        assert reader.rate == 44100
        assert reader.frames is None
        assert len(next(reader.blocks(0.5))) == 22050
    read = audio.read(path)
    assert abs(len(read) - 32000) < 1000
    assert np.sqrt(2 * np.mean(read[8000:24000] ** 2)) == pytest.approx(0.4, rel=0.03)
    assert "WAV" in error_of(audio.read_segment, path, 0.5, 0.5)


@needs_ffmpeg
@pytest.mark.parametrize("options", ["-movflags +faststart out.m4a", "out.m4a", "-c:a libopus out.webm"])
def test_truncated_through_ffmpeg(tmp_path, options):
    source = encode(tmp_path / "source.wav", noise(5.0, 48000), 48000)
    *options, name = options.split()
    path = tmp_path / name
    made = subprocess.run(["ffmpeg", "-v", "error", "-i", source, *options, path])
    if made.returncode:
        pytest.skip("this ffmpeg has no encoder for it")
    audio.read(path)
    read_error(cut(path))


@needs_ffmpeg
def test_a_video_without_sound(tmp_path):
    path = tmp_path / "mute.mp4"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=s=64x64:d=1", path], check=True)
    assert "not audio" in read_error(path)


# ---- Resampling and pieces ----

RATES = st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000])


@settings(max_examples=30, deadline=None)
@given(RATES, RATES, st.lists(st.integers(0, 3000), max_size=12), st.integers(0, 2**32 - 1))
def test_resampling_has_the_exact_length_and_ignores_the_blocking(rate_in, rate_out, lengths, seed):
    samples = noise(sum(lengths) / rate_in, rate_in, seed=seed)
    in_blocks, at_once = audio.Resampler(rate_in, rate_out), audio.Resampler(rate_in, rate_out)
    blocks = [in_blocks.feed(block) for block in np.split(samples, np.cumsum(lengths))]
    blocks = np.concatenate([*blocks, in_blocks.flush()])
    assert len(blocks) == round(len(samples) * rate_out / rate_in)
    np.testing.assert_array_equal(blocks, np.concatenate([at_once.feed(samples), at_once.flush()]))


def test_resampling_is_in_time_and_without_aliases():
    resampler = audio.Resampler(48000, 16000)
    samples = sine(1.0, 48000, 1000) + sine(1.0, 48000, 11000)  # the second must go
    out = np.concatenate([resampler.feed(samples), resampler.flush()])
    assert np.abs(out - sine(1.0, 16000, 1000))[800:-800].max() < 1e-3


@pytest.mark.parametrize(
    ("suffix", "rate", "tolerance"),
    [
        (".wav", 16000, 0),
        (".flac", 16000, 0),
        (".flac", 48000, 1e-4),
        (".wav", 44100, 1e-4),
        (".wav", 32000, 1e-4),
        (".wav", 8000, 1e-4),
        (".wav", 11025, 1e-4),
        (".ogg", 16000, 1e-6),
        (".opus", 16000, 1e-2),
    ],
)
@pytest.mark.parametrize("length", [3.0, 48017])
def test_a_segment_equals_the_piece_of_the_whole(tmp_path, suffix, rate, tolerance, length):
    frames = length if isinstance(length, int) else round(length * rate)
    path = encode(tmp_path / f"noise{suffix}", noise(frames / rate, rate), rate)
    whole = audio.read(path)
    seconds = 0.7
    last = len(whole) / 16000 - seconds
    for start in (0, 0.0001, 0.05, last / 3, last * 0.77, last):
        piece = audio.read_segment(path, start, seconds)
        assert piece.dtype == np.float32
        assert piece.shape == (11200,)
        at = min(round(start * 16000), len(whole) - 11200)
        np.testing.assert_allclose(piece, whole[at : at + 11200], rtol=0, atol=tolerance)


def test_a_segment_to_the_very_end_when_both_times_round_up(tmp_path):
    path = encode(tmp_path / "noise.wav", noise(48001 / 16000))
    piece = audio.read_segment(path, 36799.5 / 16000, 11201.5 / 16000)
    np.testing.assert_array_equal(piece, audio.read(path)[-11202:])


def test_a_segment_of_a_stereo_file_is_mono(tmp_path):
    path = encode(tmp_path / "stereo.wav", np.stack([noise(1), np.zeros(16000)], axis=1))
    np.testing.assert_array_equal(audio.read_segment(path, 0.25, 0.5), audio.read(path)[4000:12000])


def test_a_segment_beyond_the_end(tmp_path):
    path = encode(tmp_path / "noise.wav", noise(1.0))
    assert "1.00 s long" in error_of(audio.read_segment, path, 0.6, 0.5)
    assert "1.00 s long" in error_of(audio.read_segment, path, -0.1, 0.5)
    assert "no such file" in error_of(audio.read_segment, tmp_path / "none.wav", 0, 0.5)
    path = cut(encode(tmp_path / "cut.flac", noise(4.0)))
    assert "breaks off" in error_of(audio.read_segment, path, 2.5, 1.0)


# ---- Writing ----


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".WAV"])
def test_what_is_written_reads_the_same(tmp_path, suffix):
    path = tmp_path / "new folder" / f"sine{suffix}"
    samples = sine(1.0, 16000)
    audio.write(path, samples)
    read = audio.read(path)
    assert len(read) == 16000
    assert np.abs(read - samples)[1000:-1000].max() < (0.6 / 32768 if suffix.lower() in (".wav", ".flac") else 0.03)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_16_bit_recording_survives_bit_for_bit(tmp_path):
    samples = np.arange(-32768, 32768, dtype=np.int16)
    path = encode(tmp_path / "all.wav", samples)
    audio.write(tmp_path / "copy.wav", audio.read(path))
    np.testing.assert_array_equal(soundfile.read(tmp_path / "copy.wav", dtype="int16")[0], samples)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_silence_stays_digital_silence(tmp_path, suffix):
    audio.write(tmp_path / f"silence{suffix}", np.zeros(16000))
    assert not soundfile.read(tmp_path / f"silence{suffix}", dtype="int16")[0].any()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_peaks_are_clipped_and_never_wrap(tmp_path, suffix):
    samples = sine(1.0, 16000, level=1.5)
    with audio.Writer(tmp_path / f"loud{suffix}") as writer:
        writer.write(samples)
        assert writer.clipped == np.count_nonzero(np.abs(samples) > 1)
    read = audio.read(tmp_path / f"loud{suffix}")
    error = np.abs(read - np.clip(samples, -1, 1))
    assert error.max() < (1e-4 if suffix != ".ogg" else 0.5)


def test_a_long_ogg_does_not_crash(tmp_path):
    """libsndfile's Vorbis encoder overruns its stack with a few million samples at once."""
    audio.write(tmp_path / "long.ogg", np.zeros(4_000_000, dtype=np.float32), 8000)
    assert soundfile.info(tmp_path / "long.ogg").frames == 4_000_000


@pytest.mark.parametrize("name", ["out.wav", "out.flac", "out.ogg"])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, name):
    path = tmp_path / name
    audio.write(path, sine(0.5, 16000))
    before = path.read_bytes()

    def fail():
        with audio.Writer(path) as writer:
            writer.write(noise(2.0))
            assert path.read_bytes() == before
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    audio.write(path, noise(2.0))
    assert path.read_bytes() != before


def test_writing_what_cannot_be_written(tmp_path):
    samples = noise(0.1)
    line = error_of(audio.write, tmp_path / "out.mp4", samples)
    assert ".mp4" in line
    assert ".wav, .flac, .ogg, .opus" in line
    assert "suffix" in error_of(audio.write, tmp_path / "out", samples)
    assert "48000" in error_of(audio.write, tmp_path / "out.opus", samples, 44100)
    (tmp_path / "folder.wav").mkdir()
    assert "folder" in error_of(audio.write, tmp_path / "folder.wav", samples)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.wav"]


def test_writing_into_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in error_of(audio.write, tmp_path / "file" / "out.wav", noise(0.1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on file sizes")
@pytest.mark.parametrize(
    ("suffix", "samples", "free_bytes"),
    [
        (".wav", 160000, 20000),
        (".flac", 160000, 20000),
        (".ogg", 160000, 20000),
        (".opus", 160000, 20000),
        (".wav", 1000, 10),
        (".flac", 1000, 1000),  # libsndfile notices none of this one
    ],
)
def test_a_full_disk(tmp_path, suffix, samples, free_bytes):
    program = f"""
import resource, numpy, audio
resource.setrlimit(resource.RLIMIT_FSIZE, ({free_bytes}, {free_bytes}))
try:
    audio.write({str(tmp_path / ("out" + suffix))!r}, 0.1 * numpy.random.default_rng(0).standard_normal({samples}))
except audio.UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "cannot be written" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


# ---- The reference ----


def hum(hz, harmonics=1, noise_level=0.0):
    waves = sum(sine(5.0, 16000, hz * k, 0.2 / k) for k in range(1, harmonics + 1))
    return waves + noise(5.0, level=noise_level)


def coloured(exponent):
    spectrum = np.fft.rfft(noise(5.0))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** -exponent
    samples = np.fft.irfft(spectrum)
    return (0.1 * samples / samples.std()).astype(np.float32)


def fake_speech():
    """Syllables of a gliding pitch, four a second."""
    time = np.arange(3 * 16000) / 16000
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / 16000
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * voice * np.maximum(0, np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def test_a_short_reference():
    line = error_of(audio.check_reference, fake_speech()[:9920], "me.wav")
    assert line.startswith("me.wav: 0.62 s of reference is too short; give at least 1 s of the voice alone")


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(80000, dtype=np.float32),
        noise(5.0),
        noise(5.0, level=1e-5),
        coloured(0.5),
        coloured(1.0),
        hum(50),
        hum(50, 8),
        hum(60, 8, 0.01),
        hum(100),
        hum(100, 8),
        hum(100, 8, 0.05),
        hum(200),
        hum(440),
        np.full(80000, 0.3, dtype=np.float32),
    ],
    ids="silence white faint pink brown 50 50h 60h+n 100 100h 100h+n 200 440 offset".split(),
)
def test_a_reference_without_speech(samples):
    assert "no speech" in error_of(audio.check_reference, samples, "hum.wav")


@pytest.mark.parametrize("level", [1e-3, 1, 10])
@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_reference_with_a_voice(level, rate):
    resampler = audio.Resampler(16000, rate)
    samples = np.concatenate([resampler.feed(level * fake_speech()), resampler.flush()])
    audio.check_reference(samples, "me.wav", rate)


# ---- Real recordings ----


def recordings(pattern, count):
    paths = sorted(CORPORA.glob(pattern))
    if not paths:
        pytest.skip(f"no {pattern} in {CORPORA}; set CORPORA to a folder of corpora")
    return paths[:: max(1, len(paths) // count)]


def accepted(path, seconds=None):
    with contextlib.suppress(UserError):
        audio.check_reference(audio.read(path)[: seconds and round(seconds * 16000)], path)
        return True
    return False


@pytest.mark.parametrize(
    "pattern",
    [
        "LibriSpeech/train-clean-100/*/*/*.opus",
        "LibriSpeech/test-other/*/*/*.flac",
        "VCTK/*/*.flac",
        "speechocean762/WAVE/*/*",
    ],
)
def test_real_speech_reads_in_pieces_and_makes_a_reference(pattern):
    for path in recordings(pattern, 12):
        whole = audio.read(path)
        assert accepted(path), path
        half = len(whole) / 2 / 16000
        piece = audio.read_segment(path, half - 0.25, 0.5)
        at = round((half - 0.25) * 16000)
        expected = whole[at : at + 8000]
        error_db = 10 * np.log10(np.sum((piece - expected) ** 2) / np.sum(expected**2) + 1e-12)
        assert error_db < (-25 if path.suffix == ".opus" else -110), path


@pytest.mark.parametrize("category", ["rain", "sea_waves"])
def test_real_noise_makes_no_reference(category):
    paths = recordings(f"noise/{category}/*.opus", 12)
    assert not [path for path in paths if accepted(path)]
