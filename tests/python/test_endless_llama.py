"""`EndlessLlama`: llama-cpp-python's class without an end."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from conftest import OpenLlama
from get_llama_cpp import LOCK_PATH, Lock
from llama_cpp_python import Finished, LlamaCppPython
from lminf_edge import lib_path
from reference import Attention
from stock import stock_program
from tiny_models import N_VOCAB, TinyModel, random_tokens

LMINF = {"n_window": 96, "n_block": 16}
ATTENTION = Attention(n_sink=4, n_window=96, n_clamp=96, n_block=16)


def run_endless(installed: LlamaCppPython, program: str, model: TinyModel | None = None, **arguments: Any) -> Finished:
    opened = """
from lminf_edge import LMInfConfig
from lminf_edge.llama_cpp import EndlessLlama

def open_model(**options):
    fixed = {"n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False}
    return EndlessLlama(arguments["model"], lminf=LMInfConfig(**arguments["lminf"]), **{**fixed, **options})
"""
    path = None if model is None else str(model.path)
    return installed.run(opened + program, None, model=path, **{"lminf": LMINF, **arguments})


COMPLETION = """
import llama_cpp
llm = open_model(n_ctx=128, n_batch=64)
enough = llama_cpp.StoppingCriteriaList([lambda input_ids, logits: len(input_ids) >= arguments["n_tokens"]])
llm.create_completion(arguments["prompt"], max_tokens=None, temperature=0.0, stopping_criteria=enough,
                      logit_bias={str(token): -1000.0 for token in range(3)})
print(json.dumps(llm.input_ids[: llm.n_tokens].tolist()))
"""


def test_it_reads_and_writes_far_past_n_ctx_as_our_own_class(
    llama_cpp_python: LlamaCppPython, open_llama: OpenLlama, head_64: TinyModel
) -> None:
    prompt = random_tokens(1000, seed=20)
    tokens = run_endless(llama_cpp_python, COMPLETION, head_64, prompt=prompt, n_tokens=1500).value
    assert tokens[:1000] == prompt
    assert len(tokens) == 1500

    with open_llama(head_64, ATTENTION) as llm:
        logits = llm.eval(tokens)[999:-1, 3:]
    assert (logits.max(axis=1) - logits[np.arange(500), np.array(tokens[1000:]) - 3]).max() <= 1e-3


NEXT_PROMPT = """
import itertools
llm = open_model(n_ctx=128, n_batch=64)
evaluated = []
evaluate = llm.eval
llm.eval = lambda tokens: evaluated.append(len(tokens)) or evaluate(tokens)
prompt = arguments["prompt"]
answers = []
for question in arguments["questions"]:
    prompt = prompt + question
    before = len(evaluated)
    answer = list(itertools.islice(llm.generate(prompt, temp=0.0), 20))
    answers.append([evaluated[before], answer])
    prompt = prompt + answer
print(json.dumps({"answers": answers, "tokens": prompt}))
"""


def test_a_prompt_that_goes_on_is_not_read_again(llama_cpp_python: LlamaCppPython, head_32: TinyModel) -> None:
    prompt, questions = random_tokens(700, seed=21), [random_tokens(30, seed=seed) for seed in (22, 23, 24)]
    value = run_endless(llama_cpp_python, NEXT_PROMPT, head_32, prompt=prompt, questions=questions).value
    # the last token of an answer is drawn, but not evaluated before the next question
    assert [n_first for n_first, _ in value["answers"]] == [730, 31, 31]

    again = run_endless(llama_cpp_python, NEXT_PROMPT, head_32, prompt=value["tokens"][:-20], questions=[[]]).value
    assert again["answers"] == [[len(value["tokens"]) - 20, value["answers"][-1][1]]]


INHERITED = """
import itertools, pickle
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
tokens = arguments["tokens"]
draw = lambda llm: list(itertools.islice(llm.generate(tokens, temp=0.0), 60))

def all_logits():
    llm = open_model(n_ctx=128, logits_all=True)
    llm.eval(tokens)
    return [llm.scores[: llm.n_tokens].shape, llm.scores[[10, 499]].tolist()]

def pickled():
    llm = pickle.loads(pickle.dumps(open_model(n_ctx=128)))
    return [llm.lminf.n_window, draw(llm)]

results = {
    "plain": draw(open_model(n_ctx=128)),
    "draft": draw(open_model(n_ctx=128, draft_model=LlamaPromptLookupDecoding())),
    "pickled": pickled(),
    "all_logits": all_logits(),
    "defaults": EndlessLlama(arguments["model"], n_threads=1, verbose=False).lminf == LMInfConfig(),
}
print(json.dumps(results))
"""


def test_what_it_inherits_works_past_n_ctx(
    llama_cpp_python: LlamaCppPython, open_llama: OpenLlama, head_32: TinyModel
) -> None:
    tokens = random_tokens(500, seed=25)
    value = run_endless(llama_cpp_python, INHERITED, head_32, tokens=tokens).value
    assert len(value["plain"]) == 60
    assert value["draft"] == value["plain"]
    assert value["pickled"] == [96, value["plain"]]
    assert value["defaults"] is True
    shape, logits = value["all_logits"]
    assert shape == [500, N_VOCAB]
    with open_llama(head_32, ATTENTION) as llm:
        expected = llm.eval(tokens)[[10, 499]]
    assert np.abs(np.array(logits) - expected).max() <= 1e-4


DETOKENIZED = """
import llama_cpp
llm = open_model(n_ctx=128)
tokens, decoded = arguments["tokens"], []
decode = llm._model.detokenize
llm._model.detokenize = lambda tokens, special: decoded.append(len(tokens)) or decode(tokens, special=special)
for n in range(1, len(tokens) + 1):
    llm.detokenize(tokens[:n])
n_decoded = sum(decoded)
steps = [tokens[:n] for n in range(1, len(tokens) + 1)]
steps += [tokens[:100], tokens[5:200], tokens[:150] + tokens, list(reversed(tokens)), tokens]
same = [
    llm.detokenize(step, special=special) == llama_cpp.Llama.detokenize(llm, step, special=special)
    for special in (False, True) for step in steps
]
print(json.dumps([same, n_decoded]))
"""


def test_texts_are_those_of_the_base_class_however_they_grow(
    llama_cpp_python: LlamaCppPython, head_32: TinyModel
) -> None:
    begin_of_text, space_t = 1, 259  # the tiny models' tokens <|im_start|> and " t"
    tokens = [
        begin_of_text,
        space_t,
        *random_tokens(200, seed=26),
        begin_of_text,
        space_t,
        2,
        *random_tokens(50, seed=27),
    ]
    same, n_decoded = run_endless(llama_cpp_python, DETOKENIZED, head_32, tokens=tokens).value
    assert same == [True] * 2 * (len(tokens) + 5)
    assert n_decoded == 64 * 65 // 2 + len(tokens) - 64  # from the 65th on, each token once


REFUSED = """
results = []
for lminf, options in arguments["cases"]:
    try:
        EndlessLlama(arguments["model"], lminf=LMInfConfig(**lminf) if lminf is not None else "wide", verbose=False,
                     **options)
    except Exception as error:
        results.append([type(error).__name__, str(error)])
import llama_cpp
plain = llama_cpp.Llama(arguments["model"], n_ctx=512, verbose=False)
try:
    plain.create_completion(list(range(3, 263)) * 2)
except ValueError as error:
    results.append([type(error).__name__, str(error)])
print(json.dumps(results))
"""


def test_what_does_not_fit_is_an_error_that_says_why(llama_cpp_python: LlamaCppPython, head_32: TinyModel) -> None:
    causal = {"kv_overrides": {"llama.attention.causal": False}}
    cases = [[{"n_window": 300}, {}], [{}, causal], [{}, {"embedding": True}], [None, {}]]
    finished = run_endless(llama_cpp_python, REFUSED, head_32, cases=cases)
    names, messages = zip(*finished.value, strict=True)
    assert names == ("ConfigError", "UnsupportedModelError", "ConfigError", "ConfigError", "ValueError")
    reasons = ("n_window = 300 is larger", "not a causal decoder", "kv_unified must be off", "lminf = 'wide'")
    assert [reason in message for reason, message in zip(reasons, messages, strict=False)] == [True] * 4
    assert "exceed context window of 512" in messages[4]  # other objects are what they were
    assert "Exception ignored" not in finished.log


def test_without_llama_cpp_python_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lminf_edge.llama_cpp", raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    version = Lock.load(LOCK_PATH).version
    with pytest.raises(ImportError, match=f"pip install llama-cpp-python=={version}"):
        import lminf_edge.llama_cpp  # noqa: F401


def test_other_libraries_are_refused(llama_cpp_python: LlamaCppPython) -> None:
    program = "import lminf_edge.llama_cpp"
    finished = llama_cpp_python.run(program, stock_program().parents[2] / "bin")
    assert finished.status == 1
    assert "ImportError: llama_cpp has loaded " in finished.log
    assert f"not a library of {lib_path()}: import lminf_edge.llama_cpp before llama_cpp" in finished.log


def test_another_version_is_refused(llama_cpp_python: LlamaCppPython) -> None:
    program = "import llama_cpp\nllama_cpp.__version__ = '0.2.90'\nimport lminf_edge.llama_cpp"
    finished = llama_cpp_python.run(program, lib_path())
    assert finished.status == 1
    assert "ImportError: this is llama-cpp-python 0.2.90" in finished.log
