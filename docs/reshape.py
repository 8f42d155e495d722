"""How the shipped weights began: those before, whose network saw d-vectors in all their directions, with few of them.

git show dd00085:models/extractor/pretrained.pt > before.pt
python3 docs/reshape.py before.pt datasets/preprocessed/size=12000 begin.pt

See `model.Network.standardise`; the directions are those of the examples' training speakers.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataset  # noqa: E402
import model  # noqa: E402


def main(before, examples, begin):
    saved = torch.load(before, map_location="cpu", weights_only=True)
    weights = saved["weights"]
    network = model.Network(model.Config(**saved["config"]))
    network.standardise(dataset.Examples(examples, "train").dvectors[:, -1])
    scale, primary = weights.pop("dvector_scale"), weights["primary"]
    moved = (network.dvector_mean - weights["dvector_mean"]) / scale
    back = torch.linalg.pinv(network.dvector_axes).T / scale  # from the new voice to the one before
    wanted, given = [], []  # what the layers make of the primary voice, and how they see a voice now
    for name in [name for name in weights if name.endswith("condition.weight")]:
        weight, bias = weights[name], name.replace("weight", "bias")
        weights[name] = weight @ back
        weights[bias] = weights[bias] + weight @ moved
        wanted.append(weight @ (primary - moved))
        given.append(weights[name])
    weights["primary"] = torch.linalg.lstsq(torch.cat(given), torch.cat(wanted)[:, None]).solution[:, 0]
    weights |= {name: tensor for name, tensor in network.state_dict().items() if name.startswith("dvector_")}
    network.load_state_dict(weights)
    model.save(begin, network)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "examples", "begin"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
