"""From votes to a taste, and the studio: votes, taste, studio, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate.cli.app import LOOK, TRAIN, app, examples
from palate.runtime.errors import InputError
from palate.runtime.progress import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable

Votes = Annotated[Path, typer.Argument(help="A folder with votes.jsonl in it, or such a file, for example votes.")]
TasteFolder = Annotated[Path, typer.Argument(help="The folder of a taste, for example tastes/mine.")]
Runs = Annotated[Path, typer.Option("--runs", help="The folder of runs, votes and tastes.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="The next free one is taken if it is in use.")]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")]
SourceName = Annotated[str, typer.Option(help="The reward that looks at the pictures: emoji, clip-score, ...")]
SourceWeights = Annotated[str | None, typer.Option(help="Where that reward's weights are, as reward.source.")]

votes_app = typer.Typer(help="Import, export and show votes.", no_args_is_help=True, rich_markup_mode=None)
taste_app = typer.Typer(help="Learn a taste from votes, and look at it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(votes_app, name="votes", rich_help_panel=TRAIN)
app.add_typer(taste_app, name="taste", rich_help_panel=TRAIN)


@votes_app.command("import", epilog=examples(
    "palate votes import pictures/ --to votes        pictures/win and pictures/lose",
    "palate votes import choices.jsonl --to votes    of a blind study",
))  # fmt: skip
def import_votes(
    source: Annotated[
        Path, typer.Argument(help="Folders win/ and lose/, ranked folders, HPDv2, Pick-a-Pic, JSON, a blind study.")
    ],
    to: Annotated[Path, typer.Option("--to", help="The folder of votes to add to.")] = Path("votes"),
    prompt: Annotated[str, typer.Option(help="Of pictures that come without one.")] = "",
    rater: Annotated[str, typer.Option(help="Who voted, if the source does not say.")] = "",
    key: Annotated[Path | None, typer.Option(help="The key of a blind study, where it is not beside it.")] = None,
) -> None:
    """Read votes from elsewhere; their pictures are copied."""
    from palate.taste import readers

    store = readers.VoteStore(to)
    count = readers.import_votes(source, store, prompt=prompt, rater=rater, key=key)
    print(f"{counted(count, 'new vote')}, {len(store.read())} in all: {printable(str(store.file))}")


@votes_app.command("export", epilog=examples(
    "palate votes export votes --out pairs && palate train taste-emoji-dpo prompts.pairs=pairs/train.json",
    "palate votes export votes --out pairs --format likes    for dpo-emoji-likes: both bad is two dislikes",
))  # fmt: skip
def export_votes(
    votes: Votes,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("votes-export"),
    form: Annotated[
        str, typer.Option("--format", help="hpdv2 (train.json, for dpo), likes (likes.jsonl) or json.")
    ] = "hpdv2",
) -> None:
    """Write votes where dpo and other programs read them."""
    from palate.taste import exported

    count = exported.export_votes(exported.VoteStore(votes), out, form)
    print(f"{counted(count, 'vote')}: {printable(str(out))}")


@votes_app.command("show")
def show_votes(votes: Votes) -> None:
    """Count the votes, and say what is missing."""
    from collections import Counter

    from palate.taste.votes import VoteStore

    store = VoteStore(votes)
    there, gone = store.with_pictures()
    everything = store.read()
    if not everything:
        raise InputError(
            f"{store.file} holds no vote; make some in palate studio, or bring some with palate votes import"
        )
    choices = Counter(vote.choice for vote in everything)
    print(f"{counted(len(everything), 'vote')}: " + ", ".join(f"{n} {choice}" for choice, n in choices.items()))
    kinds = {"session": {v.session for v in everything}, "rater": {v.rater for v in everything},
             "prompt": {v.prompt for v in everything}}  # fmt: skip
    print(", ".join(counted(len(found), kind) for kind, found in kinds.items()))
    times = sorted(v.ms for v in there if v.ms is not None)
    if times:
        print(f"median time per vote {times[len(times) // 2] / 1000:.1f} s")
    if gone:
        print(f"not counted, because a picture is gone: {counted(gone, 'vote')}")


@taste_app.command("fit", epilog=examples(
    "palate taste fit votes -o tastes/mine",
    "palate train taste-emoji reward.source.taste=tastes/mine",
))  # fmt: skip
def fit(
    votes: Votes,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write to.")] = Path("tastes/mine"),
    features: SourceName = "emoji",
    weights: SourceWeights = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks of features, as words,colour; also tower, pairs.")] = None,
) -> None:
    """Learn a taste, and say how well it predicts votes."""
    from palate.cli import fit_taste

    fit_taste.fit(votes, out, features, weights, blocks)


@taste_app.command("show")
def show(taste: TasteFolder, weights: SourceWeights = None) -> None:
    """Say what a taste is made of, and how good it is."""
    from palate.cli import fit_taste

    fit_taste.show(taste, weights)


@taste_app.command("ask", epilog=examples("palate taste ask tastes/mine samples --count 20 -o next.jsonl"))
def ask(
    taste: TasteFolder,
    pictures: Annotated[Path, typer.Argument(help="A folder of samples: pictures and index.jsonl.")],
    count: Annotated[int, typer.Option(min=1, help="Pairs to choose.")] = 20,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")] = Path("next.jsonl"),
    seed: Annotated[int, typer.Option(min=0, help="Of the random candidates.")] = 0,
    weights: SourceWeights = None,
) -> None:
    """Choose the pairs whose answers tell most (BALD)."""
    from palate.cli import fit_taste

    fit_taste.ask(taste, pictures, count=count, out=out, seed=seed, weights=weights)


@taste_app.command("words", epilog=examples("palate taste words tastes/mine samples --prompt 'a fox'"))
def words(
    taste: TasteFolder,
    pictures: Annotated[
        Path, typer.Argument(help="A folder of samples whose prompts name styles, sizes and backgrounds, or do not.")
    ],
    prompt: Annotated[str, typer.Option(help="Put the words into this prompt.")] = "",
    weights: SourceWeights = None,
) -> None:
    """Say a taste in words of the embedded model, which need no training."""
    from palate.cli import fit_taste

    fit_taste.words(taste, pictures, prompt=prompt, weights=weights)


@app.command(rich_help_panel=LOOK, epilog=examples(
    "palate studio",
    "palate studio --port 8500 --no-browser --runs runs    then open the link that it prints",
))  # fmt: skip
def studio(
    port: Port = 8420,
    browser: Browser = True,
    runs: Runs = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Another address than this machine alone; needs --token-file.")
    ] = "127.0.0.1",
    token_file: Annotated[Path | None, typer.Option(help="A file with a secret of at least 16 characters.")] = None,
) -> None:
    """Choose pictures, align, steer and compare in the browser."""
    _serve()(runs, port=port, host=host, token_file=token_file, browser=browser)


@app.command(rich_help_panel=LOOK, epilog=examples("palate demo"))
def demo(port: Port = 8420, browser: Browser = True, runs: Runs = Path("runs")) -> None:
    """Open the studio with a first run under way."""
    _serve()(runs, port=port, browser=browser, first_run="direct-emoji")


def _serve() -> Callable[..., None]:
    try:
        from palate.studio.app import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("palate"):
            raise
        raise InputError(f"the studio needs {error.name}: pip install 'palate[studio]'") from error
    return serve
