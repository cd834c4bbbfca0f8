"""Questions about pictures: what an answer is worth, that nothing is asked twice, and servers that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.judge import SECRET, FakeJudge, serving

from palate import recipe
from palate.data.checklists import Question
from palate.optimize.oracles import load_oracle
from palate.recipe.objective import Term
from palate.rewards import checklist
from palate.rewards.answers import Answers, as_kept
from palate.rewards.chat import ChatModel, Reply
from palate.rewards.checklist import QuestionJudge, Score, load_checklist, means, request_text, score_of
from palate.rewards.client import TOKEN, Patience, RemoteError

PATIENCE = Patience(timeout=5.0, retries=3, wait=0.01, again=(429, 500, 502, 503, 504))
YES, NO = Question("Is there a dog?"), Question("Is there no cat?", "no")
FOUR = Question("How many dogs?", "four", "count")
GRADED = Question("How real?", "2", grades=("0", "1", "2"))


@pytest.fixture
def judge():
    with serving(FakeJudge()) as found:
        yield found


def asking(judge, answers=None, **options):
    chat = ChatModel(judge.url, SECRET, "owner/judge", patience=PATIENCE, key="checklist")
    return QuestionJudge(chat, answers=answers, **options)


def reply(text, *places):
    return Reply(text, tuple(tuple(place.items()) for place in places))


# --- what an answer is worth ---


def test_the_score_is_the_probability_of_the_right_answer():
    told = reply("Yes", {"Yes": 0.6, " yes": 0.1, "No": 0.25, "YES": 0.02, "Maybe": 0.03})
    assert score_of(YES, told) == (pytest.approx(0.72), True)
    assert score_of(NO, told) == (pytest.approx(0.25), True)
    assert score_of(FOUR, reply("4", {"4": 0.7, "\u2581four": 0.2, "five": 0.1})).value == pytest.approx(0.9)
    assert score_of(FOUR, reply("five", {"five": 0.9, "3": 0.1})) == (0.0, True)


def test_grades_are_the_mean_grade_over_the_best():
    told = reply("1", {"1": 0.5, "2": 0.3, "0": 0.1, "x": 0.1})
    assert score_of(GRADED, told).value == pytest.approx((0.5 + 2 * 0.3) / 0.9 / 2)
    assert score_of(GRADED, Reply("It is a 2.")) == (1.0, True) and score_of(GRADED, Reply("good")) == (0.0, False)


def test_an_answer_of_several_tokens_is_the_product_of_the_written_ones():
    question = Question("What is it made of?", "stainless steel")
    told = reply("stainless steel", {"stain": 0.8, "wood": 0.2}, {"less": 0.9}, {" steel": 0.5, " iron": 0.5})
    assert score_of(question, told).value == pytest.approx(0.8 * 0.9 * 0.5)
    assert score_of(question, reply("wood", {"wood": 0.8, "stain": 0.2})).value == 0.0


def test_a_piece_of_what_was_written_is_no_answer():
    """As by the text: of "12" the 1 is no answer, nor "red" of "reddish"; a word that ends there is."""
    one, ten, red = Question("How many?", "one"), Question("How many?", "10"), Question("Colour?", "red")
    assert score_of(one, reply("12", {"1": 0.97, "one": 0.01}, {"2": 0.9})).value == pytest.approx(0.01)
    assert score_of(ten, reply("10", {"1": 0.9, "ten": 0.05}, {"0": 0.8})).value == pytest.approx(0.05 + 0.9 * 0.8)
    assert score_of(ten, reply("100", {"1": 0.9}, {"0": 0.8}, {"0": 0.8})).value == 0.0
    assert score_of(red, reply("reddish", {"red": 0.9, "Red": 0.06}, {"dish": 1.0})).value == pytest.approx(0.06)
    assert score_of(YES, reply("yesterday", {"yes": 0.9}, {"terday": 1.0})) == (0.0, False)
    for after in (" wine", ".", "\u0120wine", "\u2581wine", "\u010a", "<|end|>", ""):
        assert score_of(red, reply("red" + after, {"red": 0.9, "Red": 0.06}, {after: 1.0})).value == pytest.approx(0.96)
    island = Question("Where?", "island")  # its first piece is a word that may stand before an answer
    assert score_of(island, reply("island", {"is": 0.9}, {"land": 0.8})).value == pytest.approx(0.72)


def test_what_stands_before_the_answer_is_passed_over():
    told = reply("**Answer:** yes", {"**": 1.0}, {"Answer": 1.0}, {":**": 1.0}, {" yes": 0.75, " no": 0.25})
    assert score_of(YES, told).value == 0.75


@pytest.mark.parametrize(
    ("question", "text", "score"),
    [
        (YES, "Yes, there is.", Score(1.0)), (YES, "No.", Score(0.0)), (NO, "no", Score(1.0)),
        (YES, "banana", Score(0.0, False)), (YES, "", Score(0.0, False)), (YES, "yesterday", Score(0.0, False)),
        (FOUR, "There are 4 dogs", Score(1.0)), (FOUR, "Four", Score(1.0)), (FOUR, "fourteen", Score(0.0, False)),
        (FOUR, "5, not 4", Score(0.0)), (YES, "<think>No? No.</think>\nYes", Score(1.0)),
        (Question("Colour?", "light blue"), "It is light blue.", Score(1.0)),
        (Question("Colour?", "light blue"), "It is blue, light.", Score(0.0)),
    ],
)  # fmt: skip
def test_without_probabilities_the_text_counts(question, text, score):
    assert score_of(question, Reply(text)) == score


def test_an_answer_that_says_neither_yes_nor_no_is_not_clear():
    assert score_of(YES, reply("Maybe", {"Maybe": 0.7, "Yes": 0.2, "No": 0.1})) == (0.2, False)


def test_a_sentence_in_the_place_of_a_number_or_a_grade_is_read_by_its_text():
    """Of "There are four." the first word is no number but for the crumbs among the likeliest tokens."""
    told = reply("There are four.", {"There": 0.98, "4": 0.01, "five": 0.01}, {" are": 1.0}, {" four": 1.0}, {".": 1.0})
    assert score_of(FOUR, told) == (1.0, True)
    assert score_of(Question("How many?", "5"), told) == (0.0, True)
    assert score_of(FOUR, reply("Several", {"Several": 0.9, "4": 0.1})) == (0.1, False)
    told = reply("Realism: 2", {"Real": 0.98, "0": 0.01, "1": 0.01}, {"ism": 1.0}, {":": 1.0}, {" 2": 1.0})
    assert score_of(GRADED, told) == (1.0, True)
    ten = Question("How many?", "10")  # in two tokens, the first of which is a number too
    assert score_of(ten, reply("10", {"1": 0.4, "x": 0.6}, {"0": 1.0})).value == 1.0


def test_means():
    questions = [Question("a"), Question("b"), Question("c")]
    assert means(questions, [0.9, 0.4, 0.6]) == pytest.approx((1.9 / 3, (0.9 * 0.4 * 0.6) ** (1 / 3)))
    assert means(questions, [1.0, 0.0, 1.0]) == (pytest.approx(2 / 3), 0.0)
    weighed = [question._replace(weight=w) for question, w in zip(questions, (0.7, 0.2, 0.1), strict=True)]
    assert means(weighed, [1.0, 0.5, 0.5]) == pytest.approx((0.85, 0.5**0.3))
    child = [questions[0], questions[1]._replace(parents=(0,)), questions[2]._replace(parents=(1,))]
    assert means(child, [0.3, 0.9, 0.8]) == (pytest.approx(0.3 / 3), 0.0)  # b counts 0, and so does what hangs on b
    assert means(child, [0.6, 0.3, 0.8]) == (pytest.approx((0.6 + 0.3) / 3), 0.0)
    assert means(child, [0.6, 0.5, 0.8])[0] == pytest.approx((0.6 + 0.5 + 0.8) / 3)


# --- the judge ---


def shades(count):
    """Pictures that differ in one colour."""
    return [np.full((4, 4, 3), i, np.uint8) for i in range(count)]


def test_every_picture_is_judged_by_its_own_questions(judge):
    judge.say = lambda pixels, question: {"yes": 0.5 + pixels[0, 0, 0] / 100, "no": 0.4 - pixels[0, 0, 0] / 100}
    asked = [(pixels, question) for pixels in shades(9) for question in (YES, NO)]
    found = asking(judge).scores(asked)
    assert [score.value for score in found] == pytest.approx(
        [v for i in range(9) for v in (0.5 + i / 100, 0.4 - i / 100)]
    )
    _, text, request = judge.asked[0]
    assert text == request_text(YES) or text == request_text(NO)
    assert request["logprobs"] is True and request["top_logprobs"] == 20 and request["temperature"] == 0


def test_several_are_asked_at_once_and_no_more_than_allowed(judge):
    judge.seconds = 0.03
    asking(judge, concurrency=4).scores([(pixels, YES) for pixels in shades(16)])
    assert 2 <= judge.most_at_once <= 4


def test_nothing_is_asked_twice_in_one_call_or_in_the_next(judge, tmp_path):
    asked = [(pixels, question) for pixels in (*shades(3), *shades(2)) for question in (YES, YES, FOUR)]
    judge.say = lambda pixels, question: {"yes": 0.123456789, "4": 0.3, "no": 0.5}
    first = asking(judge, Answers(tmp_path / "answers.jsonl")).scores(asked)
    assert len(judge.asked) == 6 and set(judge.received.values()) == {1}
    again = asking(judge, Answers(tmp_path / "mine.jsonl", also=[tmp_path / "answers.jsonl"]))
    assert again.scores(asked) == first and again.asked == 0 and len(judge.asked) == 6
    assert not (tmp_path / "mine.jsonl").exists()
    other = ChatModel(judge.url, SECRET, "another/judge", key="checklist")  # its answers are its own
    QuestionJudge(other, answers=Answers(tmp_path / "answers.jsonl")).scores(asked[:1])
    assert len(judge.asked) == 7


def test_pictures_in_files_are_read_one_by_one_and_scored_as_their_pixels(judge, tmp_path, monkeypatch):
    """Of a benchmark's thousands of pictures none is held: at most those that are on their way to the judge."""
    held, most, real = [], [], checklist.read_pixels

    class Held(np.ndarray):
        def __del__(self):
            if self.base is None:
                held.pop()

    def read(path):
        pixels = real(path)
        own = np.ndarray.__new__(Held, pixels.shape, pixels.dtype)
        own[:] = pixels
        held.append(path)
        most.append(len(held))
        return own

    monkeypatch.setattr(checklist, "read_pixels", read)
    judge.say = lambda pixels, question: {"yes": 0.5 + pixels[0, 0, 0] / 100, "no": 0.1}
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for file, pixels in zip(files, shades(12), strict=True):
        Image.fromarray(pixels).save(file)
    found = asking(judge, concurrency=2).scores([(file, question) for file in files for question in (YES, NO)])
    assert found == asking(judge).scores([(pixels, question) for pixels in shades(12) for question in (YES, NO)])
    assert len(most) == 36 and max(most) <= 4  # each for its digest and for two questions
    files[3].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"3.png cannot be read .*draw it again, without --stored"):
        asking(judge).scores([(files[3], YES)])


def test_a_row_that_a_crash_cut_is_asked_again_and_the_file_stays_whole(judge, tmp_path):
    path = tmp_path / "answers.jsonl"
    asking(judge, Answers(path)).scores([(pixels, YES) for pixels in shades(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    answers = Answers(path)
    assert len(answers) == 2
    asking(judge, answers).scores([(pixels, YES) for pixels in shades(3)])
    assert len(judge.asked) == 4 and sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    kept = '{"image": "i", "question": "q", "judge": "j", "text": "a", "places": %s}'
    for broken in ('{"image": 3}', kept % "[[]]", kept % '[[["a", NaN]]]', kept % '[[["a", 2]]]'):
        path.write_text(broken + "\n")
        with pytest.raises(ValueError, match=r"answers.jsonl, line 1: not an answer of a judge"):
            Answers(path)


def test_a_kept_reply_scores_as_a_fresh_one():
    long = reply("a " * 30, *[{"a": 0.123456789}] * 30)
    assert as_kept(as_kept(long)) == as_kept(long) != long


def test_a_server_without_probabilities_is_read_by_its_text(judge):
    judge.logprobs = False
    judge.say = lambda pixels, question: "Yes." if pixels[0, 0, 0] else "no"
    assert [score.value for score in asking(judge).scores([(pixels, YES) for pixels in shades(2)])] == [0.0, 1.0]


def test_a_server_that_refuses_to_tell_them_is_asked_without(judge):
    judge.refuses = True
    found = asking(judge, concurrency=1)
    assert [score.value for score in found.scores([(pixels, YES) for pixels in shades(3)])] == [1.0, 1.0, 1.0]
    assert not found.chat.tells_tokens and all("logprobs" not in request for _, _, request in judge.asked)


def test_a_busy_server_is_asked_again(judge):
    judge.script = [429, 500, 503, 200, 429]
    assert [score.value for score in asking(judge, concurrency=1).scores([(pixels, YES) for pixels in shades(2)])] == [
        1,
        1,
    ]


def test_one_that_stays_broken_ends_it_and_what_was_answered_is_kept(judge, tmp_path):
    judge.script = [200, 200, *[500] * 50]
    answers = Answers(tmp_path / "answers.jsonl")
    with pytest.raises(RemoteError, match=r"HTTP 500 .as the script says., 4 times"):
        asking(judge, answers, concurrency=1).scores([(pixels, YES) for pixels in shades(12)])
    assert len(judge.script) >= 42  # of 50 failures: who waited is not asked any more
    assert len(answers) == 2 and len(Answers(tmp_path / "answers.jsonl")) == 2
    judge.script = []
    asking(judge, Answers(tmp_path / "answers.jsonl")).scores([(pixels, YES) for pixels in shades(12)])
    assert len(judge.asked) == 12 and set(judge.received.values()) == {1}


def test_one_that_hangs_is_given_up(judge):
    judge.seconds = 1.0
    chat = ChatModel(judge.url, SECRET, "m", patience=Patience(timeout=0.2, retries=0), key="checklist")
    with pytest.raises(RemoteError, match="no answer"):
        QuestionJudge(chat).scores([(shades(1)[0], YES)])


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[" * 9999,
            b'{"choices": [{"message": {"content": "yes"}, "logprobs": {"content": [{"token": "yes"}]}}]}',
            b'{"choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": NaN}]}}]}'],
)  # fmt: skip
def test_an_answer_that_is_no_completion_ends_it(raw, judge, tmp_path):
    judge.raw = raw
    answers = Answers(tmp_path / "answers.jsonl")
    with pytest.raises(RemoteError, match="a bad answer; expected a chat completion"):
        asking(judge, answers).scores([(shades(1)[0], YES)])
    assert len(answers) == 0


KILLED = """
import sys
from pathlib import Path
import numpy as np
from palate.data.checklists import Question
from palate.rewards.answers import Answers
from palate.rewards.checklist import connect
asked = [(np.full((4, 4, 3), i, np.uint8), Question(f"question {k}?")) for i in range(100) for k in range(10)]
judge = connect(sys.argv[1], answers=Answers(Path(sys.argv[2])))
print(sum(score.value for score in judge.scores(asked)), judge.asked)
"""


@pytest.mark.slow
def test_a_thousand_questions_go_on_after_kill_9_with_none_asked_twice(judge, tmp_path):
    """Killed after 500 answers, with eight questions on their way that were never answered: those alone come again."""
    answers, judge.after = tmp_path / "answers.jsonl", 500
    command = [sys.executable, "-c", KILLED, judge.source, str(answers)]
    environment = os.environ | {TOKEN: SECRET}
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not answers.exists() or answers.read_bytes().count(b"\n") < 500:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    judge.after = None
    judge.go.set()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000.0", "500"]
    assert len(judge.answered) == 1000 and set(judge.answered.values()) == {1}
    assert sum(count - 1 for count in judge.received.values()) <= 8
    assert answers.read_bytes().count(b"\n") == 1000


# --- the reward ---


def test_the_reward_is_the_mean_over_the_prompts_questions(judge, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)
    file = tmp_path / "questions.jsonl"
    file.write_text(
        '{"prompt": "a dog", "questions": ["Is there a dog?", "Is it awake?"]}\n'
        '{"prompt": "four dogs", "questions": [["How many dogs?", "four"]]}\n'
    )
    judge.say = lambda pixels, question: {"yes": 0.8, "no": 0.2} if "awake" not in question else {"no": 0.6, "yes": 0.4}
    reward = load_checklist(f"{file} {judge.source}")
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert reward(images, ["a dog", "four dogs"]).tolist() == pytest.approx([0.6, 0.0])
    assert not reward(images, ["a dog", "a dog"]).requires_grad
    with pytest.raises(ValueError, match=r"no questions for the prompt 'a cat'; set prompts.file to that file"):
        reward(images, ["a dog", "a cat"])
    with pytest.raises(ValueError, match="expected a file and a URL"):
        load_checklist(judge.source)
    oracle = load_oracle(recipe.OracleSettings(checklist=f"{file} {judge.source}"))
    assert oracle(images, ["a dog", "a dog"]).tolist() == pytest.approx([0.6, 0.6])
    with pytest.raises(ValueError, match=r"^optimize.oracle.checklist: its file has no questions"):
        oracle(images, ["a cat", "a dog"])


def test_a_recipe_takes_it_where_no_gradient_is_needed(tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a dog", "questions": ["Is there a dog?"]}\n')
    monkeypatch.chdir(tmp_path)
    source = "reward.source.checklist=q.jsonl http://127.0.0.1:9/v1/chat/completions#m"
    found = recipe.read("grpo-emoji", ["reward={name: checklist}", source, "prompts.file=q.jsonl"])
    assert found.reward.source["checklist"] == f"{tmp_path}/q.jsonl http://127.0.0.1:9/v1/chat/completions#m"
    with pytest.raises(recipe.RecipeError, match="needs the reward's gradient, and checklist gives none"):
        recipe.read("refl-emoji", ["reward={name: checklist}", source])
    with pytest.raises(
        recipe.RecipeError, match=r"reward.source.checklist: give the server's URL, for example questions.jsonl"
    ):
        recipe.read("grpo-emoji", ["reward={name: checklist}"])


def test_what_two_judges_say_is_not_taken_for_one_reward(tmp_path):
    """In evaluations, by the judge's name; where its server is does not count."""
    (tmp_path / "q.jsonl").write_text('{"prompt": "a dog", "questions": ["Is there a dog?"]}\n')
    urls = [f"http://127.0.0.1:{port}/v1/chat/completions#{name}" for port, name in ((1, "a"), (2, "a"), (1, "b"))]
    first, moved, other = (Term("checklist", source=f"{tmp_path / 'q.jsonl'} {url}").digest() for url in urls)
    assert first == moved != other
    (tmp_path / "q.jsonl").write_text('{"prompt": "a dog", "questions": ["Is there a cat?"]}\n')
    assert Term("checklist", source=f"{tmp_path / 'q.jsonl'} {urls[0]}").digest() != first


def test_a_run_with_other_questions_is_another_run(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "a dog", "questions": ["Is there a dog?"]}\n')
    source = f"reward.source.checklist={file} http://127.0.0.1:9/v1/chat/completions#m"
    found = recipe.read("grpo-emoji", ["reward={name: checklist}", source])
    before = recipe.run_identity(found)
    file.write_text('{"prompt": "a dog", "questions": ["Is there a cat?"]}\n')
    assert recipe.run_identity(found) != before
