"""Programs as people write them for llama-cpp-python: only the import changes, and `lminf=` is added."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

THEIR_IMPORT = "from llama_cpp import Llama"
OUR_IMPORT = "from lminf_edge import Llama, LMInfConfig"

COMPLETION = """
from llama_cpp import Llama
import sys

llm = Llama(model_path=sys.argv[1], n_ctx=2048, n_threads=2, seed=1, verbose=False)
question = "Q: Which city is the capital of France? A:"
answer = llm(question, max_tokens=12, stop=["Q:", "\\n"], echo=True, temperature=0.0)
print(answer["choices"][0]["text"])
print(answer["usage"]["total_tokens"], answer["choices"][0]["finish_reason"])
"""

CHAT_STREAM = """
from llama_cpp import Llama
import sys

llm = Llama(model_path=sys.argv[1], verbose=False)
messages = [
    {"role": "system", "content": "You answer in few words."},
    {"role": "user", "content": "Say hello to the reader. " * 120},
]
for chunk in llm.create_chat_completion(messages=messages, max_tokens=16, temperature=0.2, stream=True):
    delta = chunk["choices"][0]["delta"]
    if "content" in delta:
        print(delta["content"], end="", flush=True)
print()
"""

JSON_MODE = """
from llama_cpp import Llama
import sys

llm = Llama(model_path=sys.argv[1], verbose=False)
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
}
result = llm.create_chat_completion(
    messages=[{"role": "user", "content": "Describe a dog as JSON."}],
    response_format={"type": "json_object", "schema": schema},
    temperature=0.0,
    max_tokens=60,
)
print(result["choices"][0]["message"]["content"])
"""


def run(program: str, model: Path) -> str:
    """What the program prints when it is changed as its author would change it."""
    assert THEIR_IMPORT in program
    ours = program.replace(THEIR_IMPORT, OUR_IMPORT).replace(
        "model_path=sys.argv[1],", "model_path=sys.argv[1], lminf=LMInfConfig(n_window=256),"
    )
    finished = subprocess.run(
        [sys.executable, "-c", ours, str(model)], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_completion(default_model: Path) -> None:
    text, numbers = run(COMPLETION, default_model).strip().rsplit("\n", 1)
    assert text.startswith("Q: Which city is the capital of France? A: ")
    assert int(numbers.split()[0]) > 12
    assert numbers.split()[1] in ("stop", "length")


def test_a_chat_that_streams_an_answer_to_a_message_longer_than_the_window(default_model: Path) -> None:
    assert run(CHAT_STREAM, default_model).strip()


def test_json_mode(default_model: Path) -> None:
    answer = json.loads(run(JSON_MODE, default_model))
    assert set(answer) == {"name", "size"}
    assert answer["size"] in ("small", "large")
