"""Benchmarks that ask a vision-language model about each picture, in one form: a prompt and its questions.

    GenEval 2        geneval2_data.jsonl       {"prompt", "atom_count", "vqa_list": [[question, answer]], "skills"}
    UniGenBench++    test_prompts_en.csv       prompt_en, sub_dims_en: JSON of "Testpoints" and their descriptions;
                     test_prompts_zh.csv       prompt_zh, sub_dims_zh: the same with Chinese names
    DPG-Bench        dpg_bench.csv             a row per question: item_id, text, proposition_id, dependency, ...
    WISE             cultural_common_sense.json and two more: {"Prompt", "Explanation", "Category", "Subcategory"}
    plain            anything.jsonl            {"prompt", "questions": [{"question", "answer", "skill"}]}

Files are read as their authors publish them; the form is told from their columns. None comes with the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.data.tables import TABLES, RecipeError, read_rows
from palate.runtime.files import parse_json

Rows = Sequence[dict[str, Any]]


class Question(NamedTuple):
    """One question about a picture of a prompt, and the answer that a right picture gets."""

    text: str
    answer: str = "yes"
    skill: str = ""
    weight: float = 1.0  # in the mean over the prompt's questions
    parents: tuple[int, ...] = ()  # places of the questions without which this one does not count
    grades: tuple[str, ...] = ()  # answers from worst to best; then the score is the mean grade over the best one


class Checklist(NamedTuple):
    """What is asked about every picture of a prompt. `kind` is the prompt's category, "" without one."""

    prompt: str
    questions: tuple[Question, ...]
    kind: str = ""


def read_checklists(source: str | Path) -> list[Checklist]:
    """The checklists of a file, one for each prompt in order of first appearance. InputError names file and row."""
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"{path} does not exist; give a file of questions (docs/evaluation.md says where they are)")
    rows = read_rows(path)
    if not rows:
        raise RecipeError(f"{path} holds no row; expected a prompt and its questions in each")
    reader = next((read for told, read in FORMS if told(rows[0])), None)
    if reader is None:
        if "include" in rows[0] and "tag" in rows[0]:
            raise RecipeError(f"{path} is GenEval's metadata, which exact oracles score: add --tasks")
        raise RecipeError(
            f'{path}: expected {{"prompt", "questions"}}, or a file of GenEval 2, UniGenBench++, DPG-Bench or WISE; '
            f"got the columns {', '.join(map(str, rows[0]))}"[:400]
        )
    try:
        return _merged(reader(rows))
    except _BadRowError as error:
        raise RecipeError(f"{path}, {error}") from error


def is_checklist(path: Path) -> bool:
    """Whether the file is one that `read_checklists` knows the form of, by its first row; others may still be wrong."""
    reader = TABLES.get(path.suffix.lower())
    first = next(iter(reader(path)), None) if reader else None
    return isinstance(first, dict) and any(told(first) for told, _ in FORMS)


class _BadRowError(ValueError):
    """Row number and what was expected there."""


def _merged(found: Sequence[Checklist]) -> list[Checklist]:
    """One checklist per prompt: of a prompt that comes twice the questions of both, each once."""
    merged: dict[str, Checklist] = {}
    for item in found:
        before = merged.get(item.prompt)
        if before is None:
            merged[item.prompt] = item
            continue
        known = {(question.text, question.answer) for question in before.questions}
        shift = len(before.questions)
        more = tuple(
            question._replace(parents=tuple(parent + shift for parent in question.parents))
            for question in item.questions
            if (question.text, question.answer) not in known
        )
        if len(more) not in (0, len(item.questions)) and any(question.parents for question in more):
            raise _BadRowError(f"prompt {item.prompt[:60]!r} comes twice with other questions; give it once")
        merged[item.prompt] = before._replace(questions=before.questions + more)
    return list(merged.values())


# --- the forms ------------------------------------------------------------------------------------------------------


def _plain(rows: Rows) -> list[Checklist]:
    """A question may be {"question", "answer", "skill"}, [question, answer, skill] or a text that wants a yes."""
    found = []
    for number, row in enumerate(rows, 1):
        asked = row.get("questions")
        if not isinstance(asked, list) or not asked:
            raise _BadRowError(f'row {number}: "questions" must be a list of at least one')
        questions = tuple(_plain_question(number, item) for item in asked)
        found.append(Checklist(_text(number, row, "prompt"), questions, str(row.get("kind") or "")))
    return found


def _plain_question(number: int, item: Any) -> Question:
    if isinstance(item, dict):
        parts = [item.get("question"), item.get("answer", "yes"), item.get("skill") or ""]
    else:
        parts = [item] if isinstance(item, str) else item
    if not isinstance(parts, list) or not 1 <= len(parts) <= 3 or not all(isinstance(part, str) for part in parts):
        raise _BadRowError(
            f'row {number}: expected {{"question", "answer", "skill"}} as texts, got {json.dumps(item)[:80]}'
        )
    if not all(part.strip() for part in parts[:2]):
        raise _BadRowError(f"row {number}: a question or its answer is empty")
    return Question(*parts)


def _geneval2(rows: Rows) -> list[Checklist]:
    found = []
    for number, row in enumerate(rows, 1):
        asked, skills = row.get("vqa_list"), row.get("skills")
        if not isinstance(asked, list) or not isinstance(skills, list) or len(asked) != len(skills) or not asked:
            raise _BadRowError(f'row {number}: "vqa_list" and "skills" must be lists of the same length, at least one')
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in asked):
            raise _BadRowError(f'row {number}: "vqa_list" must hold [question, answer] pairs')
        questions = tuple(
            Question(str(text), str(answer), str(skill))
            for (text, answer), skill in zip(asked, skills, strict=True)
        )  # fmt: skip
        atoms = row.get("atom_count")
        found.append(Checklist(_text(number, row, "prompt"), questions, f"{atoms} atoms" if atoms else ""))
    return found


UNIGENBENCH = {  # language, with which its columns' names end -> keys of test points, their descriptions, the category
    "en": ("Testpoints", "Testpoint Description", "Primary Categories"),
    "zh": ("\u8003\u70b9", "\u8003\u70b9\u5bf9\u5e94\u63cf\u8ff0", "\u4e00\u7ea7\u5782\u7c7b"),
}


def _unigenbench(rows: Rows) -> list[Checklist]:
    """A test point is a skill and the part of the prompt that shows it; its question is whether the picture does."""
    prompt_column = next((name for name in rows[0] if str(name).startswith("prompt")), "prompt")
    points_column = next(name for name in rows[0] if str(name).startswith("sub_dims"))
    points_key, texts_key, kind_key = UNIGENBENCH.get(str(points_column).rpartition("_")[2], UNIGENBENCH["en"])
    found = []
    for number, row in enumerate(rows, 1):
        try:
            told = parse_json(row[points_column])
            points, texts = told[points_key], told[texts_key]
        except (ValueError, TypeError, KeyError) as error:
            raise _BadRowError(
                f'row {number}: {points_column} must be JSON with "{points_key}" and "{texts_key}"'
            ) from error
        if not isinstance(points, list) or not isinstance(texts, list):
            raise _BadRowError(f'row {number}: "{points_key}" and "{texts_key}" must be lists')
        if len(points) != len(texts) or not points:
            raise _BadRowError(f"row {number}: {len(points)} test points and {len(texts)} descriptions")
        prompt = _text(number, row, prompt_column)
        questions = tuple(
            Question(f'The picture was made for the text: "{prompt}"\nThe part to look at, as {point}: "{text}"\n'
                     "Does the picture show this part as the text means it?", "yes", str(point))
            for point, text in zip(points, texts, strict=True)
        )  # fmt: skip
        found.append(Checklist(prompt, questions, str(told.get(kind_key) or "")))
    return found


def _dpg(rows: Rows) -> list[Checklist]:
    """A row per question. A question counts 0 where one that it depends on is answered no, or counts 0 itself for that
    reason (dependency 0: on none)."""
    items: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, row in enumerate(rows, 1):
        items.setdefault(_text(number, row, "item_id"), []).append((number, row))
    found = []
    for own in items.values():
        prompt, places = _text(*own[0], "text"), {}
        for place, (number, row) in enumerate(own):
            if _text(number, row, "text") != prompt:
                raise _BadRowError(f"row {number}: its item_id is that of row {own[0][0]}, which has another text")
            places[str(row.get("proposition_id")).strip()] = place
        questions = []
        for number, row in own:
            on = [part.strip() for part in str(row.get("dependency") or "0").split(",")]
            if unknown := [part for part in on if part not in ("0", *places)]:
                raise _BadRowError(f"row {number}: depends on question {unknown[0]}, which is not in its item")
            skill = str(row.get("category_broad") or str(row.get("tuple") or "").partition("(")[0]).strip()
            parents = tuple(places[part] for part in on if part != "0")
            questions.append(
                Question(_text(number, row, "question_natural_language"), "yes", skill, parents=parents)
            )  # fmt: skip
        found.append(Checklist(prompt, tuple(questions)))
    return found


WISE_ASPECTS = {  # WiScore's parts and weights (arXiv 2503.07265), asked in words of our own
    "consistency": (0.7, "How completely and accurately does it show what the text means? 0: key parts are missing or "
                         "wrong, 1: in part, 2: everything, without a fault."),
    "realism": (0.2, "How real does it look? 0: clearly artificial or impossible, 1: small faults, 2: like a "
                     "photograph."),
    "aesthetics": (0.1, "How good is it as a picture? 0: unpleasant, 1: ordinary, 2: outstanding."),
}  # fmt: skip


def _wise(rows: Rows) -> list[Checklist]:
    """Three grades from 0 to 2, weighed as WiScore; a prompt's kind is its category."""
    found = []
    for number, row in enumerate(rows, 1):
        prompt, meant = _text(number, row, "Prompt"), _text(number, row, "Explanation")
        questions = tuple(
            Question(f'The picture was made for the text: "{prompt}"\nThe text means: "{meant}"\n{asked}',
                     "2", aspect, weight, grades=("0", "1", "2"))
            for aspect, (weight, asked) in WISE_ASPECTS.items()
        )  # fmt: skip
        kind = str(row.get("Category") or row.get("Subcategory") or "")
        found.append(Checklist(prompt, questions, kind))
    return found


def _text(number: int, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f"row {number}: {name} must be a text, got {json.dumps(value, default=str)[:60]}")
    return " ".join(value.split())


FORMS: list[tuple[Callable[[dict[str, Any]], bool], Callable[[Rows], list[Checklist]]]] = [
    (lambda row: "vqa_list" in row, _geneval2),
    (lambda row: any(str(name).startswith("sub_dims") for name in row), _unigenbench),
    (lambda row: "question_natural_language" in row, _dpg),
    (lambda row: "Explanation" in row and "Prompt" in row, _wise),
    (lambda row: "questions" in row and "prompt" in row, _plain),
]
