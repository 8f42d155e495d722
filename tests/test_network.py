"""The STFT and the network: streams equal wholes, nothing of the future, level does not matter."""

import dataclasses

import pytest
import torch

import model
from stft import Stft
from utils import UserError


@pytest.fixture
def mixture():
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(2, 32000, generator=generator) * torch.linspace(0.01, 0.3, 32000)
    return Stft().spectrum(samples)


@pytest.fixture
def dvector():
    return torch.nn.functional.normalize(torch.rand(2, 256, generator=torch.Generator().manual_seed(2)), dim=-1)


def in_chunks(network, mixture, dvector, lengths):
    state, estimates, start = None, [], 0
    for length in lengths:
        estimate, state = network(mixture[..., start : start + length], dvector, state)
        estimates.append(estimate)
        start += length
    assert start == mixture.shape[-1]
    return torch.cat(estimates, dim=-1)


@pytest.mark.parametrize(("n_fft", "hop"), [(512, 256), (512, 128), (320, 160)])
@pytest.mark.parametrize("length", [1, 255, 16000, 16001])
def test_stft_and_back_is_the_signal(n_fft, hop, length):
    stft, samples = Stft(n_fft, hop), torch.randn(2, length)
    assert stft.spectrum(samples).shape == (2, stft.n_freq, stft.frames(length))
    torch.testing.assert_close(stft.samples(stft.spectrum(samples), length), samples, atol=2e-6, rtol=0)


@pytest.mark.parametrize("hop", [256, 128])
def test_stft_in_chunks_is_the_signal_delayed(hop):
    stft, samples = Stft(512, hop), torch.randn(1, 8192)
    analysis = synthesis = None
    heard = []
    for chunk in samples.split([hop, 3 * hop, 8192 - 4 * hop], dim=-1):
        spectrum, analysis = stft.analyse(chunk, analysis)
        out, synthesis = stft.synthesise(spectrum, synthesis)
        assert out.shape == chunk.shape
        heard.append(out)
    heard = torch.cat(heard, dim=-1)
    assert heard[:, : stft.delay].abs().max() < 1e-5
    torch.testing.assert_close(heard[:, stft.delay :], samples[:, : -stft.delay], atol=2e-6, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[1] * 20 + [106], [3, 1, 40, 82], [125, 1]])
def test_chunks_equal_whole(network, mixture, dvector, lengths):
    whole, _ = network(mixture, dvector)
    chunked = in_chunks(network, mixture, dvector, lengths)
    assert (chunked - whole).abs().max() < 1e-5 * whole.abs().max()


@torch.inference_mode()
def test_nothing_of_the_future_leaks(network, mixture, dvector):
    whole, _ = network(mixture, dvector)
    changed = mixture.clone()
    changed[..., 70:] = torch.randn_like(changed[..., 70:])
    estimate, _ = network(changed, dvector)
    torch.testing.assert_close(estimate[..., :70], whole[..., :70], atol=0, rtol=0)
    assert (estimate[..., 70:] - whole[..., 70:]).abs().max() > 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("gain", [0.01, 100.0])
def test_level_does_not_matter(network, mixture, dvector, gain):
    whole, _ = network(mixture, dvector)
    scaled, _ = network(gain * mixture, dvector)
    assert (scaled / gain - whole).abs().max() < 1e-3 * whole.abs().max()


@torch.inference_mode()
def test_silence_gives_silence(network, mixture, dvector):
    estimate, _ = network(torch.zeros_like(mixture), dvector)
    assert estimate.abs().max() == 0


@torch.inference_mode()
def test_the_voice_matters(network, mixture, dvector):
    one, _ = network(mixture, dvector)
    other, _ = network(mixture, dvector.roll(1, dims=0))
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@torch.inference_mode()
def test_voices_are_seen_along_the_directions_in_which_they_differ_most():
    network = model.Network(model.Config(voice_size=8)).eval()
    turned = torch.linalg.qr(torch.randn(256, 256, generator=torch.Generator().manual_seed(3)))[0]
    spread = torch.full((256,), 0.01)
    spread[:8] = torch.linspace(0.5, 1, 8)
    drawn = torch.randn(2000, 256, generator=torch.Generator().manual_seed(4)) * spread
    dvectors = drawn @ turned.T + 1
    network.standardise(dvectors)
    voices = network.voice(dvectors)
    torch.testing.assert_close(voices.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(voices.T), torch.eye(8) / 8, atol=1e-3, rtol=0)
    assert (voices.T @ drawn).abs()[:, 8:].max() < 0.05 * (voices.T @ drawn).abs()[:, :8].max()
    network.standardise(dvectors[:3])  # fewer voices than directions
    assert network.voice(dvectors[:3]).norm(dim=1).max() < 2


@torch.inference_mode()
def test_a_mask_of_ones_returns_the_mixture(network, mixture, dvector, monkeypatch):
    bound = network.config.mask_bound
    one = (1 - bound**-2) ** -0.5  # what is bounded to one
    ones = torch.tensor([one, 0.0])[:, None, None].expand(2, 2, *mixture.shape[1:])
    monkeypatch.setattr(network, "mask", lambda features, dvector, states: (ones, states))
    estimate, _ = network(mixture, dvector)
    torch.testing.assert_close(estimate, mixture, atol=1e-5, rtol=1e-5)


def test_the_mask_is_bounded(network):
    mask = network.bound(1e4 * torch.randn(1, 2, 5, 5))
    assert mask.abs().max() <= network.config.mask_bound + 1e-5


def test_size_and_cost_are_within_bounds():
    config = model.Config()
    assert model.parameters(model.Network(config)) <= 2.5e6
    assert model.macs_per_second(config) <= 1.6e9


def test_the_formula_for_the_cost_counts_what_torch_counts():
    config = model.Config()
    network, frames = model.Network(config).eval(), 8
    mixture, dvector = torch.zeros(1, 257, frames, dtype=torch.complex64), torch.zeros(1, 256)
    from torch.utils.flop_counter import FlopCounterMode

    # the counter does not know recurrent layers, nor what is done once for a voice
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.LSTM):
            network.set_submodule(name, Echo(module.hidden_size))
        elif name.endswith("condition"):
            network.set_submodule(name, Constant(module.out_features))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(mixture, dvector)
    size = config.full_channels * config.bands[-1]
    lstm = config.blocks * 4 * config.full_hidden * (size + config.full_hidden)
    counted = counter.get_total_flops() / 2 / frames + lstm
    assert counted * config.sample_rate / config.hop == pytest.approx(model.macs_per_second(config), rel=0.02)


class Echo(torch.nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, x, memory):
        return x.new_zeros(*x.shape[:2], self.hidden_size), memory


class Constant(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x.new_zeros(len(x), self.size)


def test_a_checkpoint_gives_the_same_network(network, checkpoint):
    loaded, saved = model.load(checkpoint)
    assert loaded.config == network.config
    assert saved["config"] == dataclasses.asdict(network.config)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_broken_checkpoint_is_a_clear_error(checkpoint, tmp_path):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(checkpoint.read_bytes()[:20000])
    with pytest.raises(UserError, match=r"broken\.pt: not a whole checkpoint"):
        model.load(broken)
    with pytest.raises(UserError, match=r"missing\.pt: no such checkpoint"):
        model.load(tmp_path / "missing.pt")
