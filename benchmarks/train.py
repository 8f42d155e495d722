"""How fast main.py trains, and how much faster than that the examples are loaded.

python3 benchmarks/train.py --data datasets/preprocessed/size=4000
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataset  # noqa: E402
import main as training  # noqa: E402
from utils import option, parse, run  # noqa: E402

WARM_UP = 3  # steps that are not counted, the compilation among them


@dataclass(frozen=True, kw_only=True)
class Options:
    data: str | None = option(None, "folder with examples (default: the largest in datasets/preprocessed)")
    steps: int = option(40, "steps to time")
    batch_size: int = option(training.Options.batch_size, "examples a step")
    device: str = option(training.Options.device, "cpu, cuda, cuda:1 ...")


def main(argv):
    options = parse(Options, argv, __doc__)
    folder = Path(options.data or dataset.largest())
    rates = {}
    for compiled in (False, True):
        with tempfile.TemporaryDirectory() as output:
            settings = training.Options(
                data=str(folder), output=output, logs=output, batch_size=options.batch_size, compile=compiled,
                device=options.device,
            )  # fmt: skip
            rates[compiled] = measure(training.Trainer(settings, folder), options.steps)
    for compiled, (trained, loaded) in rates.items():
        kind = "compiled" if compiled else "not compiled"
        print(f"{kind}: {trained:.1f} s of mixture a second trained, loading and loss included; {loaded:.0f} loaded")
    print(f"compiled / not compiled: {rates[True][0] / rates[False][0]:.2f}")


def measure(trainer, steps):
    """Seconds of mixture a second: trained with loading and loss, and loaded alone."""
    seconds = trainer.options.batch_size * trainer.examples.samples / trainer.network.config.sample_rate
    batches = endless(trainer)
    for _ in range(WARM_UP):
        trainer.update(next(batches))
    began = time.monotonic()
    for _ in range(steps):
        trainer.update(next(batches))
    trained = steps * seconds / (time.monotonic() - began)
    began = time.monotonic()
    for _ in range(steps):
        next(batches)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return trained, steps * seconds / (time.monotonic() - began)


def endless(trainer):
    epoch = 0
    while True:
        yield from trainer.batches(epoch, 0)
        epoch += 1


if __name__ == "__main__":
    run(main)
