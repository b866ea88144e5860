"""Pseudo-labels: what a teacher is sure of is kept, says where it came from, and can be trained on."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from antiphon.errors import ConfigError, InputError
from antiphon.files import read_safetensors, write_safetensors
from antiphon.train.data import read_cuts
from antiphon.train.label import label
from antiphon.train.loop import BEST, train
from antiphon.train.stages.aut import SPARE, AuTStage, write
from tests.test_train_speech import SAYINGS, place, setting

__all__ = ["place"]
DECODER = {"layers": 1, "heads": 2, "ffn_dim": 32}
SAID = [{"cuts": "say.jsonl.gz"}]


@pytest.fixture(scope="module")
def taught(place):
    """The folders, with a teacher that has seen a few steps."""
    first = setting(place, "aut", {}, SAID, decoder=DECODER)
    train(AuTStage(first), first.recipe, place[1] / "teacher", quiet=True)
    return place


def labelling(place, keep: float, init: dict[str, str] | None = None):
    init = {"aut": "teacher", "decoder": "teacher"} if init is None else init
    return setting(place, "label", init, SAID, decoder=DECODER, keep=keep, out="labelled.jsonl.gz")


def test_labels_say_where_they_came_from(taught):
    kept, found = label(labelling(taught, -1000.0), quiet=True)
    assert kept <= found == len(SAYINGS)
    cuts, before = read_cuts(taught[0] / "labelled.jsonl.gz"), read_cuts(taught[0] / "say.jsonl.gz")
    assert len(cuts) == kept > 0
    assert [c.id for c in cuts] == [c.id for c in before if c.id in {k.id for k in cuts}]
    for cut in cuts:
        (said,) = cut.supervisions
        assert said.text not in ("", *SAYINGS), "the old text must not survive"
        assert said.custom["label_source"] == "pseudo"
        assert said.custom["teacher"] == "teacher"
        assert said.custom["score"] < 0


def test_they_are_trained_on_like_any_others(taught):
    label(labelling(taught, -1000.0), quiet=True)
    again = setting(taught, "aut", {}, [{"cuts": "labelled.jsonl.gz"}], decoder=DECODER)
    assert AuTStage(again).batch(0).mel.shape[0] >= 1


def test_only_what_the_teacher_is_sure_of_is_kept(taught):
    everything = label(labelling(taught, -1000.0), quiet=True)[0]
    scores = sorted(c.supervisions[0].custom["score"] for c in read_cuts(taught[0] / "labelled.jsonl.gz"))
    if scores[0] < scores[-1]:
        kept = label(labelling(taught, scores[-1] - 1e-4), quiet=True)[0]
        assert 1 <= kept < everything
    with pytest.raises(InputError, match="no transcript reaches"):
        label(labelling(taught, 0.0), quiet=True)


def test_no_text_is_cut_short(taught):
    """A transcript may have as many tokens as its sound; one who never comes to an end is stopped after that."""
    stage = AuTStage(setting(taught, "aut", {}, SAID, decoder=DECODER))
    assert stage.mix is not None
    example = stage.mix.draw(0)[0]
    cut = deepcopy(example.cut)
    cut.supervisions[0].text = "word " * 400
    assert stage.tokenizer.decode(stage.read(replace(example, cut=cut))[1]).count("word") == 400
    stage.decoder.lm_head.weight.data[stage.tokenizer.config.im_end_token_id] = 0  # never the best
    states, heard = torch.randn(2, 150, stage.config.d_model), torch.ones(2, 150, dtype=torch.bool)
    assert [len(line) for line in write(stage.decoder, states, heard, stage.tokenizer)[0]] == [150 + SPARE] * 2


def test_a_teacher_is_needed(taught):
    with pytest.raises(ConfigError, match="labels need a teacher"):
        label(labelling(taught, -1.0, {}), quiet=True)


def test_a_module_may_begin_from_the_mean_of_runs(taught):
    """Runs that went on from the same one, joined by a plus."""
    first = read_safetensors(taught[1] / "teacher" / BEST)
    (taught[1] / "other").mkdir(exist_ok=True)
    write_safetensors(taught[1] / "other" / BEST, {n: t + 1 for n, t in first.items()}, {"run": "other"})
    both = AuTStage(setting(taught, "aut", {"aut": "teacher+other"}, SAID, decoder=DECODER))
    for name, tensor in both.modules["aut"].state_dict().items():
        torch.testing.assert_close(tensor, first[f"aut.{name}"] + 0.5)
