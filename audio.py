"""Recordings in, recordings out: everything here that touches an audio file."""

import contextlib
import functools
import io
import math
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

from utils import UserError, whole

SAMPLE_RATE = 16000  # Hz, the network's

SHORTEST_SECONDS = 0.01  # what is shorter is no recording
SHORTEST_REFERENCE_SECONDS = 1.0
MARGIN_SECONDS = 0.1  # read around a piece: the resampling filter's length, and what an Opus decoder needs to settle
WRITE_BLOCK = 65536  # samples; libsndfile's Vorbis encoder crashes on blocks of millions

# suffix: soundfile's format, subtype, and the rates in Hz that it can hold (all of them when empty)
FORMATS = {
    ".wav": ("WAV", "PCM_16", ()),
    ".flac": ("FLAC", "PCM_16", ()),
    ".ogg": ("OGG", "VORBIS", ()),
    ".opus": ("OGG", "OPUS", (8000, 12000, 16000, 24000, 48000)),
}

# first bytes: a chunk's header (name, size), how many bytes of that header its size counts, what chunks are
# aligned to, and the name of the chunk that holds the samples
CHUNKS = {
    b"RIFF": ("<4sI", 0, 2, b"data"),
    b"RF64": ("<4sI", 0, 2, b"data"),
    b"RIFX": (">4sI", 0, 2, b"data"),
    b"FORM": (">4sI", 0, 2, b"SSND"),
    b"riff": ("<16sQ", 24, 8, b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"),  # Wave64
}
STREAMED_BYTES = 0x7FFF0000  # a data size from here on, or 0, is what a writer into a pipe puts for "unknown"


# ---- Reading ----


class Reader:
    """A recording opened at its start, read as mono blocks at its own rate; a context manager.

    Reads what libsndfile reads and, where the `ffmpeg` program is installed, what that reads (m4a, webm, the
    sound of a video). `rate` is in Hz; `frames` is the number of samples per channel, None where the file does
    not tell, an estimate in some MP3 files.

    Raises `UserError` for a file that is missing, a folder, not audio, empty, shorter than 10 ms, or breaks off:
    WAV, AIFF and Ogg when opened, others when `blocks` reaches the break.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._resources = contextlib.ExitStack()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            missing_sizes = _check_container(self.path)
            try:
                self._open_soundfile(missing_sizes)
            except (soundfile.LibsndfileError, TypeError):  # TypeError: a headerless ".raw"
                self._open_ffmpeg()
            if self.frames is not None:
                self._check_length(self.frames)
            on_error.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Release the file and the ffmpeg process, if any."""
        self._resources.close()

    def blocks(self, seconds):
        """Yield the recording from here on as float32 arrays `(samples,)`, its channels averaged.

        Each is `seconds` long but for the last, which may be shorter. Raises `UserError` where the recording
        breaks off or has samples that are no numbers.
        """
        block_frames = max(1, round(seconds * self.rate))
        frames = 0
        while len(samples := self._read(block_frames)):
            frames += len(samples)
            _check_finite(samples, self.path)
            yield _mono(samples)
        if self.frames is not None and frames < self.frames and not self._estimated:
            raise _breaks_off(self.path, f"after {frames / self.rate:.2f} of {self.frames / self.rate:.2f} s")
        self._check_length(frames)

    def _check_length(self, frames):
        if frames == 0:
            raise UserError(f"{self.path}: has no audio in it; give a recording")
        if frames < SHORTEST_SECONDS * self.rate:
            milliseconds = 1000 * frames / self.rate
            raise UserError(f"{self.path}: {milliseconds:.1f} ms is too short; give at least 10 ms")

    def _open_soundfile(self, missing_sizes):
        source = str(self.path)
        if missing_sizes:
            source = self._resources.enter_context(_Mended(source, missing_sizes))
        file = self._resources.enter_context(_SoundFile(source))
        self.rate = file.samplerate
        self.frames = file.frames if file.frames < 2**62 else None  # a FLAC written into a pipe
        self._estimated = file.format == "MP3"

        def read(frames):
            try:
                return file.read(frames, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise _breaks_off(self.path, f"or is damaged ({error.error_string.strip(' .')})") from error

        self._read = read

    def _open_ffmpeg(self):
        if not shutil.which("ffmpeg"):
            raise UserError(
                f"{self.path}: not audio, or in a format that needs the ffmpeg program; "
                "install ffmpeg or convert the recording to WAV"
            )
        errors = self._resources.enter_context(tempfile.TemporaryFile())
        # "file:" and the whitelist: a name is never an option or an address, and a playlist fetches nothing.
        # The Sun AU header is 24 bytes and tells rate and channels; float, so that nothing is clipped or dithered.
        command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file"]
        command += ["-i", f"file:{self.path}", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        self._resources.callback(process.wait)
        self._resources.callback(process.stdout.close)
        self._resources.callback(process.kill)

        def complaint():
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip().replace(str(self.path), self.path.name)
            return text.split("\n")[0] or "no reason given"

        header = process.stdout.read(24)
        if len(header) < 24:
            process.wait()
            raise UserError(f"{self.path}: not audio (ffmpeg: {complaint()}); give a recording such as WAV or M4A")
        _, data_start, _, _, self.rate, channels = struct.unpack(">4s5I", header)
        process.stdout.read(data_start - 24)
        self.frames = None

        def read(frames):
            data = process.stdout.read(frames * channels * 4)
            if not data and (process.wait() != 0 or "ended prematurely" in complaint()):  # a webm that breaks off
                raise _breaks_off(self.path, f"or is damaged (ffmpeg: {complaint()})")
            data = data[: len(data) // (4 * channels) * (4 * channels)]
            return np.frombuffer(data, dtype=">f4").reshape(-1, channels).astype(np.float32)

        self._read = read


class Resampler:
    """Converts a signal that comes in blocks from `rate_in` to `rate_out` Hz; the blocking makes no difference.

    N samples in become `round(N * rate_out / rate_in)` samples out, counted over every `feed` and the `flush`.
    """

    def __init__(self, rate_in, rate_out):
        self.rate_in, self.rate_out = rate_in, rate_out
        self._stream = soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32") if rate_in != rate_out else None
        self._in = self._out = 0

    def feed(self, block):
        """Take float32 `(samples,)` and return what is ready, `(samples,)`, which may be none."""
        self._in += len(block)
        return self._count(self._stream.resample_chunk(block) if self._stream else block)

    def flush(self):
        """Return the rest, `(samples,)`, once the signal has ended."""
        rest = np.zeros(0, dtype=np.float32)
        if self._stream:
            rest = self._stream.resample_chunk(rest, last=True)
        missing = round(self._in * self.rate_out / self.rate_in) - self._out - len(rest)
        return self._count(np.pad(rest, (0, missing)) if missing > 0 else rest[: len(rest) + missing])

    def convert(self, blocks):
        """Yield what is ready of each block, then the rest."""
        for block in blocks:
            yield self.feed(block)
        yield self.flush()

    def _count(self, block):
        self._out += len(block)
        return block


@functools.cache
def resampling_delay(rate_in, rate_out):
    """Seconds by which what a `Resampler` returns is behind at most, measured: soxr works in blocks of its own."""
    resampler, block = Resampler(rate_in, rate_out), np.zeros(rate_in // 1000, dtype=np.float32)
    behind = []
    for n in range(1000):
        resampler.feed(block)
        behind.append((n + 1) * len(block) / rate_in - resampler._out / rate_out)
    return max(behind)


def read(path, rate=SAMPLE_RATE):
    """Return a whole recording as mono float32 `(samples,)` at `rate` Hz; `UserError` as in `Reader`."""
    with Reader(path) as reader:
        return np.concatenate(list(Resampler(reader.rate, rate).convert(reader.blocks(10))))


def read_segment(path, start_seconds, seconds, rate=SAMPLE_RATE):
    """Return the piece of a recording from `start_seconds` on, mono float32 `(round(seconds * rate),)` at `rate` Hz.

    It seeks, so it costs the same anywhere in the file, and equals the same piece of `read(path, rate)`: exactly
    for WAV and FLAC at `rate`, within the resampler's rounding at other rates, and with an error of some -50 dB for
    Opus, whose decoder depends on what it decoded before.

    Raises `UserError` for a file that libsndfile cannot seek in and for a piece that is not all in it.
    """
    samples = round(seconds * rate)
    try:
        with _SoundFile(str(path)) as file:
            total = round(file.frames * rate / file.samplerate)
            start = round(start_seconds * rate)
            if start < 0 or start + samples > total + 1:
                raise UserError(
                    f"{path}: has no {seconds:.2f} s from {start_seconds:.2f} s on, it is {total / rate:.2f} s long; "
                    "give another place, or replace the file if it should be longer"
                )
            start = max(0, min(start, total - samples))  # rounding twice can point one sample past the end
            # The piece read starts where both rates have a sample, so that the resampled grid is that of the whole;
            # twice that step keeps its end on the same side of a half when lengths are rounded.
            common = math.gcd(rate, file.samplerate)
            step_in, step_out = 2 * file.samplerate // common, 2 * rate // common
            margin = round(MARGIN_SECONDS * rate)
            steps = max(0, start - margin) // step_out
            before = start - steps * step_out
            file.seek(steps * step_in)
            frames = math.ceil((before + samples + margin) * file.samplerate / rate)
            around = file.read(min(frames, file.frames - steps * step_in), dtype="float32", always_2d=True)
            rate_in = file.samplerate
    except (soundfile.LibsndfileError, TypeError) as error:
        with Reader(path) as reader:  # tells what is wrong, if anything is
            for _ in reader.blocks(10):
                pass
        raise UserError(f"{path}: pieces of it cannot be read; convert it to WAV or FLAC") from error
    piece = np.concatenate(list(Resampler(rate_in, rate).convert([_mono(around)])))[before : before + samples]
    _check_finite(piece, path)
    if len(piece) < samples:
        raise _breaks_off(path, f"before {start_seconds + seconds:.2f} s")
    return piece


class _SoundFile(soundfile.SoundFile):
    """A file that soundfile does not seek in after each read, as it does by itself.

    That makes Opus and Vorbis decoders start again, so that blocks would not add up to the whole, and it fails for
    a FLAC of unknown length.
    """

    def seekable(self):
        return False


class _Mended(io.FileIO):
    """A file read as if `patches`, {position: bytes}, were written in it: the sizes that its writer left at 0."""

    def __init__(self, path, patches):
        super().__init__(path)
        self.patches = patches

    def readinto(self, buffer):
        start = self.tell()
        count = super().readinto(buffer)
        for position, patch in self.patches.items():
            for at, byte in enumerate(patch, position - start):
                if 0 <= at < count:
                    buffer[at : at + 1] = bytes([byte])
        return count


def _check_container(path):
    """Raise `UserError` unless `path` is a file that does not break off, as far as its header or last page tells.

    Returns the patches for `_Mended`: none, or the data size of a file written into a pipe with 0 for unknown.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(12)
            if size == 0:
                raise UserError(f"{path}: is empty, 0 bytes; give a recording")
            if start[:4] == b"OggS":
                _check_last_page(file, size, path)
            elif start[:4] == b"riff" or (start[:4] in CHUNKS and start[8:] in (b"WAVE", b"AIFF", b"AIFC")):
                return _check_data_chunk(file, size, path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; give a recording in it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a file that can") from error
    return {}


def _check_data_chunk(file, size, path):
    """Compare the data size that a WAV, RF64, Wave64 or AIFF header tells with the bytes that are there."""
    file.seek(0)
    magic = file.read(4)
    header, counted, alignment, data_name = CHUNKS[magic]
    header_bytes = struct.calcsize(header)
    at = header_bytes + header_bytes - struct.calcsize(header[0] + header[-1])  # the outer header and the form's name
    while True:
        if at + header_bytes > size:
            raise _breaks_off(path, "in its header")
        file.seek(at)
        name, told = struct.unpack(header, file.read(header_bytes))
        told -= counted
        if name == data_name:
            break
        at += header_bytes + max(0, told)
        at += -at % alignment
    there = size - at - header_bytes
    told_at, told_format = at + header_bytes - struct.calcsize(header[-1]), header[0] + header[-1]
    if magic == b"RF64" and told == 0xFFFFFFFF:  # the size is in the ds64 chunk, the first (EBU Tech 3306)
        told_at, told_format = 28, "<Q"
        file.seek(told_at)
        told = int.from_bytes(file.read(8), "little")
    if told <= 0 < there:
        largest = 2 ** (8 * struct.calcsize(told_format)) - 1
        return {told_at: struct.pack(told_format, min(there + counted, largest))}
    if there < told < STREAMED_BYTES:
        raise _breaks_off(path, f"after {there} of the {told} bytes of audio that its header tells")
    return {}


def _check_last_page(file, size, path):
    """See that the last page of an Ogg file is there whole and ends a stream (RFC 3533, section 6)."""
    file.seek(max(0, size - 2**17))  # two of the largest pages
    tail = file.read()
    page = tail.rfind(b"OggS\x00")
    if page >= 0 and len(tail) >= page + 27 and tail[page + 5] & 4:
        lengths = tail[page + 27 : page + 27 + tail[page + 26]]
        if len(lengths) == tail[page + 26] and len(tail) >= page + 27 + len(lengths) + sum(lengths):
            return
    raise _breaks_off(path, "before its last page")


def _breaks_off(path, where):
    return UserError(f"{path}: breaks off {where}; get the whole recording, or convert what is there to WAV")


def _mono(samples):
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


def _check_finite(samples, path):
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: has samples that are not numbers (NaN or infinite); export the recording again")


# ---- Writing ----


class Writer:
    """Writes a recording block by block; it appears at `path` whole when the `with` block ends, or not at all.

    The suffix tells the format: .wav and .flac in 16 bits, .ogg (Vorbis), .opus. Samples beyond -1 to 1 are clipped,
    never wrapped; `clipped` counts them. A 16-bit recording read and written again stays the same, bit for bit.

    Raises `UserError` for another suffix, a rate that the format does not hold, and where nothing can be written.
    """

    def __init__(self, path, rate=SAMPLE_RATE, channels=1):
        self.path, self.rate, self.channels = Path(path), rate, channels
        self.clipped = 0
        self._written = 0
        if (suffix := self.path.suffix.lower()) not in FORMATS:
            raise UserError(f"{path}: cannot write {suffix or 'without a suffix'}; use {_listed(FORMATS)}")
        self._format, self._subtype, rates = FORMATS[suffix]
        if rates and rate not in rates:
            raise UserError(f"{path}: this format does not hold {rate} Hz; use {_listed(rates)} Hz, or .wav")
        if self.path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file")

    def __enter__(self):
        self._context = self._whole_file()
        self._file = self._context.__enter__()
        return self

    def __exit__(self, *exception):
        return self._context.__exit__(*exception)

    def write(self, samples):
        """Append `samples`, float `(samples,)` or, with several channels, `(samples, channels)`, full scale at 1."""
        samples = np.asarray(samples, dtype=np.float32)
        assert samples.shape[1:] == (() if self.channels == 1 else (self.channels,)), samples.shape
        assert np.isfinite(samples).all()
        self.clipped += int(np.count_nonzero(np.abs(samples) > 1))
        for start in range(0, len(samples), WRITE_BLOCK):
            block = samples[start : start + WRITE_BLOCK]
            if self._subtype == "PCM_16":
                block = np.clip(np.rint(block * 32768), -32768, 32767).astype(np.int16)
            else:
                block = np.clip(block, -1, 1)
            with self._told():
                self._file.write(block)
            self._written += len(block)

    @contextlib.contextmanager
    def _whole_file(self):
        with whole(self.path) as partial:
            partial.touch()  # where nothing can be written this tells why, libsndfile does not
            with self._told():
                file = _SoundFile(str(partial), "w", self.rate, self.channels, self._subtype, format=self._format)
            try:
                yield file
            finally:
                with self._told():
                    file.close()
            # libsndfile can lose the last of it on a full disk without a word
            with self._told():
                frames = soundfile.info(str(partial)).frames if self._written else 0
            if frames != self._written:
                raise self._incomplete()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except (soundfile.LibsndfileError, AssertionError) as error:  # soundfile asserts that all was written
            raise self._incomplete() from error

    def _incomplete(self):
        return UserError(f"{self.path}: cannot be written whole; free some disk or choose another place")


def write(path, samples, rate=SAMPLE_RATE):
    """Write mono `samples`, float `(samples,)`, as a recording at `rate` Hz; see `Writer`."""
    with Writer(path, rate) as writer:
        writer.write(samples)


def _listed(values):
    return ", ".join(map(str, values))


# ---- The reference ----

VOICED_RATE = 4000  # Hz; pitch and the first formant are below half of it
VOICED_FRAME_SECONDS = 0.04
VOICED_HOP_SECONDS = 0.02
PITCH_HZ = (60, 400)
VOICED_CORRELATION = 0.45
VOICED_RANGE_DB = 40  # below the loudest frame
SILENCE_DB = -100
SPEECH_SECONDS = 0.2
SPEECH_PART = 0.125
SPEECH_SPREAD_DB = 1.0


def check_reference(samples, path, rate=SAMPLE_RATE):
    """Raise `UserError` unless `samples`, `(samples,)` at `rate` Hz read from `path`, can be a reference.

    That is at least 1 s with speech in it: of the frames that are not silent at least an eighth, and 0.2 s, is voiced
    (see `voicing`), and the levels of those have a standard deviation of 1 dB or more, for a hum is steady.
    """
    seconds = len(samples) / rate
    if seconds < SHORTEST_REFERENCE_SECONDS:
        raise UserError(
            f"{path}: {seconds:.2f} s of reference is too short; "
            f"give at least {SHORTEST_REFERENCE_SECONDS:g} s of the voice alone"
        )
    levels_db, voiced = voicing(samples, rate)
    enough = max(SPEECH_SECONDS / VOICED_HOP_SECONDS, SPEECH_PART * len(voiced))
    if np.count_nonzero(voiced) < enough or np.std(levels_db[voiced]) < SPEECH_SPREAD_DB:
        raise UserError(f"{path}: no speech found in this reference; give a recording of the voice alone")


def voicing(samples, rate=SAMPLE_RATE):
    """Return the levels in dB of 40 ms frames, one each 20 ms, and whether they are voiced, both `(frames,)`.

    Of `samples`, `(samples,)` at `rate` Hz, only the frames within 40 dB of the loudest. One is voiced when its
    autocorrelation, normalised by the energies of the two parts that overlap, has a peak above 0.45 at the lag of a
    pitch from 60 to 400 Hz.
    """
    shrink = max(1, rate // VOICED_RATE)
    rate /= shrink
    low = samples[: len(samples) // shrink * shrink].reshape(-1, shrink).mean(axis=1)
    low = np.diff(low)  # the falling spectra of wind and traffic would correlate at short lags
    frame, hop = round(VOICED_FRAME_SECONDS * rate), round(VOICED_HOP_SECONDS * rate)
    frames = np.lib.stride_tricks.sliding_window_view(low, frame)[::hop]
    levels_db = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
    audible = levels_db > max(levels_db.max() - VOICED_RANGE_DB, SILENCE_DB)
    frames, levels_db = frames[audible], levels_db[audible]
    lags = np.arange(math.floor(rate / PITCH_HZ[1]) - 1, math.ceil(rate / PITCH_HZ[0]) + 2)  # one more each side
    products = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * frame)) ** 2)[:, lags]
    energy_from_start = np.cumsum(frames**2, axis=1)[:, frame - 1 - lags]
    energy_from_end = np.cumsum(frames[:, ::-1] ** 2, axis=1)[:, frame - 1 - lags]
    correlation = products / np.sqrt(energy_from_start * energy_from_end + 1e-20)
    middle = correlation[:, 1:-1]
    peaks = (middle > VOICED_CORRELATION) & (middle >= correlation[:, :-2]) & (middle >= correlation[:, 2:])
    return levels_db, peaks.any(axis=1)
