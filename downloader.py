"""Fetch corpora, mix them with all cores and write the examples that `main.py` trains on; once per machine."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corpora
import dataset
import dynamic
import fetch
import mixing
from encoder import SpeakerEncoder
from model import Config, bf16_is_fast
from utils import POSITIVE, ROOT, UserError, differences, option, parse, processes, require, run, whole

BLOCK = 16  # examples that a worker makes at once
AHEAD = 4  # blocks a worker that may be begun before the first is written
VALIDATION_SHARE = 0.05  # validation examples beside the training examples
MIN_VALIDATION, MAX_VALIDATION = 16, 1000
EXAMPLES_PER_SECOND = 15  # of one core, for the forecast; see benchmarks/README.md


@dataclass(frozen=True, kw_only=True)
class Options(mixing.Settings):
    size: int = option(10000, "number of training examples")
    speech: list[str] = option(corpora.defaults("speech"), "corpora of --list, or folders with a folder per speaker")
    noise: list[str] = option(corpora.defaults("noise"), "corpora of --list, or folders of recordings; or none")
    music: list[str] = option(corpora.defaults("music"), "corpora of --list, or folders of recordings; or none")
    rooms: list[str] = option(["none"], "corpora of --list, or folders of impulse responses with a folder per room")
    where: str = option("", "keep only speakers that fit, for instance 'gender=f age<16'")
    n_fft: int = option(Config.n_fft, "length of the STFT's window in samples")
    hop: int = option(Config.hop, "hop of the STFT in samples")
    dynamic: bool = option(False, "store recordings: main.py makes examples of them, --size at a time, on its GPU")
    workers: int = option(os.cpu_count(), "number of processes")
    mirror: str | None = option(None, "folder or URL that holds the corpora's archives, instead of the internet")
    datasets: str = option(str(ROOT / "datasets"), "folder for corpora and examples")
    list: bool = option(False, "show the corpora that can be fetched, and end")
    list_speakers: bool = option(False, "show the speakers by region, gender and age, and end")

    def __post_init__(self):
        super().__post_init__()
        require(self, POSITIVE, "size", "workers", "hop")
        Config(n_fft=self.n_fft, hop=self.hop)
        require(self, (lambda share: not (self.dynamic and share), "0 with --dynamic"), "reverb")


def main(argv):
    options = parse(Options, argv, __doc__)
    if options.list:
        print(corpora.listing())
        return
    root = Path(options.datasets)
    kinds = ("speech",) if options.list_speakers else corpora.KINDS
    named = {kind: getattr(options, kind) for kind in kinds}
    named = {kind: names for kind, names in named.items() if kind == "speech" or names != ["none"]}
    folder = root / "preprocessed" / f"size={options.size}"
    if not options.list_speakers:
        forecast(options, folder, wanted(named))
    for corpus in wanted(named):
        fetch.fetch(corpus, root, options.mirror)
    recordings = {kind: corpora.find(names, kind, root) for kind, names in named.items()}
    recordings["speech"] = corpora.select(recordings["speech"], options.where)
    if options.list_speakers:
        print(corpora.speaker_table(recordings["speech"]))
        return
    prepare(folder, options, recordings, options.size, options.workers, options.n_fft, options.hop, options.dynamic)
    print(f"{folder}: {options.size} examples; train with: python3 main.py")


def wanted(named):
    """The table's corpora among the names of each kind; folders are none."""
    return [c for kind, names in named.items() for c in corpora.CORPORA if kind in c.kinds and c.name in names]


def forecast(options, folder, fetched):
    """Print what it will take; raise `UserError` where the disk is too small."""
    config = dataclasses.replace(Config(), n_fft=options.n_fft, hop=options.hop)
    frames = config.stft.frames(options.samples)
    total = validation_size(options.size) + (0 if options.dynamic else options.size)
    spectra = total * len(mixing.PARTS) * config.stft.n_freq * frames * 4
    corpora_bytes = fetch.disk_needed(fetched, options.datasets)
    minutes = total * options.segment / 3 / EXAMPLES_PER_SECOND / options.workers / 60
    print(
        f"{total} examples of {options.segment:g} s in {folder}: {spectra / 1e9:.1f} GB, about {minutes:.0f} min "
        f"on {options.workers} cores; corpora to fetch and unpack: {corpora_bytes / 1e9:.1f} GB"
        + ("; recordings: 0.12 GB an hour" if options.dynamic else "")
    )
    needed = corpora_bytes + spectra - sum(path.stat().st_size for path in folder.glob("*/[0-9]*/spectra.npy"))
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{existing}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; free some or lower --size"
        )


def validation_size(size):
    return min(max(MIN_VALIDATION, round(size * VALIDATION_SHARE)), MAX_VALIDATION)


def prepare(folder, settings, recordings, size, workers, n_fft=Config.n_fft, hop=Config.hop, as_recordings=False):
    """Write the store of `size` training examples, and validation examples of other speakers, to `folder`.

    `settings` are `mixing.Settings`, `recordings` lists of `corpora.Recording` by kind. With `as_recordings`, those
    for training are stored instead of examples, see dynamic.py. What is there already is kept, so a broken run goes
    on. Raises `UserError` where the folder holds examples with other settings.
    """
    counts = {"train": size, "validation": validation_size(size)}
    kind = {"dynamic": True} if as_recordings else {}
    begin(folder, store_settings(settings, recordings, counts, n_fft, hop) | kind)
    splits = split(recordings)
    drawn = mixing_settings(settings)
    natural = dataclasses.replace(drawn, **mixing.NATURAL)  # what counts is how well real voices can be told
    mixers = {
        name: mixing.Mixer(drawn if name == "train" else natural, **recordings) for name, recordings in splits.items()
    }
    recorded = []
    if as_recordings:
        recorded = [recording for kind in splits["train"].values() for recording in kind]
        del counts["train"]
    shards = [
        Shard(folder / name / f"{n:05d}", name, start, min(start + dataset.SHARD, count))
        for name, count in counts.items()
        for n, start in enumerate(range(0, count, dataset.SHARD))
    ]
    missing = [shard for shard in shards if not shard.path.exists()]
    blocks = [
        (shard.split, start, min(start + BLOCK, shard.end))
        for shard in missing
        for start in range(shard.start, shard.end, BLOCK)
    ]
    total, to_do = sum(counts.values()), sum(shard.count for shard in missing)
    with (
        tqdm(total=total, initial=total - to_do, unit="example", smoothing=0.05) as bar,
        processes(workers, start_worker, mixers, Config(n_fft=n_fft, hop=hop)) as executor,
    ):
        if recorded and not (folder / "train").exists():
            decoded = tqdm(executor.map(dynamic.decode, recorded, chunksize=BLOCK), total=len(recorded))
            dynamic.write_recordings(folder / "train", recorded, decoded)
        made = in_order(executor, blocks, AHEAD * workers)
        for shard in missing:
            dataset.write_shard(shard.path, shard.count, counted(bar, itertools.islice(made, shard.count)))


@dataclass(frozen=True)
class Shard:
    """A folder of examples number `start` to `end` of a split."""

    path: Path
    split: str
    start: int
    end: int

    @property
    def count(self):
        return self.end - self.start


def in_order(executor, blocks, ahead):
    """The examples of all blocks in order, with at most `ahead` blocks begun, so that none pile up in memory."""
    begun = collections.deque()
    for block in blocks:
        begun.append(executor.submit(make_block, block))
        if len(begun) == ahead:
            yield from begun.popleft().result()
    while begun:
        yield from begun.popleft().result()


def counted(bar, examples):
    for example in examples:
        yield example
        bar.update()


def split(recordings):
    """Recordings by kind to those for training and for validation: other speakers, other noise and music."""
    train, validation = corpora.split_speakers(recordings["speech"])
    splits = {"train": {"speech": train}, "validation": {"speech": validation}}
    for kind in ("noise", "music", "rooms"):
        splits["train"][kind], splits["validation"][kind] = corpora.split_files(recordings.get(kind, []))
    return splits


def mixing_settings(settings):
    return mixing.Settings(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(mixing.Settings)})


def store_settings(settings, recordings, counts, n_fft, hop):
    """Everything that decides about a store's bytes, for its settings.json."""
    digest = hashlib.sha256()
    for kind in sorted(recordings):
        for r in recordings[kind]:
            digest.update(f"{kind} {r.speaker} {r.path.name} {r.seconds:.3f}\n".encode())
    return {
        **dataclasses.asdict(mixing_settings(settings)),
        "samples": settings.samples,
        "sample_rate": Config.sample_rate,
        "n_fft": n_fft,
        "hop": hop,
        "reference_seconds": list(mixing.REFERENCE_SECONDS),
        "examples": counts,
        "recordings": {kind: len(found) for kind, found in sorted(recordings.items())},
        "recordings_sha256": digest.hexdigest(),
    }


def begin(folder, settings):
    """Write settings.json, or check that the one there is the same."""
    if (folder / "settings.json").exists():
        before = dataset.read_settings(folder)
        differing = differences(before, json.loads(json.dumps(settings)))
        if differing:
            raise UserError(f"{folder}: made with other settings ({differing}); remove it or choose another --size")
    else:
        with whole(folder / "settings.json") as partial:
            partial.write_text(json.dumps(settings, indent=1))


def start_worker(mixers, config):
    """Keep what `make_block` needs in this process."""
    global worker
    torch.set_num_threads(1)
    worker = Worker(mixers, config, SpeakerEncoder(bf16_is_fast(torch.device("cpu"))))


@dataclass
class Worker:
    mixers: dict
    config: Config
    encoder: SpeakerEncoder


def make_block(block):
    """Make the examples of one block: a list of (spectra, dvectors, row), see `dataset`."""
    name, start, end = block
    mixer = worker.mixers[name]
    examples = []
    for n in range(start, end):
        plan = mixer.draw(np.random.default_rng([mixer.settings.seed, dataset.SPLITS.index(name), n]))
        examples.append(mixing.render(plan, mixer.settings, mixer.rooms))
    parts = torch.from_numpy(np.stack([example.parts for example in examples]))
    spectra = worker.config.stft.spectrum(parts.reshape(-1, parts.shape[-1]))
    spectra = torch.view_as_real(spectra).half().numpy().reshape(*parts.shape[:2], *spectra.shape[1:], 2)
    references = [example.reference for example in examples]
    dvectors = worker.encoder.prefix_dvectors(references, mixing.REFERENCE_SAMPLES).numpy()
    return list(zip(spectra, dvectors, (example.row for example in examples), strict=True))


if __name__ == "__main__":
    run(main)
