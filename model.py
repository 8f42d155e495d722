"""The network: a causal conv-net with skip connections that keeps one voice of a mixture.

In the line of VoiceFilter (Wang et al., 2019, arXiv:1810.04826): a mask over the STFT of the mixture, conditioned on
the target speaker's d-vector; here causal, complex and small enough for one core of a laptop. Strided convolutions
bring the frequencies down to a few bands, wider ones where voices have little power, blocks of {dilated convolutions
over bands and past frames, an LSTM over time that sees all bands at once} look at voice and time, and a mirrored
decoder returns to a mask for every frequency. The d-vector scales and shifts every stage (FiLM, Perez et al., 2018,
arXiv:1709.07871).
"""

import io
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from stft import Stft
from utils import POSITIVE, UserError, option, require, whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COARSE = 8  # bins of a band after the first stage above `Config.fine_hz`; below it is 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network's shape; stored in every checkpoint. Each field is an option of `main.py`."""

    sample_rate: int = 16000  # Hz
    dvector_size: int = 256
    voice_size: int = option(32, "directions of d-vectors that are used, those in which voices differ most")
    n_fft: int = option(512, "length of the STFT's window in samples")
    hop: int = option(256, "hop of the STFT in samples")
    channels: list[int] = option([32, 64, 96], "channels of the strided stages, each of which halves the frequencies")
    fine_hz: float = option(4000.0, "frequency in Hz from which on bands are four times as wide")
    blocks: int = option(3, "blocks at the bottom")
    dilations: list[int] = option([1, 2, 4], "dilations in frames of a block's convolutions")
    full_channels: int = option(10, "channels of each band that the LSTM over all bands sees")
    full_hidden: int = option(208, "units of each block's LSTM over all bands")
    compression: float = option(0.3, "exponent on the magnitudes that the network sees")
    mask_bound: float = option(2.0, "largest magnitude of the mask")
    level_seconds: float = option(3.0, "time constant of the running level")

    def __post_init__(self):
        require(self, POSITIVE, "n_fft", "hop", "blocks", "full_channels", "full_hidden", "mask_bound", "level_seconds")
        fewer = (lambda size: 1 <= size <= self.dvector_size, f"1 to {self.dvector_size}, the length of a d-vector")
        require(self, fewer, "voice_size")
        require(self, (lambda values: values and min(values) > 0, "numbers more than 0"), "channels", "dilations")
        fits = self.n_fft % (2 * self.hop) == 0
        require(self, (lambda hop: fits, f"a whole part of half of --n-fft {self.n_fft}"), "hop")
        coarse = self.stft.n_freq - self.fine
        halves = coarse > 0 and coarse % COARSE == 0 and all(n % 2 for n in (self.fine, *self.bands[1:-1]))
        if self.fine_hz == Config.fine_hz:
            require(self, (lambda n_fft: halves, "a power of two, or another length whose bins halve"), "n_fft")
        require(self, (lambda hz: halves, f"{Config.fine_hz:g}, or another frequency whose bins halve"), "fine_hz")

    @property
    def stft(self):
        return Stft(self.n_fft, self.hop)

    @property
    def fine(self):
        """The number of frequency bins up to `fine_hz`."""
        return round(self.fine_hz / self.sample_rate * self.n_fft) + 1

    @property
    def fine_bands(self):
        """How many of the bands after the first stage are below `fine_hz`."""
        return (self.fine + 1) // 2

    @property
    def bands(self):
        """The number of frequency bins before and after each strided stage."""
        bands = [self.stft.n_freq, self.fine_bands + (self.stft.n_freq - self.fine) // COARSE]
        for _ in self.channels[1:]:
            bands.append((bands[-1] + 1) // 2)
        return bands


class FiLM(nn.Module):
    """Batch normalisation whose scale and shift are a linear function of the voice, then ReLU."""

    def __init__(self, channels, voice_size):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.condition = nn.Linear(voice_size, 2 * channels)
        self.activation = nn.ReLU()

    def forward(self, x, voice):
        scale, shift = self.condition(voice)[:, :, None, None].chunk(2, dim=1)
        return self.activation(self.norm(x) * (1 + scale) + shift)


class Split(nn.Module):
    """One layer for the lowest `border` bins or bands, another for those above."""

    def __init__(self, border, fine, coarse):
        super().__init__()
        self.border, self.fine, self.coarse = border, fine, coarse

    def forward(self, x):
        # x: (batch, channels, freq, frames)
        return torch.cat([self.fine(x[:, :, : self.border]), self.coarse(x[:, :, self.border :])], dim=2)


class Convolution(nn.Module):
    """A residual convolution over neighbouring bands and past frames; its memory is those frames."""

    def __init__(self, config, dilation):
        super().__init__()
        channels = config.channels[-1]
        self.shape = (channels, config.bands[-1], 2 * dilation)  # of the memory, without the batch
        self.conv = nn.Conv2d(channels, channels, 3, padding=(1, 0), dilation=(1, dilation), bias=False)
        self.film = FiLM(channels, config.voice_size)

    def forward(self, x, voice, past):
        extended = torch.cat([past.to(x.dtype, memory_format=torch.channels_last), x], dim=-1)
        y = self.film(self.conv(extended.contiguous(memory_format=torch.channels_last)), voice)
        return x + y, extended[..., x.shape[-1] :]


class FullBand(nn.Module):
    """A residual LSTM over time that sees a few channels of all bands at once; the voice scales and shifts its output.

    In the line of the full-band model of FullSubNet (Hao et al., 2021, arXiv:2010.15508).
    """

    def __init__(self, config):
        super().__init__()
        channels, few, size = config.channels[-1], config.full_channels, config.bands[-1] * config.full_channels
        self.squeeze = nn.Conv2d(channels, few, 1, bias=False)
        self.norm = nn.BatchNorm2d(few)
        self.lstm = nn.LSTM(size, config.full_hidden, batch_first=True)
        self.condition = nn.Linear(config.voice_size, 2 * config.full_hidden)
        self.across = nn.Linear(config.full_hidden, size)
        self.expand = nn.Conv2d(few, channels, 1)

    def forward(self, x, voice, memory):
        batch, _, bands, frames = x.shape
        y = F.relu(self.norm(self.squeeze(x))).permute(0, 3, 1, 2).flatten(2)  # (batch, frames, few * bands)
        y, memory = self.lstm(y, tuple(tensor.to(y.dtype)[None] for tensor in memory))
        scale, shift = self.condition(voice)[:, None].chunk(2, dim=-1)
        y = self.across(y * (1 + scale) + shift).reshape(batch, frames, -1, bands).permute(0, 2, 3, 1)
        memory = [tensor.reshape(batch, self.lstm.hidden_size) for tensor in memory]
        return x + self.expand(y.contiguous(memory_format=torch.channels_last)), memory


class Block(nn.Module):
    """Convolutions over bands and past frames, then an LSTM over all bands."""

    def __init__(self, config):
        super().__init__()
        self.convolutions = nn.ModuleList(Convolution(config, dilation) for dilation in config.dilations)
        self.full_band = FullBand(config)

    def shapes(self):
        """The shapes of the state's tensors, without the batch."""
        return [convolution.shape for convolution in self.convolutions] + [(self.full_band.lstm.hidden_size,)] * 2

    def forward(self, x, voice, state):
        # x: (batch, channels, bands, frames)
        new_state = []
        for convolution, past in zip(self.convolutions, state[:-2], strict=True):
            x, past = convolution(x, voice, past)
            new_state.append(past)
        x, memory = self.full_band(x, voice, state[-2:])
        return x, [*new_state, *memory]


class Network(nn.Module):
    """Mixture spectrum and d-vector to the spectrum of that voice; see the module's text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config.voice_size
        inputs, outputs = [3, *config.channels], [2, *config.channels]
        kernel = {"kernel_size": (5, 1), "stride": (2, 1), "padding": (2, 0), "bias": False}
        coarse = {"kernel_size": (COARSE, 1), "stride": (COARSE, 1), "bias": False}
        self.down = nn.ModuleList(nn.Conv2d(a, b, **kernel) for a, b in pairwise(inputs))
        self.down[0] = Split(config.fine, self.down[0], nn.Conv2d(*inputs[:2], **coarse))
        self.down_film = nn.ModuleList(FiLM(channels, size) for channels in config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, **kernel) for a, b in reversed(list(pairwise(outputs))))
        self.up[-1] = Split(config.fine_bands, self.up[-1], nn.ConvTranspose2d(*outputs[1::-1], **coarse))
        self.up_film = nn.ModuleList(FiLM(channels, size) for channels in reversed(config.channels[:-1]))
        # training begins with half of the mixture: SI-SDR would hold on to a wrong sign that it begins with
        self.mask_bias = nn.Parameter(torch.tensor([0.5, 0.0]))
        for weight in self.up[-1].parameters():
            nn.init.zeros_(weight)
        self.primary = nn.Parameter(torch.zeros(size))  # the voice when there is no reference
        self.register_buffer("dvector_mean", torch.zeros(config.dvector_size))
        self.register_buffer("dvector_axes", torch.eye(config.dvector_size, size))
        self.to(memory_format=torch.channels_last)

    def standardise(self, dvectors):
        """Take mean and axes of the training speakers' d-vectors (speakers, dvector_size).

        The axes are the directions in which the d-vectors differ most, each scaled to the same spread. The others tell
        no more voices apart, but are enough to learn a few hundred speakers by heart.
        """
        dvectors, size = dvectors.double().cpu(), self.config.voice_size
        variances, axes = torch.linalg.eigh(torch.cov(dvectors.T, correction=0))
        variances = variances[-size:].clamp(min=0.01 * variances[-1])  # few speakers have fewer directions
        axes = axes[:, -size:] * axes[:, -size:].sum(0).sign()  # either sign is one; all processes have to agree
        self.dvector_mean.copy_(dvectors.mean(0))
        self.dvector_axes.copy_(axes / (size * variances).sqrt())

    def start(self, batch, device=None):
        """The state of `extract` before the first sample, a list of tensors (batch, ...), all zero.

        The first two are the STFT's, the rest is the state of `forward`.
        """
        shapes = [(self.config.stft.delay,)] * 2 + [(2,)] + [shape for block in self.blocks for shape in block.shapes()]
        return [torch.zeros(batch, *shape, device=device) for shape in shapes]

    def forward(self, mixture, dvector, state=None):
        """Estimate the target's spectrum; training, files and streams all call this.

        `mixture` is (batch, freq, frames) complex64, `dvector` (batch, dvector_size), `state` that of the chunk
        before, `None` at the start. Returns the estimate, of the mixture's shape, and the state, see `start`. Without a
        reference, the d-vector is all zeros, and the target is the primary speaker.
        """
        level_state, *block_states = state or self.start(len(mixture), mixture.device)[2:]
        level, level_state = self.level(mixture, level_state)
        mask, block_states = self.mask(self.features(mixture, level), self.voice(dvector), block_states)
        return self.bound(mask) * mixture, [level_state, *block_states]

    def extract(self, samples, dvector, state=None):
        """As `forward`, from samples (batch, hops * hop) to as many samples of the estimate, `config.stft.delay` late.

        Returns the estimate and the state, a list of tensors (batch, ...).
        """
        stft = self.config.stft
        analysis, synthesis, *state = state or self.start(len(samples), samples.device)
        spectrum, analysis = stft.analyse(samples, analysis)
        estimate, state = self(spectrum, dvector, state)
        estimate, synthesis = stft.synthesise(estimate, synthesis)
        return estimate, [analysis, synthesis, *state]

    def voice(self, dvector):
        """What conditions the network (batch, voice_size): d-vectors along the axes, a learned voice for zeros."""
        known = dvector.any(dim=-1, keepdim=True)
        return torch.where(known, (dvector - self.dvector_mean) @ self.dvector_axes, self.primary)

    def level(self, mixture, state):
        """Running root mean square (batch, 1, frames) of a spectrum, with exponentially fading weights."""
        power = torch.view_as_real(mixture).square().sum(-1).mean(1)
        frames = power.shape[1]
        rate = self.config.hop / self.config.sample_rate / self.config.level_seconds
        age = torch.arange(frames, device=power.device)
        age = age[:, None] - age  # (frame, earlier frame)
        weight = torch.exp(-rate * age.clamp(min=0)) * (age >= 0)
        fade = torch.exp(-rate * torch.arange(1, frames + 1, device=power.device))
        total = (power[:, None] * weight).sum(-1) + state[:, :1] * fade
        count = weight.sum(-1) + state[:, 1:] * fade
        return (total / count).sqrt()[:, None], torch.stack([total[:, -1], count[:, -1]], dim=-1)

    def features(self, mixture, level):
        """What the network sees (batch, 3, freq, frames): compressed real and imaginary part, log magnitude."""
        # lower bounds, as the export takes what is added for nothing if it is so small
        spectrum = torch.view_as_real(mixture) / level.clamp(min=1e-9)[..., None]
        power = spectrum.square().sum(-1).clamp(min=1e-10)
        compressed = spectrum * (power ** ((self.config.compression - 1) / 2))[..., None]
        features = torch.stack([compressed[..., 0], compressed[..., 1], 0.1 * power.log()], dim=1)
        return features.contiguous(memory_format=torch.channels_last)

    def mask(self, x, voice, states):
        """The unbounded mask (batch, 2, freq, frames) for features; takes and returns the blocks' states, one list."""
        skips, new_states = [], []
        for conv, film in zip(self.down, self.down_film, strict=True):
            x = film(conv(x), voice)
            skips.append(x)
        size = len(states) // len(self.blocks)
        for n, block in enumerate(self.blocks):
            x, state = block(x, voice, states[n * size : (n + 1) * size])
            new_states.extend(state)
        for conv, film in zip(self.up[:-1], self.up_film, strict=True):
            x = film(conv(x + skips.pop()), voice)
        return self.up[-1](x + skips.pop()) + self.mask_bias[:, None, None], new_states

    def bound(self, mask):
        """A mask (batch, 2, freq, frames) as complex numbers of magnitude up to `mask_bound`."""
        mask = mask.float().permute(0, 2, 3, 1)
        length = torch.sqrt(1 + mask.square().sum(-1, keepdim=True) / self.config.mask_bound**2)
        return torch.view_as_complex((mask / length).contiguous())


def save(path, network, **rest):
    """Write a checkpoint: the network's configuration and weights, and whatever plain data `rest` names."""
    # by way of memory, as torch's own writer has another error for a full disk
    written = io.BytesIO()
    torch.save({"config": asdict(network.config), "weights": network.state_dict(), **rest}, written)
    with whole(path) as partial:
        partial.write_bytes(written.getbuffer())


def load(path, device="cpu"):
    """Read a checkpoint; returns the network in evaluation mode and the checkpoint, a plain dict.

    Raises `UserError` for a file that is missing, broken or no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        network = Network(Config(**checkpoint["config"]))
        network.load_state_dict(checkpoint["weights"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one with: python3 main.py") from None
    except Exception as error:
        raise UserError(f"{path}: not a whole checkpoint of this network ({first_line(error)}); use another") from error
    return network.to(device).eval(), checkpoint


def bf16_is_fast(device):
    """Whether bfloat16 autocast pays on a torch device: on GPUs, and on CPUs with AMX (5 to 8 times fp32) or with
    AVX-512's bfloat16 (1.6 times)."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def find_device(name):
    """The torch device of this name. Raises `UserError` where it cannot be used."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({first_line(error)}); use cpu") from error


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


def parameters(network):
    """The number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def macs_per_second(config):
    """Multiply-accumulates for a second of audio, recurrent layers included, normalisation and masking left out."""
    bands, top, kernel = config.bands, config.channels[-1], 5
    coarse = (bands[1] - config.fine_bands) * (COARSE - kernel) * config.channels[0]
    down = sum(kernel * a * b * n for a, b, n in zip([3, *config.channels], config.channels, bands[1:], strict=False))
    up = sum(kernel * a * b * n for a, b, n in zip([2, *config.channels], config.channels, bands[1:], strict=False))
    size, few = bands[-1], config.full_channels
    convolutions = len(config.dilations) * 9 * top * top * size
    full_band = 2 * top * few * size + lstm_macs(few * size, config.full_hidden) + config.full_hidden * few * size
    per_frame = down + up + (3 + 2) * coarse + config.blocks * (convolutions + full_band)
    return per_frame * config.sample_rate / config.hop


def lstm_macs(inputs, hidden):
    return 4 * hidden * (inputs + hidden)
