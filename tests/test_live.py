"""live.py: file to file equals the extractor, what goes wrong is counted and survived, and a real sound card's path.

The virtual sound card needs Debian packages (`.ci/run` installs them); without them its test is skipped.
"""

import ctypes.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from conftest import DEMO, score

import audio
import devices
import enrolment
import live
from extractor import PRIMARY, Extractor, Voice
from stft import Stft
from utils import ROOT, UserError

REFERENCE = DEMO / "reference.opus"
MIXTURE = DEMO / "mixture.flac"
# weights that extract, for the virtual sound card
TRAINED = os.environ.get("LIVE_CHECKPOINT", ROOT / "models" / "extractor" / "pretrained.pt")
BLOCK = 256
TONE = (0.5 * np.sin(2 * np.pi * 100 * np.arange(400 * BLOCK) / 16000)).astype(np.float32)


@pytest.fixture(scope="module")
def extractor(checkpoint):
    return Extractor(checkpoint, rehearsal_seconds=0)


@pytest.fixture(scope="module")
def reference():
    return audio.read(REFERENCE)


class Echo:
    """A stream whose estimate is its mixture, whole hops at a time; `running` can stop it."""

    rate, delay, voice = 16000, Stft().n_fft, PRIMARY

    def __init__(self):
        self.extractor = SimpleNamespace(sample_rate=16000, stft=Stft())
        self.seconds = 0.0  # that a feed takes
        self.running = threading.Event()
        self.running.set()
        self.waiting, self.fed, self.returned = TONE[:0], 0, 0

    def feed(self, samples):
        self.running.wait()
        time.sleep(self.seconds)
        self.fed += len(samples)
        self.waiting = np.concatenate([self.waiting, samples])
        count = max(0, self.fed // BLOCK * BLOCK - Stft().delay - self.returned)
        self.returned += count
        estimate, self.waiting = self.waiting[:count], self.waiting[count:]
        return estimate


class FakeCard:
    """A sound card that records given samples as fast as the network takes them, then ends or has gone."""

    rate, block, latency, overruns, underruns, name, error = 16000, BLOCK, 0.08, 0, 0, "a card", None

    def __init__(self, samples, goes=False):
        self.samples, self.goes = samples, goes
        self.heard = []

    def start(self, live):
        def work():
            for block in self.samples[: len(self.samples) // BLOCK * BLOCK].reshape(-1, BLOCK):
                self.heard.append(live.move(block, wait=True))

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def running(self):
        if self.thread.is_alive():
            return True
        if self.goes:
            raise UserError(f"{self.name}: the sound card has gone")
        return False

    def stop(self):
        self.thread.join()


# ---- File to file ----


@pytest.mark.parametrize(
    ("rate", "arguments"), [(16000, ["--no-pace"]), (16000, ["--reserve", "0.5"]), (44100, ["--no-pace"])]
)
def test_file_to_file_equals_the_extractor(extractor, checkpoint, reference, tmp_path, monkeypatch, rate, arguments):
    """Sample by sample before 16 bits round it, in real time and as fast as it goes, without PortAudio."""
    without_portaudio(monkeypatch, tmp_path)
    resampler = audio.Resampler(16000, rate)
    soundfile.write(tmp_path / "in.wav", resampler.feed(audio.read(MIXTURE))[: rate + 11], rate, subtype="FLOAT")
    written = keep_what_is_written(monkeypatch)
    began = time.monotonic()
    live.main(
        ["--from", str(tmp_path / "in.wav"), "--to", str(tmp_path / "out.wav"), "--reference", str(REFERENCE)]
        + ["--record", str(tmp_path / "record.wav"), "--checkpoint", str(checkpoint), *arguments]
    )
    assert "--no-pace" in arguments or time.monotonic() - began > 1.5  # a second, and the reserve
    mixture = soundfile.read(tmp_path / "in.wav", dtype="float32")[0]
    estimate = extractor.extract(mixture, extractor.enroll(reference), rate)
    peak = np.abs(estimate).max()
    heard, recorded = written[tmp_path / "out.wav"], written[tmp_path / "record.wav"]
    assert heard.shape == mixture.shape
    # at another rate what is heard of the last milliseconds depends on whether silence or nothing comes after it
    same = len(mixture) if rate == 16000 else len(mixture) - rate // 20
    assert np.abs(heard - np.clip(estimate, -1, 1))[:same].max() < 1e-5 * peak
    assert np.abs(recorded[: len(mixture)] - np.stack([mixture, estimate], axis=1))[:same].max() < 1e-5 * peak
    assert soundfile.info(tmp_path / "out.wav").frames == len(mixture)
    assert soundfile.info(tmp_path / "record.wav").channels == 2


def keep_what_is_written(monkeypatch):
    """What `audio.Writer` gets from now on, by path."""
    written, write = {}, audio.Writer.write

    def keep(self, samples):
        written[self.path] = np.concatenate([written[self.path], samples]) if self.path in written else samples
        write(self, samples)

    monkeypatch.setattr(audio.Writer, "write", keep)
    return written


def without_portaudio(monkeypatch, folder):
    """As if the library was not installed."""
    (folder / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)


def test_gain_and_bypass_fade_and_stay_in_time():
    ear = live.Live(Echo(), BLOCK, gain_db=-20.0)
    blocks = TONE.reshape(-1, BLOCK)
    heard = [ear.move(block, wait=True) for block in blocks[:100]]
    ear.bypass, ear.gain_db = True, 0.0
    heard = np.concatenate([*heard, *(ear.move(block, wait=True) for block in blocks[100:])])
    ear.close()
    assert np.abs(heard[ear.lag : 90 * BLOCK] - 0.1 * TONE[: 90 * BLOCK - ear.lag]).max() < 1e-6
    assert np.abs(heard[110 * BLOCK :] - TONE[110 * BLOCK - ear.lag : -ear.lag]).max() < 1e-6
    assert np.abs(np.diff(heard)).max() < 0.03  # the tone's own steps are 0.02


def test_ctrl_c_keeps_what_was_heard(checkpoint, tmp_path, monkeypatch):
    shown = []

    def interrupt(line):
        shown.append(line)
        if len(shown) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(live, "show", interrupt)
    live.main(["--from", str(MIXTURE), "--to", str(tmp_path / "out.wav"), "--checkpoint", str(checkpoint)])
    assert 0 < soundfile.info(tmp_path / "out.wav").duration < 3
    assert re.fullmatch(
        r"in -\d+ out -\d+ dB \| \+0 dB searching \| rtf 0\.\d\d \| 32 ms = 32\+0\+0 \| over 0 under \d+", shown[8]
    )


# ---- What goes wrong ----


@pytest.mark.parametrize("seconds", [None, 0.02], ids=["stalled", "slow"])
def test_a_network_that_is_late_is_counted_concealed_and_adds_no_latency(seconds):
    """A hundred blocks of a millisecond without it; the ear hears silence with soft edges, then all in time again."""
    echo, heard = Echo(), []
    ear = live.Live(echo, BLOCK)
    for n, block in enumerate(TONE.reshape(-1, BLOCK)):
        late = 100 <= n < 200
        echo.seconds = seconds if late and seconds else 0.0
        echo.running.clear() if late and not seconds else echo.running.set()
        heard.append(ear.move(block, wait=not late))
        time.sleep(0.001 * late)
    heard = np.concatenate(heard)
    ear.close()
    assert ear.overruns > 0
    assert ear.underruns > 50
    after = slice(210 * BLOCK, None)
    assert np.array_equal(heard[after], TONE[210 * BLOCK - ear.lag : -ear.lag])
    assert np.abs(np.diff(heard)).max() < 0.03  # the tone's own steps are 0.02
    assert not heard[190 * BLOCK : 199 * BLOCK].any()


def test_a_slow_device_gets_the_latest_and_takes_no_more_memory():
    """A ring that nobody reads keeps its size and its latest samples, and says how many are gone."""
    ring = live.Ring(1000)
    for block in TONE.reshape(-1, BLOCK):
        ring.write(block)
    assert len(ring.samples) == 1000
    samples, lost = ring.read(600)
    assert lost == len(TONE) - 1000
    assert np.array_equal(samples, TONE[-1000:-400])
    assert not ring.read(600)[1]
    ring.write(TONE[:300])  # the first 200 come too late
    assert np.array_equal(ring.read(100)[0], TONE[200:300])


def test_who_falls_behind_goes_on_with_the_latest():
    """Else a network that is a little too slow would be late, and silent, for ever."""
    ring = live.Ring(1000)
    ring.write(TONE[:900])
    assert np.array_equal(ring.read(BLOCK, catch_up=True)[0], TONE[:BLOCK])
    ring.write(TONE[900:1500])
    samples, lost = ring.read(BLOCK, catch_up=True)
    assert np.array_equal(samples, TONE[1500 - BLOCK : 1500])
    assert lost == 1500 - 2 * BLOCK


def test_gaps_of_any_length_have_soft_edges():
    ear = live.Live(Echo(), BLOCK)
    ear.close()
    for missing in (1, 10, 63, 64, 200):
        heard = np.concatenate(
            [ear.conceal(0.02 * np.ones(count, dtype=np.float32), BLOCK) for count in (BLOCK, BLOCK - missing, BLOCK)]
        )
        assert np.abs(np.diff(heard)).max() < (0.021 if missing == 1 else 0.0025)


def test_a_device_that_goes_away_leaves_a_whole_recording(refusal, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "SoundCard", lambda *_: FakeCard(0.1 * TONE[:32000], goes=True))
    line = refusal(live.main, "--record", tmp_path / "record.wav", "--checkpoint", checkpoint)
    assert "a card: the sound card has gone" in line
    samples, _ = soundfile.read(tmp_path / "record.wav")
    assert 32000 - 2 * BLOCK <= len(samples) <= 32000
    assert np.abs(samples[:, 0] - 0.1 * TONE[: len(samples)]).max() < 1e-4


@pytest.mark.parametrize("how", [RuntimeError("gone wrong"), signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_it_the_recording_is_kept(checkpoint, tmp_path, monkeypatch, how):
    card = FakeCard(0.1 * TONE[:32000])

    def end(line):
        card.thread.join()
        if isinstance(how, Exception):
            raise how
        os.kill(os.getpid(), how)

    monkeypatch.setattr(live, "show", end)
    monkeypatch.setattr(live, "SoundCard", lambda *_: card)
    arguments = ["--record", str(tmp_path / "record.wav"), "--checkpoint", str(checkpoint)]
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(how, Exception):
        with pytest.raises(RuntimeError, match="gone wrong"):
            live.main(arguments)
    else:
        live.main(arguments)
    assert len(soundfile.read(tmp_path / "record.wav")[0]) >= 32000 - 2 * BLOCK
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_recording_that_cannot_be_written_is_one_line(refusal, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "SoundCard", lambda *_: FakeCard(TONE))

    def full(self, samples):
        raise self._incomplete()

    monkeypatch.setattr(audio.Writer, "write", full)
    line = refusal(live.main, "--record", tmp_path / "record.wav", "--checkpoint", checkpoint)
    assert "record.wav: cannot be written whole" in line
    assert not list(tmp_path.iterdir())


def test_a_mixture_that_breaks_off_leaves_nothing(refusal, checkpoint, tmp_path):
    data = MIXTURE.read_bytes()
    (tmp_path / "broken.flac").write_bytes(data[: len(data) // 2])
    line = refusal(
        live.main, "--from", tmp_path / "broken.flac", "--to", tmp_path / "out.wav", "--no-pace",
        "--reference", REFERENCE, "--checkpoint", checkpoint,
    )  # fmt: skip
    assert "broken.flac: breaks off" in line
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", REFERENCE, "--enroll", "5"], "--reference and --enroll: whose voice?"),
        (["--reference", "missing.wav"], "missing.wav: no such file"),
        (["--reference", "{silence}"], "no speech"),
        (["--voice", "missing.voice"], "missing.voice: no such voice"),
        (["--voice", REFERENCE], "not a saved voice"),
        (["--enroll", "0.5"], "--enroll 0.5: give 1 to 60 seconds"),
        (["--gain", "nan"], "--gain nan: give -60 to 40 dB"),
        (["--reserve", "-1"], "--reserve -1.0: give 0 to 1 second"),
        (["--from", MIXTURE], "--from and --to go together"),
        (["--no-pace"], "--no-pace: a sound card has its own pace"),
        (["--from", MIXTURE, "--to", "x.wav", "--input", "3"], "uses no sound card"),
        (["--from", MIXTURE, "--to", "x.wav", "--enroll", "3"], "uses no sound card"),
        (["--from", MIXTURE, "--to", MIXTURE], "is given twice"),
        (["--from", MIXTURE, "--to", "x.doc"], "cannot write .doc"),
        (["--from", MIXTURE, "--to", "/proc/no/x.wav", "--no-pace"], "/proc/no/x.wav: cannot be written"),
        (["--from", "missing.wav", "--to", "x.wav"], "missing.wav: no such file"),
        (["--from", MIXTURE, "--to", "{x}", "--record", "x.txt"], "cannot write .txt"),
        (["--from", "{silence}", "--to", "{x}", "--no-pace", "--save", "{x}.voice"], "nobody has spoken for 3 s"),
        (["--checkpoint", REFERENCE], "not a whole checkpoint"),
        ([], "on Linux: sudo apt-get install libportaudio2"),
        (["--list-devices"], "on Linux: sudo apt-get install libportaudio2"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(refusal, checkpoint, tmp_path, monkeypatch, arguments, message):
    if any("reference" in str(word) or "voice" in str(word) for word in arguments):
        monkeypatch.setattr(live, "SoundCard", lambda *_: FakeCard(TONE))
    without_portaudio(monkeypatch, tmp_path)
    audio.write(tmp_path / "silence.wav", np.zeros(32000))
    arguments = [str(word).format(silence=tmp_path / "silence.wav", x=tmp_path / "x.wav") for word in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", checkpoint]
    assert message in refusal(live.main, *arguments)
    assert not list(tmp_path.glob(".*"))


class FakePortAudio:
    """The sounddevice module on a machine whose devices want 48 kHz, and whose streams do nothing by themselves."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def query_devices(self, name, kind):
        if name not in (None, 3, "usb"):
            raise ValueError(f"No {kind} device matching {name!r}")
        if name is None and kind == "input":
            raise self.PortAudioError("Error querying device -1")
        return {"name": f"{name} {kind}", "index": 3, "default_samplerate": 48000.0, "max_output_channels": 8}

    def check_input_settings(self, device, channels, dtype, samplerate):
        if samplerate != 48000:
            raise self.PortAudioError("Invalid sample rate")

    check_output_settings = check_input_settings

    class Stream:
        latency, active = (0.02, 0.03), True

        def __init__(self, *_, callback):
            self.callback = callback

        def start(self):
            pass

        def close(self):
            self.active = False


@pytest.mark.parametrize("how", ["inactive", "an error", "silent"])
def test_a_card_that_has_gone_is_noticed(extractor, monkeypatch, how):
    monkeypatch.setattr(devices, "portaudio", FakePortAudio)
    card = devices.SoundCard("usb", "3", extractor)
    card.start(SimpleNamespace(move=lambda mixture: 0.5 * mixture))
    heard, status = np.zeros((768, 2), dtype=np.float32), SimpleNamespace(input_overflow=True, output_underflow=False)
    card.stream.callback(np.ones((768, 1), dtype=np.float32), heard, 768, None, status)
    assert (heard == 0.5).all()
    assert (card.overruns, card.underruns, card.latency) == (1, 0, 0.05)
    assert card.running()
    if how == "silent":
        monkeypatch.setattr(devices, "PATIENCE_SECONDS", 0.0)
    elif how == "inactive":
        card.stop()
    else:

        def active(stream):
            raise FakePortAudio.PortAudioError("Invalid stream pointer")

        monkeypatch.setattr(FakePortAudio.Stream, "active", property(active))
    with pytest.raises(UserError, match="usb input and 3 output: the sound card has gone silent"):
        card.running()


def test_sound_cards_are_found_by_name_or_number_and_opened_at_a_rate_they_have(extractor, monkeypatch):
    monkeypatch.setattr(devices, "portaudio", FakePortAudio)
    card = devices.SoundCard("usb", "3", extractor)
    assert (card.rate, card.block, card.name, card.channels) == (48000, 768, "usb input and 3 output", [1, 2])
    with pytest.raises(UserError, match="--output none: No output device matching 'none'; choose a number from --list"):
        devices.SoundCard("usb", "none", extractor)
    with pytest.raises(UserError, match="no input device found; plug one in, or use files"):
        devices.SoundCard(None, None, extractor)


# ---- Whose voice ----


class FakeExtractor:
    """Remembers how many seconds it enrolled."""

    def __init__(self):
        self.enrolled = []

    def enroll(self, reference):
        self.enrolled.append(len(reference) / 16000)
        return Voice(torch.full((256,), len(self.enrolled) / 100))


def test_the_primary_speaker_is_locked_on_after_three_seconds_of_speech_and_refined_until_fifteen(reference):
    stream = SimpleNamespace(extractor=FakeExtractor(), rate=16000, voice=PRIMARY)
    primary = enrolment.Primary(stream)

    def say(samples):
        for start in range(0, len(samples), BLOCK):
            primary.hear(samples[start : start + BLOCK])
            primary.update()

    second = np.zeros(16000, dtype=np.float32)
    hiss = 0.01 * np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    say(np.concatenate([second, hiss, reference[:16000], 2 * hiss, second, reference[16000:32000]]))
    assert stream.voice is PRIMARY  # a word here and there is nobody's turn to speak
    say(np.concatenate([second, second]))
    say(reference[: 16000 * 3 - BLOCK])
    assert stream.voice is PRIMARY
    say(reference[: 2 * BLOCK])
    assert stream.extractor.enrolled == [3.0]
    assert stream.voice.dvector[0] == pytest.approx(0.01)
    say(np.concatenate([second, np.tile(reference, 3)]))
    assert stream.extractor.enrolled == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert not primary.heard
    primary.restart()
    assert stream.voice is PRIMARY
    say(reference[: 16000 * 4])
    assert stream.extractor.enrolled[5:] == [3.0]


def test_as_fast_as_it_goes_the_primary_speaker_is_found_at_the_same_moment(
    checkpoint, reference, tmp_path, monkeypatch
):
    """The voice is judged with every block, whatever the speed, so that the output is the same every time."""
    monkeypatch.setattr(enrolment, "is_speech", lambda piece: True)  # a random network's
    audio.write(tmp_path / "in.wav", np.tile(reference, 2)[: 6 * 16000])
    for name in ("one", "two"):
        live.main(
            ["--from", str(tmp_path / "in.wav"), "--to", str(tmp_path / f"{name}.wav"), "--no-pace"]
            + ["--save", str(tmp_path / f"{name}.voice"), "--checkpoint", str(checkpoint)]
        )
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "two.wav").read_bytes()
    assert Voice.load(tmp_path / "one.voice").dvector.any()


def test_a_voice_is_enrolled_from_the_microphone_and_saved(extractor, checkpoint, reference, tmp_path, monkeypatch):
    """At once, so that it stays when the card goes; the recorded seconds, no more."""
    monkeypatch.setattr(live, "SoundCard", lambda *_: FakeCard(reference[:90000]))
    live.main(["--enroll", "5", "--save", str(tmp_path / "anna.voice"), "--checkpoint", str(checkpoint)])
    expected = extractor.enroll(reference[:80000]).dvector
    assert torch.allclose(Voice.load(tmp_path / "anna.voice").dvector, expected, atol=1e-5)


def test_what_is_wrong_with_a_recorded_reference_is_said(extractor, reference, monkeypatch, capsys):
    noise = 0.03 * np.random.default_rng(0).standard_normal(len(reference)).astype(np.float32)
    bad = {"too quiet": 0.01 * reference, "clipped": np.clip(20 * reference, -1, 1), "noisy": reference + noise}
    assert enrolment.complaints(reference) == []
    for word, samples in bad.items():
        (complaint,) = enrolment.complaints(samples)
        assert complaint.startswith(word)
    options = live.Options(enroll=5.0)
    live.find_voice(options, extractor, FakeCard(bad["noisy"]))
    assert "warning: noisy" in capsys.readouterr().err
    with pytest.raises(UserError, match="a card: no speech found"):
        live.find_voice(options, extractor, FakeCard(0 * reference))


# ---- The terminal ----


def test_keys(monkeypatch):
    """One after the other, from a terminal that is as before afterwards."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    keyboard, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    restarted = []
    primary = SimpleNamespace(
        restart=lambda: restarted.append(True), update=lambda: None, enrolled_seconds=3.0, at_once=False
    )
    device = SimpleNamespace(running=lambda: True, rate=16000, latency=0.08, overruns=0, underruns=0)
    ear = live.Live(Echo(), BLOCK)
    with os.fdopen(terminal, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(keyboard, b"b++-nxq")
        live.listen(ear, device, primary)
        assert termios.tcgetattr(terminal) == before
    ear.close()
    os.close(keyboard)
    assert (ear.bypass, ear.gain_db, restarted) == (True, 3.0, [True])


def test_the_latency_is_told_by_its_parts():
    ear = live.Live(Echo(), BLOCK)
    ear.close()
    card = SimpleNamespace(rate=16000, latency=0.08, overruns=2, underruns=1)
    assert ear.lag == 512
    assert live.figures(ear, card) == (
        "overruns 2, underruns 1, real-time factor 0.00, latency 112 ms (algorithm 32, conversion 0, device 80)"
    )


# ---- A virtual sound card ----

PACKAGES = "libportaudio2 libasound2-plugins pulseaudio pulseaudio-utils"
DAEMON = """
.fail
load-module module-native-protocol-unix auth-anonymous=1 socket={folder}/native
load-module module-null-sink sink_name=mic format=s16le rate=16000 channels=1 norewinds=1
load-module module-null-sink sink_name=spk format=s16le rate=16000 channels=1 norewinds=1
set-default-sink spk
set-default-source mic.monitor
"""


class Tape:
    """Records what a sink plays; `start` is when its first sample was heard, in seconds of `time.monotonic`."""

    def __init__(self, sink, environment):
        command = ["parec", "-d", f"{sink}.monitor", "--raw", "--format=s16le", "--rate=16000", "--channels=1"]
        self.process = subprocess.Popen([*command, "--latency-msec=8"], env=environment, stdout=subprocess.PIPE)
        self.data, self.start = b"", np.inf
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        while data := os.read(self.process.stdout.fileno(), 65536):
            self.data += data
            self.start = min(self.start, time.monotonic() - len(self.data) / 32000)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.thread.join()
        self.process.wait()
        return np.frombuffer(self.data[: len(self.data) // 2 * 2], dtype=np.int16).astype(np.float32) / 32768


@pytest.fixture
def sound():
    """A private PulseAudio daemon with a sink that is the microphone, `mic`, and one that is heard, `spk`."""
    missing = [name for name in ("pulseaudio", "pactl", "paplay", "parec") if not shutil.which(name)]
    missing += [] if ctypes.util.find_library("portaudio") else ["PortAudio"]
    missing += [] if list(Path("/usr/lib").glob("**/libasound_module_pcm_pulse.so")) else ["ALSA's plugin for it"]
    if missing:
        pytest.skip(f"no virtual sound card, {', '.join(missing)} missing: apt-get install {PACKAGES}")
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has to be short
        (Path(folder) / "fake.pa").write_text(DAEMON.format(folder=folder))
        private = {"HOME": folder, "PULSE_RUNTIME_PATH": folder, "PULSE_STATE_PATH": folder}
        private["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/nonexistent"
        command = ["pulseaudio", "-n", "-F", f"{folder}/fake.pa", "--daemonize=no", "--use-pid-file=no"]
        daemon = subprocess.Popen(
            [*command, "--exit-idle-time=-1", "--disable-shm=yes"], env={**os.environ, **private},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        environment = {**os.environ, "PULSE_SERVER": f"unix:{folder}/native"}
        environment.pop("PULSE_LATENCY_MSEC", None)
        wait_until(lambda: pactl(environment, "info"))
        yield SimpleNamespace(daemon=daemon, environment=environment)
        daemon.terminate()
        daemon.wait()


def pactl(environment, *arguments):
    return subprocess.run(["pactl", *arguments], env=environment, capture_output=True, text=True).stdout


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_through_a_virtual_sound_card(sound, tmp_path):
    """The voice is heard at the stated latency; when the card goes away, one line, and the recording is there."""
    command = [sys.executable, "live.py", "--input", "pulse", "--output", "pulse", "--reference", REFERENCE]
    command += ["--record", tmp_path / "record.wav", "--checkpoint", TRAINED, "--reserve", "0.05"]
    tapes = [Tape("mic", sound.environment), Tape("spk", sound.environment)]
    program = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=sound.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(pactl(sound.environment, "list", "short", "source-outputs").splitlines()) == 3)
    subprocess.run(["paplay", "-d", "mic", MIXTURE], env=sound.environment, check=True)
    time.sleep(1.5)  # until all of it is in the recording, which ends with the card
    recorded, heard = (tape.stop() for tape in tapes)
    sound.daemon.kill()
    output, errors = program.communicate(timeout=30)
    assert errors.strip().splitlines()[-1].startswith("error: pulse: the sound card has gone"), errors
    assert program.returncode == 2

    mixture, target = audio.read(MIXTURE), audio.read(DEMO / "target.flac")
    first = find(mixture, recorded)
    assert np.abs(recorded[first : first + len(mixture)] - mixture).max() < 1e-3
    late = tapes[1].start + find(target, heard) / 16000 - tapes[0].start - first / 16000
    stated = float(re.search(r"latency (\d+) ms", output)[1]) / 1000
    before, after = score(mixture, target), score(cut(heard, target), target)
    print(f"{output.strip()}\nlatency measured {1000 * late:.0f} ms; SI-SDR {before:.1f} dB to {after:.1f} dB")
    assert after > before + 2
    assert late == pytest.approx(stated, abs=0.05)

    samples, rate = soundfile.read(tmp_path / "record.wav", dtype="float32")
    assert rate == 16000
    first = find(mixture, samples[:, 0])
    assert score(samples[first : first + len(target), 1], target) > before + 2


def find(signal, tape):
    """Where in a tape (samples,) a signal (samples,) is, of either sign."""
    return int(np.argmax(np.abs(scipy.signal.correlate(tape, signal, mode="valid", method="fft"))))


def cut(tape, signal):
    first = find(signal, tape)
    return tape[first : first + len(signal)]
