"""Streams: any chunks, any sound, for a long time, through the network and through its graph."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
import export
import extractor as module
import model
from extractor import Extractor
from utils import ROOT

RATE = 16000


@pytest.fixture(scope="module")
def graph_checkpoint(tmp_path_factory, network):
    """A checkpoint with its graph beside it."""
    path = tmp_path_factory.mktemp("graph") / "random.pt"
    model.save(path, network)
    export.export(network, path.with_suffix(".onnx"))
    return path


@pytest.fixture(scope="module")
def extractor(graph_checkpoint):
    extractor = Extractor(graph_checkpoint, rehearsal_seconds=0)
    assert extractor.graph is not None
    return extractor


@pytest.fixture(scope="module")
def voice(extractor):
    return extractor.enroll(audio.read(DEMO / "reference.opus"))


@pytest.fixture(scope="module")
def mixture():
    return audio.read(DEMO / "mixture.flac")


def in_chunks(stream, samples, lengths):
    heard, start = [], 0
    while start < len(samples):
        length = next(lengths)
        heard.append(stream.feed(samples[start : start + length]))
        start += length
        assert np.isfinite(heard[-1]).all()
    return np.concatenate([*heard, stream.flush()])


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), largest=st.sampled_from([40, 256, 700, 9000]), rate=st.sampled_from([16000, 48000]))
def test_any_chunks_equal_the_whole(extractor, voice, mixture, seed, largest, rate):
    """Chunks of a few hops go through the graph, others through the network, in turn and with one state."""
    rng = np.random.default_rng(seed)
    samples = mixture[: rng.integers(1, 20000)]
    heard = in_chunks(extractor.stream(voice, rate), samples, iter(lambda: rng.integers(1, largest), None))
    whole = extractor.extract(samples, voice, rate)
    assert heard.shape == samples.shape
    assert np.abs(heard - whole).max() <= 1e-4 * np.abs(whole).max()


def test_nothing_of_the_future_leaks(extractor, voice, mixture):
    """What comes from sample 20000 on changes nothing of the estimate that is more than a window before."""
    other = mixture[:40000].copy()
    other[20000:] = np.random.default_rng(0).normal(0, 0.3, 20000)
    one, two = (in_chunks_of_a_hop(extractor.stream(voice), samples) for samples in (mixture[:40000], other))
    first = 20000 - extractor.stft.n_fft
    assert np.array_equal(one[:first], two[:first])
    assert np.abs(one[20000:] - two[20000:]).max() > 1e-3
    assert 20000 - len(extractor.stream(voice).feed(mixture[:20000])) <= extractor.stream(voice).delay


def sounds():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 2 * RATE).astype(np.float32)
    jumps = noise * np.repeat([1e-3, 1.0, 1e-3, 1.0], RATE // 2)
    bad = noise.copy()
    bad[5000:5100], bad[9000], bad[9001], bad[9002] = np.nan, np.inf, -np.inf, 3e38
    return {"dc": noise + 0.5, "clipped": np.sign(noise), "jumps of 60 dB": jumps, "not numbers": bad}


@pytest.mark.parametrize("name", sounds())
def test_odd_sounds_leave_the_stream_well(extractor, voice, mixture, name):
    """Some seconds of speech after it, the stream is much as it is without it."""
    stream = extractor.stream(voice)
    samples = np.tile(mixture, 4)
    before = in_chunks_of_a_hop(stream, sounds()[name])
    after = in_chunks_of_a_hop(stream, samples)
    assert np.isfinite(before).all()
    assert np.isfinite(after).all()
    without = in_chunks_of_a_hop(extractor.stream(voice), samples)
    after, without = after[-2 * RATE :], without[-2 * RATE :]
    assert np.square(after - without).mean() < 0.1 * np.square(without).mean()


def in_chunks_of_a_hop(stream, samples):
    return np.concatenate([stream.feed(samples[n : n + 256]) for n in range(0, len(samples), 256)])


def test_silence_gives_silence(extractor, voice):
    assert np.abs(in_chunks_of_a_hop(extractor.stream(voice), np.zeros(RATE))).max() == 0


def minutes_do_not_drift(extractor, voice, mixture, minutes):
    """A hop at a time equals a minute at a time, in every minute, and the memory settles."""
    minute = np.resize(mixture, 60 * RATE)
    hops, whole, memory = extractor.stream(voice), extractor.stream(voice), []
    for _ in range(minutes):
        heard, expected = in_chunks_of_a_hop(hops, minute), whole.feed(minute)
        assert np.abs(heard - expected).max() < 1e-4 * np.abs(expected).max()
        memory.append(resident_megabytes())
    assert min(np.diff(memory)) < 1  # it may settle late, in some steps


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_five_minutes_do_not_drift(extractor, voice, mixture):
    minutes_do_not_drift(extractor, voice, mixture, 5)


@pytest.mark.long
def test_thirty_minutes_do_not_drift(extractor, voice, mixture):
    minutes_do_not_drift(extractor, voice, mixture, 30)


def test_streams_that_go_through_the_graph_together_are_what_each_is_alone(extractor, voice, mixture):
    """The primary speaker's among them, and one that is a part of a hop behind."""
    streams = [extractor.stream(voice), extractor.stream(), extractor.stream(voice)]
    mixtures = [mixture[:8192], mixture[4096:12288], mixture[100:8292]]
    heard = [[], [], [streams[2].feed(mixture[:100])]]
    for start in range(0, 8192, 256):
        for blocks, block in zip(
            heard, extractor.feed(streams, [m[start : start + 256] for m in mixtures]), strict=True
        ):
            blocks.append(block)
    mixtures[2] = mixture[:8292]
    for blocks, stream, samples in zip(heard, streams, mixtures, strict=True):
        expected = extractor.extract(samples, stream.voice)
        found = np.concatenate([*blocks, stream.flush()])
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_graph_is_what_streams_use(extractor, voice, mixture, monkeypatch):
    """With a few hops at a time, at any rate, the network itself is never asked."""
    monkeypatch.setattr(extractor.network, "extract", None)
    assert len(in_chunks_of_a_hop(extractor.stream(voice), mixture[:2560])) == 2560 - 256
    assert len(in_chunks_of_a_hop(extractor.stream(voice, 48000), mixture[:25600])) > 15000


def test_the_graph_runs_without_this_project(graph_checkpoint, extractor, mixture, voice):
    """As its text says: names, shapes, zeros at the start, any number of streams."""
    session = onnxruntime.InferenceSession(graph_checkpoint.with_suffix(".onnx"))
    shapes = {tensor.name: [2, *tensor.shape[1:]] for tensor in session.get_inputs()}
    feed = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    feed["dvector"][:] = voice.dvector.numpy()
    heard = []
    for start in range(0, 8192, 256):
        feed["samples"] = np.stack([mixture[start : start + 256], 0.5 * mixture[start : start + 256]])
        estimate, *state = session.run(None, feed)
        feed.update({f"state_{n}": value for n, value in enumerate(state)})
        heard.append(estimate)
    heard = np.concatenate(heard, axis=1)
    whole = extractor.extract(mixture[:8192], voice)
    assert np.abs(heard[0, 256:] - whole[: 8192 - 256]).max() < 1e-4 * np.abs(whole).max()
    assert np.abs(heard[1] - 0.5 * heard[0]).max() < 1e-3 * np.abs(whole).max()


def test_export_writes_and_checks(script, checkpoint, tmp_path):
    done = script("export.py", "--checkpoint", checkpoint, "--output", tmp_path / "out.onnx", "--seconds", 2)
    assert done.returncode == 0, done.stderr
    assert "of the peak of the network" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_graph_that_differs_is_not_written(refusal, checkpoint, tmp_path, monkeypatch):
    class Wrong(module.HopGraph):
        def __call__(self, samples, dvector, state):
            estimate, state = super().__call__(samples, dvector, state)
            return 1.001 * estimate, state

    monkeypatch.setattr(export, "HopGraph", Wrong)
    arguments = ["--checkpoint", checkpoint, "--output", tmp_path / "out.onnx", "--seconds", 1]
    assert "out.onnx: not written, it is 1" in refusal(export.main, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["other weights", "broken"])
def test_a_graph_of_other_weights_is_passed_over(graph_checkpoint, network, tmp_path, capsys, how):
    graph = graph_checkpoint.with_suffix(".onnx").read_bytes()
    (tmp_path / "other.onnx").write_bytes(graph if how == "other weights" else graph[:1000])
    other = model.Network(network.config).eval()
    torch.nn.init.ones_(other.primary)
    model.save(tmp_path / "other.pt", network if how == "broken" else other)
    assert Extractor(tmp_path / "other.pt").graph is None
    assert "other.onnx: not the graph of this checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "missing.pt"], "missing.pt: no such checkpoint"),
        (["--checkpoint", "{checkpoint}", "--output", "out.pt"], "out.pt: name a file that ends in .onnx"),
        (["--seconds", "0"], "--seconds 0.0: give more than 0"),
    ],
)
def test_bad_arguments_are_one_line(refusal, checkpoint, arguments, message):
    assert message in refusal(export.main, *(argument.format(checkpoint=checkpoint) for argument in arguments))


def test_the_benchmark_runs(graph_checkpoint):
    command = [sys.executable, "benchmarks/stream.py", "--checkpoint", graph_checkpoint, "--seconds", 1]
    command += ["--paced-seconds", 0.2]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "carried with 95 %" in done.stdout
