"""Small trees in the layouts of the field's sets, filled with made-up sound: nothing in them is from those sets.

For a look at what `antiphon evaluate --set` makes of them, with tiny's own synthetic voices instead of tones:

    python -m tests.field_trees /tmp/trees        # /tmp/trees/librispeech, …
"""

import csv
import io
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from antiphon.evaluate.asked_sets import JAMENDO, VOICEBENCH
from antiphon.evaluate.spoken_sets import FLEURS, MINIMAX
from antiphon.train.prepare import AISHELL_TEXT

RATE = 16000
Say = Callable[[str, str], np.ndarray]  # text and language to samples at RATE
Words = Callable[[str, int], str]  # language and number to a text
COMMON_VOICE = (
    "client_id",
    "path",
    "sentence",
    "up_votes",
    "down_votes",
    "age",
    "gender",
    "accents",
    "locale",
    "segment",
)
GENRES = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")


def tone(text: str, language: str, seconds: float = 1.2) -> np.ndarray:
    """A sound of a pitch that the text decides."""
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (200 + zlib.crc32(text.encode()) % 800) * t)).astype(np.float32)


def plain(language: str, number: int) -> str:
    """A text in the language's script, without meaning."""
    texts = {"zh": "今天天气很好", "yue": "今日天氣好好", "ja": "きょうはいい天気です", "ko": "오늘은 날씨가 좋다"}
    texts |= {"th": "วันนี้อากาศดี", "ur": "آج موسم اچھا ہے", "ar": "الطقس جميل اليوم", "ru": "сегодня хорошая погода"}
    return f"{texts.get(language, 'the weather is good today')} {'abcdefgh'[number % 8]}"


NO_WORDS = {"num_words": None, "relation": None, "forbidden_words": None}
FEW = {**NO_WORDS, "num_words": 5, "relation": "less than"}
INSTRUCTIONS = [  # as VoiceBench's table has them: every row states all that any kind may state
    {
        "key": 1,
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [NO_WORDS, FEW],
    },
    {"key": 2, "instruction_id_list": ["startend:quotation"], "kwargs": [NO_WORDS]},
]


class Trees:
    """Writes trees; `say` gives the sound and `words` the texts."""

    def __init__(self, root: Path, say: Say = tone, words: Words = plain) -> None:
        self.root, self.say, self.words = root, say, words

    def sound(self, path: Path, text: str, language: str = "en") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {".opus": ("OGG", "OPUS"), ".mp3": ("MP3", None)}.get(path.suffix, (None, None))
        soundfile.write(path, self.say(text, language), RATE, format=form[0], subtype=form[1])
        return path

    def text(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def librispeech(self, root: Path) -> None:
        for part, speakers in (("test-clean", (1089, 1188)), ("test-other", (367, 533)), ("dev-clean", (84, 174))):
            for speaker in speakers:
                folder, said = root / "LibriSpeech" / part / f"{speaker}" / "121", []
                for number in range(2):
                    name, text = f"{speaker}-121-{number:04}", self.words("en", number + speaker)
                    self.sound(folder / f"{name}.flac", text)
                    said.append(f"{name} {text.upper()}\n")
                self.text(folder / f"{speaker}-121.trans.txt", "".join(said))

    def aishell(self, root: Path) -> None:
        said, root = [], root / "data_aishell"
        for part, speaker in (("test", "S0764"), ("test", "S0765"), ("train", "S0002")):
            for number in range(2):
                name, text = f"BAC009{speaker}W{number:04}", self.words("zh", number)
                self.sound(root / "wav" / part / speaker / f"{name}.wav", text, "zh")
                said.append(f"{name} {' '.join(text.replace(' ', ''))}\n")
        self.text(root / AISHELL_TEXT, "".join(said))

    def aishell2(self, root: Path) -> None:
        for device in ("iOS", "Android", "Mic"):
            for part in ("dev", "test"):
                folder, texts, sounds = root / "AISHELL-DEV-TEST-SET" / device / part, [], []
                for speaker in ("T0011", "T0012"):
                    name, text = f"{device[0]}{speaker}W0001", self.words("zh", int(speaker[1:]))
                    self.sound(folder / "wav" / speaker / f"{name}.wav", text, "zh")
                    texts.append(f"{name}\t{text}\n")
                    sounds.append(f"{name}\twav/{speaker}/{name}.wav\n")
                self.text(folder / "trans.txt", "".join(texts))
                self.text(folder / "wav.scp", "".join(sounds))

    def wenetspeech(self, root: Path) -> None:
        audios = []
        for number, (subset, folder) in enumerate((("TEST_NET", "test_net"), ("TEST_MEETING", "test_meeting"))):
            texts = [self.words("zh", number + i) for i in range(2)]
            pieces, segments, at = [np.zeros(RATE // 2, np.float32)], [], 0.5
            for i, text in enumerate(texts):
                pieces += [self.say(text, "zh"), np.zeros(RATE // 2, np.float32)]
                end = at + len(pieces[-2]) / RATE
                about = {"sid": f"Y{number}_S{i:05}", "begin_time": round(at, 3), "end_time": round(end, 3)}
                segments.append({**about, "text": text, "confidence": 1.0, "subsets": [subset]})
                at = end + 0.5
            path = Path("audio") / folder / "B00000" / f"Y{number}.opus"
            (root / path).parent.mkdir(parents=True)
            soundfile.write(root / path, np.concatenate(pieces), RATE, format="OGG", subtype="OPUS")
            audios.append({"aid": f"Y{number}", "duration": at, "path": str(path), "segments": segments})
        self.text(root / "WenetSpeech.json", json.dumps({"audios": audios}, ensure_ascii=False))

    def common_voice(self, root: Path) -> None:
        for folder, language in (("en", "en"), ("zh-CN", "zh"), ("ru", "ru")):
            place, rows = root / "cv-corpus-15.0-2023-09-08" / folder, []
            for number in range(3):
                name, text = f"common_voice_{folder}_{number}.mp3", self.words(language, number)
                self.sound(place / "clips" / name, text, language)
                rows.append([f"speaker{number // 2}", name, text, "2", "0", "", "", "", folder, ""])
            self.text(place / "test.tsv", "".join("\t".join(row) + "\n" for row in (COMMON_VOICE, *rows)))

    def fleurs(self, root: Path) -> None:
        for language, code in FLEURS.items():
            folder, rows = root / "data" / code, []
            for number in range(2):
                text = self.words(language, number)
                self.sound(folder / "audio" / "test" / f"{number}.wav", text, language)
                spelled = " ".join(text.replace(" ", "|"))
                rows.append(f'{number}\t{number}.wav\t"{text.title()}."\t{text}\t{spelled}\t19200\tFEMALE\n')
            self.text(folder / "test.tsv", "".join(rows))

    def seed_tts(self, root: Path) -> None:
        for language, name in (("zh", "meta"), ("en", "meta"), ("zh", "hardcase")):
            folder, lines = root / "seedtts_testset" / language, []
            for number in range(2):
                prompt, text = self.words(language, number), self.words(language, number + 2)
                self.sound(folder / "prompt-wavs" / f"{number}.wav", prompt, language)
                lines.append(f"{name}-{number}|{prompt}|prompt-wavs/{number}.wav|{text}\n")
            self.text(folder / f"{name}.lst", "".join(lines))

    def minimax(self, root: Path) -> None:
        for name, language in [*MINIMAX.items(), ("hindi", "hi")]:
            lines = []
            for number, sex in enumerate(("female", "male")):
                self.sound(root / "speaker" / name / f"{name}_{sex}" / "prompt.mp3", self.words(language, 9), language)
                lines.append(f"{name}_{sex}|{self.words(language, number)}\n")
            self.text(root / "text" / f"{name}.txt", "".join(lines))

    def cv3(self, root: Path) -> None:
        for language in ("zh", "en", "ja", "ko"):
            folder, files = f"data/cross_lingual_zeroshot/to_{language}", dict[str, list[str]]()
            for number, other in enumerate(code for code in ("zh", "en", "ja", "ko") if code != language):
                path = f"{folder}/waveform/prompt_audio_{number}.wav"
                self.sound(root / path, self.words(other, number), other)
                rows = {"prompt_wav.scp": path, "prompt_text": self.words(other, number)}
                for name, value in {**rows, "text": self.words(language, number)}.items():
                    files.setdefault(name, []).append(f"uttid_{number} {value}\n")
            for name, lines in files.items():
                self.text(root / folder / name, "".join(lines))

    def gtzan(self, root: Path) -> None:
        for genre in GENRES:
            self.sound(root / "genres_original" / genre / f"{genre}.00000.wav", genre)
        self.text(root / "test_filtered.txt", "".join(f"{genre}/{genre}.00000.wav\n" for genre in GENRES))

    def mtg_jamendo(self, root: Path) -> None:
        heading = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n"
        tags = {"genre": ("rock", "jazz"), "moodtheme": ("happy", "calm"), "instrument": ("piano", "drums")}
        for kind in JAMENDO.values():
            own = [f"{kind}---{tag}" for tag in tags.get(kind, ("rock", "piano"))]
            for part, number in (("train", 0), ("validation", 1), ("test", 2)):
                rows = [f"track_{number}{i}\tartist_{i}\talbum_1\t0{i}/{number}{i}.mp3\t40.0\t" for i in range(2)]
                ends = ["\t".join(own), own[0]]
                lines = [f"{row}{end}\n" for row, end in zip(rows, ends, strict=True)]
                self.text(root / "data/splits/split-0" / f"autotagging_{kind}-{part}.tsv", heading + "".join(lines))
        for i in range(2):
            path = root / "audio" / f"0{i}" / f"2{i}.mp3"
            path.parent.mkdir(parents=True)
            samples = np.concatenate([np.zeros(5 * RATE), tone("a", "", 30.0), np.zeros(5 * RATE)])
            soundfile.write(path, samples[::2], RATE // 2, format="MP3")

    def magnatagatune(self, root: Path) -> None:
        tags = ["guitar", "no vocals", "vocals", "slow", *(f"rare {i}" for i in range(49))]
        table = io.StringIO()
        write = csv.writer(table, delimiter="\t", quoting=csv.QUOTE_ALL)
        write.writerow(["clip_id", *tags, "mp3_path"])
        for number, folder in enumerate("0cdef"):
            for start in (0, 29):
                path = f"{folder}/artist-album-{number}-track-{start}-{start + 29}.mp3"
                self.sound(root / path, path)
                has = [str(int(i != number % 4 if i < 4 else number == 0)) for i in range(len(tags))]
                write.writerow([f"{number}{start}", *has, path])
        self.text(root / "annotations_final.csv", table.getvalue())

    def muchomusic(self, root: Path) -> None:
        wrong = ["A cello", "A flute", "An oboe", "A harp"]
        asked = {"question": "Which instrument leads?", "caption": "", "correct_answer": "A piano", "PI": 0.9}
        self.text(
            root / "RUL-MuchoMusic.json", json.dumps({n: {**asked, "distractors": wrong} for n in ("1740", "1862")})
        )
        for name in ("1740", "1862"):
            self.sound(root / "audio" / f"{name}.mp3", name)
        heading = "question,correct_answer,distractor_1_answer,distractor_2_answer,distractor_3_answer,dataset"
        heading += ",dataset_identifier"
        row = "Which instrument leads?,A piano,A cello,A flute,An oboe"
        self.text(root / "data/muchomusic.csv", f"{heading}\n{row},sdd,415600.json\n{row},musiccaps,ab_cd_0.json\n")
        self.text(root / "data/sdd/song_describer.csv", "caption_id,track_id,path\n1,415600,00/415600.mp3\n")
        self.text(root / "data/musiccaps/musiccaps-public.csv", "ytid,start_s,end_s\nab_cd,30,40\n")
        self.sound(root / "data/sdd/audio/00/415600.2min.mp3", "sdd")
        self.sound(root / "data/musiccaps/audio/[ab_cd]-[30-40].wav", "musiccaps")

    def voicebench(self, root: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        right = {"sd-qa": ["Paris", "Rome"], "mmsu": ["A", "B"], "openbookqa": ["C", "D"], "bbh": ["yes", "(a)"]}
        for name in [folder for _, folder in VOICEBENCH.values()]:
            prompts = [self.words("en", number) for number in range(2)]
            rows = [{"prompt": prompt, "audio": {"bytes": self.wav(prompt), "path": "a.wav"}} for prompt in prompts]
            rows = [row | ({"reference": right[name][i]} if name in right else {}) for i, row in enumerate(rows)]
            if name == "ifeval":
                rows = [row | INSTRUCTIONS[i] for i, row in enumerate(rows)]
            split = {"sd-qa": "usa", "mmsu": "law"}.get(name, "test")
            (root / name).mkdir(parents=True)
            path = root / name / f"{split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)

    def wav(self, text: str) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, self.say(text, "en"), RATE, format="WAV")
        return file.getvalue()

    def mmau(self, root: Path) -> None:
        rows = []
        for task in ("sound", "music", "speech"):
            for number in range(2):
                name = f"{task}-{number}"
                about = {"id": name, "audio_id": f"./test-mini-audios/{name}.wav", "task": task, "difficulty": "easy"}
                rows.append({**about, "question": "Who speaks?", "choices": ["A man", "A woman"], "answer": "A man"})
                self.sound(root / "test-mini-audios" / f"{name}.wav", name)
        self.text(root / "mmau-test-mini.json", json.dumps(rows))


def write_tree(name: str, root: Path, say: Say = tone, words: Words = plain) -> Path:
    """A small tree of a set, in the folder `root`."""
    getattr(Trees(root, say, words), name.replace("-", "_"))(root)
    return root


if __name__ == "__main__":
    from antiphon.evaluate.sets import SETS
    from antiphon.train import espeak
    from antiphon.train.data import resample
    from antiphon.train.world import LANGUAGES, sentences

    spoken: dict[tuple[str, str], str] = {}

    def sentence(language: str, number: int) -> str:
        one = sentences(language, "sentence", 20, 7)[number % 20] if language in LANGUAGES else None
        spoken[language, one.text if one else ""] = one.spoken if one else ""
        return one.text if one else plain(language, number)

    def spoken_aloud(text: str, language: str) -> np.ndarray:
        voice = espeak.Voice(espeak.TRAIN_VARIANTS[zlib.crc32(text.encode()) % 6], 50)
        known = LANGUAGES.get(language, LANGUAGES["en"]).espeak
        return resample(espeak.say(spoken.get((language, text), text), known, voice), espeak.RATE, RATE)

    for each in SETS:
        print(write_tree(each, Path(sys.argv[1]) / each, spoken_aloud, sentence))
