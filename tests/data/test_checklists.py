"""Files of questions as their authors publish them, in one form; what is wrong with one is told with its row."""

from __future__ import annotations

import csv
import json

import pytest

from palate.data import RecipeError, read_prompts
from palate.data.checklists import Checklist, Question, read_checklists


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path, *rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


COWS = {
    "prompt": "four white bicycles in front of three plastic cows",
    "atom_count": 7,
    "vqa_list": [["How many bicycles are in the image?", "four"], ["Are the cows plastic?", "Yes"]],
    "skills": ["count", "attribute"],
}


def test_geneval_2(tmp_path):
    (found,) = read_checklists(jsonl(tmp_path / "geneval2_data.jsonl", COWS))
    assert found == Checklist(
        COWS["prompt"],
        (Question("How many bicycles are in the image?", "four", "count"),
         Question("Are the cows plastic?", "Yes", "attribute")),
        "7 atoms",
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r'bad.jsonl, row 2: "vqa_list" and "skills" must be lists of the same len'):
        read_checklists(jsonl(tmp_path / "bad.jsonl", COWS, COWS | {"skills": ["count"]}))


def test_unigenbench(tmp_path):
    points = {"Primary Categories": "Art", "Testpoints": ["Style", "Attribute - Color"],
              "Testpoint Description": ["ink wash painting", "fresh, verdant green bamboo"]}  # fmt: skip
    row = {"index": 0, "prompt_en": "An ink wash painting of a panda, eating.", "sub_dims_en": json.dumps(points)}
    (found,) = read_checklists(table(tmp_path / "test_prompts_en.csv", row))
    assert found.prompt == row["prompt_en"] and found.kind == "Art"
    assert [(q.skill, q.answer) for q in found.questions] == [("Style", "yes"), ("Attribute - Color", "yes")]
    assert '"fresh, verdant green bamboo"' in found.questions[1].text and row["prompt_en"] in found.questions[1].text
    points["Testpoints"].pop()
    with pytest.raises(RecipeError, match="row 1: 1 test points and 2 descriptions"):
        read_checklists(table(tmp_path / "bad.csv", row | {"sub_dims_en": json.dumps(points)}))
    with pytest.raises(RecipeError, match="row 1: sub_dims_en must be JSON"):
        read_checklists(table(tmp_path / "bad.csv", row | {"sub_dims_en": "{"}))


def test_unigenbench_in_chinese(tmp_path):
    """Its Chinese files have Chinese names inside the column, as their evaluation program reads them."""
    points = {"\u4e00\u7ea7\u5782\u7c7b": "\u827a\u672f", "\u8003\u70b9": ["\u98ce\u683c"],
              "\u8003\u70b9\u5bf9\u5e94\u63cf\u8ff0": ["\u6c34\u58a8\u753b\u98ce\u683c"]}  # fmt: skip
    row = {
        "index": 0,
        "prompt_zh": "\u6c34\u58a8\u753b\u98ce\u683c\u7684\u718a\u732b",
        "sub_dims_zh": json.dumps(points),
    }
    (found,) = read_checklists(table(tmp_path / "test_prompts_zh.csv", row))
    assert (found.prompt, found.kind) == (row["prompt_zh"], "\u827a\u672f")
    (question,) = found.questions
    assert question.skill == "\u98ce\u683c" and '"\u6c34\u58a8\u753b\u98ce\u683c"' in question.text
    with pytest.raises(RecipeError, match='row 1: sub_dims_zh must be JSON with "\u8003\u70b9" and'):
        read_checklists(table(tmp_path / "bad.csv", row | {"sub_dims_zh": "{}"}))


def dpg(item, number, on, question, text="A red boat on a lake"):
    return {"item_id": item, "text": text, "keywords": "", "proposition_id": number, "dependency": on,
            "category_broad": "entity", "category_detailed": "whole", "tuple": "entity - whole (boat)",
            "question_natural_language": question}  # fmt: skip


def test_dpg_bench_keeps_which_question_depends_on_which(tmp_path):
    rows = [dpg("a", 1, "0", "Is there a boat?"), dpg("a", 2, "1", "Is it red?"), dpg("a", 3, "1, 2", "Is it wet?")]
    rows += [dpg("b", 1, "0", "Is there a cat?", "A cat")]
    first, second = read_checklists(table(tmp_path / "dpg_bench.csv", *rows))
    assert [question.parents for question in first.questions] == [(), (0,), (0, 1)]
    assert first.prompt == "A red boat on a lake" and first.questions[0].skill == "entity"
    assert second == Checklist("A cat", (Question("Is there a cat?", "yes", "entity"),))
    with pytest.raises(RecipeError, match="row 1: depends on question 9, which is not in its item"):
        read_checklists(table(tmp_path / "bad.csv", dpg("a", 1, "9", "Is there a boat?")))


def test_wise_is_graded_with_wiscores_weights(tmp_path):
    path = tmp_path / "cultural_common_sense.json"
    row = {"Prompt": "The plant often given on Mother's Day", "Explanation": "Carnations.", "Category": "Culture",
           "Subcategory": "Festival", "prompt_id": 1}  # fmt: skip
    path.write_text(json.dumps([row]))
    (found,) = read_checklists(path)
    assert [question.weight for question in found.questions] == [0.7, 0.2, 0.1] and found.kind == "Culture"
    assert {question.grades for question in found.questions} == {("0", "1", "2")}
    assert all("Carnations." in question.text for question in found.questions)


def test_a_plain_file_and_its_short_forms(tmp_path):
    path = jsonl(
        tmp_path / "mine.jsonl",
        {"prompt": "a dog", "questions": [{"question": "Is there a dog?", "skill": "object"}, "Is it good?"]},
        {"prompt": "two cats", "kind": "hard", "questions": [["How many cats?", "two", "count"]]},
        {"prompt": "a dog", "questions": ["Is it good?", "Is it awake?"]},
    )
    dog, cats = read_checklists(path)
    assert [q.text for q in dog.questions] == ["Is there a dog?", "Is it good?", "Is it awake?"]
    assert dog.questions[0] == Question("Is there a dog?", "yes", "object")
    assert cats == Checklist("two cats", (Question("How many cats?", "two", "count"),), "hard")
    assert read_prompts(str(path)) == ["a dog", "two cats"]  # so that prompts.file can be that file


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_prompts_and_questions_of_a_file_are_of_the_same_prompts(tmp_path, ending):
    """In every form of a table: DPG-Bench's rows are questions, several to a prompt."""
    rows = [dpg("a", 1, "0", "Is there  a boat?"), dpg("a", 2, "1", "Is it red?"), dpg("b", 1, "0", "A cat?", "A  cat")]
    path = tmp_path / f"dpg{ending}"
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in (".csv", ".tsv"):
        names = list(rows[0])
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == ".json":
        path.write_text(json.dumps(rows))
    else:
        jsonl(path, *rows)
    assert (
        read_prompts(str(path)) == [item.prompt for item in read_checklists(path)] == ["A red boat on a lake", "A cat"]
    )


def test_of_a_prompt_that_comes_twice_dependent_questions_keep_their_parents(tmp_path):
    rows = [
        dpg("a", 1, "0", "Is there a boat?"),
        dpg("b", 1, "0", "Is it night?"),
        dpg("b", 2, "1", "Are there stars?"),
    ]
    (found,) = read_checklists(table(tmp_path / "dpg.csv", *rows))
    assert [question.parents for question in found.questions] == [(), (), (1,)]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (dpg("a", 1, "0", "Is it wet?", "Another text"), "row 2: its item_id is that of row 1, which has another text"),
        (dpg("", 1, "0", "Is it wet?"), "row 2: item_id must be a text"),
    ],
)
def test_questions_that_belong_to_no_one_prompt_are_refused(tmp_path, row, match):
    with pytest.raises(RecipeError, match=match):
        read_checklists(table(tmp_path / "dpg.csv", dpg("a", 1, "0", "Is there a boat?"), row))


def test_a_later_row_is_checked_as_the_first_is(tmp_path):
    good = {"prompt": "a", "questions": ["x"]}
    with pytest.raises(RecipeError, match='row 2: "questions" must be a list of at least one'):
        read_checklists(jsonl(tmp_path / "plain.jsonl", good, {"prompt": "b"}))
    with pytest.raises(RecipeError, match=r'row 2: "vqa_list" and "skills" must be lists .* at least one'):
        read_checklists(jsonl(tmp_path / "geneval2.jsonl", COWS, COWS | {"vqa_list": [], "skills": []}))


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a", "questions": []}, 'row 1: "questions" must be a list of at least one'),
        ({"prompt": "", "questions": ["x"]}, "row 1: prompt must be a text"),
        ({"prompt": "a", "questions": [{"answer": "yes"}]}, 'row 1: expected {"question", "answer", "skill"}'),
        ({"prompt": "a", "questions": [" "]}, "row 1: a question or its answer is empty"),
        ({"prompt": "a", "questions": [3]}, "row 1: expected"),
        ({"prompt": "a"}, "got the columns prompt"),
        ({"prompt": "a", "tag": "counting", "include": []}, "GenEval's metadata, which exact oracles score: add --tas"),
    ],
)
def test_files_that_are_no_questions(row, match, tmp_path):
    with pytest.raises(RecipeError, match=match):
        read_checklists(jsonl(tmp_path / "x.jsonl", row))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="does not exist; give a file of questions"):
        read_checklists(tmp_path / "none.jsonl")
