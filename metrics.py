"""How near an estimate is to the target; the loss and every printed figure use these."""

import torch


def si_sdr(estimate, target, eps=1e-8):
    """Scale-invariant signal-to-distortion ratio in dB of signals (..., samples); returns (...).

    Le Roux et al., "SDR - half-baked or well done?" (2019, arXiv:1811.02508), eq. 5, means removed. Not defined for
    a silent target, where it returns a very low figure.
    """
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).sum(-1, keepdim=True) / (target.square().sum(-1, keepdim=True) + eps)
    projection = scale * target
    error = estimate - projection
    return 10 * torch.log10((projection.square().sum(-1) + eps) / (error.square().sum(-1) + eps))


def attenuation_db(estimate, mixture, eps=1e-8):
    """How much less power than the mixture (..., samples) the estimate has, in dB; the figure for absent targets."""
    return 10 * torch.log10((mixture.square().sum(-1) + eps) / (estimate.square().sum(-1) + eps))


def over_suppression(estimate, target, frame=320):
    """Share, 0 to 1, of the target's active frames that the estimate has attenuated by more than 10 dB.

    Signals (..., samples) with speech in the target; frames of `frame` samples, 20 ms, active within 40 dB of the
    loudest. What the estimate has of the target is its projection on it, so that other voices in it do not count.
    """
    estimate, target = (signal.unfold(-1, frame, frame) for signal in (estimate, target))
    power = target.square().sum(-1)
    active = power > 1e-4 * power.amax(-1, keepdim=True)
    return (active & ((estimate * target).sum(-1) < 10**-0.5 * power)).sum(-1) / active.sum(-1)


def spectral_distance(estimate, target, mixture, exponent=0.3, eps=1e-6):
    """Mean squared distance of compressed spectra (batch, freq, frames), complex and magnitude; returns (batch,).

    The magnitudes are raised to `exponent`, the phases kept (Ephrat et al., 2018, arXiv:1804.03619; Wilson et al.,
    2018, arXiv:1811.07030); both spectra are first scaled by the mean power of `mixture`.
    """
    level = mixture.abs().square().mean((1, 2), keepdim=True).sqrt() + 1e-9
    estimate, estimate_magnitude = compress(estimate / level, exponent, eps)
    target, target_magnitude = compress(target / level, exponent, eps)
    complex_term = torch.view_as_real(estimate - target).square().sum(-1)
    return (complex_term + (estimate_magnitude - target_magnitude).square()).mean((1, 2))


def compress(spectrum, exponent, eps):
    """Raise the magnitudes of a spectrum to `exponent`; returns the spectrum and its magnitudes.

    `eps` is added to the power, as the slope of a root has no bound at zero.
    """
    power = torch.view_as_real(spectrum).square().sum(-1) + eps
    return spectrum * power ** ((exponent - 1) / 2), power ** (exponent / 2)
