"""A trained network in use: a reference becomes a voice, a mixture's samples become that voice's samples."""

import numpy as np
import torch

import model
from encoder import SpeakerEncoder

CHUNK_SECONDS = 10.0  # of the pieces that whole recordings are extracted in


class Extractor:
    """A checkpoint on a device. Voices are d-vectors (256,), samples numpy float32 (samples,) at 16 kHz."""

    def __init__(self, checkpoint, device="cpu"):
        self.network, self.checkpoint = model.load(checkpoint, device)
        self.device = torch.device(device)
        self.encoder = SpeakerEncoder().to(self.device)

    @property
    def sample_rate(self):
        return self.network.config.sample_rate

    def enroll(self, reference):
        """The voice of a reference (samples,), of 1 s or more."""
        return self.encoder.dvectors([reference])[0]

    def stream(self, voice):
        return Stream(self.network, voice, self.device)

    def extract(self, mixture, voice):
        """The voice in a mixture (samples,), as long as it and in time with it."""
        chunk = round(CHUNK_SECONDS * self.sample_rate)
        blocks = (mixture[start : start + chunk] for start in range(0, len(mixture), chunk))
        return np.concatenate(list(self.extract_blocks(blocks, voice)))

    def extract_blocks(self, blocks, voice):
        """The voice in a mixture that comes in blocks of any length; yields blocks whose sum is as long and in time."""
        stream = self.stream(voice)
        ahead = stream.delay  # samples that come before the mixture's first
        for block in blocks:
            estimate = stream.feed(block)
            yield estimate[ahead:]
            ahead -= min(ahead, len(estimate))
        yield stream.flush()[ahead:]


class Stream:
    """One mixture on its way through the network; all state is here, so many streams share one network."""

    def __init__(self, network, voice, device):
        self.network, self.stft, self.device = network, network.config.stft, device
        self.voice = voice[None].to(device)
        self.waiting = np.zeros(0, dtype=np.float32)  # samples that are no whole hop yet
        self.analysis = self.state = self.synthesis = None

    @property
    def delay(self):
        """Samples by which the estimate lags behind the mixture."""
        return self.stft.delay

    @torch.inference_mode()
    def feed(self, samples):
        """Take samples (any number,) of the mixture; returns the estimate of all whole hops so far, `delay` late."""
        self.waiting = np.concatenate([self.waiting, np.asarray(samples, dtype=np.float32)])
        whole = len(self.waiting) // self.stft.hop * self.stft.hop
        if whole == 0:
            return self.waiting[:0]
        chunk, self.waiting = self.waiting[:whole], self.waiting[whole:]
        chunk = torch.from_numpy(chunk)[None].to(self.device)
        spectrum, self.analysis = self.stft.analyse(chunk, self.analysis)
        estimate, self.state = self.network(spectrum, self.voice, self.state)
        samples, self.synthesis = self.stft.synthesise(estimate, self.synthesis)
        return samples[0].cpu().numpy()

    def flush(self):
        """The rest, once the mixture has ended: with all of `feed`, `delay` samples more than went in."""
        missing = len(self.waiting) + self.delay
        padding = -(-missing // self.stft.hop) * self.stft.hop - len(self.waiting)
        return self.feed(np.zeros(padding))[:missing]
