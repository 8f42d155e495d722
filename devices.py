"""What a live mixture comes from and its estimate goes to: a sound card, or files in place of one.

A device has `rate` in Hz, `block`, the samples that it moves at a time, and `latency` in seconds; `overruns` and
`underruns` count what it lost. `start(live)` lets it call `live.move` with each block of the mixture and play what that
returns, from a thread of its own, while `running()`, until `stop()`.
"""

import itertools
import math
import threading
import time

import numpy as np

import audio
from model import first_line
from utils import UserError

PATIENCE_SECONDS = 3.0  # without a block until a sound card counts as gone


class SoundCard:
    """Microphone and loudspeaker, by name or number, at the network's rate where they can be opened so.

    `overruns` and `underruns` count what the card itself lost. Raises `UserError` where it cannot be used.
    """

    error = None

    def __init__(self, input, output, extractor):
        self.sounddevice = portaudio()
        self.overruns = self.underruns = 0
        self.latency = 0.0  # until it has started
        devices = [self.find(input, "input"), self.find(output, "output")]
        self.name = " and ".join(dict.fromkeys(device["name"] for device in devices))
        self.devices = [device["index"] for device in devices]
        self.channels = [1, min(2, devices[1]["max_output_channels"])]  # one would be the left one on some systems
        rates = [extractor.sample_rate, *(round(device["default_samplerate"]) for device in reversed(devices))]
        self.rate = next(filter(self.supports, rates), rates[-1])
        self.block = round(extractor.stft.hop * self.rate / extractor.sample_rate)

    def find(self, name, kind):
        try:
            return self.sounddevice.query_devices(int(name) if name and name.isdigit() else name, kind)
        except (ValueError, self.sounddevice.PortAudioError) as error:
            if name is None:
                raise UserError(f"no {kind} device found; plug one in, or use files with --from and --to") from error
            raise UserError(f"--{kind} {name}: {first_line(error)}; choose a number from --list-devices") from error

    def supports(self, rate):
        checks = self.sounddevice.check_input_settings, self.sounddevice.check_output_settings
        try:
            for check, device, channels in zip(checks, self.devices, self.channels, strict=True):
                check(device, channels, "float32", samplerate=rate)
        except (ValueError, self.sounddevice.PortAudioError):
            return False
        return True

    def start(self, live):
        def callback(mixture, heard, frames, times, status):
            self.overruns += status.input_overflow
            self.underruns += status.output_underflow
            self.moved = time.monotonic()
            heard[:] = live.move(np.nan_to_num(mixture[:, 0]))[:, None]

        self.overruns = self.underruns = 0
        self.moved = time.monotonic()
        try:
            self.stream = self.sounddevice.Stream(
                self.rate, self.block, self.devices, self.channels, "float32", "low", callback=callback
            )
            self.stream.start()
        except (ValueError, self.sounddevice.PortAudioError) as error:
            raise UserError(
                f"{self.name}: cannot be opened ({first_line(error)}); close what else uses it, or choose another "
                "with --input and --output"
            ) from error
        self.latency = sum(self.stream.latency)

    def running(self):
        """True; raises `UserError` when it has gone."""
        try:
            active = self.stream.active
        except self.sounddevice.PortAudioError:  # what it answers for some that have been pulled out
            active = False
        if not active or time.monotonic() - self.moved > PATIENCE_SECONDS:
            raise UserError(f"{self.name}: the sound card has gone silent; plug it in again and start anew")
        return True

    def stop(self):
        closing = threading.Thread(target=self.stream.close, daemon=True)
        closing.start()
        closing.join(PATIENCE_SECONDS)  # a card that has gone may never answer


def portaudio():
    """The sounddevice module, which needs the PortAudio library."""
    try:
        import sounddevice
    except OSError as error:
        raise UserError("the PortAudio library is missing; on Linux: sudo apt-get install libportaudio2") from error
    return sounddevice


class FileDevice:
    """A recording in place of the microphone, in real time if `paced`, and a file in place of the loudspeaker.

    The file is in time with the recording and as long, unless `stop` comes first: then it has what was heard so far.
    """

    latency, overruns, underruns = 0.0, 0, 0

    def __init__(self, source, sink, extractor, paced=True):
        self.reader = audio.Reader(source)
        self.rate, self.paced = self.reader.rate, paced
        self.writer = audio.Writer(sink, self.rate)
        self.block = max(1, round(extractor.stft.hop * self.rate / extractor.sample_rate))
        self.stopped, self.error = False, None

    def start(self, live):
        self.thread = threading.Thread(target=self.work, args=[live], daemon=True)
        self.thread.start()

    def work(self, live):
        try:
            with self.reader, self.writer:
                self.play(live)
        except Exception as error:  # `running` raises it
            self.error = error

    def play(self, live):
        early, fed, written = live.lag, 0, 0  # samples: heard before the recording's first, taken of it, written
        tail = itertools.repeat(np.zeros(0, dtype=np.float32), math.ceil(live.lag / self.block))
        began = time.monotonic()
        for n, block in enumerate(itertools.chain(self.reader.blocks(self.block / self.rate), tail), 1):
            if self.stopped:
                break
            if self.paced:
                time.sleep(max(0.0, began + n * self.block / self.rate - time.monotonic()))
            fed += len(block)
            heard = live.move(np.pad(block, (0, self.block - len(block))), wait=not self.paced)
            early, heard = max(0, early - len(heard)), heard[early:]
            self.writer.write(heard[: fed - written])
            written += min(len(heard), fed - written)

    def running(self):
        """Whether there is more; raises what went wrong with the files."""
        alive = self.thread.is_alive()
        if self.error:
            raise self.error
        return alive

    def stop(self):
        self.stopped = True
        self.thread.join()
