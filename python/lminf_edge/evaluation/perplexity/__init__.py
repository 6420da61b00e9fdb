"""Loss by position, of several methods on the same text: one part of the text after the other, each read by all.

A loss belongs to the position of the token that predicts: that at position p is the negative natural-log probability of
token p + 1, in nats. Source of the protocol: Han et al., arXiv 2308.16137, section 5.1.
"""

from __future__ import annotations

from lminf_edge.evaluation.perplexity.documents import read_documents
from lminf_edge.evaluation.perplexity.passes import open_passes
from lminf_edge.evaluation.perplexity.settings import (
    FRESH,
    PplSettings,
    Progress,
    check_text,
    opened_text,
    text_identity,
)
from lminf_edge.evaluation.perplexity.stream import TextStream
from lminf_edge.evaluation.results import ResultLog, begin_or_resume, identify_model, run_record
from lminf_edge.evaluation.texts import trained_length
from lminf_edge.evaluation.token_source import vocabulary_of

__all__ = ["FRESH", "PplSettings", "Progress", "run_ppl", "text_identity"]


def run_ppl(
    settings: PplSettings, log: ResultLog, on_progress: Progress | None = None, checkpoint_seconds: float = 120.0
) -> None:
    """Reads the text with all methods and writes what came of it to the log.

    If the log holds an earlier part of the run, it goes on behind that, and ends with the same losses.

    Args:
        settings: What to read.
        log: Where the records go. Beside its file, if it has one, a folder holds the states to go on from.
        on_progress: Watches.
        checkpoint_seconds: Time between saved states.

    Raises:
        LMInfError: Text or model cannot be read, or the log holds another run.
    """
    on_progress = on_progress or (lambda _done, _all: None)
    check_text(settings)
    record = run_record("ppl", settings, identify_model(settings.setup.model))
    if log.records and begin_or_resume(log, record) and log.of_kind("ppl.summary"):
        return
    n_train = trained_length(vocabulary_of(settings.setup.model), settings.setup.model)
    with open_passes(settings, n_train) as passes, opened_text(settings) as stream:
        begin_or_resume(log, record)
        if settings.is_json_lines and not settings.concatenate:
            read_documents(settings, stream, passes, log, on_progress)
        else:
            TextStream(settings, stream, passes, log, n_train).read(on_progress, checkpoint_seconds)
