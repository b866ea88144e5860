"""The lane that listens, reads and thinks: AuT and the Thinker.

Shapes: B calls of a batch, T positions of all of them, U the Thinker's width, V ids.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest

import torch
from torch import Tensor

from antiphon.aut import Windows
from antiphon.binding import bound
from antiphon.caches import KVCache
from antiphon.engine.blocks import pool_for
from antiphon.engine.call import CHUNK, Call, EngineSession, House
from antiphon.engine.capture import BUCKETS, Step, Steps, bucket, capture, padded_rows
from antiphon.engine.lanes import Lane
from antiphon.generate import Done, reply_of
from antiphon.sampling import NoiseKey, Sampling, choose
from antiphon.streaming import State

FIRST_WORDS = 2  # before there is sound: who makes the first of it has the machine to itself
WORDS_AHEAD = 8  # of the frame that is made next: further on an answer's text can wait
WINDOWS = 32  # that AuT hears at once
LIVE_WINDOW = 2  # seconds AuT attends over where somebody waits for the answer (docs/performance.md); released is 8


class Thinking(Lane):
    """AuT and the Thinker."""

    name = "thinking"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        thinker, place = house.model.thinker, (house.model.device, house.model.dtype)
        nobody = thinker.init_state(1, thinker.config.max_position_embeddings, *place)
        think, self.pool = bound(thinker), pool_for(nobody)
        self.think = Steps(
            lambda caches, places, x: tuple(part[0] for part in think(x[None], caches, places)),
            *(nobody, self.pool, self.memory),
        )
        self.heard = dict[tuple[int, ...], Step]()  # recorded ears, by windows and their frames

    def take_in(self, session: EngineSession) -> None:
        """The Thinker's."""
        session.thinker = self.held(session.thinker)

    def warm(self, conversations: int) -> None:
        """Record the step of a token for every number of rows up to that of the conversations, and on a GPU prompts."""
        width, place = self.model.thinker.config.hidden_size, (self.model.device, self.model.dtype)
        for rows in self.sizes(conversations):
            self.think.warm(rows, torch.zeros(rows, width, device=place[0], dtype=place[1]))
        if self.pool is not None:
            audio = self.model.config.audio
            frames = LIVE_WINDOW * audio.chunk_frames
            for rows in BUCKETS[: bisect.bisect_left(BUCKETS, min(conversations, WINDOWS)) + 1]:
                x = torch.zeros(rows, frames, audio.num_mel_bins, device=place[0], dtype=place[1])
                self.ears(x, torch.full((rows,), frames), torch.zeros(rows, dtype=torch.bool))

    def caches(self, call: Call) -> list[KVCache]:
        """The Thinker's."""
        return [call.session.thinker]

    def step(self) -> bool:
        """One wish of every call, then one batch of the Thinker's."""
        wished = [self.do(call) for call in list(self.house.calls)]
        listening = [call for call in self.house.calls if call.asked is not None]
        if self.together("aut", listening, self.hear):
            wished += [self.do(call) for call in listening]
        reads = self.batch()
        some = [call for call in reads if len(reads[call])]
        prompts = sum(len(reads[call]) for call in some if call.reading)
        self.together("thinker", some, lambda some: self.read(some, reads), prompts)
        self.together("draw", [call for call in reads if self.is_drawing(call)], self.draw)
        # last: where a batch has found that a text is over, nothing else may come that would step this lane again
        closed = [self.alone(call, self.close) for call in list(self.house.calls)]
        return bool(reads) or any(wished) or any(closed)

    def do(self, call: Call) -> bool:
        """What a call's owner asked for next."""
        wish = call.next_wish()
        if wish is None or wish.waits:
            return False
        with self.noting("wish", [call]):
            if wish.go_on():
                call.wishes.popleft()
            return self.alone(call, self.lay_out)

    def lay_out(self, call: Call) -> bool:
        """What was said is to be read."""
        call.reading += call.session.lay_out(CHUNK)
        return True

    def hear(self, calls: Sequence[Call]) -> None:
        """AuT hears the windows that have closed in `calls`.

        Windows that are equally long go in one batch, filled up with one of them to a bucket, so that what a clip is
        heard as does not depend on its company; where they are recorded, all that are of one size.
        """
        asked = [windows for call in calls if (windows := call.asked) is not None]
        alike = dict[tuple[int, ...], list[tuple[int, int]]]()
        for place, one in enumerate(asked):
            for i, (valid, alone) in enumerate(zip(one.valid[0].tolist(), one.alone[0].tolist(), strict=True)):
                alike.setdefault((one.x.shape[2], *(() if self.pool else (valid, alone))), []).append((place, i))
        heard = [[torch.zeros(0)] * one.valid.shape[1] for one in asked]
        with ExitStack() as clocks:  # each turn takes as long as the batch that it is in
            for call in calls:
                clocks.enter_context(call.session.clock("aut"))
            for places in (every[i : i + WINDOWS] for every in alike.values() for i in range(0, len(every), WINDOWS)):
                filled = [(asked[place], i) for place, i in places + places[:1] * (bucket(len(places)) - len(places))]
                x = torch.stack([one.x[0, i] for one, i in filled])
                valid = torch.stack([one.valid[0, i] for one, i in filled])
                alone = torch.stack([one.alone[0, i] for one, i in filled])
                for (place, i), row, own in zip(places, self.ears(x, valid, alone), valid.tolist(), strict=False):
                    heard[place][i] = row[: self.model.config.audio.tokens(own)]
        for call, rows in zip(calls, heard, strict=True):
            call.wishes[0].heard = torch.cat(rows)

    def ears(self, x: Tensor, valid: Tensor, alone: Tensor) -> Tensor:
        """Windows [N, frames, F] -> embeddings [N, S, U]; recorded where there is a pool, for graphs."""
        aut = self.model.aut
        if self.pool is None:
            return aut.project(aut.states(Windows(x[:, None], valid[:, None], alone[:, None])))
        given = (x, valid.to(x.device), alone.to(x.device))
        if (shape := tuple(x.shape[:2])) not in self.heard:
            self.heard[shape] = capture(lambda _, *windows: (aut.hear(*windows),), State(), given, self.memory)
        return self.heard[shape](*given)[0].clone()

    def batch(self) -> dict[Call, Tensor]:
        """What the Thinker reads next [T, U]: of every answer what it said last, and prompts as far as there is room.

        What an answer's next frame waits for comes first, then prompts; an answer that has words enough yields.
        """
        reads, room = dict[Call, Tensor](), self.room
        for call in sorted(self.house.calls, key=self.urgency):
            if call.reading:
                x = call.reading[0].x
                if len(x) <= room or not reads:
                    room, reads[call] = room - len(x), x
            elif turn := call.turn:
                thought = turn.thought
                if thought.is_over():
                    turn.end_text()
                elif turn.spoken or len(turn.words) < (turn.frames + WORDS_AHEAD if turn.has_sound else FIRST_WORDS):
                    ids = torch.tensor(thought.unread(), dtype=torch.long, device=self.model.device)
                    reads[call] = self.model.thinker.embed(ids)
        return reads

    def read(self, calls: Sequence[Call], reads: Mapping[Call, Tensor]) -> None:
        """The Thinker's step over what `calls` read; what of it is the users' is handed to the Talker."""
        steps = [len(reads[call]) for call in calls]
        several = steps if any(call.reading for call in calls) else None
        caches = [call.session.thinker for call in calls]
        hidden, accept = self.think(caches, torch.cat([reads[call] for call in calls]), steps=several)
        last = hidden if several is None else hidden[torch.tensor(steps, device=hidden.device).cumsum(0) - 1]
        for call, state in zip(calls, last.clone().split(1), strict=True):
            call.session.hidden = state
        tapped = accept.clone().split(steps) if several else ()  # a recording's are overwritten by the next step
        if several:
            self.hand_over()
        for call, states in zip_longest(calls, tapped):
            if call.reading:
                chunk = call.reading[0]
                if chunk.mine and self.model.speech is not None:
                    call.following.append((chunk, states[chunk.mine]))
                call.reading.popleft()  # last: nobody is to see that it is in neither place
            elif call.turn:
                call.turn.thought.read()

    def is_drawing(self, call: Call) -> bool:
        """Whether a call's answer has been read up to its next token."""
        turn = call.turn
        return turn is not None and not call.reading and not turn.thought.is_over()

    def draw(self, calls: Sequence[Call]) -> None:
        """The next token of every answer."""
        states = torch.cat([call.session.hidden for call in calls if call.session.hidden is not None])
        logits = self.model.thinker.logits(padded_rows(states)[0])[: len(calls)]
        turns = [turn for call in calls if (turn := call.turn)]
        if any(turn.thought.options.guide for turn in turns):
            logits = torch.cat([turn.thought.guided(row[None]) for turn, row in zip(turns, logits, strict=True)])
        tokens = choose_each(logits, [t.thought.options.text for t in turns], [t.thought.key for t in turns])
        for turn, token in zip(turns, tokens.tolist(), strict=True):
            turn.take(token)

    def close(self, call: Call) -> bool:
        """End a turn that is over: the caches are cut back, and its owner has the reply."""
        turn = call.turn
        if turn is None or not turn.is_over or call.following:
            return False
        session, thought = call.session, turn.thought
        if turn.told:
            session.close_speech()
            del thought.ids[turn.tokens_by(turn.frames - (turn.speech.finish == "length")) :]  # what nobody came to say
        else:
            if turn.speech.finish == "cancelled":  # history holds no more than the readable loop would have made
                thought.cut(turn.tokens_by(turn.frames - 1) if turn.frames else 0)
            session.close_answer(thought, turn.speech)
        call.turn = None
        turn.events.put(Done(reply_of(self.model, thought, turn.speech, thought.clock)))
        return True


def choose_each(
    logits: Tensor,
    samplings: Sequence[Sampling],
    keys: Sequence[NoiseKey],
    seen: Tensor | None = None,
    suppress: Tensor | None = None,
) -> Tensor:
    """Ids [B] of scores [B, V], each row drawn in its own way; rows of one way together."""
    chosen = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    for way in dict.fromkeys(samplings):
        rows = [i for i, own in enumerate(samplings) if own == way]
        whole = len(rows) == len(samplings)
        seed, turn, frame = (torch.tensor([keys[i][part] for i in rows]) for part in range(3))
        key = NoiseKey(seed, turn, frame, keys[rows[0]].codebook)
        scores, before = (logits, seen) if whole else (logits[rows], None if seen is None else seen[rows])
        drawn = choose(scores, way, key, before, suppress)
        if whole:
            return drawn
        chosen[rows] = drawn
    return chosen
