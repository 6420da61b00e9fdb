"""Speaks the peers' protocol with lminf_edge itself, so that no torch is needed to test what asks."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge import Llama


def main() -> None:
    request = json.loads(sys.stdin.readline())
    assert request["do"] == "open"
    n_full = request["n_sink"] + request["n_window"]
    path = request["model"]
    answer({"ok": {"versions": {"stand-in": "1.0"}, "weight_bytes": Path(path).stat().st_size}})
    with Llama(path, n_ctx=1024, n_threads=1, n_ubatch=32, cache_type_k="f32", cache_type_v="f32") as llm:
        for line in sys.stdin:
            answer(obey(llm, n_full, json.loads(line)))


def obey(llm: Llama, n_full: int, request: dict[str, Any]) -> object:
    tokens = request.get("tokens", [])
    if request["do"] == "decode":
        assert llm.n_past == n_full
        return {"ok": {"n_tokens": len(tokens) - 1, "seconds": 0.5}}
    if request["do"] == "footprint":
        return {"ok": {"kv_bytes": 1000, "resident_bytes": 2000}}
    if request["do"] == "fail":
        return {"error": "as asked"}
    if request["do"] == "babble":
        return "no answer"
    llm.reset()
    if request["do"] == "loss":
        return {"ok": {"loss": -float(llm.logprobs(tokens).mean())}}
    logits = llm.eval(tokens)
    if request["do"] == "logits":
        np.save(request["file"], logits)
    elif request["do"] != "fill":
        sys.exit(f"cannot {request['do']}")
    return {"ok": {"n_read": llm.n_past}}


def answer(document: object) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
