"""How fast streams run: one on one core, in each of the ways PyTorch and ONNX offer; then many on all cores.

python3 benchmarks/stream.py
"""

import resource
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import audio  # noqa: E402
from extractor import Extractor, default_checkpoint  # noqa: E402
from utils import POSITIVE, ROOT, option, parse, require, run  # noqa: E402

DEMO = ROOT / "datasets" / "demo"
RUNS = 5
DELAY_LIMIT = 0.05  # seconds that 95 % of the chunks of many streams may take


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: str | None = option(None, "checkpoint (default: models/extractor/best.pt, else the shipped one)")
    seconds: float = option(60.0, "length of the sound of one stream")
    paced_seconds: float = option(10.0, "how long many streams run, in real time, for each number of them")
    cores: int = option(2, "threads that share many streams")

    def __post_init__(self):
        require(self, POSITIVE, "seconds", "paced_seconds", "cores")


def main(argv):
    options = parse(Options, argv, __doc__)
    torch.set_num_threads(1)
    librosa.filters.mel(sr=audio.SAMPLE_RATE, n_fft=400)  # it loads libraries of its own when first used
    before = memory()
    extractor = Extractor(options.checkpoint or default_checkpoint())
    voice = extractor.enroll(audio.read(DEMO / "reference.opus"))
    samples = np.resize(audio.read(DEMO / "mixture.flac"), round(options.seconds * extractor.sample_rate))

    stft = extractor.stft
    latency = 1000 * stft.n_fft / extractor.sample_rate
    print(f"one stream, one thread, {options.seconds:g} s in chunks of {stft.hop} samples; latency {latency:.0f} ms")
    print(f"{'':24} real-time factor   median chunk   99th percentile   (median of {RUNS} runs)")
    graph = extractor.graph
    if graph is None:
        print("no graph: write it with python3 export.py")
    else:
        show("ONNX graph", [one_stream(extractor, voice, samples) for _ in range(RUNS)])
        print(f"memory over the interpreter with its libraries: {memory() - before:.0f} MB")
        at_48000 = audio.Resampler(extractor.sample_rate, 48000).feed(samples[: len(samples) // 4])
        show("ONNX graph, 48 kHz", [one_stream(extractor, voice, at_48000, 48000) for _ in range(RUNS)])
    extractor.graph = None
    short = samples[: len(samples) // 4]

    def measure(name):
        one_stream(extractor, voice, short[: 16 * stft.hop])
        show(name, [one_stream(extractor, voice, short) for _ in range(3)])

    measure("PyTorch")
    network, eager = extractor.network, extractor.network.mask
    network.mask = torch.compile(eager)
    measure("PyTorch, torch.compile")
    network.mask = torch.autocast("cpu", torch.bfloat16)(eager)
    measure("PyTorch, bfloat16")
    network.mask = eager
    kinds = {torch.nn.Linear, torch.nn.LSTM}
    extractor.network = torch.ao.quantization.quantize_dynamic(network, kinds, dtype=torch.qint8)
    measure("PyTorch, int8")
    extractor.network = network
    theirs = np.median([timed(lambda: librosa_round_trip(samples, stft)) for _ in range(3)])
    ours = np.median([timed(lambda: round_trip(samples, stft)) for _ in range(3)])
    print(f"STFT and back of the whole: librosa takes {theirs / ours:.1f} times as long as stft.py")
    whole = [timed(lambda: extractor.extract(samples, voice)) / options.seconds for _ in range(3)]
    print(f"whole file in large chunks: real-time factor {np.median(whole):.4f}")
    frames = voicefilter_frames(2.0)
    theirs = np.median([timed(frames) / 2.0 for _ in range(3)])
    print(f"a network of VoiceFilter's size, whole: {theirs:.3f}, {theirs / np.median(whole):.0f} times ours")

    extractor.graph = graph
    print(f"\nmany streams, {options.cores} threads, paced for {options.paced_seconds:g} s each:")
    count, carried = 1, 0
    while True:
        delays = many_streams(extractor, voice, samples, count, options.cores, options.paced_seconds)
        late = np.quantile(delays, 0.95)
        print(
            f"{count:4} streams: a chunk is done after {1000 * np.median(delays):.1f} ms, 95 % after {1000 * late:.1f}"
        )
        if late > DELAY_LIMIT:
            break
        carried, count = count, 2 * count if count < options.cores else count + max(options.cores, count // 4)
    print(f"carried with 95 % of the chunks done within {1000 * DELAY_LIMIT:.0f} ms: {carried}")


def one_stream(extractor, voice, samples, rate=audio.SAMPLE_RATE):
    """Seconds that each chunk of one hop takes, and that it lasts."""
    stream, times = extractor.stream(voice, rate), []
    size = extractor.stft.hop * rate // extractor.sample_rate
    for start in range(0, len(samples), size):
        chunk = samples[start : start + size]
        times.append(timed(lambda chunk=chunk: stream.feed(chunk)))
    return np.array(times), size / rate


def show(name, runs):
    factor = np.median([times.mean() / hop for times, hop in runs])
    runs = [times for times, _ in runs]
    median, slowest = (1000 * np.median([np.quantile(times, q) for times in runs]) for q in (0.5, 0.99))
    print(f"{name:24} {factor:16.3f} {median:11.2f} ms {slowest:14.2f} ms", flush=True)


def round_trip(samples, stft):
    samples = torch.from_numpy(samples)[None]
    return stft.samples(stft.spectrum(samples), samples.shape[-1])


def librosa_round_trip(samples, stft):
    spectrum = librosa.stft(samples, n_fft=stft.n_fft, hop_length=stft.hop)
    return librosa.istft(spectrum, n_fft=stft.n_fft, hop_length=stft.hop, length=len(samples))


def many_streams(extractor, voice, samples, count, cores, seconds):
    """Seconds from a chunk's arrival to its estimate, for `count` streams that `cores` threads share, in real time.

    The chunks of all streams arrive at the same moments, and those of a thread go through the network together.
    """
    hop = extractor.stft.hop
    period, delays = hop / extractor.sample_rate, []
    begin = time.monotonic() + 0.1

    def work(number):
        streams = [extractor.stream(voice) for _ in range(number, count, cores)]
        for n in range(round(seconds / period)):
            arrival = begin + n * period
            time.sleep(max(0, arrival - time.monotonic()))
            start = n * hop % (len(samples) - hop)
            extractor.feed(streams, [samples[start : start + hop]] * len(streams))
            delays.append(time.monotonic() - arrival)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return np.array(delays)


def voicefilter_frames(seconds):
    """A function that runs the layers of VoiceFilter (Wang et al., 2019, table 1), some 34 GMAC a second, untrained.

    601 frequencies, 100 frames a second; eight convolutions, an LSTM of 400 units that also sees the d-vector, two
    linear layers.
    """
    shapes = [(1, 64, (1, 7), 1), (64, 64, (7, 1), 1), *((64, 64, (5, 5), 2**n) for n in range(5)), (64, 8, (1, 1), 1)]
    layers = []
    for inputs, outputs, (height, width), dilation in shapes:
        padding = (height // 2 * dilation, width // 2)
        layers.append(torch.nn.Conv2d(inputs, outputs, (height, width), padding=padding, dilation=(dilation, 1)))
        layers += [torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]
    convolutions = torch.nn.Sequential(*layers).eval()
    lstm = torch.nn.LSTM(8 * 601 + 256, 400, batch_first=True)
    linear = torch.nn.Sequential(torch.nn.Linear(400, 600), torch.nn.ReLU(), torch.nn.Linear(600, 601))
    spectrum = torch.randn(1, 1, round(100 * seconds), 601)  # frames before frequencies, as the paper's kernels
    dvector = torch.randn(1, round(100 * seconds), 256)

    def forward():
        with torch.inference_mode():
            x = convolutions(spectrum).permute(0, 2, 1, 3).flatten(2)
            return linear(lstm(torch.cat([x, dvector], dim=-1))[0])

    return forward


def timed(action):
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def memory():
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run(main)
