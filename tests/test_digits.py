"""The newcomer's first training, `recipes/tiny/digits.yaml`, with a few steps of every stage."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import antiphon
from antiphon.generate import collect
from antiphon.train.corpus import make_corpus
from antiphon.train.run import read_course, train_course
from tests.models import CPU

RECIPE = Path(__file__).parent.parent / "recipes/tiny/digits.yaml"


def test_there_is_something_to_see_and_hear_as_digits_are_trained():
    recipes = {recipe.name: recipe for recipe in read_course(RECIPE).recipes}
    for name in ("aut", "codec", "code2wav", "thinker", "speech"):
        plan = recipes[name].optimization
        assert plan.steps >= 5 * plan.sample_every, name


@pytest.mark.long
def test_the_course_of_digits_ends_in_a_checkpoint_that_hears_and_speaks(tmp_path):
    course = read_course(RECIPE)
    sets = {name: replace(s, count=60 if "valid" not in name else 2) for name, s in course.corpus.items()}
    make_corpus(sets, tmp_path / "cuts/digits", 1, lambda done, of: None)
    recipes = [
        replace(
            recipe,
            threads=1,
            optimization=replace(recipe.optimization, steps=4, validate_every=4, sample_every=2, save_every=4),
        )
        for recipe in course.recipes
    ]
    folders = train_course(replace(course, recipes=recipes), tmp_path / "cuts", tmp_path / "runs", CPU, quiet=True)
    assert [folder.name for folder in folders] == [recipe.name for recipe in course.recipes]
    for folder in folders[1:-1]:
        assert (folder / "best.safetensors").exists(), folder.name
        assert (folder / "log.jsonl").read_text().count('"step": 4') == 1
    for name in ("codec", "code2wav", "speech"):  # also on the way
        for step in ("000002", "000004"):
            shown = tmp_path / "runs/digits" / name / "samples" / step
            assert len(list(shown.glob("*.wav"))) == 2 * len(list(shown.glob("*.png"))) == 4, shown
    spoken, rate = soundfile.read(tmp_path / "runs/digits/speech/samples/000004/0-said.wav")
    assert rate == 24000
    assert np.abs(spoken).max() > 0
    model = antiphon.load(folders[-1])
    said = collect(model.speak("one two three", voice="ethan", max_frames=10))
    assert 0 < len(said.audio) <= 10 * 1920
    assert np.isfinite(said.audio).all()
    voice = model.clone(np.tile(said.audio, 4), said.sample_rate)
    assert len(collect(model.speak("one", voice=voice, max_frames=4)).codes) <= 4
    question = [{"role": "user", "content": [{"type": "audio", "audio": (said.audio, said.sample_rate)}]}]
    assert model.generate(question, max_text_tokens=4, max_frames=4).text_ids
