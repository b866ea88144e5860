"""Do labels of an earlier AuT help? The same AuT trained with and without them, on recordings that neither has met.

    python -m benchmarks.pseudo_labels [--course recipes/tiny/labels.yaml] [--cuts cuts] [--runs runs]

Makes the corpus and trains the course, or goes on with it; the course has two runs of stage aut, `without` and `with`,
which differ in that the second also reads what a run of stage label has written. Prints the error of both and the
difference, clip by clip, with the interval that it would be in in 95 of 100 such tests.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from antiphon.error_rates import ErrorRate
from antiphon.evaluate.scoring import Estimate, Tally
from antiphon.train.corpus import make_corpus
from antiphon.train.data import Example, read_examples
from antiphon.train.recipe import Recipe, Source
from antiphon.train.run import Course, read_course, train_course
from antiphon.train.stages.aut import AuTStage
from antiphon.train.stages.common import Setting

WINDOW = 8  # seconds that are attended over
JOBS = 2  # processes that make the corpus


def trained(course: Course, cuts: Path, runs: Path) -> None:
    """The corpus and all runs of a course, in the folders named after it."""
    make_corpus(course.corpus, cuts / course.name, JOBS, lambda done, every: None)
    train_course(course, cuts, runs, torch.device("cpu"), quiet=True)


@torch.inference_mode()
def heard(recipe: Recipe, cuts: Path, runs: Path, examples: Sequence[Example]) -> list[str]:
    """What a run's AuT and its text decoder write down, by its best weights."""
    teaching = Setting(recipe, cuts, runs, torch.device("cpu")).teaching({"decoder": recipe.options["decoder"]})
    begun = dict.fromkeys(("aut", "decoder", "ctc"), recipe.name)
    stage = AuTStage(replace(teaching, recipe=replace(teaching.recipe, init=begun)))
    stage.modules.eval()
    found = {example.cut.id: text for example, text, _ in stage.hear(examples, WINDOW)}
    return [found[example.cut.id] for example in examples]


def compared(course: Course, cuts: Path, runs: Path, test: str) -> dict[str, Estimate]:
    """Error rates `without` and `with`, and the `margin` between them, over the clips of a manifest."""
    cuts, runs = cuts / course.name, runs / course.name
    examples = read_examples(Source(test), cuts)
    by_name = {recipe.name: recipe for recipe in course.recipes}
    texts = {name: heard(by_name[name], cuts, runs, examples) for name in ("without", "with")}
    tallies = {name: Tally("error rate") for name in (*texts, "margin")}
    for i, example in enumerate(examples):
        rates = {name: ErrorRate() for name in texts}
        for name, rate in rates.items():
            rate.add(example.text, texts[name][i], example.language)
            tallies[name].add(example.cut.id, (rate.edits, rate.length))
        fewer = rates["without"].edits - rates["with"].edits
        tallies["margin"].add(example.cut.id, (fewer, rates["with"].length))
    return {name: tally.estimate() for name, tally in tallies.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--course", type=Path, default=Path("recipes/tiny/labels.yaml"))
    parser.add_argument("--cuts", type=Path, default=Path("cuts"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--test", default="test.jsonl.gz")
    options = parser.parse_args()
    course = read_course(options.course)
    trained(course, options.cuts, options.runs)
    print_table(compared(course, options.cuts, options.runs, options.test))


def print_table(found: dict[str, Estimate]) -> None:
    """A line for each."""
    machine = platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {found['with'].items} clips\n\n| labels | error | 95 % of tests |")
    print("|---|---|---|")
    for name, one in found.items():
        between = "" if one.low is None or one.high is None else f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        print(f"| {name} | {100 * one.value:.1f} % | {between} |")


if __name__ == "__main__":
    main()
