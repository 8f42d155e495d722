"""The metrics against known answers."""

import pytest
import torch

from metrics import attenuation_db, si_sdr, spectral_distance


@pytest.fixture
def signals():
    """Two signals (16000,) without means, of power 1, orthogonal to each other."""
    generator = torch.Generator().manual_seed(0)
    target, noise = torch.randn(2, 16000, generator=generator).double()
    target = target - target.mean()
    noise = noise - noise.mean()
    noise = noise - (noise @ target) / (target @ target) * target
    return target / target.square().mean().sqrt(), noise / noise.square().mean().sqrt()


@pytest.mark.parametrize("decibels", [-20.0, 0.0, 7.5, 40.0])
@pytest.mark.parametrize("scale", [1.0, -3.0, 0.01])
def test_si_sdr_is_the_ratio_whatever_scale_and_offset(signals, decibels, scale):
    target, noise = signals
    estimate = scale * (target + 10 ** (-decibels / 20) * noise) + 0.1
    assert si_sdr(estimate, target).item() == pytest.approx(decibels, abs=1e-3)


def test_si_sdr_takes_batches(signals):
    target, noise = signals
    ratios = si_sdr(torch.stack([target + noise, target + 0.1 * noise]), torch.stack([target, target]))
    torch.testing.assert_close(ratios, torch.tensor([0.0, 20.0]).double(), atol=1e-3, rtol=0)


def test_si_sdr_of_silence_is_finite_with_its_gradient(signals):
    target, _ = signals
    for estimate in (torch.zeros_like(target), target.clone()):
        for wanted in (torch.zeros_like(target), target):
            estimate = estimate.detach().requires_grad_()
            ratio = si_sdr(estimate, wanted)
            ratio.backward()
            assert torch.isfinite(ratio)
            assert torch.isfinite(estimate.grad).all()


def test_attenuation(signals):
    _, noise = signals
    assert attenuation_db(0.1 * noise, noise).item() == pytest.approx(20, abs=1e-3)


def test_spectral_distance_is_zero_only_where_right_and_knows_no_level():
    generator = torch.Generator().manual_seed(0)
    target, other = torch.randn(2, 3, 257, 20, dtype=torch.complex64, generator=generator)
    assert spectral_distance(target, target, target + other).abs().max() == 0
    distance = spectral_distance(other, target, target + other)
    assert distance.shape == (3,)
    assert (distance > 0.1).all()
    scaled = spectral_distance(100 * other, 100 * target, 100 * (target + other))
    torch.testing.assert_close(scaled, distance, rtol=1e-3, atol=0)


def test_spectral_distance_by_hand():
    # the mixture has power 1, so nothing is scaled; 0.3 is the exponent
    target, estimate = torch.full((1, 4, 4), 2j), torch.full((1, 4, 4), 3.0 + 0j)
    mixture = torch.ones(1, 4, 4, dtype=torch.complex64)
    complex_term = 2 ** (2 * 0.3) + 3 ** (2 * 0.3)  # at right angles
    magnitude_term = (3**0.3 - 2**0.3) ** 2
    assert spectral_distance(estimate, target, mixture).item() == pytest.approx(complex_term + magnitude_term, rel=1e-4)
