"""Whose voice: found in what the primary speaker says, and what makes a reference a bad one."""

from collections import deque

import numpy as np

import audio
from extractor import PRIMARY

PIECE_SECONDS = 0.5  # of the estimate, that are speech or not
PIECE_DB = -55  # the lowest level of speech
PIECE_VOICED = 6  # the least voiced frames, one each 20 ms, in a piece of speech
LOCK_SECONDS = 3.0  # of speech until the primary speaker's voice is known, and again until it is known better
REFINED_SECONDS = 15.0

QUIET_DB, NOISY_DB, CLIPPED = -45, 15, 0.001  # level of speech, its distance from the pauses, share of samples


class Primary:
    """Finds the voice of a stream's primary speaker in its estimate, once that has had enough speech in it.

    `update` takes longer than a block may: a thread of its own calls it, unless there is time (`at_once`).
    """

    def __init__(self, stream, at_once=False):
        self.stream, self.at_once = stream, at_once
        self.restart()

    def restart(self):
        """Start anew: whoever is the primary speaker from now on."""
        self.stream.voice = PRIMARY
        self.resampler = audio.Resampler(self.stream.rate, audio.SAMPLE_RATE)
        self.heard = deque()  # blocks that `update` has not seen
        self.rest, self.speech = np.zeros(0, dtype=np.float32), []  # what is no whole piece yet, pieces of speech
        self.enrolled_seconds = 0.0  # of speech that the voice is from

    def hear(self, estimate):
        """Take what comes next of the estimate (samples,); the network's thread calls this."""
        if self.enrolled_seconds < REFINED_SECONDS:
            self.heard.append(estimate)
        if self.at_once:
            self.update()

    def update(self):
        """Judge what was heard since, and replace the stream's voice if it is known, or known better."""
        piece = round(PIECE_SECONDS * audio.SAMPLE_RATE)
        heard = [self.resampler.feed(self.heard.popleft()) for _ in range(len(self.heard))]
        self.rest = np.concatenate([self.rest, *heard])
        while len(self.rest) >= piece:
            if is_speech(self.rest[:piece]):
                self.speech.append(self.rest[:piece])
            elif not self.enrolled_seconds:
                del self.speech[:1]  # a word here and there is nobody's turn to speak
            self.rest = self.rest[piece:]
        seconds = len(self.speech) * PIECE_SECONDS
        if self.enrolled_seconds < REFINED_SECONDS and seconds >= self.enrolled_seconds + LOCK_SECONDS:
            self.stream.voice = self.stream.extractor.enroll(np.concatenate(self.speech))
            self.enrolled_seconds = seconds


def is_speech(piece):
    """Whether a piece of an estimate (samples,) at 16 kHz is loud enough and voiced enough to be speech."""
    return level_db(piece) > PIECE_DB and np.count_nonzero(audio.voicing(piece)[1]) >= PIECE_VOICED


def complaints(reference):
    """What makes a reference (samples,) at 16 kHz a bad one: a list of lines, empty for a good one."""
    frames = reference[: len(reference) // 320 * 320].reshape(-1, 320)  # 20 ms
    levels_db = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-10)
    speech_db, pauses_db = np.percentile(levels_db, [90, 10])
    found = {
        f"too quiet, {speech_db:.0f} dB; turn the microphone up or come nearer": speech_db < QUIET_DB,
        "clipped; turn the microphone down": np.mean(np.abs(reference) > 0.99) > CLIPPED,
        f"noisy, speech is only {speech_db - pauses_db:.0f} dB above the pauses; find a quieter place": (
            speech_db - pauses_db < NOISY_DB
        ),
    }
    return [line for line, true in found.items() if true]


def level_db(samples):
    """Level in dB of full scale."""
    return 10 * np.log10(np.mean(np.square(samples)) + 1e-10) if len(samples) else -100.0
