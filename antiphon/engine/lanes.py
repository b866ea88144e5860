"""The engine's two lanes: one listens, reads and thinks, the other speaks; each steps all conversations at once.

    Thinking   wishes -> AuT ; chunks and tokens of all calls -> Thinker -> next tokens -> words
                                   | accept layer's states
    Speaking   chunks of all calls -> Talker ; one frame of every call that is due -> Talker, MTP, Code2Wav -> sound

A lane is a function of the calls: `step` picks what is most urgent, runs it as one batch, and says whether there was
anything. Two threads step them without end, so the Talker reads a chunk while the Thinker is at the next; a test steps
them in turn. What a batch cannot do, because one call in it raises, is undone and done call by call: the one fails,
the others do not notice.

Shapes: B calls of a batch, T positions of all of them, U the Thinker's width, W the Talker's, V ids, Q codebooks.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from antiphon.aut import Windows
from antiphon.binding import bound
from antiphon.code2wav import Code2WavState
from antiphon.engine.blocks import BlockPool, pool_for
from antiphon.engine.call import CHUNK, Call, EngineSession, House, Turn, Work
from antiphon.engine.capture import BUCKETS, OneStep, Step, bucket, capture, graph_memory, padded_rows
from antiphon.errors import BusyError
from antiphon.generate import AudioDelta, Done, reply_of
from antiphon.sampling import MTP, TALKER, NoiseKey, Sampling, choose, gumbel
from antiphon.streaming import CACHE_BLOCK, JoinedCaches, KVCache

FIRST_WORDS = 2  # before there is a frame: the Talker, which is at it, has the machine to itself
WORDS_AHEAD = 8  # of the frame that is made next: further on an answer's text can wait
POSITIONS = 256  # of prompts that are read in one step, beside the tokens of answers


SOUNDING = 16  # answers at once that there is room for at first
TURN_BLOCKS = 4  # of a pool, that a conversation which comes in should find free
RETRY = 5.0  # seconds after which one who was refused may ask again: about an answer's length


Way: TypeAlias = tuple[Sampling, Sampling]  # how codebook 0 is drawn, and how the others
RELEASED: Way = (TALKER, MTP)


class Lane:
    """What both lanes are."""

    name = ""

    def __init__(self, house: House) -> None:
        self.house, self.model = house, house.model
        self.pool: BlockPool | None = None
        self.memory = graph_memory(self.model.device)

    @contextmanager
    def noting(self, name: str, calls: Iterable[Call], positions: int = 0) -> Iterator[None]:
        """Note a batch in the timeline."""
        start, names = self.house.now(), tuple(call.name for call in calls)
        yield
        self.house.noted(Work(self.name, name, start, self.house.now(), names, positions))

    def together(
        self, name: str, calls: Sequence[Call], run: Callable[[Sequence[Call]], None], positions: int = 0
    ) -> bool:
        """Run a batch; call by call if it raises, so that only whose fault it is fails. True if there was one."""
        if not calls:
            return False
        with self.noting(name, calls, positions):
            caches = [cache for call in calls for cache in self.caches(call)]
            lengths = [cache.filled for cache in caches]
            try:
                run(calls)
            except Exception as error:
                for cache, length in zip(caches, lengths, strict=True):
                    cache.truncate(length)
                if len(calls) == 1:
                    calls[0].fail(error)
                for call in calls if len(calls) > 1 else ():
                    self.together(name, [call], run)
        self.house.wake()
        return True

    def alone(self, call: Call, run: Callable[[Call], bool]) -> bool:
        """What concerns one call only; if it raises, that call ends by it. Whether something was done."""
        try:
            return run(call)
        except Exception as error:
            call.fail(error)
            return True

    def step(self) -> bool:
        """Run the most urgent work there is; whether there was any."""
        raise NotImplementedError

    def warm(self, conversations: int) -> None:
        """Make ready for batches of up to so many."""

    def caches(self, call: Call) -> list[KVCache]:
        """Of a call, those that this lane writes."""
        raise NotImplementedError

    def take_in(self, session: EngineSession) -> None:
        """Have a session's caches where this lane's steps want them.

        Raises:
            BusyError: the memory for conversations is used up.
        """

    def held(self, cache: KVCache) -> KVCache:
        """A cache in this lane's pool, if it has one."""
        if self.pool is None:
            return cache
        if len(self.pool.free) < TURN_BLOCKS + cache.filled // CACHE_BLOCK:
            raise BusyError.of(len(self.house.calls), RETRY)
        cache = self.pool.hold(cache)
        self.hand_over()
        return cache

    def hand_over(self) -> None:
        """Wait until what this lane computed is there: the other has a stream of its own."""
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    @property
    def seconds(self) -> float:
        """Of a frame."""
        code2wav = self.model.config.code2wav
        return code2wav.frame_ms / 1000 if code2wav else 0.0

    def urgency(self, call: Call) -> tuple[int, float]:
        """What comes first: answers that are listened to, by when their next frame is due, others, prompts, guesses."""
        due = call.turn.due(self.seconds) if call.turn else 0.0
        if call.is_aside:
            return 3, due
        return (2, due) if call.turn is None else (int(call.turn.ahead is None), due)


class Thinking(Lane):
    """AuT and the Thinker."""

    name = "thinking"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        thinker, place = house.model.thinker, (house.model.device, house.model.dtype)
        nobody = thinker.init_state(1, thinker.config.max_position_embeddings, *place)
        self.think, decode, self.pool = bound(thinker), bound(thinker.model), pool_for(nobody)
        self.go_on = OneStep(
            lambda caches, places, x: decode(x[None], caches, places)[0].unbind(), nobody, self.pool, self.memory
        )

    def take_in(self, session: EngineSession) -> None:
        """The Thinker's."""
        session.thinker = self.held(session.thinker)

    def warm(self, conversations: int) -> None:
        """Record the step of a token for every number of rows up to that of the conversations."""
        width, place = self.model.thinker.config.hidden_size, (self.model.device, self.model.dtype)
        for rows in BUCKETS[: bisect.bisect_left(BUCKETS, conversations) + 1]:
            self.go_on.warm(rows, torch.zeros(rows, width, device=place[0], dtype=place[1]))

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
        heard as does not depend on its company.
        """
        asked = [windows for call in calls if (windows := call.asked) is not None]
        alike = dict[tuple[int, int, bool], list[tuple[int, int]]]()
        for place, one in enumerate(asked):
            for i, (valid, alone) in enumerate(zip(one.valid[0].tolist(), one.alone[0].tolist(), strict=True)):
                alike.setdefault((one.x.shape[2], valid, alone), []).append((place, i))
        heard = [[torch.zeros(0)] * one.valid.shape[1] for one in asked]
        with ExitStack() as clocks:  # each turn takes as long as the batch that it is in
            for call in calls:
                clocks.enter_context(call.session.clock("aut"))
            for (_, valid, alone), places in alike.items():
                rows = bucket(len(places))
                x = torch.stack([asked[place].x[0, i] for place, i in places + places[:1] * (rows - len(places))])
                batch = Windows(x[:, None], torch.full((rows, 1), valid), torch.full((rows, 1), alone))
                for (place, i), row in zip(places, self.model.aut.project(self.model.aut.states(batch)), strict=False):
                    heard[place][i] = row
        for call, rows in zip(calls, heard, strict=True):
            call.wishes[0].heard = torch.cat(rows)

    def batch(self) -> dict[Call, Tensor]:
        """What the Thinker reads next [T, U]: of every answer what it said last, and prompts as far as there is room.

        What an answer's next frame waits for comes first, then prompts; an answer that has words enough yields.
        """
        reads, room = dict[Call, Tensor](), POSITIONS
        for call in sorted(self.house.calls, key=self.urgency):
            if call.reading:
                x = call.reading[0].x
                if len(x) <= room or not reads:
                    room, reads[call] = room - len(x), x
            elif turn := call.turn:
                thought = turn.thought
                if thought.is_over():
                    turn.end_text()
                elif turn.spoken or len(turn.words) - turn.frames < (WORDS_AHEAD if turn.frames else FIRST_WORDS):
                    ids = torch.tensor(thought.unread(), dtype=torch.long, device=self.model.device)
                    reads[call] = self.model.thinker.embed(ids)
        return reads

    def read(self, calls: Sequence[Call], reads: Mapping[Call, Tensor]) -> None:
        """The Thinker's step over what `calls` read; what of it is the users' is handed to the Talker."""
        if not any(call.reading for call in calls):
            self.read_words(calls, torch.cat([reads[call] for call in calls]))
            return
        steps = [len(reads[call]) for call in calls]
        x, padded = padded_rows(torch.cat([reads[call] for call in calls]))
        hidden, accept = self.think(x[None], JoinedCaches([call.session.thinker for call in calls], steps, padded))
        hidden, accept = (whole[0, : sum(steps)].split(steps) for whole in (hidden, accept))
        for call, states in zip(calls, hidden, strict=True):
            call.session.hidden = states[-1:].clone()
        self.hand_over()
        for call, tapped in zip(calls, accept, strict=True):
            if call.reading:
                chunk = call.reading[0]
                if chunk.mine and self.model.speech is not None:
                    call.following.append((chunk, tapped[chunk.mine]))
                call.reading.popleft()  # last: nobody is to see that it is in neither place
            elif call.turn:
                call.turn.thought.read()

    def read_words(self, calls: Sequence[Call], x: Tensor) -> None:
        """The Thinker's step over a token x [B, U] of the answer of each call."""
        (hidden,) = self.go_on([call.session.thinker for call in calls], x)
        for call, state in zip(calls, hidden.clone().split(1), strict=True):
            call.session.hidden = state
            if call.turn:
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


class Speaking(Lane):
    """Talker, MTP and Code2Wav."""

    name = "speaking"

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self.speech = speech = house.model.speaking()
        self.talk, self.records = bound(speech.talker), dict[tuple[Way, int], Step]()
        self.rows = WeakKeyDictionary[Turn, int]()  # of `sounds`, as long as there is the answer; the first is nobody's
        self.suppress = speech.talker.suppressed(house.model.device)
        capacity, place = speech.talker.config.text.max_position_embeddings, (house.model.device, house.model.dtype)
        nobody = speech.talker.init_state(1, capacity, *place)
        self.pool = pool_for(nobody)
        self.go_on = OneStep(self.bind_talker(), nobody, self.pool, self.memory)
        self.sounds = speech.code2wav.init_state(1 + SOUNDING, *place)

    def take_in(self, session: EngineSession) -> None:
        """The Talker's."""
        session.talker = self.held(session.talker)

    def warm(self, conversations: int) -> None:
        """Record a frame for every number of rows up to that of the conversations, drawn as the release draws."""
        self.make_room(conversations)
        for rows in BUCKETS[: bisect.bisect_left(BUCKETS, conversations) + 1]:
            hidden, seen, keys, own = self.examples(rows)
            self.go_on.warm(rows, own, hidden)
            self.recorded(RELEASED, rows)(hidden, seen, keys, own)

    def caches(self, call: Call) -> list[KVCache]:
        """The Talker's."""
        return [call.session.talker]

    def step(self) -> bool:
        """What the Talker has to read along, then one frame of every answer that is due."""
        with self.house.speaking:
            reading = [call for call in self.house.calls if call.following]
            read = self.together(
                "talker", reading, self.follow, sum(len(call.following[0][0].mine) for call in reading)
            )
            return self.together("frame", self.speaking(), self.frames) or read

    def follow(self, calls: Sequence[Call]) -> None:
        """The Talker reads what is the users' of a chunk of each call."""
        xs = [call.session.follow(*call.following[0])[0] for call in calls]
        x, padded = padded_rows(torch.cat(xs))
        self.talk(x[None], JoinedCaches([call.session.talker for call in calls], [len(x) for x in xs], padded))
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
            waits = not turn.has_word() or turn.events.kept >= turn.events.limit or self.is_ahead(turn)
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
        hidden, made = self.states(calls, turns), list[tuple[Call, Turn, Tensor, Tensor, Tensor]]()
        ways = [(turn.speech.options.speech, turn.speech.options.residual) for turn in turns]
        rows = torch.tensor([self.rows[turn] for turn in turns], device=hidden.device)
        before = self.sounds.pick(rows) if len(set(ways)) > 1 else None
        try:
            for way in dict.fromkeys(ways):
                some = [i for i, own in enumerate(ways) if own == way]
                made += self.sound(way, [(calls[i], turns[i]) for i in some], hidden[some])
        except Exception:
            if before is not None:  # what was done in one way is done again, call by call
                self.sounds.put(rows, before)
            raise
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

    def begin(self, turn: Turn) -> None:
        """Give an answer a row of `sounds` with silence in it, unless it has one."""
        if turn not in self.rows:
            taken = set(self.rows.values())
            if len(taken) + 1 == self.sounds.rows:
                self.make_room(2 * len(taken))
            self.rows[turn] = min(set(range(1, self.sounds.rows)) - taken)
            self.sounds.reset([self.rows[turn]])

    def make_room(self, answers: int) -> None:
        """Have rows for so many answers; what was recorded held the state that was there before."""
        old, place = self.sounds, (self.model.device, self.model.dtype)
        if old.rows <= answers:
            self.sounds = self.speech.code2wav.init_state(1 + answers, *place)
            self.sounds.put(torch.arange(old.rows, device=place[0]), old)
            self.records.clear()

    def states(self, calls: Sequence[Call], turns: Sequence[Turn]) -> Tensor:
        """The Talker's states [B, W] that give each answer's next frame."""
        caches = [call.session.talker for call in calls]
        for turn in turns:
            self.begin(turn)
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
        x, padded = padded_rows(torch.cat(xs))
        states = self.talk(x[None], JoinedCaches(caches, steps, padded))[0]
        return states[torch.tensor(steps, device=x.device).cumsum(0) - 1]

    def bind_talker(self) -> Step:
        """The Talker's states [B, W] after one more word [B] and residue [B, W] of each answer."""
        talk, embed = bound(self.speech.talker.model), self.model.thinker.embed
        project = self.speech.talker.text_projection

        def step(caches: JoinedCaches, places: Tensor, words: Tensor, residue: Tensor) -> tuple[Tensor, ...]:
            return talk((residue + project(embed(words)))[None], caches, places)[0].unbind()

        return step

    def sound(
        self, way: Way, some: Sequence[tuple[Call, Turn]], hidden: Tensor
    ) -> Iterator[tuple[Call, Turn, Tensor, Tensor, Tensor]]:
        """Codes [Q], what they sum up to [W] and samples [1920] of a frame of each, whose codes are drawn in one way.

        The states [B, W] give the codes of codebook 0.
        """
        step = self.recorded(way, bucket(len(some)))
        seen = torch.cat([turn.speech.seen for _, turn in some])
        known = [[*turn.speech.key(turn.frames, 0)[:3], self.rows[turn]] for _, turn in some]
        keys = padded_rows(torch.tensor(known, device=hidden.device))[0]
        codes, residue, wave = step(padded_rows(hidden)[0], padded_rows(seen)[0], keys[:, :3], keys[:, 3])
        calls, turns = zip(*some, strict=True)
        return zip(calls, turns, codes.cpu(), residue.clone(), wave.float().cpu(), strict=False)

    def recorded(self, way: Way, rows: int) -> Step:
        """Codes of a frame, drawn in such a way, and their sound, on so many rows.

        States [B, W], codes [B, V] of codebook 0 drawn before, keys [B, 3] of the noise and rows [B] of `sounds` ->
        all codes [B, Q], their sum [B, W], samples [B, 1920]. Where codebook 0 ends the answer, the rest is nobody's.
        """
        if (way, rows) not in self.records:
            step, given = self.bind_frame(way, rows), self.examples(rows)
            self.records[way, rows] = capture(step, self.sounds, given, self.memory)
        return self.records[way, rows]

    def bind_frame(self, way: Way, rows: int) -> Step:
        """What `recorded` records."""
        talker, mtp, (first_way, rest_way) = self.speech.talker, self.speech.mtp, way
        predict, decode, suppress = mtp.bind_predict(), bound(self.speech.code2wav), self.suppress
        scratch = mtp.init_state(rows, self.model.device, self.model.dtype)
        books = torch.arange(1, mtp.codebooks, device=self.model.device).repeat(rows)
        size, stop = mtp.config.vocab_size, talker.config.codec_eos_token_id

        def step(sounds: Code2WavState, hidden: Tensor, seen: Tensor, keys: Tensor, own: Tensor) -> tuple[Tensor, ...]:
            kept = sounds.pick(own)
            key = NoiseKey(keys[:, 0], keys[:, 1], keys[:, 2], 0)
            code = choose(talker.codec_head(hidden), first_way, key, seen, suppress)
            first = talker.model.codec_embedding(code)
            each = keys.repeat_interleave(mtp.codebooks - 1, 0)
            every = NoiseKey(each[:, 0], each[:, 1], each[:, 2], books)
            noise = None if rest_way.greedy else gumbel(every, size, hidden.device).view(rows, -1, size)
            rest, total = predict(
                hidden,
                first,
                lambda x, book: choose(x, rest_way, None if noise is None else noise[:, book - 1]),
                scratch,
            )
            heard = torch.cat([code.masked_fill(code == stop, 0)[:, None], rest], 1)
            wave = decode(heard[:, None], kept)
            sounds.put(own, kept)
            return torch.cat([code[:, None], rest], 1), first + total, wave

        return step

    def examples(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `recorded` steps may be given."""
        text, device = self.speech.talker.config.text, self.model.device
        hidden = torch.zeros(rows, text.hidden_size, dtype=self.model.dtype, device=device)
        seen = torch.zeros(rows, text.vocab_size, dtype=torch.bool, device=device)
        keys = torch.zeros(rows, 4, dtype=torch.long, device=device)
        return hidden, seen, keys[:, :3], keys[:, 3]

    def give(self, call: Call, turn: Turn, codes: Tensor, residue: Tensor, wave: Tensor) -> None:
        """One more frame for who listens, unless codebook 0 ended the answer."""
        if int(codes[0]) == self.speech.talker.config.codec_eos_token_id:
            turn.speech.finish, turn.spoken = "stop", True
            return
        turn.first_at = self.house.now() if turn.first_at is None else turn.first_at
        turn.residue, turn.speech.seen[0, codes[0]] = residue, True
        samples = turn.speech.add(codes, wave)
        if call.session.answer is not None and not turn.told:
            call.session.answer.frames.append(turn.tokens_by(turn.frames - 1))
        turn.events.put(AudioDelta(samples, turn.frames - 1, turn.speech.sample_rate))


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
