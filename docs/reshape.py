"""How the shipped weights began: those before, of 17 bands of equal width at the bottom, in a network of 11 bands.

git show 60b4c7b:models/extractor/pretrained.pt > before.pt
python3 docs/reshape.py before.pt begin.pt

Below 4 kHz nothing changes; above it one band takes the place of four. See `model.Config.fine_hz`.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model  # noqa: E402

FEW, BEFORE, FINE = 12, 17, 9  # channels of a band that the LSTM sees, bands before, those that stay
MERGED = (slice(9, 13), slice(13, 17))  # the bands before that each of the two others stands for


def main(before, begin):
    saved = torch.load(before, map_location="cpu", weights_only=True)
    network = model.Network(model.Config(**saved["config"]))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    weights = {name: reshaped(name, saved["weights"]).reshape(shape) for name, shape in shapes.items()}
    network.load_state_dict(weights)
    model.save(begin, network)


def reshaped(name, weights):
    """A tensor of the network as it is now, by name, from the weights before."""
    if name.startswith(("down.0.", "up.3.")):
        kernel = weights[name.replace(".fine", "").replace(".coarse", "")]
        if ".fine" in name:
            return kernel
        return coarse_down(kernel) if name.startswith("down") else coarse_up(kernel)
    tensor = weights[name]
    if name.endswith("lstm.weight_ih_l0"):
        bands = tensor.reshape(-1, FEW, BEFORE)  # four alike that become one count as before
        return torch.cat([bands[..., :FINE], *(bands[..., four].sum(-1, keepdim=True) for four in MERGED)], dim=-1)
    if ".across." in name:
        bands = tensor.reshape(FEW, BEFORE, -1)
        return torch.cat([bands[:, :FINE], *(bands[:, four].mean(1, keepdim=True) for four in MERGED)], dim=1)
    return tensor


def coarse_down(kernel):
    """The mean of what four neighbours of stride 2 would see, as one kernel over their eight bins."""
    coarse = torch.zeros(*kernel.shape[:2], model.COARSE, 1)
    for centre in range(1, model.COARSE, 2):
        for tap in range(5):
            if 0 <= centre + tap - 2 < model.COARSE:
                coarse[:, :, centre + tap - 2] += kernel[:, :, tap] / 4
    return coarse


def coarse_up(kernel):
    """What four alike of stride 2 would give their eight bins; the lowest, 129, is between two of them."""
    between, on = kernel[:, :, [1, 3]].sum(2), kernel[:, :, [0, 2, 4]].sum(2)
    return torch.stack([between, on] * (model.COARSE // 2), dim=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
