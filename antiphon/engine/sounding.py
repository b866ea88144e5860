"""The lane that turns codes into sound: Code2Wav, while the Talker and MTP are at the next frame.

Shapes: B calls of a batch, Q codebooks.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from antiphon.binding import bound
from antiphon.caches import KVCache
from antiphon.code2wav import Code2WavState
from antiphon.engine.call import Call, House, Turn
from antiphon.engine.capture import BUCKETS, Step, bucket, capture, padded_rows
from antiphon.engine.lanes import Lane
from antiphon.generate import AudioDelta

SOUNDING = 16  # answers at once that there is room for at first


class Sounding(Lane):
    """Code2Wav. Its state is one for all answers, with a row for each."""

    name = "sounding"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self.code2wav, self.records = house.model.speaking().code2wav, dict[int, Step]()
        self.rows = WeakKeyDictionary[Turn, int]()  # of `sounds`, as long as there is the answer; the first is nobody's
        self.sounds = self.code2wav.init_state(1 + SOUNDING, self.model.device, self.model.dtype)

    def warm(self, conversations: int) -> None:
        """Record the sound of a frame for every number of rows up to that of the conversations."""
        self.make_room(conversations)
        for rows in BUCKETS[: bisect.bisect_left(BUCKETS, conversations) + 1]:
            self.recorded(rows)(*self.examples(rows))

    def caches(self, call: Call) -> list[KVCache]:
        """None: what Code2Wav keeps of an answer changes at the end of a step, when nothing can raise any more."""
        return []

    def step(self) -> bool:
        """The sound of a frame of every answer that has codes without it."""
        calls = [call for call in self.house.calls if (turn := call.turn) and turn.silent]
        return self.together("sound", sorted(calls, key=self.urgency)[: BUCKETS[-1]], self.sound)

    def sound(self, calls: Sequence[Call]) -> None:
        """The next frame of each."""
        turns = [turn for call in calls if (turn := call.turn)]
        if not turns:
            return
        rows = torch.tensor([self.row(turn) for turn in turns])
        codes = torch.stack([turn.speech.codes[len(turn.speech.sound)] for turn in turns])
        given = (padded_rows(x)[0].to(self.model.device) for x in (codes, rows))
        (waves,) = self.recorded(bucket(len(turns)))(*given)
        for turn, wave in zip(turns, waves.float().cpu(), strict=False):
            self.give(turn, wave)

    def give(self, turn: Turn, wave: Tensor) -> None:
        """One more frame for who listens."""
        speech, samples = turn.speech, wave.numpy()
        turn.first_at = self.house.now() if turn.first_at is None else turn.first_at
        speech.sound.append(samples)
        turn.events.put(AudioDelta(samples, len(speech.sound) - 1, speech.sample_rate))

    def row(self, turn: Turn) -> int:
        """An answer's row of `sounds`; one that is new has silence in it."""
        if turn not in self.rows:
            taken = set(self.rows.values())
            if len(taken) + 1 == self.sounds.rows:
                self.make_room(2 * len(taken))
            self.rows[turn] = min(set(range(1, self.sounds.rows)) - taken)
            self.sounds.reset([self.rows[turn]])
        return self.rows[turn]

    def make_room(self, answers: int) -> None:
        """Have rows for so many answers; what was recorded held the state that was there before."""
        old, place = self.sounds, (self.model.device, self.model.dtype)
        if old.rows <= answers:
            self.sounds = self.code2wav.init_state(1 + answers, *place)
            self.sounds.put(torch.arange(old.rows, device=place[0]), old)
            self.records.clear()

    def recorded(self, rows: int) -> Step:
        """Codes [B, Q] and rows [B] of `sounds` -> samples [B, 1920], on so many rows."""
        if rows not in self.records:
            decode = bound(self.code2wav)

            def step(sounds: Code2WavState, codes: Tensor, own: Tensor) -> tuple[Tensor, ...]:
                kept = sounds.pick(own)
                wave = decode(codes[:, None], kept)
                sounds.put(own, kept)
                return (wave,)

            self.records[rows] = capture(step, self.sounds, self.examples(rows), self.memory)
        return self.records[rows]

    def examples(self, rows: int) -> tuple[Tensor, Tensor]:
        """What `recorded` steps may be given."""
        device = self.model.device
        codes = torch.zeros(rows, self.model.speaking().mtp.codebooks, dtype=torch.long, device=device)
        return codes, torch.zeros(rows, dtype=torch.long, device=device)
