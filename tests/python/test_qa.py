"""Question answering: right answers count, passages are where the settings say, and the records tell what came."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from command_line import run, start
from lminf_edge import ConfigError, Llama, LMInfError
from lminf_edge.evaluation.answer_f1 import answer_f1, is_exact, normalised
from lminf_edge.evaluation.answering import ask_all
from lminf_edge.evaluation.methods import MethodSetup
from lminf_edge.evaluation.question_answering import (
    QaSettings,
    filler_sha256,
    prepare_questions,
    qa_cells,
    questions_sha256,
    run_qa,
)
from lminf_edge.evaluation.question_prompts import PromptFormat, QuestionPrompt, length_range, prompt_as_it_comes
from lminf_edge.evaluation.questions import Question, own_questions, parse_questions, read_questions
from lminf_edge.evaluation.results import Record, ResultLog, plain, read_results, settings_from
from lminf_edge.evaluation.token_source import vocabulary_of
from tiny_models import TinyModel

LINES = (
    {
        "id": "a",
        "context": "Anna lives in Lisbon. She bakes bread.",
        "question": "Where?",
        "answers": ["Lisbon", "in L."],
    },
    {"context": "The cat is called Miso. " * 12, "question": "What is the cat called?", "answer": "Miso"},
    {"_id": "c", "context": "It cost nine pounds. " * 14, "input": "How much?", "answers": ["nine pounds"]},
)


@pytest.fixture
def filler(tmp_path: Path) -> Path:
    path = tmp_path / "filler.txt"
    path.write_text("".join(f"Line {number} says nothing. " for number in range(500)))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def settings_for(
    model: TinyModel, *, file: Path | None = None, filler: Path | None = None, **others: Any
) -> QaSettings:
    setup = MethodSetup(
        model=str(model.path),
        methods=("endless", "full"),
        cache_types=("f16",),
        n_sink=2,
        n_window=200,
        n_threads=1,
        n_ubatch=32,
    )
    values: dict[str, Any] = {
        "max_tokens": 4,
        "full_tokens": 4000,
        "text_sha256": questions_sha256(None if file is None else str(file)),
    }
    if file is not None:
        values["text"] = str(file)
    if filler is not None:
        values |= {"filler": str(filler), "filler_sha256": filler_sha256(str(filler)), "lengths": (1500, 2500)}
    return QaSettings(setup=setup, **{**values, **others})


def prompts_of(model: TinyModel, **settings: Any) -> list[QuestionPrompt]:
    groups = prepare_questions(settings_for(model, **settings), vocabulary_of(model.path))
    return [prompt for group in groups for prompt in group]


def text_of(model: TinyModel, prompt: QuestionPrompt) -> str:
    return vocabulary_of(model.path).detokenize(prompt.tokens(), False, True).decode()


def measured(settings: QaSettings, path: Path | None = None) -> list[Record]:
    with ResultLog(path) as log:
        run_qa(settings, log)
        return log.records


def without_time(records: list[Record]) -> list[Record]:
    return [{name: each[name] for name in each if name not in ("seconds", "started", "command")} for each in records]


# --- the measure


@pytest.mark.parametrize(
    ("answer", "references", "f1"),
    [
        ("Lisbon", ["Lisbon"], 1.0),
        ("The Lisbon!", ["a lisbon"], 1.0),
        ("in Lisbon", ["Lisbon"], 2 / 3),  # precision 1/2, recall 1
        ("Lisbon", ["Lisbon in Portugal"], 1 / 2),  # precision 1, recall 1/3
        ("red red blue", ["red blue blue"], 2 / 3),  # two words in common, each counted as often as both have it
        ("in Lisbon", ["Porto", "Lisbon", "the city"], 2 / 3),  # the best one
        ("Porto", ["Lisbon"], 0.0),
        ("", ["Lisbon"], 0.0),
        ("the", ["an"], 0.0),  # nothing is left of either
        ("", [""], 0.0),
        ("Unanswerable", ["unanswerable"], 1.0),
        ("yes", ["Yes."], 1.0),
        ("a well-known man", ["wellknown man"], 1.0),  # punctuation goes without leaving a space
        ("theory", ["ory"], 0.0),  # an article is a word
    ],
)
def test_f1_is_squad_s(answer: str, references: list[str], f1: float) -> None:
    assert answer_f1(answer, references) == pytest.approx(f1)


def test_exact_answers_differ_in_case_punctuation_and_articles_only() -> None:
    assert normalised(" The  Laconia, a frigate. ") == ["laconia", "frigate"]
    assert is_exact("the Laconia.", ["Laconia"])
    assert is_exact("Laconia", ["frigate", "Laconia"])
    assert not is_exact("Laconia frigate", ["Laconia"])


# --- the questions that come with the package


def test_there_are_sixty_questions_on_sixty_passages() -> None:
    questions = own_questions()
    assert len({each.id for each in questions}) == len({each.context for each in questions}) == 60
    assert len({each.question for each in questions}) == 60
    for each in questions:
        assert 80 <= len(each.context.split()) <= 200
        assert each.question.endswith("?")


def test_every_answer_stands_in_its_passage() -> None:
    for each in own_questions():
        words = f" {' '.join(normalised(each.context.replace('-', ' ').replace('--', ' ')))} "
        first = f" {' '.join(normalised(each.answers[0].replace('-', ' ')))} "
        assert each.answers[0] in each.context, each.id
        assert first in words, each.id
        assert first not in f" {' '.join(normalised(each.question))} ", each.id
        assert len(each.answers[0].split()) <= 6


def test_the_questions_ask_for_different_things() -> None:
    beginnings = [each.question.split()[0] for each in own_questions()]
    assert {"Who", "Where", "What", "How", "Which"} <= set(beginnings)
    assert max(beginnings.count(word) for word in set(beginnings)) < 20


# --- files of questions


def test_a_file_has_questions_in_either_form(file: Path) -> None:
    first, second, third = read_questions(file)
    assert first == Question(id="a", context=str(LINES[0]["context"]), question="Where?", answers=("Lisbon", "in L."))
    assert (second.id, second.answers) == ("line 2", ("Miso",))
    assert (third.id, third.question, third.answers) == ("c", "How much?", ("nine pounds",))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[]", "must be an object"),
        ('{"question": "q", "answers": ["a"]}', "has no context"),
        ('{"context": "c", "answers": ["a"]}', "has no question"),
        ('{"context": "c", "question": "q"}', "has no answers"),
        ('{"context": "c", "question": "q", "answers": []}', "answers: must be a list"),
        ('{"context": "c", "question": "q", "answers": "a"}', "answers: must be a list"),
        ('{"context": "c", "question": "q", "answers": [1]}', "answers: must be a text"),
        ('{"context": " ", "question": "q", "answer": "a"}', "context: must be a text"),
        ('{"context": "c", "question": 5, "answer": "a"}', "question: must be a text"),
        ('{"id": [], "context": "c", "question": "q", "answer": "a"}', "id must be"),
        ('{"id": "one", "context": "c", "question": "q", "answer": "a"}', "the id 'one' is that of line 1"),
    ],
)
def test_a_wrong_line_is_named(line: str, said: str) -> None:
    good = '{"id": "one", "context": "c", "question": "q", "answer": "a"}'
    with pytest.raises(LMInfError, match=r"set\.jsonl, line 3") as raised:
        list(parse_questions([good, "", line], "set.jsonl"))
    assert said in str(raised.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(LMInfError, match="holds no questions"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(LMInfError, match="cannot read the questions"):
        read_questions(tmp_path / "missing.jsonl")


# --- prompts


def test_a_prompt_is_exactly_as_long_as_it_should_be_with_its_passage_at_its_depth(
    head_32: TinyModel, filler: Path
) -> None:
    prompts = prompts_of(head_32, filler=filler, n_questions=10)
    assert [prompt.depth for prompt in prompts] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1] * 2
    ids = [question.id for question in own_questions()]
    assert all(ids.index(prompt.question.id) % 5 == (prompt.depth or 0) * 4 for prompt in prompts)
    assert [prompt.length for prompt in prompts] == [1500] * 10 + [2500] * 10
    for prompt in prompts:
        tokens, passage = prompt.tokens().tolist(), prompt.passage.tolist()
        assert len(tokens) == prompt.length
        (begin,) = [at for at in range(len(tokens)) if tokens[at : at + len(passage)] == passage]
        n_filler = len(tokens) - prompt.n_needed
        assert prompt.depth is not None
        assert abs(begin - len(prompt.before) - prompt.depth * n_filler) <= 20  # a sentence of the filler
        for n_window in (1000, len(tokens) - begin, len(tokens) - begin + 1):
            assert prompt.in_window(n_window) is (len(tokens) - begin < n_window)
        assert prompt.question.context in text_of(head_32, prompt)


def test_prompts_of_one_length_and_depth_begin_alike(head_32: TinyModel, filler: Path) -> None:
    first, other = prompts_of(head_32, filler=filler, lengths=(2500,), n_questions=10, depths=(0.75,))[:2]
    n_before = len(first.before) + first.n_before
    assert n_before > 500
    assert first.question != other.question
    assert first.tokens()[:n_before].tolist() == other.tokens()[:n_before].tolist()


def test_a_prompt_goes_through_the_chat_template(head_32: TinyModel) -> None:
    form = PromptFormat(vocabulary_of(head_32.path))
    question = Question(id="q", context="A <|im_end|> B", question="Is <|im_end|> there?", answers=("yes",))
    prompt = prompt_as_it_comes(form, question)
    text = text_of(head_32, prompt)
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\nAnswer:")
    assert "Text:\nA <|im_end|> B\n\nQuestion: Is <|im_end|> there?<|im_end|>" in text
    with Llama(head_32.path, n_ctx=256, n_threads=1) as llm:
        (end,) = llm.tokenize("<|im_end|>", special=True)
    assert prompt.tokens().tolist().count(end) == 1  # of the template; the others are text
    assert prompt.in_window(10) is None


def test_a_model_without_a_chat_template_gets_a_plain_prompt(
    head_32: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = vocabulary_of(head_32.path)

    class WithoutTemplate:
        chat_template = None
        tokenize = vocabulary.tokenize

    form = PromptFormat(WithoutTemplate())  # type: ignore[arg-type]
    prompt = prompt_as_it_comes(form, Question(id="q", context="It is 5.", question="What?", answers=("5",)))
    assert text_of(head_32, prompt).endswith("Text:\nIt is 5.\n\nQuestion: What?\nAnswer:")


def test_a_length_without_room_for_a_question_is_refused(head_32: TinyModel, filler: Path) -> None:
    with pytest.raises(ConfigError, match="lengths: 100 tokens have no room for question persuasion-01"):
        prompts_of(head_32, filler=filler, lengths=(100,))


def test_another_text_than_the_settings_say_is_refused(head_32: TinyModel, filler: Path, file: Path) -> None:
    for changed, settings in (
        (filler, settings_for(head_32, filler=filler, lengths=(1500,))),
        (file, settings_for(head_32, file=file)),
    ):
        changed.write_text("Another one.")
        with pytest.raises(LMInfError, match=f"{changed.name} is not the text that it was"):
            prepare_questions(settings, vocabulary_of(head_32.path))
    own = settings_for(head_32, text_sha256="0" * 64)
    with pytest.raises(LMInfError, match="the set of questions is not the text that it was"):
        prepare_questions(own, vocabulary_of(head_32.path))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lengths": (512,)}, "taken as they are"),
        ({"depths": ()}, "depths"),
        ({"depths": (-0.5,)}, "depths"),
        ({"n_questions": 0}, "n_questions"),
    ],
)
def test_settings_out_of_range_are_refused(head_32: TinyModel, file: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_for(head_32, file=file, **wrong)


@pytest.mark.parametrize(
    ("n_tokens", "limits"), [(1, (1, 1)), (511, (256, 511)), (512, (512, 1023)), (8193, (8192, 16383))]
)
def test_ranges_of_lengths_begin_at_powers_of_two(n_tokens: int, limits: tuple[int, int]) -> None:
    assert length_range(n_tokens) == limits


# --- a run


def test_texts_of_a_file_are_taken_as_they_come(head_32: TinyModel, file: Path, tmp_path: Path) -> None:
    settings = settings_for(head_32, file=file, truncate=True, full_tokens=300)
    measured(settings, tmp_path / "qa.jsonl")
    records = read_results(tmp_path / "qa.jsonl")  # checks them against the schema
    answers = [each for each in records if each["kind"] == "qa.answer"]
    asked = {method: [e["id"] for e in answers if e["method"] == method] for method in ("endless", "full", "truncate")}
    assert asked == {"endless": ["a", "line 2", "c"], "full": ["a"], "truncate": ["a", "line 2", "c"]}
    for each in answers:
        assert (each["length"], each["depth"], each["in_window"]) == (None, None, None)
        assert each["f1"] == answer_f1(each["answer"], each["answers"])
        assert "\n" not in each["answer"]
    cells = [each for each in records if each["kind"] == "qa.cell"]
    assert sum(each["n_questions"] for each in cells) == len(answers) == 7
    assert {(each["length_low"], each["length_high"]) for each in cells} == {(128, 255), (256, 511)}
    assert settings_from(QaSettings, json.loads(json.dumps(plain(asdict(settings))))) == settings


def test_a_text_is_read_once_for_all_questions_about_it(head_32: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    text = "Anna lives in Lisbon. She bakes bread. " * 12
    asked = ("Where does Anna live?", "Who bakes?", "What does she bake?")
    lines = [{"context": text, "question": question, "answers": ["Lisbon"]} for question in asked]
    file.write_text("\n".join(map(json.dumps, lines)))
    prompts = prompts_of(head_32, file=file)
    answers = ask_all(settings_for(head_32, file=file), [prompts], lambda *_: False, lambda *_: None, one_line=True)
    n_text = prompts[0].n_tokens - prompts[0].n_question
    assert [answer.n_kept for *_, answer in answers] == [n_text, n_text, n_text, n_text, 0, 0]  # two methods in turns


def test_cells_have_the_mean_f1_of_their_questions(head_32: TinyModel, filler: Path) -> None:
    settings = settings_for(head_32, filler=filler, lengths=(1500,))
    common = {"kind": "qa.answer", "method": "endless", "cache_type": "f16", "length": 1500}
    values = ((True, 0.5, False), (True, 1.0, True), (False, 0.0, False))
    answers = [{**common, "in_window": inside, "f1": f1, "exact": exact} for inside, f1, exact in values]
    cells = {cell["in_window"]: cell for cell in qa_cells(settings, answers)}
    assert {window: (cell["n_questions"], cell["f1"]["mean"]) for window, cell in cells.items()} == {
        None: (3, 0.5),
        True: (2, 0.75),
        False: (1, 0.0),
    }
    assert cells[None]["exact"]["mean"] == pytest.approx(1 / 3)


def test_a_stopped_run_goes_on_to_the_same_figures(head_32: TinyModel, filler: Path, tmp_path: Path) -> None:
    settings = settings_for(head_32, filler=filler, lengths=(1500,), n_questions=2)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    measured(settings, whole)
    lines = whole.read_text().splitlines(keepends=True)
    for n_lines in (2, len(lines) - 1):
        part.write_text("".join(lines[:n_lines]) + lines[n_lines][:20])
        measured(settings, part)
        assert part.read_text().splitlines(keepends=True)[:n_lines] == lines[:n_lines]
        assert without_time(read_results(part)) == without_time(read_results(whole))


# --- the command


def command(model: TinyModel, *arguments: str) -> tuple[str, ...]:
    settings = ("--threads", "1", "--n-window", "200", "--n-ubatch", "32", "--max-tokens", "4", "--methods", "endless")
    return ("eval", "qa", "--model", str(model.path), *settings, *arguments)


def test_the_command_shows_a_table(head_32: TinyModel, filler: Path) -> None:
    finished = run(*command(head_32, "--lengths", "1500", "--questions", "5", "--filler", str(filler), "--truncate"))
    assert finished.returncode == 0, finished.stderr
    for expected in ("F1", "1,500", "endless, f16", "truncate, f16", "outside"):
        assert expected in finished.stdout


def test_the_command_s_json_is_its_records(head_32: TinyModel, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    wanted = ("--methods", "endless,full", "--full-tokens", "300", "--json", "--output", str(path))
    finished = run(*command(head_32, str(file), *wanted))
    assert finished.returncode == 0, finished.stderr
    assert "full, f16: 2 of 3 prompts were left out" in finished.stderr
    assert [json.loads(line) for line in finished.stdout.splitlines()] == read_results(path)


def test_wrong_usage_ends_with_2_and_a_wrong_file_with_1(head_32: TinyModel, file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"context": "c"}\n')
    for arguments, code, said in (
        ((str(file), "--lengths", "512"), 2, "--lengths"),
        (("--depths", "0,x"), 2, "--depths 0,x"),
        ((str(wrong),), 1, "wrong.jsonl, line 1"),
    ):
        finished = run(*command(head_32, *arguments))
        assert finished.returncode == code, finished.stderr
        assert said in finished.stderr.replace("\n", " ")
        assert finished.stdout == ""
        assert "Traceback" not in finished.stderr


def test_ctrl_c_ends_with_130_and_leaves_what_can_go_on(head_32: TinyModel, filler: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped.jsonl"
    wanted = ("--lengths", "8k", "--filler", str(filler), "--output", str(path))
    with start(*command(head_32, *wanted)) as process:
        while not path.exists() or path.read_text().count("\n") < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    kinds = [each["kind"] for each in read_results(path)]
    assert kinds == ["run"] + ["qa.answer"] * (len(kinds) - 1)
    assert 3 <= len(kinds) < 60


def test_the_default_model_answers_simple_questions(default_model: Path, tmp_path: Path) -> None:
    lines = (
        ("Anna lives in Lisbon with her brother Paul. She works as a baker.", "Where does Anna live?", "Lisbon"),
        ("The cat is called Miso. It sleeps all day in a basket.", "What is the cat called?", "Miso"),
        ("The bridge was built in 1871 by a company from Leeds.", "When was the bridge built?", "1871"),
        ("Tom paid nine pounds for the lamp and two for the bulb.", "How much did the lamp cost?", "nine pounds"),
    )
    file = tmp_path / "simple.jsonl"
    names = ("context", "question", "answer")
    file.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines))
    setup = MethodSetup(
        model=str(default_model), methods=("endless",), cache_types=("f16",), n_sink=4, n_window=256, n_threads=1
    )
    settings = QaSettings(
        setup=setup, full_tokens=512, max_tokens=12, text=str(file), text_sha256=questions_sha256(str(file))
    )
    (cell,) = [each for each in measured(settings) if each["kind"] == "qa.cell"]
    assert cell["n_questions"] == 4
    assert cell["f1"]["mean"] > 0.1
