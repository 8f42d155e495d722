"""The fixed lists that `evaluate.py` scores: which voices, when, how loud, and what they are extracted with."""

import functools
import sys
from dataclasses import dataclass, replace

import numpy as np

import mixing
from utils import UserError

MAIN = (
    "two-voices", "noisy", "three-voices", "accents", "reverberant", "target-absent", "clean-target", "primary"
)  # fmt: skip
QUICK = MAIN[:4]
REFERENCES = (1, 2, 3, 5, 10)  # seconds
SEGMENTS = {f"segment-{seconds}": float(seconds) for seconds in (1, 3, 5, 10, 30)}
CUTS = ("reference-length", *SEGMENTS, "recording", "pairs", "words")
LISTS = (*MAIN, *CUTS)
ESTIMATE, OTHER = "estimate", "interferer's reference"  # what most lists extract, see `Case.references`
SELF = "self-enrolled"  # the primary speaker, with what is heard of it as the reference
NOISE_DB, PRIMARY_DB = [0.0, 15.0], [3.0, 10.0]
PRIMARY_SEGMENT = 10.0  # seconds, so that there is something to enroll
LONGEST_WORDS, MOST_WORDS = 10.0, 100  # seconds of an utterance whose words are scored, mixtures: that takes long
SHORTEST = 2.0  # seconds of a mixture
TRIES = 1000  # to draw what a list asks for
EPSILON = 1e-6  # seconds, of rounding


@dataclass(frozen=True)
class Case:
    """One mixture of a list, without its sound.

    `references` names what is extracted, each with its reference: so many seconds of the plan's, pieces of recordings,
    or `None`, for the primary speaker.
    """

    list: str
    plan: mixing.Plan
    settings: mixing.Settings
    references: dict
    text: str = ""  # what the target says, where its words are scored


def fixed_lists(names, recordings, texts, **common):
    """The cases of the lists of these names, one after the other; says which it leaves out, and why.

    `recordings` are lists of `corpora.Recording` under speech, accents, words, noise and music, `texts` what is said in
    some of them, by path, `None` without a recogniser; `common` goes to `two_voices`. Raises `UserError` where no list
    can be drawn.
    """
    speech, accents, words = (recordings[kind] for kind in ("speech", "accents", "words"))
    noises = [found for kind in ("noise", "music") if (found := recordings[kind])]
    everybody = list(dict.fromkeys([*speech, *accents, *words]))
    draw = functools.partial(two_voices, **common)
    drawers = {
        "two-voices": lambda: draw(speech),
        "noisy": lambda: in_turn([draw(speech, noise=found, noise_share=1, snr_db=NOISE_DB) for found in noises]),
        "three-voices": lambda: draw(speech, more_voices=1, max_voices=2, shape=two_others),
        "accents": lambda: draw(accents),
        "reverberant": lambda: draw(speech, reverb=1),
        "target-absent": lambda: draw(speech, absent=1),
        "clean-target": lambda: draw(speech, shape=alone),
        "primary": lambda: draw(speech, segment=PRIMARY_SEGMENT, sir_db=PRIMARY_DB, shape=with_and_without),
        "reference-length": lambda: draw(speech, shape=several_lengths),
        **{name: functools.partial(draw, speech, segment=s, shape=filled) for name, s in SEGMENTS.items()},
        "recording": lambda: draw(speech, shape=same_or_another),
        "pairs": lambda: draw(everybody),
        "words": lambda: draw(
            words,
            count=min(common["count"], MOST_WORDS),
            segment=LONGEST_WORDS,
            shape=functools.partial(whole_utterance, texts),
        ),
    }
    words_missing = "pocketsphinx is not installed" if texts is None else not texts and "no transcripts in --words"
    missing = {
        "noisy": not noises and "no --noise and no --music",
        "accents": not accents and "no --accents",
        "words": words_missing if words else "no --words",
    }
    cases, left_out = [], []
    for name in names:
        try:
            if missing.get(name):
                raise UserError(missing[name])
            cases += [replace(case, list=name) for case in drawers[name]()]
        except UserError as error:
            left_out.append(f"{name} is left out: {error}")
    if not cases:
        raise UserError("; ".join(left_out))
    for line in left_out:
        print(line, file=sys.stderr)
    return cases


def two_voices(speech, count, segment, sir_db, seed, noise=(), shape=None, **settings):
    """A list of `count` cases, item i drawn from (`seed`, i), with one interfering voice unless `settings` say more.

    `shape(rng, mixer, case)` makes of a case what a list is about, `overlapped` unless given, or returns `None`, and
    another one is drawn. Raises `UserError` where the recordings hold no such cases.
    """
    shape = shape or overlapped
    nothing = dict.fromkeys(["more_voices", "no_voices", "absent", "partial", "noise_share", "music_share"], 0)
    settings = mixing.Settings(**{**nothing, "segment": segment, "sir_db": sir_db, **mixing.NATURAL, **settings})
    mixer = mixing.Mixer(settings, speech, noise)
    cases = []
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        for _ in range(TRIES):
            plan = mixer.draw(rng)
            other = mixer.draw_reference(rng, plan.interference[0])
            if total(other) < mixing.MIN_REFERENCE_SECONDS:
                continue
            references = {ESTIMATE: max(mixing.REFERENCE_SECONDS), OTHER: other}
            if case := shape(rng, mixer, Case("two-voices", plan, settings, references)):
                break
        else:
            raise UserError(f"too few voices with enough speech for {segment:g} s; add some or shorten --segment")
        cases.append(case)
    return cases


def in_turn(lists):
    """Items of equally long lists in turn: item i is that of list i modulo their number."""
    return [lists[n % len(lists)][n] for n in range(len(lists[0]))]


def total(pieces):
    """The seconds of pieces together."""
    return sum(piece.seconds for piece in pieces)


# ---- Shapes of `two_voices` ----


def overlapped(rng, mixer, case):
    """All voices speak from start to end: where a recording is shorter than the segment, that ends with it."""
    plan = case.plan
    voices = [piece for piece in (plan.target, *plan.interference) if piece]
    seconds = min(piece.seconds for piece in voices)
    if seconds < min(SHORTEST, case.settings.segment):
        return None

    def placed(piece, offset=0.0):
        return piece and replace(piece, seconds=min(piece.seconds, seconds), offset=offset)

    plan = replace(
        plan,
        target=placed(plan.target),
        interference=[placed(piece) for piece in plan.interference],
        noise=[placed(piece, min(piece.offset, max(0.0, seconds - piece.seconds))) for piece in plan.noise],
    )
    return replace(case, plan=plan, settings=replace(case.settings, segment=seconds))


def alone(rng, mixer, case):
    """Only the target speaks."""
    return overlapped(rng, mixer, replace(case, plan=replace(case.plan, interference=[])))


def two_others(rng, mixer, case):
    """Two interfering voices, and no control, as a reference of one of them must not extract both."""
    if len(case.plan.interference) < 2:
        return None
    return overlapped(rng, mixer, replace(case, references={ESTIMATE: case.references[ESTIMATE]}))


def with_and_without(rng, mixer, case):
    """Without a reference, with one from what is heard, and with a true one; both voices speak from start to end."""
    references = {ESTIMATE: None, SELF: None, "with a reference": case.references[ESTIMATE]}
    return filled(rng, mixer, replace(case, references={**references, OTHER: case.references[OTHER]}))


def several_lengths(rng, mixer, case):
    """References from 1 to 10 s."""
    if total(case.plan.reference) < max(REFERENCES) - EPSILON:
        return None
    references = {f"reference {seconds} s": seconds for seconds in REFERENCES}
    return overlapped(rng, mixer, replace(case, references={**references, OTHER: case.references[OTHER]}))


def same_or_another(rng, mixer, case):
    """A reference from the rest of the target's recording, and one as long from others."""
    plan, target = case.plan, case.plan.target
    end = target.start + target.seconds
    before = replace(target, start=0.0, seconds=target.start)
    after = replace(target, start=end, seconds=target.recording.seconds - end)
    rest = max(before, after, key=lambda piece: piece.seconds)
    seconds = min(rest.seconds, total(plan.reference))
    if plan.equalise or seconds < mixing.MIN_REFERENCE_SECONDS:  # equalised: there are no others
        return None
    references = {"same recording": [replace(rest, seconds=seconds)], "another recording": seconds}
    return overlapped(rng, mixer, replace(case, references={**references, OTHER: case.references[OTHER]}))


def filled(rng, mixer, case):
    """Both voices speak from start to end."""
    plan, segment = case.plan, case.settings.segment
    target = back_to_back(rng, mixer, plan.target, plan.reference, segment)
    interference = back_to_back(rng, mixer, plan.interference[0], case.references[OTHER], segment)
    if not target or not interference:
        return None
    return replace(case, plan=replace(plan, target=target[0], more=target[1:], interference=interference))


def back_to_back(rng, mixer, piece, reference, segment):
    """The piece, and other recordings of its voice behind it until the segment is full; none where they do not suffice.

    Those of the reference stay out of it.
    """
    used = {piece.recording, *(part.recording for part in reference)}
    others = [r for r in mixer.speakers[piece.recording.speaker] if r not in used]
    pieces = [replace(piece, seconds=min(piece.seconds, segment), offset=0.0)]
    for n in rng.permutation(len(others)):
        missing = segment - total(pieces)
        if missing > EPSILON:
            pieces.append(mixing.Piece(others[n], 0.0, min(others[n].seconds, missing), segment - missing))
    return pieces if total(pieces) > segment - EPSILON else []


def whole_utterance(texts, rng, mixer, case):
    """The target is a whole recording whose words are known."""
    target = case.plan.target
    text = texts.get(target.recording.path)
    if not text or target.seconds < target.recording.seconds:
        return None
    return filled(rng, mixer, replace(case, settings=replace(case.settings, segment=target.seconds), text=text))
