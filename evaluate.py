"""Score a checkpoint on voices that it has never heard: fixed lists drawn from a seed, or cases of your own."""

import functools
import importlib.util
import json
import math
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import corpora
import mixing
import report
from extractor import REHEARSAL_SECONDS, Extractor, default_checkpoint, digest
from lists import ESTIMATE, LISTS, MAIN, OTHER, QUICK, SELF, fixed_lists
from metrics import attenuation_db, over_suppression, si_sdr
from model import DEVICE
from utils import NOT_NEGATIVE, POSITIVE, RANGE, ROOT, UserError, option, parse, processes, require, run, whole

ACCENTS = ("VCTK",)


@dataclass(frozen=True, kw_only=True)
class Options:
    speech: list[str] = option(
        [], "corpora or folders with a folder per speaker, used whole (default: the speakers the downloader holds out)"
    )
    accents: list[str] = option([], "more such speech, for the list accents (default: VCTK, if it is fetched)")
    words: list[str] = option(
        [],
        "speech with transcripts, for word errors: LibriSpeech, used whole, or speechocean762, its held-out speakers",
    )
    noise: list[str] = option(corpora.defaults("noise"), "corpora or folders, their held-out files; or none")
    music: list[str] = option(corpora.defaults("music"), "corpora or folders, their held-out files; or none")
    datasets: str = option(str(ROOT / "datasets"), "folder that holds the corpora")
    checkpoint: str | None = option(None, "checkpoint (default: models/extractor/best.pt, else the shipped one)")
    lists: list[str] = option([], f"lists to score, of {', '.join(LISTS)} (default: all)")
    quick: bool = option(False, "only the lists " + ", ".join(QUICK) + ", without SDR, PESQ and STOI")
    cases: str | None = option(None, "score this folder instead, its subfolders with mixture.*, target.*, reference.*")
    mixtures: int = option(200, "number of mixtures in a list")
    segment: float = option(4.0, "their length in seconds")
    sir_db: list[float] = option([-5.0, 5.0], "range of the target over the interference in dB", nargs=2)
    seed: int = option(1, "seed of the lists")
    output: str = option(str(ROOT / "results" / "evaluation"), "folder for report, pictures and sound")
    json: str | None = option(None, "file for the figures of every mixture (default: evaluation.json in --output)")
    curve: str | None = option(None, "save a picture of the checkpoint's learning curve here, too")
    workers: int = option(os.cpu_count(), "number of processes")
    device: str = option(DEVICE, "cpu, cuda, cuda:1 ...")
    live: bool = option(False, "extract as from live streams, of which nothing is heard before they begin")

    def __post_init__(self):
        require(self, POSITIVE, "mixtures", "workers")
        require(self, NOT_NEGATIVE, "seed")
        require(self, RANGE, "sir_db")
        require(self, (set(LISTS).issuperset, "some of " + ", ".join(LISTS)), "lists")

    @property
    def names(self):
        """The lists to score."""
        return self.lists or (QUICK if self.quick else LISTS)

    def extractor(self):
        """What is scored."""
        return Extractor(self.checkpoint, self.device, rehearsal_seconds=0 if self.live else REHEARSAL_SECONDS)


def main(argv):
    options = parse(Options, argv, __doc__)
    measures = {} if options.quick else quality_measures()
    extractor = options.extractor()
    output = Path(options.output)
    if options.cases:
        folders = case_folders(options.cases)
        rows = [score(extractor, read_case(folder), measures) for folder in tqdm(folders, unit="case", disable=None)]
        print(report.case_table(rows), end="\n\n")
    else:
        cases = draw(options)
        rows = score_all(cases, options)
    summary = report.summary(rows)
    print(report.text(summary))
    if options.json or not options.cases:
        save_json(options.json or output / "evaluation.json", options=asdict(options), summary=summary, rows=rows)
    if not options.cases:
        scenes = {name: scene_of(cases[n]) for name, n in report.extremes(rows).items()}
        examples = {name: {"target": scene.target, **hear(extractor, scene)} for name, scene in scenes.items()}
        print(report.save(output, about(extractor, rows, options), rows, summary, examples, extractor.sample_rate))
    if options.curve:
        report.learning_curve(options.curve, extractor.checkpoint.get("curve", []))
        print(options.curve)


def about(extractor, rows, options):
    """A sentence that says what was scored, and with what."""
    speakers = {row["target"]["speaker"] for row in rows}
    path = options.checkpoint or default_checkpoint()
    return (
        f"The checkpoint {Path(path).name} (step {extractor.checkpoint.get('step')}, weights "
        f"{digest(extractor.network)[:12]}) on lists drawn with seed {options.seed}, of {len(speakers)} speakers of "
        f"{', '.join(sorted({row['target']['corpus'] for row in rows}))}, extracted as "
        f"{'from live streams' if options.live else 'from recordings'}."
    )


def save_json(path, **contents):
    with whole(path) as partial:
        partial.write_text(json.dumps(contents, indent=1))
    print(path)


def draw(options):
    """The cases of all lists asked for."""
    recordings = find_recordings(options)
    texts = transcripts(recordings["words"]) if importlib.util.find_spec("pocketsphinx") else None
    common = {"count": options.mixtures, "segment": options.segment, "sir_db": options.sir_db, "seed": options.seed}
    return fixed_lists(options.names, recordings, texts, **common)


def find_recordings(options):
    """Recordings under speech, accents, words, noise and music that nothing was trained on, see `Options`."""
    find = functools.partial(corpora.find, root=Path(options.datasets))
    if options.speech:
        speech = find(options.speech, "speech")
    else:
        speech = corpora.split_speakers(find(corpora.defaults("speech"), "speech"))[1]
    words = find(options.words, "speech")
    trained_on = [r for r in words if r.corpus == "speechocean762"]
    excluded = set(corpora.split_speakers(trained_on)[0]) if trained_on else ()
    fetched = [] if options.speech else [name for name in ACCENTS if corpora.is_fetched(name, options.datasets)]
    found = {"speech": speech, "accents": find(options.accents or fetched, "speech")}
    found["words"] = [r for r in words if r not in excluded]
    for kind, names in (("noise", options.noise), ("music", options.music)):
        wanted = "noisy" in options.names and names != ["none"]
        found[kind] = corpora.split_files(find(names, kind))[1] if wanted else []
    return found


def transcripts(recordings):
    """What is said, by path, as far as it is known: LibriSpeech's .trans.txt and speechocean762's text."""
    table = functools.cache(read_transcripts)
    texts = {}
    for r in recordings:
        for file in (*r.path.parent.glob("*.trans.txt"), *r.path.parents[2].glob("t*/text")):  # train or test
            if text := table(file).get(r.path.stem):
                texts[r.path] = text
    return texts


def read_transcripts(path):
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    return {line[0]: line[1] for line in lines if len(line) == 2}


# ---- What is heard, and what of it is right ----


@dataclass(frozen=True)
class Scene:
    """Signals (samples,) at 16 kHz; `references` by name, `None` for the primary speaker; `about`: its row's head."""

    mixture: np.ndarray
    target: np.ndarray
    interference: np.ndarray
    references: dict
    about: dict
    text: str = ""


def scene_of(case):
    """Make the sound of a `Case`."""
    example = mixing.render(case.plan, case.settings)
    references = {}
    for name, what in case.references.items():
        if isinstance(what, list):
            references[name] = np.concatenate([mixing.load(piece) for piece in what])
        else:
            references[name] = what and example.reference[: round(what * audio.SAMPLE_RATE)]
    about = {"list": case.list, "segment": case.settings.segment, **example.row}
    target, interference, _ = example.parts
    return Scene(example.parts.sum(0), target, interference, references, about, case.text)


def case_folders(folder):
    """The subfolders of a folder of cases."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; give one whose subfolders hold mixture.* and target.*")
    folders = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{folder}: has no subfolders; put mixture.* and target.* of each case in one")
    for case in folders:
        for name in ("mixture", "target", "reference"):
            only(case, name, needed=name != "reference")
    return folders


def only(folder, name, needed):
    """The one recording of this name in a folder, of any format; `None` where there is none and none is needed."""
    found = sorted(folder.glob(f"{name}.*"))
    if len(found) > 1:
        raise UserError(f"{folder}: has {' and '.join(path.name for path in found)}; keep one of them")
    if not found and needed:
        raise UserError(f"{folder}: has no {name}.*; add the recording or remove the folder")
    return found[0] if found else None


def read_case(folder):
    """The `Scene` of a folder of recordings of any format and rate; all but the target is interference.

    Raises `UserError` for recordings that cannot be used.
    """
    path = {name: only(folder, name, needed=False) for name in ("mixture", "target", "reference")}
    mixture, target = audio.read(path["mixture"]), audio.read(path["target"])
    seconds = len(mixture) / audio.SAMPLE_RATE, len(target) / audio.SAMPLE_RATE
    if abs(seconds[0] - seconds[1]) > 0.1:
        raise UserError(
            f"{path['target']}: {seconds[1]:.2f} s, but {path['mixture'].name} is {seconds[0]:.2f} s long; "
            "give the target's part of this mixture"
        )
    mixture, target = (samples[: min(len(mixture), len(target))] for samples in (mixture, target))
    reference = None
    if path["reference"]:
        reference = audio.read(path["reference"])
        audio.check_reference(reference, path["reference"])
    # the mixture may have been made louder or quieter than its parts
    target = target * max(0.0, np.dot(mixture, target) / max(np.dot(target, target), 1e-12))
    about = {"list": "cases", "case": folder.name, "target": {"speaker": folder.name}}
    references = {ESTIMATE: None, SELF: None} if reference is None else {ESTIMATE: reference}
    return Scene(mixture, target, mixture - target, references, about)


def hear(extractor, scene):
    """The signals that are scored, by name: the mixture, what each reference extracts, and an oracle's estimate."""
    estimates = {}
    for name, reference in scene.references.items():
        if name == SELF:
            voice, _ = extractor.enroll_primary([scene.mixture])
        else:
            voice = None if reference is None else extractor.enroll(reference)
        estimates[name] = extractor.extract(scene.mixture, voice)
    ceiling = oracle(extractor.network.config, scene.mixture, scene.target)
    return {"mixture": scene.mixture, **estimates, report.ORACLE: ceiling}


def oracle(config, mixture, target):
    """What the best mask leaves of a mixture: the ratio of the spectra, as bounded as the network's mask is."""
    mixed, wanted = config.stft.spectrum(torch.from_numpy(np.stack([mixture, target])))
    mask = wanted / (mixed + 1e-9)
    mask = mask * (config.mask_bound / mask.abs().clamp(min=config.mask_bound))
    return config.stft.samples((mask * mixed)[None], len(mixture))[0].numpy()


# ---- The figures ----


def score(extractor, scene, measures):
    """A row: what the scene is, and under "signals" the `figures` of all that is heard, by name."""
    heard = hear(extractor, scene)
    scores = {}
    for name, estimate in heard.items():
        parts = (scene.target, scene.interference)
        wanted, unwanted = reversed(parts) if name == OTHER else parts
        scores[name] = figures(estimate, scene.mixture, wanted, unwanted, measures)
    if scene.text:
        for name, samples in {"target": scene.target, **heard}.items():
            if name not in (OTHER, report.ORACLE):
                scores.setdefault(name, {})["word_errors"] = word_errors(samples, scene.text)
    return {**scene.about, "signals": scores}


def figures(estimate, mixture, target, interference, measures):
    """The figures of an estimate (samples,), as far as they are defined: nothing but its level for a silent target."""
    estimate, mixture, target, interference = map(torch.from_numpy, (estimate, mixture, target, interference))
    found = {"attenuation_db": attenuation_db(estimate, mixture)}
    if target.any():
        found["si_sdr"] = si_sdr(estimate, target)
        found["over_suppression"] = over_suppression(estimate, target)
        if interference.any():
            found["improvement"] = found["si_sdr"] - si_sdr(mixture, target)
            found["wrong_speaker"] = (found["si_sdr"] < si_sdr(estimate, interference)).float()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # pystoi's, and then it returns 1e-5
            for name, measure in measures.items():
                try:
                    found[name] = measure(estimate, target)
                except (RuntimeError, RuntimeWarning):  # too little speech
                    pass
    return {name: value.item() for name, value in found.items() if math.isfinite(value)}


def quality_measures():
    """Functions of (estimate, target): SDR in dB, PESQ (wide band) and STOI. Raises `UserError` without them."""
    # not imported above, as pesq needs a compiler where it is installed, and --quick does without
    for package in ("torchmetrics", "pesq", "pystoi"):
        if not importlib.util.find_spec(package):
            raise UserError(f"{package}: is not installed; pip install -r requirements.txt, or take --quick")
    from torchmetrics.functional.audio.pesq import perceptual_evaluation_speech_quality
    from torchmetrics.functional.audio.sdr import signal_distortion_ratio
    from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility

    return {
        "sdr": signal_distortion_ratio,
        "pesq": functools.partial(perceptual_evaluation_speech_quality, fs=audio.SAMPLE_RATE, mode="wb"),
        "stoi": functools.partial(short_time_objective_intelligibility, fs=audio.SAMPLE_RATE),
    }


def word_errors(samples, text):
    """How many words an offline recogniser has wrong, and how many there are."""
    from torchmetrics.functional.text import word_error_rate

    decoder = recogniser()
    decoder.start_utt()
    decoder.process_raw((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    heard, count = decoder.hyp(), len(text.split())
    return [round(word_error_rate(heard.hypstr if heard else "", text.lower()).item() * count), count]


@functools.cache
def recogniser():
    from pocketsphinx import Decoder

    return Decoder(samprate=audio.SAMPLE_RATE, cmn="batch", loglevel="FATAL")


# ---- All cores ----


def score_all(cases, options):
    """The rows of all cases, in order, made by `options.workers` processes."""
    jobs = [(case, not options.quick and case.list in MAIN) for case in cases]
    with processes(options.workers, prepare, options) as executor:
        return list(tqdm(executor.map(score_job, jobs), total=len(jobs), unit="mixture", smoothing=0.05))


def prepare(options):
    """Keep what `score_job` needs in this process."""
    global worker
    torch.set_num_threads(1)
    worker = options.extractor()


def score_job(job):
    case, thorough = job
    return score(worker, scene_of(case), quality_measures() if thorough else {})


if __name__ == "__main__":
    run(main)
