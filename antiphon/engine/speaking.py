"""The lane that speaks: Talker and MTP, which give the codes of every frame.

Shapes: B calls of a batch, U the Thinker's width, W the Talker's, V codes, Q codebooks.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from antiphon.binding import bound
from antiphon.caches import JoinedCaches, KVCache
from antiphon.engine.blocks import pool_for
from antiphon.engine.call import Call, EngineSession, House, Turn
from antiphon.engine.capture import BUCKETS, Step, Steps, bucket, capture, padded_rows
from antiphon.engine.lanes import Lane
from antiphon.kernels import usable
from antiphon.sampling import MTP, TALKER, NoiseKey, Sampling, choose, gumbel
from antiphon.streaming import State

SILENT = 2  # frames that may have no sound yet: one that Code2Wav is at, and the next
PATIENCE = 3  # frames that reading along waits for at most

Way: TypeAlias = tuple[Sampling, Sampling]  # how codebook 0 is drawn, and how the others
Drawing: TypeAlias = Callable[[Tensor, int], Tensor]  # codes [B] of scores [B, V] of a codebook
RELEASED: Way = (TALKER, MTP)


class Speaking(Lane):
    """Talker and MTP."""

    name = "speaking"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self.speech = speech = house.model.speaking()
        talk, self.records = bound(speech.talker), dict[tuple[Way, int], Step]()
        self.waited = 0  # frames that reading along has
        self.suppress = speech.talker.suppressed(house.model.device)
        capacity, place = speech.talker.config.text.max_position_embeddings, (house.model.device, house.model.dtype)
        nobody = speech.talker.init_state(1, capacity, *place)
        self.pool = pool_for(nobody)
        self.talk = Steps(lambda caches, places, x: (talk(x[None], caches, places)[0],), nobody, self.pool, self.memory)
        self.go_on = Steps(self.bind_talker(), nobody, self.pool, self.memory)

    def take_in(self, session: EngineSession) -> None:
        """The Talker's."""
        session.talker = self.held(session.talker)

    def warm(self, conversations: int) -> None:
        """Record a frame for every number of rows up to that of the conversations, drawn as the release draws."""
        for rows in self.sizes(conversations) if self.pool else ():  # without one, what is read is not recorded
            self.talk.warm(rows, self.examples(rows)[0])
        for rows in BUCKETS[: bisect.bisect_left(BUCKETS, conversations) + 1]:
            hidden, seen, keys = self.examples(rows)
            self.go_on.warm(rows, keys[:, 0], hidden)
            self.recorded(RELEASED, rows)(hidden, seen, keys)

    def caches(self, call: Call) -> list[KVCache]:
        """The Talker's."""
        return [call.session.talker]

    def step(self) -> bool:
        """What the Talker has to read along, then one frame of every answer that is due.

        While somebody hears the last of what there is, reading waits a few frames: who comes new does not make others
        stutter.
        """
        reading = [call for call in self.house.calls if call.following]
        self.waited = self.waited + 1 if reading and self.waited < PATIENCE and self.is_late() else 0
        read = not self.waited and self.together(
            "talker", reading, self.follow, sum(len(call.following[0][0].mine) for call in reading)
        )
        return self.together("frame", self.speaking(), self.frames) or read

    def is_late(self) -> bool:
        """Whether the next frame of an answer that somebody listens to should be there already."""
        turns = [turn for call in self.speaking() if (turn := call.turn) and turn.ahead is not None]
        return any(turn.first_at is not None and turn.due(self.seconds) <= self.house.now() for turn in turns)

    def follow(self, calls: Sequence[Call]) -> None:
        """The Talker reads what is the users' of a chunk of each call."""
        xs = [call.session.follow(*call.following[0])[0] for call in calls]
        self.talk([call.session.talker for call in calls], torch.cat(xs), steps=[len(x) for x in xs])
        self.hand_over()  # before the states that it read are let go
        for call in calls:
            call.session.user_length += len(call.following[0][0].mine)
            call.following.popleft()  # last: whoever sees that nothing follows goes on from where it ends

    def speaking(self) -> list[Call]:
        """Calls whose next frame can be made and is wanted, the one that is due first first."""
        wanted = []
        for call in self.house.calls:
            turn = call.turn
            if turn is None or turn.spoken or call.reading or call.following:
                continue
            silent = turn.silent >= (SILENT if turn.has_sound else 1)  # nothing is beside the first sound
            kept = turn.events.kept + turn.silent >= turn.events.limit
            waits = silent or kept or not turn.has_word() or self.is_ahead(turn)
            if not waits or call.session.generation != turn.generation:
                wanted.append(call)
        return sorted(wanted, key=self.urgency)[: BUCKETS[-1]]

    def is_ahead(self, turn: Turn) -> bool:
        """Whether a listener has enough to hear."""
        return turn.ahead is not None and turn.due(self.seconds) > self.house.now() + turn.ahead

    def frames(self, calls: Sequence[Call]) -> None:
        """One frame of each call."""
        turns = [turn for call in calls if (turn := call.turn) and not self.ends(call, turn)]
        calls = [call for call in calls if call.turn in turns]
        if not turns:
            return
        hidden, made = self.states(calls, turns), list[tuple[Call, Turn, Tensor, Tensor]]()
        ways = [(turn.speech.options.speech, turn.speech.options.residual) for turn in turns]
        for way in dict.fromkeys(ways):
            some = [i for i, own in enumerate(ways) if own == way]
            made += self.codes(way, [(calls[i], turns[i]) for i in some], hidden[some])
        for one in made:  # nothing raises from here on: what the batch could not do is not half done
            self.give(*one)

    def ends(self, call: Call, turn: Turn) -> bool:
        """Whether an answer's sound is over before its next frame."""
        speech = turn.speech
        if turn.complete and not turn.words:
            speech.finish = "stop"
        elif turn.frames >= speech.options.max_frames:
            speech.finish = "length"
        elif call.session.generation != turn.generation:
            speech.finish = "cancelled"
        turn.spoken = speech.finish is not None
        return turn.spoken

    def states(self, calls: Sequence[Call], turns: Sequence[Turn]) -> Tensor:
        """The Talker's states [B, W] that give each answer's next frame."""
        caches = [call.session.talker for call in calls]
        for turn in turns:
            turn.speech.words[:] = turn.words[: turn.frames + 1]
        residues = [turn.residue for turn in turns if turn.residue is not None]
        words = torch.tensor(
            [turn.next_input(self.model.config) for turn in turns if turn.residue is not None],
            dtype=torch.long,
            device=self.model.device,
        )
        if len(residues) == len(turns):
            return self.go_on(caches, words, torch.stack(residues))[0]
        text = self.speech.talker.text_projection(self.model.thinker.embed(padded_rows(words)[0]))
        rows = (residue + word for residue, word in zip(residues, text, strict=False))
        xs = [next(rows)[None] if turn.residue is not None else turn.speech.open(turn.words[0])[0] for turn in turns]
        steps = [len(x) for x in xs]
        (states,) = self.talk(caches, torch.cat(xs), steps=steps)
        return states[torch.tensor(steps, device=states.device).cumsum(0) - 1]

    def bind_talker(self) -> Step:
        """The Talker's states [B, W] after one more word [B] and residue [B, W] of each answer."""
        talk, embed = bound(self.speech.talker.model), self.model.thinker.embed
        project = self.speech.talker.text_projection

        def step(caches: JoinedCaches, places: Tensor, words: Tensor, residue: Tensor) -> tuple[Tensor, ...]:
            return talk((residue + project(embed(words)))[None], caches, places)[0].unbind()

        return step

    def codes(
        self, way: Way, some: Sequence[tuple[Call, Turn]], hidden: Tensor
    ) -> Iterator[tuple[Call, Turn, Tensor, Tensor]]:
        """Codes [Q] of a frame of each, which are drawn in one way, and what they sum up to [W].

        The states [B, W] give the codes of codebook 0.
        """
        step = self.recorded(way, bucket(len(some)))
        seen = torch.cat([turn.speech.seen for _, turn in some])
        keys = torch.tensor([turn.speech.key(turn.frames, 0)[:3] for _, turn in some], device=hidden.device)
        codes, residue = step(*(padded_rows(x)[0] for x in (hidden, seen, keys)))
        calls, turns = zip(*some, strict=True)
        return zip(calls, turns, codes.cpu(), residue.clone(), strict=False)

    def recorded(self, way: Way, rows: int) -> Step:
        """Codes of a frame, drawn in such a way, on so many rows.

        States [B, W], codes [B, V] of codebook 0 drawn before, keys [B, 3] of the noise -> all codes [B, Q], their sum
        [B, W]. Where codebook 0 ends the answer, the rest is nobody's.
        """
        if (way, rows) not in self.records:
            step = self.bind_frame(way, rows)
            self.records[way, rows] = capture(step, State(), self.examples(rows), self.memory)
        return self.records[way, rows]

    def bind_frame(self, way: Way, rows: int) -> Step:
        """What `recorded` records."""
        talker, mtp = self.speech.talker, self.speech.mtp
        predict, scratch = mtp.bind_predict(), mtp.init_state(rows, self.model.device, self.model.dtype)
        first_code, others = self.bind_drawing(way, rows)

        def step(_: State, hidden: Tensor, seen: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
            code = first_code(talker.codec_head(hidden), keys, seen)
            first = talker.model.codec_embedding(code)
            rest, total = predict(hidden, first, others(keys), scratch)
            return torch.cat([code[:, None], rest], 1), first + total

        return step

    def bind_drawing(self, way: Way, rows: int) -> tuple[Callable[..., Tensor], Callable[[Tensor], Drawing]]:
        """How the first code is drawn, of scores, keys [B, 3] and codes seen; and how, given keys, all others are."""
        config, device, (first_way, rest_way) = self.speech.mtp.config, self.model.device, way
        count, suppress = self.speech.mtp.codebooks - 1, self.suppress
        if usable(self.speech.talker.codec_head.weight):
            from antiphon.kernels.draw import LARGEST, draw

            if max(config.vocab_size, len(suppress)) <= LARGEST:

                def drawn(scores: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
                    seed, turn, frame = keys.unbind(1)
                    return draw(scores, first_way, seed, turn, frame, 0, seen, suppress)

                def rest(keys: Tensor) -> Drawing:
                    seed, turn, frame = keys.unbind(1)
                    return lambda scores, book: draw(scores, rest_way, seed, turn, frame, book)

                return drawn, rest
        books = torch.arange(1, count + 1, device=device).repeat(rows)

        def first(scores: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
            return choose(scores, first_way, NoiseKey(keys[:, 0], keys[:, 1], keys[:, 2], 0), seen, suppress)

        def others(keys: Tensor) -> Drawing:
            if rest_way.greedy:
                return lambda scores, book: choose(scores, rest_way)
            each = keys.repeat_interleave(count, 0)
            noise = gumbel(NoiseKey(each[:, 0], each[:, 1], each[:, 2], books), config.vocab_size, device)
            every = noise.view(rows, count, -1)  # of all codebooks at once
            return lambda scores, book: choose(scores, rest_way, every[:, book - 1])

        return first, others

    def examples(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `recorded` steps may be given."""
        text, device = self.speech.talker.config.text, self.model.device
        hidden = torch.zeros(rows, text.hidden_size, dtype=self.model.dtype, device=device)
        seen = torch.zeros(rows, text.vocab_size, dtype=torch.bool, device=device)
        return hidden, seen, torch.zeros(rows, 3, dtype=torch.long, device=device)

    def give(self, call: Call, turn: Turn, codes: Tensor, residue: Tensor) -> None:
        """One more frame for Code2Wav, unless codebook 0 ended the answer."""
        first = int(codes[0])
        if first == self.speech.talker.config.codec_eos_token_id:
            turn.speech.finish, turn.spoken = "stop", True
            return
        turn.residue, turn.speech.seen[0, first] = residue, True
        if call.session.answer is not None and not turn.told:
            call.session.answer.frames.append(turn.tokens_by(turn.frames))
        turn.speech.codes.append(codes)  # last: Code2Wav may be at it at once
