"""How fast downloader.py makes examples, with and without reverberation, and where the time goes.

python3 benchmarks/prepare.py --speech FOLDER --noise FOLDER --music FOLDER
"""

import cProfile
import os
import pstats
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import corpora  # noqa: E402
import downloader  # noqa: E402
import mixing  # noqa: E402
from model import Config  # noqa: E402
from utils import ROOT, option, parse, run  # noqa: E402

DEMO = ROOT / "datasets" / "demo"
SHOWN = 8  # lines of the profile


@dataclass(frozen=True, kw_only=True)
class Options:
    speech: list[str] = option([str(DEMO / "voices")], "folders of speech")
    noise: list[str] = option([str(DEMO / "noise")], "folders of noise")
    music: list[str] = option([str(DEMO / "music")], "folders of music")
    size: int = option(512, "examples to make; the workers' start is not counted")
    workers: int = option(os.cpu_count(), "processes")


def main(argv):
    options = parse(Options, argv, __doc__)
    recordings = {kind: corpora.find(getattr(options, kind), kind, ROOT) for kind in ("speech", "noise", "music")}
    for reverb in (0.0, 1.0):
        settings = mixing.Settings(reverb=reverb)
        rate = examples_per_second(settings, recordings, options)
        print(f"reverb {reverb:g}: {rate:.1f} examples of {settings.segment:g} s a second on {options.workers} workers")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(f"largest worker: {peak:.2f} GB")
    profile(mixing.Settings(), recordings)


def examples_per_second(settings, recordings, options):
    """The rate from the difference between a small and a large store, which leaves the workers' start out."""
    seconds = []
    sizes = (64, 64 + options.size)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            downloader.prepare(Path(folder) / f"size={size}", settings, recordings, size, options.workers)
            seconds.append(time.monotonic() - began)
    examples = [size + downloader.validation_size(size) for size in sizes]
    return (examples[1] - examples[0]) / (seconds[1] - seconds[0])


def profile(settings, recordings):
    """Print where one worker's time goes."""
    speech = {name: mixing.Mixer(settings, **found) for name, found in downloader.split(recordings).items()}
    downloader.start_worker(speech, Config())
    downloader.make_block(("train", 0, downloader.BLOCK))
    profiler = cProfile.Profile()
    profiler.enable()
    for start in range(downloader.BLOCK, 5 * downloader.BLOCK, downloader.BLOCK):
        downloader.make_block(("train", start, start + downloader.BLOCK))
    profiler.disable()
    rows = [(timing[2], function) for function, timing in pstats.Stats(profiler).stats.items()]
    total = sum(own for own, _ in rows)
    print(f"one worker: {1000 * total / (4 * downloader.BLOCK):.0f} ms an example, of which")
    for own, (file, _, name) in sorted(rows, reverse=True)[:SHOWN]:
        print(f"  {100 * own / total:4.1f} %  {Path(file).name} {name}")


if __name__ == "__main__":
    run(main)
