"""Write a checkpoint's network as an ONNX graph that takes one hop of samples; `extractor.py` streams with it.

The graph is `model.Network.extract` for a hop, spectra included: `samples` (batch, hop), `dvector` (batch, 256) and the
state (`state_0` ...: zeros at the start) go in, `estimate` (batch, hop), `delay` samples late, and the new state
(`new_state_0` ...) come out. It needs nothing of this project, so it also runs from other languages.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

import audio
from extractor import PRIMARY, Extractor, HopGraph, default_checkpoint, digest
from utils import POSITIVE, ROOT, UserError, option, parse, require, run, whole

TOLERANCE = 1e-4  # of the peak, between graph and network
RECORDING = ROOT / "datasets" / "demo" / "mixture.flac"


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: str | None = option(None, "checkpoint (default: models/extractor/best.pt, else the shipped one)")
    output: str | None = option(None, "file to write (default: beside the checkpoint, where streams find it)")
    seconds: float = option(120.0, "length of the sound on which the graph must equal the network")

    def __post_init__(self):
        require(self, POSITIVE, "seconds")


def main(argv):
    options = parse(Options, argv, __doc__)
    checkpoint = Path(options.checkpoint or default_checkpoint())
    output = Path(options.output or checkpoint.with_suffix(".onnx"))
    if output.suffix != ".onnx":
        raise UserError(f"{output}: name a file that ends in .onnx with --output")
    extractor = Extractor(checkpoint)
    with whole(output) as partial:
        export(extractor.network, partial)
        difference = parity(extractor, HopGraph(partial), audio.read(RECORDING), options.seconds)
        if not difference < TOLERANCE:
            raise UserError(f"{output}: not written, it is {difference:.1e} of the peak away from the network")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, within {difference:.0e} of the peak of the network")


def export(network, path):
    """Write the graph of a `Network` in evaluation mode to a file."""
    hop, size = network.config.hop, network.config.dvector_size
    examples = (torch.zeros(2, hop), torch.ones(2, size), network.start(2))
    batch = torch.export.Dim("batch")
    names = [f"state_{n}" for n in range(len(examples[2]))]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what it says of packages that are not there
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Extract(network).eval(),
            examples,
            dynamo=True,
            opset_version=20,
            input_names=["samples", "dvector", *names],
            output_names=["estimate", *(f"new_{name}" for name in names)],
            dynamic_shapes=({0: batch}, {0: batch}, [{0: batch}] * len(names)),
            verbose=False,
        )
    graph = program.model_proto
    del graph.graph.value_info[:]  # shapes within, which the converter states wrongly for LSTMs
    facts = {"weights": digest(network), "sample_rate": network.config.sample_rate, "hop": hop}
    onnx.helper.set_model_props(graph, {name: str(value) for name, value in facts.items()})
    onnx.save(graph, path)


class Extract(torch.nn.Module):
    """`Network.extract` as a `forward`."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, samples, dvector, state):
        return self.network.extract(samples, dvector, state)


@torch.inference_mode()
def parity(extractor, graph, recording, seconds):
    """The largest difference between graph and network over so many seconds of a recording, as a share of the peak.

    Two streams at once: the recording's voice, and the primary speaker.
    """
    hop = extractor.stft.hop
    samples = np.resize(recording, round(seconds * extractor.sample_rate) // hop * hop)
    samples = np.stack([samples, samples])
    dvector = torch.stack([extractor.enroll(recording).dvector, PRIMARY.dvector])
    expected = state = extractor.network.start(2)
    estimates, steps = [], []
    for chunk in torch.from_numpy(samples).split(hop * 512, dim=-1):
        estimate, expected = extractor.network.extract(chunk, dvector, expected)
        estimates.append(estimate)
        for step in chunk.split(hop, dim=-1):
            estimate, state = graph(step, dvector, state)
            steps.append(estimate)
    estimates, steps = torch.cat(estimates, dim=-1), torch.cat(steps, dim=-1)
    return ((estimates - steps).abs().max() / estimates.abs().max()).item()


if __name__ == "__main__":
    run(main)
