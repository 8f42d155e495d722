"""The short-time Fourier transform that the store, the network, files and streams all share."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Stft:
    """A causal STFT pair with square-root Hann windows; `n_fft` and `hop` in samples, `hop` divides `n_fft` / 2.

    Frame t ends with sample (t + 1) * hop, so nothing of the future is needed: `analyse` and `synthesise` take
    any whole number of hops and the state of the chunk before, `None` at the start. What comes out of the pair is
    what went in, `delay` samples later (Griffin and Lim, 1984, eq. 6: the squared windows sum to a constant).
    """

    n_fft: int = 512
    hop: int = 256

    @property
    def n_freq(self):
        return self.n_fft // 2 + 1

    @property
    def delay(self):
        """Samples from the input of `analyse` to the same sound in the output of `synthesise`."""
        return self.n_fft - self.hop

    def window(self, device=None):
        # the root of a periodic Hann window
        return torch.sin(torch.arange(self.n_fft, device=device) * (math.pi / self.n_fft))

    def analyse(self, samples, state=None):
        """Transform samples (batch, hops * hop) to a complex spectrum (batch, freq, hops); returns it and the state."""
        if state is None:
            state = samples.new_zeros(len(samples), self.delay)
        samples = torch.cat([state, samples], dim=-1)
        frames = samples.unfold(-1, self.n_fft, self.hop) * self.window(samples.device)
        return torch.fft.rfft(frames).transpose(1, 2), samples[:, samples.shape[-1] - self.delay :]

    def synthesise(self, spectrum, state=None):
        """Overlap-add a complex spectrum (batch, freq, hops) to samples (batch, hops * hop); returns them and state."""
        batch, _, hops = spectrum.shape
        # what irfft returns, in terms that older versions of onnxruntime know: the bins without a mirror image once
        bins = torch.arange(self.n_freq, device=spectrum.device)
        twice = 2.0 - ((bins == 0) | (bins == self.n_fft // 2)).float()
        parts = torch.view_as_real(spectrum) * twice[:, None, None]
        parts = F.pad(parts, (0, 0, 0, 0, 0, self.n_fft - self.n_freq))
        frames = torch.fft.ifft(torch.view_as_complex(parts), dim=1).real
        frames = frames * self.window(spectrum.device)[:, None]
        length = (hops - 1) * self.hop + self.n_fft
        samples = F.fold(frames, (1, length), (1, self.n_fft), stride=(1, self.hop)).reshape(batch, length)
        samples = samples * (2 * self.hop / self.n_fft)
        if state is not None:
            samples = torch.cat([samples[:, : self.delay] + state, samples[:, self.delay :]], dim=-1)
        return samples[:, : hops * self.hop], samples[:, hops * self.hop :]

    def frames(self, samples):
        """The number of frames that hold a whole signal of this many samples."""
        return -(-(samples + self.delay) // self.hop)

    def spectrum(self, samples):
        """The spectrum (batch, freq, frames) of whole signals (batch, samples), complete up to the last sample."""
        padding = self.frames(samples.shape[-1]) * self.hop - samples.shape[-1]
        return self.analyse(F.pad(samples, (0, padding)))[0]

    def samples(self, spectrum, length):
        """The inverse of `spectrum`: signals (batch, length) without the delay."""
        return self.synthesise(spectrum)[0][:, self.delay : self.delay + length]
