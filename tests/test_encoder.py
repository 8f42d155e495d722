"""d-vectors: of unit length, of any reference from 1 s up, near for one voice and far for two."""

import pytest
import torch
from conftest import CORPORA, DEMO

import audio
import corpora
from encoder import SpeakerEncoder


@pytest.fixture(scope="module")
def encoder():
    return SpeakerEncoder()


@pytest.fixture(scope="module")
def utterances():
    """Two utterances of 3 s each of several voices."""
    folder = CORPORA / "LibriSpeech" / "test-other"
    folder = folder if folder.exists() else DEMO / "voices"
    by_speaker = {}
    for recording in corpora.find([str(folder)], "speech", folder):
        if recording.seconds > 3 and len(by_speaker.setdefault(recording.speaker, [])) < 2:
            by_speaker[recording.speaker].append(audio.read_segment(recording.path, 0, 3))
    return [pair for pair in by_speaker.values() if len(pair) == 2]


@pytest.mark.parametrize("seconds", [1.0, 1.59, 1.6, 1.61, 3.0])
def test_any_length_gives_a_unit_vector(encoder, utterances, seconds):
    dvector = encoder.dvectors([utterances[0][0][: round(seconds * 16000)]])
    assert dvector.shape == (1, 256)
    assert dvector.norm().item() == pytest.approx(1, abs=1e-5)


def test_a_batch_is_its_references(encoder, utterances):
    references = [utterances[0][0], utterances[1][0][:20000], utterances[2][0][:40000]]
    together = encoder.dvectors(references)
    for n, reference in enumerate(references):
        torch.testing.assert_close(together[n], encoder.dvectors([reference])[0], atol=1e-5, rtol=0)


def test_prefixes_are_what_the_shorter_references_give(encoder, utterances):
    reference = utterances[0][0]
    prefixes = encoder.prefix_dvectors([reference], [16000, 40000, 10**9])[0]
    for prefix, length in zip(prefixes, (16000, 40000, len(reference)), strict=True):
        torch.testing.assert_close(prefix, encoder.dvectors([reference[:length]])[0], atol=1e-5, rtol=0)


def test_level_does_not_matter(encoder, utterances):
    one, other = encoder.dvectors([utterances[0][0], 0.01 * utterances[0][0]])
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_one_voice_is_nearer_than_another(encoder, utterances):
    assert len(utterances) >= 8
    first = encoder.dvectors([pair[0] for pair in utterances])
    second = encoder.dvectors([pair[1] for pair in utterances])
    similarity = first @ second.T
    same = similarity.diagonal()
    other = similarity[~torch.eye(len(similarity), dtype=torch.bool)]
    assert same.mean() > other.mean() + 0.15
    assert (similarity.argmax(1) == torch.arange(len(similarity))).float().mean() > 0.7
