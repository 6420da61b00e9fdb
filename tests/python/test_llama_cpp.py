"""Unmodified programs written for llama-cpp-python, on our libraries, with LM-Infinite from environment variables."""

from __future__ import annotations

import ast
import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from conftest import OpenLlama
from llama_cpp_python import Finished, LlamaCppPython, extract
from lminf_edge import Llama, LMInfConfig, lib_path
from reference import Attention
from stock import stock_program
from tiny_models import TinyModel, TinyShape, random_tokens, write_tiny_model
from tiny_tensors import Tensors

WINDOW = {"LMINF_N_WINDOW": "96", "LMINF_N_BLOCK": "16"}
ATTENTION = Attention(n_sink=4, n_window=96, n_clamp=96, n_block=16)
LIBRARY = "libllama.dylib" if (lib_path() / "libllama.dylib").is_file() else "libllama.so"


class Programs:
    """Runs programs against our libraries."""

    def __init__(self, installed: LlamaCppPython) -> None:
        self.installed = installed

    def __call__(self, program: str, environment: dict[str, str] | None = None, **arguments: Any) -> Finished:
        return self.installed.run(program, lib_path(), environment=environment, **arguments)


@pytest.fixture(scope="module")
def run_program(llama_cpp_python: LlamaCppPython) -> Programs:
    return Programs(llama_cpp_python)


def test_every_function_that_it_declares_is_exported(tmp_path: Path) -> None:
    package = extract(("llama_cpp/llama_cpp.py", "llama_cpp/llama_cpp_ext.py"), tmp_path)
    declared = declared_functions(package / "llama_cpp" / "llama_cpp.py")
    library = ctypes.CDLL(str(lib_path() / LIBRARY))
    assert len(declared) == 253
    assert [name for name in declared if not hasattr(library, name)] == []


def declared_functions(module: Path) -> list[str]:
    """Names in the decorators @ctypes_function(name, ...) of a module."""
    calls = [
        decorator
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
    ]
    return [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "ctypes_function"]


COMPLETION = """
import llama_cpp
llm = llama_cpp.Llama(arguments["model"], n_ctx=arguments["n_ctx"], n_ubatch=64, n_threads=1, n_threads_batch=1,
                      type_k=0, type_v=0, verbose=False)
no_special = {str(token): -1000.0 for token in range(3)}
answer = llm.create_completion(arguments["prompt"], max_tokens=-1, temperature=0.0, logit_bias=no_special)
print(json.dumps({"n_ctx": llm.n_ctx(), "tokens": llm.input_ids[: llm.n_tokens].tolist(), **answer}))
"""


def test_a_completion_runs_past_the_trained_length_as_in_our_own_class(
    run_program: Programs, open_llama: OpenLlama, head_64: TinyModel
) -> None:
    prompt = random_tokens(300, seed=7)  # the model was trained on 256
    value = run_program(COMPLETION, WINDOW, model=str(head_64.path), n_ctx=1536, prompt=prompt).value
    assert value["n_ctx"] == 1536
    assert value["usage"] == {"prompt_tokens": 300, "completion_tokens": 1236, "total_tokens": 1536}
    assert value["choices"][0]["finish_reason"] == "length"

    with open_llama(head_64, ATTENTION) as llm:
        logits = llm.eval(value["tokens"])[299:-1, 3:]
    assert value["tokens"][:300] == prompt
    drawn = np.array(value["tokens"][300:]) - 3
    assert len(drawn) == 1235  # the last one is returned, but not evaluated any more
    assert (logits.max(axis=1) - logits[np.arange(1235), drawn]).max() <= 1e-3


CHAT = """
import llama_cpp
llm = llama_cpp.Llama(arguments["model"], n_ctx=1024, n_threads=2, verbose=False)
messages = [
    {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
    {"role": "user", "content": "Count from one to ten."},
]
stream = llm.create_chat_completion(messages, max_tokens=20, temperature=0.0, stream=True)
parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream]
whole = llm.create_chat_completion(messages, max_tokens=20, temperature=0.0)
print(json.dumps(["".join(parts), whole["choices"][0]["message"]["content"]]))
"""


def test_a_chat_says_the_same_with_and_without_it_while_nothing_is_masked(
    run_program: Programs, default_model: Path
) -> None:
    streamed, whole = run_program(CHAT, model=str(default_model)).value
    assert streamed == whole
    assert "3. 3\n4. 4" in whole  # the next most probable token is a logit away at least: rounding changes nothing
    assert run_program(CHAT, {"LMINF_N_WINDOW": "0"}, model=str(default_model)).value == [whole, whole]


LOW_LEVEL = """
import ctypes, resource
import llama_cpp.llama_cpp as api
import numpy as np
api.llama_backend_init()
model = api.llama_model_load_from_file(arguments["model"].encode(), api.llama_model_default_params())
params = api.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch = arguments["n_ctx"], 64, 32
params.n_threads = params.n_threads_batch = 1
params.type_k = params.type_v = api.GGML_TYPE_F32
params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.embeddings = arguments.get("embeddings", False)
context = api.llama_init_from_model(model, params)
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
batch = api.llama_batch_init(64, 0, 1)

def decode(tokens, begin, wanted):
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, begin + i, 1, 0
        batch.logits[i] = i in wanted
    return api.llama_decode(context, batch)

def rows(get, size, indices):
    return [np.ctypeslib.as_array(get(context, i), shape=(size,)).tolist() for i in indices]
"""

CHOSEN = (
    LOW_LEVEL
    + """
wanted, found = [0, 5, 40, 63], []
for begin in range(0, len(arguments["tokens"]), 64):
    assert decode(arguments["tokens"][begin : begin + 64], begin, wanted) == 0
    found += rows(api.llama_get_logits_ith, n_vocab, wanted)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"n_ctx": api.llama_n_ctx(context), "logits": found, "memory": memory}))
"""
)


def test_the_low_level_api_gives_logits_for_chosen_positions(
    run_program: Programs, open_llama: OpenLlama, head_32: TinyModel
) -> None:
    tokens = random_tokens(640, seed=8)
    n_ctx = 1_000_192
    value = run_program(CHOSEN, WINDOW, model=str(head_32.path), tokens=tokens, n_ctx=n_ctx).value
    assert value["n_ctx"] == n_ctx
    # plain llama.cpp would need 1 GiB of keys and values for that length
    plain = run_program(CHOSEN, model=str(head_32.path), tokens=tokens, n_ctx=1024).value
    assert value["memory"] - plain["memory"] < 64 * 1024

    with open_llama(head_32, ATTENTION) as llm:
        expected = llm.eval(tokens)
    chosen = [begin + i for begin in range(0, 640, 64) for i in (0, 5, 40, 63)]
    assert np.abs(np.array(value["logits"]) - expected[chosen]).max() <= 1e-4


ONE_OR_MANY = (
    LOW_LEVEL
    + """
logits, n = [], arguments["n_at_once"]
for begin in range(0, len(arguments["tokens"]), n):
    assert decode(arguments["tokens"][begin : begin + n], begin, range(n)) == 0
    logits += rows(api.llama_get_logits_ith, n_vocab, range(n))
print(json.dumps(logits[-n_vocab:]))
"""
)


def test_a_variable_makes_it_deterministic(run_program: Programs, head_32: TinyModel) -> None:
    """F32 weights: with the stock library's products for many tokens, logits depend on how many there are."""
    tokens = random_tokens(320, seed=8)

    def logits(n_at_once: int, environment: dict[str, str]) -> Any:
        arguments = {"model": str(head_32.path), "tokens": tokens, "n_ctx": 512, "n_at_once": n_at_once}
        return run_program(ONE_OR_MANY, {**WINDOW, **environment}, **arguments).value

    once, often = (logits(n, {"LMINF_DETERMINISTIC": "1"}) for n in (64, 1))
    assert once == often
    assert logits(64, {}) != once


NOT_CAUSAL = (
    LOW_LEVEL
    + """
tokens = arguments["tokens"]
before = decode(tokens, 0, [])
api.llama_set_causal_attn(context, False)
refused = decode(tokens, 32, [])
api.llama_set_causal_attn(context, True)
print(json.dumps([before, refused, decode(tokens, 32, [])]))
"""
)


def test_turning_causal_attention_off_is_refused(run_program: Programs, head_32: TinyModel) -> None:
    options: dict[str, Any] = {"model": str(head_32.path), "tokens": random_tokens(32, seed=14), "n_ctx": 256}
    finished = run_program(NOT_CAUSAL, WINDOW, **options)
    before, refused, after = finished.value
    assert before == after == 0
    assert refused != 0
    assert "LM-Infinite needs causal attention" in finished.log


FACTORS = (
    LOW_LEVEL
    + """
assert decode(arguments["tokens"], 0, range(64)) == 0
print(json.dumps([api.llama_n_ctx(context), rows(api.llama_get_logits_ith, n_vocab, range(64))]))
"""
)


def test_long_and_short_rope_factors_are_chosen_by_the_distances_not_by_n_ctx(
    run_program: Programs, tmp_path: Path
) -> None:
    factors = (("rope_factors_short", (1.0,) * 16), ("rope_factors_long", (4.0,) * 16))
    scaling: dict[str, str | int] = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 128}
    shape = TinyShape(tensors=Tensors(rope_factors=factors), metadata=scaling)
    model = str(write_tiny_model(tmp_path / "factors.gguf", shape, seed=1).path)

    def logits(environment: dict[str, str], n_ctx: int) -> np.ndarray[Any, Any]:
        value = run_program(FACTORS, environment, model=model, tokens=random_tokens(64, seed=15), n_ctx=n_ctx).value
        assert value[0] == n_ctx
        return np.array(value[1])

    long, short = logits({}, 1024), logits({"LMINF_N_WINDOW": "128"}, 256)
    assert np.abs(long - short).max() > 0.1
    assert np.abs(logits({"LMINF_N_WINDOW": "128"}, 1024) - short).max() <= 1e-4
    assert np.abs(logits({"LMINF_N_WINDOW": "129"}, 1024) - long).max() <= 1e-4


EMBEDDINGS = (
    LOW_LEVEL
    + """
n_embd = api.llama_model_n_embd(model)
assert decode(arguments["tokens"], 0, range(64)) == 0
print(json.dumps(rows(api.llama_get_embeddings_ith, n_embd, [0, 30, 63])))
"""
)


def test_embeddings_of_each_token_are_as_without_it_while_nothing_is_masked(
    run_program: Programs, head_32: TinyModel
) -> None:
    options: dict[str, Any] = {"model": str(head_32.path), "tokens": random_tokens(64, seed=9), "n_ctx": 256}
    plain = np.array(run_program(EMBEDDINGS, embeddings=True, **options).value)
    with_it = np.array(run_program(EMBEDDINGS, WINDOW, embeddings=True, **options).value)
    assert plain.shape == (3, head_32.shape.n_embd)
    assert np.abs(plain).max() > 0.1
    assert np.abs(with_it - plain).max() <= 1e-4


STATE = """
import llama_cpp
llm = llama_cpp.Llama(arguments["model"], n_ctx=1024, n_threads=1, type_k=0, type_v=0)

def go_on(token, n_tokens):
    for _ in range(n_tokens):
        llm.eval([token])
        token = llm.sample(temp=0.0)
        yield token

llm.eval(arguments["tokens"])
size, state = llama_cpp.llama_state_get_size(llm.ctx), llm.save_state()
first = list(go_on(100, 20))
llm.reset()
llm.eval(arguments["tokens"][::-1])
llm.load_state(state)
print(json.dumps({"size": size, "first": first, "again": list(go_on(100, 20))}))
"""


@pytest.mark.parametrize("environment", [{}, WINDOW], ids=["without", "with"])
def test_a_state_is_saved_and_restored(run_program: Programs, head_32: TinyModel, environment: dict[str, str]) -> None:
    value = run_program(STATE, environment, model=str(head_32.path), tokens=random_tokens(200, seed=10)).value
    assert value["size"] > 200
    assert value["again"] == value["first"]


SAMPLERS = """
import llama_cpp
llm = llama_cpp.Llama(arguments["model"], n_ctx=4096, n_threads=1, verbose=False)
grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("ab" | "cd" | " the")+', verbose=False)
long = arguments["prompt"]
with_grammar = llm.create_completion(long, max_tokens=40, temperature=0.8, seed=3, grammar=grammar)
llm.create_completion(long, max_tokens=10, temperature=0.0, logit_bias={arguments["token"]: 1000.0})
print(json.dumps({"grammar": with_grammar["choices"][0]["text"], "tokens": llm.input_ids[: llm.n_tokens].tolist()}))
"""


def test_grammar_and_logit_bias_work_past_the_window(run_program: Programs, head_32: TinyModel) -> None:
    prompt = random_tokens(500, seed=11)
    value = run_program(SAMPLERS, WINDOW, model=str(head_32.path), prompt=prompt, token=100).value
    assert re.fullmatch(r"(ab|cd| the)+( |a|c| t| th)?", value["grammar"])  # the last one may be cut off
    assert value["tokens"][500:] == [100] * 9


LORA = """
import llama_cpp
result = {}
for name in ("none", "lora"):
    llm = llama_cpp.Llama(arguments["model"], n_ctx=1024, n_ubatch=64, n_threads=1, type_k=0, type_v=0, verbose=False,
                          logits_all=True, lora_path=arguments["lora"] if name == "lora" else None)
    llm.eval(arguments["tokens"])
    result[name] = llm.scores[[10, 80, 250, 399]].tolist()
    llm.close()
print(json.dumps(result))
"""


def test_a_lora_adapter_works_as_without_it(run_program: Programs, head_32: TinyModel, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", head_32)
    options: dict[str, Any] = {"model": str(head_32.path), "lora": str(lora), "tokens": random_tokens(400, seed=12)}
    plain = {name: np.array(rows) for name, rows in run_program(LORA, **options).value.items()}
    wide = {"LMINF_N_WINDOW": "256", "LMINF_N_SINK": "16"}
    with_it = {name: np.array(rows) for name, rows in run_program(LORA, wide, **options).value.items()}
    assert np.abs(plain["lora"] - plain["none"]).max() > 0.1
    for name in plain:  # up to the window's length nothing is masked
        assert np.abs(with_it[name][:3] - plain[name][:3]).max() <= 1e-4
    assert np.abs(with_it["lora"][3] - with_it["none"][3]).max() > 0.1
    assert np.isfinite(with_it["lora"]).all()


def write_lora(path: Path, model: TinyModel) -> Path:
    """Writes a LoRA adapter of rank 2 for the keys and values of each layer."""
    rng = np.random.default_rng(13)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    for layer in range(model.shape.n_layer):
        for name in ("attn_k", "attn_v"):
            weight = f"blk.{layer}.{name}.weight"
            n_out, n_in = model.weights[weight].shape
            writer.add_tensor(f"{weight}.lora_a", rng.normal(0, 1 / np.sqrt(n_in), (2, n_in)).astype(np.float32))
            writer.add_tensor(f"{weight}.lora_b", rng.normal(0, 0.7, (n_out, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


REFUSALS = """
import llama_cpp
log = []
llama_cpp.llama_log_set(keep := llama_cpp.llama_log_callback(lambda _, text, __: log.append(text.decode())), None)
results = []
for case in arguments["cases"]:
    os.environ.update(case["environment"])
    log.clear()
    try:
        llama_cpp.Llama(arguments["model"], **{"n_ctx": 512, "n_threads": 1, **case["options"]}).close()
        results.append([None, "".join(log)])
    except ValueError as error:
        results.append([str(error), "".join(log)])
    for name in case["environment"]:
        del os.environ[name]
print(json.dumps(results))
"""


def test_what_does_not_fit_is_refused_and_the_log_says_why(run_program: Programs, head_32: TinyModel) -> None:
    on = {"LMINF_N_SINK": "4"}
    cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
        ({"LMINF_N_WINDOW": "many"}, {}, "LMINF_N_WINDOW = 'many': not a whole number"),
        ({"LMINF_N_SINK": "-1"}, {}, "LMINF_N_SINK = '-1': not a whole number"),
        ({"LMINF_N_BLOCK": "64 "}, {}, "LMINF_N_BLOCK = '64 ': not a whole number"),
        ({"LMINF_N_ROLLBACK": "1e3"}, {}, "LMINF_N_ROLLBACK = '1e3': not a whole number"),
        ({"LMINF_N_CLAMP": "99999999999"}, {}, "LMINF_N_CLAMP = '99999999999': larger than 2^32 - 1"),
        ({"LMINF_SINK_ORDER": "random"}, {}, "LMINF_SINK_ORDER = 'random': must be 'clamped' or 'kept'"),
        ({"LMINF_DETERMINISTIC": "yes"}, {}, "LMINF_DETERMINISTIC = 'yes': must be '0' or '1'"),
        (
            {"LMINF_DETERMINISTIC": "1", "LMINF_ATTENTION": "stock"},
            {},
            "attention is llama.cpp's (LMINF_ATTENTION=stock)",
        ),
        ({"LMINF_N_WINDOW": "257"}, {}, "n_window = 257 is larger than the model's trained context of 256"),
        ({"LMINF_N_CLAMP": "8", "LMINF_N_BLOCK": "9"}, {}, "n_block = 9 is larger than n_clamp = 8"),
        ({"LMINF_N_REBASE": "99999999"}, {}, "n_rebase = 99999999 is larger than 2^24"),
        ({"LMINF_SINK_ORDER": "kept"}, {}, "with sink_order kept, n_sink + n_window = 260 must be at most"),
        (on, {"type_k": 20}, "cache type iq4_nl is not supported for keys"),
        (on, {"embedding": True}, "kv_unified must be off with n_seq_max = 256"),
        (on, {"attention_type": 1}, "LM-Infinite needs causal attention"),
        (on, {"kv_overrides": {"llama.attention.causal": False}}, "it is not a causal decoder"),
    ]
    given = [{"environment": environment, "options": options} for environment, options, _ in cases]
    results = run_program(REFUSALS, model=str(head_32.path), cases=given).value
    for (_, _, reason), (error, log) in zip(cases, results, strict=True):
        assert error == "Failed to create llama_context"
        assert reason in log


def test_one_variable_turns_it_on_and_an_empty_one_does_not(run_program: Programs, head_32: TinyModel) -> None:
    environments = [
        {"LMINF_N_WINDOW": "0"},
        {"LMINF_SINK_ORDER": "clamped", "LMINF_N_SINK": ""},
        {"LMINF_N_WINDOW": "64", "LMINF_N_SINK": "8", "LMINF_N_ROLLBACK": "7"},
        {"LMINF_N_WINDOW": ""},
        {},
        {"LMINF_DETERMINISTIC": "1"},
        {"LMINF_DETERMINISTIC": "0"},
    ]
    cases = [{"environment": environment, "options": {}} for environment in environments]
    results = run_program(REFUSALS, model=str(head_32.path), cases=cases).value
    assert [error for error, _ in results] == [None] * 7
    assert [
        [line.partition("LM-Infinite: ")[2] for line in log.splitlines() if "LM-Infinite" in line]
        for _, log in results
    ] == [
        ["n_sink = 4, n_window = 256, n_clamp = 256, n_block = 64, n_rollback = 128, sink_order = clamped"],
        ["n_sink = 4, n_window = 256, n_clamp = 256, n_block = 64, n_rollback = 128, sink_order = clamped"],
        ["n_sink = 8, n_window = 64, n_clamp = 64, n_block = 64, n_rollback = 7, sink_order = clamped"],
        [],
        [],
        ["n_sink = 4, n_window = 256, n_clamp = 256, n_block = 64, n_rollback = 128, sink_order = clamped"],
        [],
    ]  # fmt: skip


def test_a_model_that_reads_a_text_at_once_embeds_it_as_ever(run_program: Programs, head_32: TinyModel) -> None:
    cases = [
        {
            "environment": WINDOW,
            "options": {"embedding": True, "kv_overrides": {"llama.attention.causal": False}},
        }
    ]
    ((error, log),) = run_program(REFUSALS, model=str(head_32.path), cases=cases).value
    assert error is None
    assert "LM-Infinite is off for this context" in log


def test_our_own_class_does_not_read_the_environment(head_32: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMINF_N_WINDOW", "64")
    monkeypatch.setenv("LMINF_N_SINK", "nonsense")
    with Llama(head_32.path, n_threads=1) as plain, Llama(head_32.path, n_threads=1, lminf=LMInfConfig()) as llm:
        assert plain.config is None
        assert plain.n_ctx == 256
        assert llm.config is not None
        assert (llm.config.n_sink, llm.config.n_window) == (4, 256)


OTHER_MODELS_OUTPUT = {
    "test_real_model",  # token ids of Qwen 3.5's vocabulary
    "test_real_llama",  # Qwen 3.5 repeats the sentence about the fox
    "test_real_llama_repeated_prompt_cache",  # the same
    "test_real_llama_embeddings",  # one embedding for each text, which needs an embedding model
}


def test_its_own_tests_have_the_same_results_on_the_stock_library_and_on_ours(
    llama_cpp_python: LlamaCppPython, default_model: Path, tmp_path: Path
) -> None:
    stock_libraries = stock_program().parents[2] / "bin"
    stock = llama_cpp_python.own_tests(tmp_path / "stock", stock_libraries, default_model)
    ours = llama_cpp_python.own_tests(tmp_path / "ours", lib_path(), default_model)
    assert ours == stock
    assert {name for name, outcome in ours.items() if outcome == "failed"} == OTHER_MODELS_OUTPUT
    assert [list(ours.values()).count(outcome) for outcome in ("passed", "failed", "skipped")] == [12, 4, 10]
