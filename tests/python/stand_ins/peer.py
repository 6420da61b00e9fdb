"""Speaks the peers' protocol with lminf_edge itself, so that no torch is needed to test what asks."""

import json
import sys
from pathlib import Path

import numpy as np

from lminf_edge import Llama


def main() -> None:
    llm, options = None, {}
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if do == "open":
            options = request
            llm = Llama(request["model"], n_ctx=1024, n_threads=1, n_ubatch=32, cache_type_k="f32", cache_type_v="f32")
            answer = {"versions": {"stand-in": "1.0"}, "weight_bytes": Path(request["model"]).stat().st_size}
        elif do == "fill":
            llm.reset()
            llm.eval(request["tokens"])
            answer = {"n_read": llm.n_past}
        elif do == "decode":
            assert llm.n_past == options["n_sink"] + options["n_window"]
            answer = {"n_tokens": len(request["tokens"]) - 1, "seconds": 0.5}
        elif do == "footprint":
            answer = {"kv_bytes": 1000, "resident_bytes": 2000}
        elif do == "logits":
            llm.reset()
            np.save(request["file"], llm.eval(request["tokens"]))
            answer = {}
        elif do == "loss":
            llm.reset()
            answer = {"loss": -float(llm.logprobs(request["tokens"]).mean())}
        elif do == "fail":
            print(json.dumps({"error": "as asked"}), flush=True)
            continue
        elif do == "babble":
            print("no JSON", flush=True)
            continue
        else:
            sys.exit(f"cannot {do}")
        print(json.dumps({"ok": answer}), flush=True)


if __name__ == "__main__":
    main()
