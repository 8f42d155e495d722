"""Live: one voice from the microphone to the ear, or from file to file through the very same code.

A device calls `Live.move` with each block of the mixture and plays what that returns. This only moves samples; the
network works in a thread of its own, between two ring buffers. What is heard is always `Live.lag` samples behind: what
comes too late for that is silence, it never makes the rest later.
"""

import contextlib
import gc
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import audio
from devices import FileDevice, SoundCard, portaudio
from enrolment import LOCK_SECONDS, Primary, complaints, level_db
from extractor import Extractor, Voice
from utils import UserError, option, parse, require, run

BACKLOG_SECONDS = 0.2  # of mixture that may wait for the network beyond the latency, until the oldest is dropped
FADE = np.linspace(0, 1, 64, dtype=np.float32)  # over a gap's edges
TICK_SECONDS = 0.05  # between two looks at keys, device and voice
GAIN_DB, GAIN_STEP_DB = (-60.0, 40.0), 3.0
WARM_UP_BLOCKS = 20  # the network's first steps are slow


@dataclass(frozen=True, kw_only=True)
class Options:
    reference: str | None = option(None, "recording of the wanted voice alone, 1 s or more")
    voice: str | None = option(None, "voice that --save has kept")
    enroll: float | None = option(None, "record the wanted voice first, for so many seconds", metavar="SECONDS")
    save: str | None = option(None, "file to keep the voice in, for --voice")
    input: str | None = option(None, "microphone, by name or number (default: the system's)")
    output: str | None = option(None, "loudspeaker, by name or number (default: the system's)")
    list_devices: bool = option(False, "show the sound devices")
    from_: str | None = option(None, "recording in place of the microphone", metavar="FILE")
    to: str | None = option(None, "file in place of the loudspeaker: as long as --from and in time", metavar="FILE")
    pace: bool = option(True, "take --from in real time, not as fast as it goes")
    record: str | None = option(None, "file for the mixture (left) and the estimate (right), in time", metavar="FILE")
    gain: float = option(0.0, "gain in dB")
    reserve: float = option(0.0, "latency in seconds to add where there are underruns")
    checkpoint: str | None = option(None, "checkpoint (default: models/extractor/best.pt, else the shipped one)")

    def __post_init__(self):
        least = audio.SHORTEST_REFERENCE_SECONDS
        require(self, (lambda value: value is None or least <= value <= 60, f"{least:g} to 60 seconds"), "enroll")
        low, high = GAIN_DB
        require(self, (lambda value: low <= value <= high, f"{low:g} to {high:g} dB"), "gain")
        require(self, (lambda value: 0 <= value <= 1, "0 to 1 second"), "reserve")
        voices = [f"--{name}" for name in ("reference", "voice", "enroll") if getattr(self, name) is not None]
        if len(voices) > 1:
            raise UserError(f"{' and '.join(voices)}: whose voice? give one of them")
        if (self.from_ is None) != (self.to is None):
            raise UserError("--from and --to go together; give the recording to take and the file to write")
        if self.from_ and (self.input or self.output or self.enroll):
            raise UserError(f"--from {self.from_}: uses no sound card; leave out --input, --output and --enroll")
        if not self.pace and not self.from_:
            raise UserError("--no-pace: a sound card has its own pace; give --from and --to")
        places = {Path(path).resolve() for path in (self.reference, self.voice, self.from_) if path}
        for path in filter(None, (self.save, self.to, self.record)):
            if Path(path).resolve() in places:
                raise UserError(f"{path}: is given twice; choose another file to write")
            places.add(Path(path).resolve())


def main(argv):
    options = parse(Options, argv, __doc__)
    if options.list_devices:
        print(portaudio().query_devices())
        return
    torch.set_num_threads(1)  # for a network this small a second thread costs more than it brings
    extractor = Extractor(options.checkpoint)
    if options.from_:
        device = FileDevice(options.from_, options.to, extractor, options.pace)
    else:
        device = SoundCard(options.input, options.output, extractor)
    voice = find_voice(options, extractor, device)
    if options.save and voice:
        voice.save(options.save)
    stream = extractor.stream(voice, device.rate)
    primary = None if voice else Primary(stream, at_once=not options.pace)
    gone = None
    with ends_like_ctrl_c() as hold, contextlib.ExitStack() as files:
        recording = audio.Writer(options.record, device.rate, channels=2) if options.record else None
        if recording:
            files.enter_context(recording)
        live = Live(stream, device.block, options.gain, round(options.reserve * device.rate), recording, primary)
        live.warm_up()
        gc.freeze()  # a collection of all that was imported would stop every thread for 0.2 s
        device.start(live)
        try:
            listen(live, device, primary)
        except KeyboardInterrupt:
            pass
        except Exception as error:  # what was recorded until then is kept
            gone = error
        finally:
            hold()
            device.stop()
            live.close()
    gone = gone or device.error
    print(f"{live.fed / device.rate:.1f} s, {figures(live, device)}")
    if options.save and primary and primary.enrolled_seconds:
        stream.voice.save(options.save)
    if gone:
        raise gone
    if options.save and primary and not primary.enrolled_seconds:
        raise UserError(f"{options.save}: not saved, nobody has spoken for {LOCK_SECONDS:g} s; give --reference")


@contextlib.contextmanager
def ends_like_ctrl_c():
    """Let a closed terminal and a kill end it as Ctrl-C does; yields a function after which nothing interrupts."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), signal.default_int_handler) for name in names}

    def hold():
        for name in names:
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    try:
        yield hold
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


# ---- Between the device and the network ----


class Ring:
    """A signal on its way from one thread to another: the latest samples, at most `capacity`, known by position.

    Who reads late finds the oldest gone, what is written late is never read: neither moves what comes after it.
    """

    def __init__(self, capacity):
        self.samples = np.zeros(capacity, dtype=np.float32)
        self.start = self.end = 0  # positions of the next sample to read and to write
        self.closed = False
        self.changed = threading.Condition()

    def write(self, samples):
        """Append samples (any number up to `capacity`,)."""
        with self.changed:
            self.samples[np.arange(self.end, self.end + len(samples)) % len(self.samples)] = samples
            self.end += len(samples)
            self.changed.notify_all()

    def read(self, count, catch_up=False):
        """The next `count` samples, as far as they have been written, and how many before them are gone.

        With `catch_up`, who finds some gone goes on with the latest: what waits before them would come too late, too.
        """
        with self.changed:
            first = max(self.start, self.end - len(self.samples))
            if catch_up and first > self.start:
                first = self.end - count
            lost, self.start = first - self.start, first + count
            return self.samples[np.arange(first, min(first + count, self.end)) % len(self.samples)], lost

    def wait(self, count):
        """Wait for `count` samples; returns whether there are as many, which `close` can prevent."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.end - self.start >= count)
            return self.end - self.start >= count

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Live:
    """A stream in a thread between two rings; `block` is the number of samples that `move` takes at a time.

    `overruns` counts the times that mixture was dropped, `underruns` the blocks of the estimate that came too late.
    """

    def __init__(self, stream, block, gain_db=0.0, reserve=0, recording=None, primary=None):
        self.stream, self.block, self.recording, self.primary = stream, block, recording, primary
        # What `feed` may hold back, less what can never wait for its hop to be full; and a block, as one is heard
        # while the next is in the network.
        whole = math.gcd(block, stream.extractor.stft.hop) if stream.rate == stream.extractor.sample_rate else 0
        self.lag = stream.delay - whole + block + reserve
        capacity = self.lag + block + round(BACKLOG_SECONDS * stream.rate)
        self.mixtures, self.estimates = Ring(capacity), Ring(capacity)
        self.estimates.write(np.zeros(self.lag, dtype=np.float32))
        self.bypass, self.gain_db = False, gain_db
        self.gains = self.wanted_gains()
        self.behind = np.zeros(0, dtype=np.float32)  # mixture whose estimate is not there yet
        self.latest = np.zeros((2, block), dtype=np.float32)  # mixture and what is heard, for the level meter
        self.stale, self.broken = 0, False  # samples to come of before mixture was dropped; whether it just was
        self.given = np.zeros(2, dtype=np.float32)  # the last of mixture and estimate
        self.gap, self.last = False, 0.0  # whether the block before ended in a gap, and its last sample
        self.overruns = self.underruns = self.fed = 0
        self.busy_seconds, self.error = 0.0, None
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    @property
    def real_time_factor(self):
        return self.busy_seconds * self.stream.rate / max(1, self.fed)

    def warm_up(self):
        """Let another stream do a few blocks."""
        stream = self.stream.extractor.stream(self.stream.voice, self.stream.rate)
        for _ in range(WARM_UP_BLOCKS):
            stream.feed(np.zeros(self.block, dtype=np.float32))

    def move(self, mixture, wait=False):
        """Take a block (samples,) of the mixture and return as many to be heard, `lag` late; the device calls this.

        With `wait` it waits for the network, otherwise it conceals what is not there.
        """
        self.mixtures.write(mixture)
        if wait:
            self.estimates.wait(len(mixture))
        heard, _ = self.estimates.read(len(mixture))
        heard = self.conceal(heard, len(mixture))
        self.latest = mixture, heard
        return heard

    def conceal(self, heard, count):
        """Fill `heard` up to `count` samples with silence, faded out before it and in after it."""
        if self.gap:
            fade = FADE[: len(heard)]
            heard[: len(fade)] *= fade
        self.gap = len(heard) < count
        if self.gap:
            self.underruns += 1
            silence = np.zeros(count - len(heard), dtype=np.float32)
            fade = np.linspace(1, 0, min(len(FADE), len(silence)), dtype=np.float32)
            silence[: len(fade)] = (heard[-1] if len(heard) else self.last) * fade
            heard = np.concatenate([heard, silence])
        self.last = heard[-1]
        return heard

    def work(self):
        """The network's thread."""
        try:
            while self.mixtures.wait(self.block):
                mixture, lost = self.mixtures.read(self.block, catch_up=True)
                if lost:
                    self.overruns += 1
                    silence = np.zeros((lost, 2), dtype=np.float32)  # so that what follows stays in time
                    silence[: len(FADE)] = self.given * FADE[::-1, None][:lost]
                    self.give(silence)
                    self.stale, self.broken = len(self.behind), True
                began = time.perf_counter()
                estimate = self.stream.feed(mixture)
                self.busy_seconds += time.perf_counter() - began
                self.fed += len(mixture)
                self.behind = np.concatenate([self.behind, mixture])
                self.give(self.resume(np.stack([self.behind[: len(estimate)], estimate], axis=1)))
                self.behind = self.behind[len(estimate) :]
        except Exception as error:  # `close` raises it
            self.error = error
        finally:
            self.estimates.close()

    def resume(self, signals):
        """Fade in what comes after mixture was dropped (samples, 2); what is from before is too late, and silenced."""
        if self.broken:
            stale = min(self.stale, len(signals))
            self.stale -= stale
            signals[:stale] = 0
            fresh = signals[stale : stale + len(FADE)]
            fresh *= FADE[: len(fresh), None]
            self.broken = len(fresh) == 0
        return signals

    def give(self, signals):
        """Pass on what comes next of mixture and estimate (samples, 2)."""
        self.given = signals[-1] if len(signals) else self.given
        if self.primary:
            self.primary.hear(signals[:, 1])
        if self.recording:
            self.recording.write(signals)
        self.estimates.write(self.blend(signals))

    def blend(self, signals):
        """What is heard (samples,) of mixture and estimate (samples, 2); fades over where gain or bypass changed."""
        if len(signals):
            before, self.gains = self.gains, self.wanted_gains()
            signals = signals * np.linspace(before, self.gains, len(signals), dtype=np.float32)
        return np.clip(signals.sum(axis=1), -1, 1)

    def wanted_gains(self):
        """Factors of mixture and estimate."""
        gain = 10 ** (self.gain_db / 20)
        return [gain, 0.0] if self.bypass else [0.0, gain]

    def close(self):
        """End the network's thread once it has done what waits. Raises what ended it before, if anything did."""
        self.mixtures.close()
        self.thread.join()
        if self.error:
            raise self.error


# ---- Whose voice ----


def find_voice(options, extractor, device):
    """The `Voice` that the options ask for, None for the primary speaker."""
    if options.voice:
        return Voice.load(options.voice)
    if options.reference:
        reference = audio.read(options.reference)
    elif options.enroll:
        reference = record(device, options.enroll)
        for complaint in complaints(reference):
            print(f"warning: {complaint}", file=sys.stderr)
    else:
        return None
    audio.check_reference(reference, options.reference or device.name)
    return extractor.enroll(reference)


class Take:
    """Collects what a device records, and plays nothing."""

    lag = 0

    def __init__(self):
        self.blocks = [np.zeros(0, dtype=np.float32)]

    def move(self, mixture, wait=False):
        self.blocks.append(mixture)
        return np.zeros_like(mixture)


def record(device, seconds):
    """Record from a device, with countdown and level meter; returns samples (samples,) at 16 kHz."""
    take = Take()
    device.start(take)
    try:
        while (left := seconds - sum(map(len, take.blocks)) / device.rate) > 0 and device.running():
            show(f"speak: {math.ceil(left):2d} s  {'#' * max(0, round(30 + level_db(take.blocks[-1]) / 2))}")
            time.sleep(TICK_SECONDS)
    finally:
        device.stop()
        show("")
    samples = np.concatenate(list(audio.Resampler(device.rate, audio.SAMPLE_RATE).convert(take.blocks)))
    return samples[: round(seconds * audio.SAMPLE_RATE)]


# ---- The terminal ----


def listen(live, device, primary=None):
    """Show the status and obey keys, until the device ends, the network's thread ends or q is pressed."""
    with keys() as pressed:
        while device.running() and live.thread.is_alive():
            key = pressed()
            if key == "q":
                break
            if key == "b":
                live.bypass = not live.bypass
            if key in ("+", "-"):
                live.gain_db += GAIN_STEP_DB if key == "+" else -GAIN_STEP_DB
                live.gain_db = min(max(live.gain_db, GAIN_DB[0]), GAIN_DB[1])
            if key == "n" and primary:
                primary.restart()
            if primary and not primary.at_once:
                primary.update()
            show(status(live, device, primary))
            time.sleep(TICK_SECONDS)
    show("")


def status(live, device, primary):
    """One line for the terminal."""
    mixture_db, heard_db = map(level_db, live.latest)
    state = "bypass" if live.bypass else f"{live.gain_db:+.0f} dB"
    if primary:
        state += f" voice {primary.enrolled_seconds:.0f} s" if primary.enrolled_seconds else " searching"
    delays = [round(1000 * seconds) for seconds in latencies(live, device).values()]
    return (
        f"in {mixture_db:.0f} out {heard_db:.0f} dB | {state} | rtf {live.real_time_factor:.2f} | "
        f"{sum(delays)} ms = {'+'.join(map(str, delays))} | "
        f"over {live.overruns + device.overruns} under {live.underruns + device.underruns}"
    )


def latencies(live, device):
    """By how many seconds what is heard is late, by cause."""
    algorithm = live.stream.extractor.stft.n_fft / live.stream.extractor.sample_rate
    conversion = live.stream.delay / device.rate - algorithm
    card = device.latency + (live.lag - live.stream.delay) / device.rate
    return {"algorithm": algorithm, "conversion": conversion, "device": card}


def figures(live, device):
    """What was lost, how fast the network is, and by how much what is heard is late."""
    parts = latencies(live, device)
    return (
        f"overruns {live.overruns + device.overruns}, underruns {live.underruns + device.underruns}, "
        f"real-time factor {live.real_time_factor:.2f}, latency {1000 * sum(parts.values()):.0f} ms ("
        + ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in parts.items())
        + ")"
    )


def show(line):
    """Replace the line on the terminal, if there is one."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def keys():
    """Yield a function that returns the next key that was pressed, "" for none; leaves the terminal as it was."""
    if not sys.stdin.isatty():
        yield lambda: ""
        return
    print("keys: q ends, b plays the mixture, + and - gain, n another voice", file=sys.stderr)
    try:
        import termios
        import tty
    except ImportError:  # Windows
        import msvcrt

        yield lambda: msvcrt.getwch() if msvcrt.kbhit() else ""
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSANOW)
        yield lambda: os.read(terminal, 1).decode(errors="replace") if select.select([terminal], [], [], 0)[0] else ""
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


if __name__ == "__main__":
    run(main)
