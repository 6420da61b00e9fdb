"""What a saved state of a `Llama` says of itself, and whether it fits another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lminf_edge.config import LMInfConfig
from lminf_edge.errors import StateError
from lminf_edge.sequence import SequenceState
from lminf_edge.state_file import StateFile

Settings = Mapping[str, Any]
"""What has to be the same where a state is loaded: JSON data by name."""


def state_file(kind: str, settings: Settings, state: SequenceState, extra: Mapping[str, Any]) -> StateFile:
    """A file's content.

    Args:
        kind: "llama" for a sequence, "chat" for a conversation.
        settings: What it belongs to.
        state: The sequence.
        extra: Further JSON data.
    """
    sections = {"cells": state.cells}
    if state.logits is not None:
        sections["logits"] = state.logits.tobytes()
    if state.history is not None:
        sections["history"] = state.history
    return StateFile(header={"kind": kind, "settings": dict(settings), **extra}, sections=sections)


def sequence_state(file: StateFile, kind: str, settings: Settings) -> SequenceState:
    """The sequence in a file, if it fits.

    Args:
        file: A file's content.
        kind: See `state_file`.
        settings: Of the `Llama` that is to go on with it.

    Raises:
        StateError: It does not fit; the message names what differs.
    """
    found = file.header.get("kind")
    if found != kind:
        raise StateError(f"this is the saved state of a {found!r}, not of a {kind!r}")
    saved = file.header["settings"]
    differences = [
        f"{name} = {saved.get(name)!r} and not {settings.get(name)!r}"
        for name in dict.fromkeys([*saved, *settings])
        if saved.get(name) != settings.get(name)
    ]
    if differences:
        raise StateError(f"the state was saved with {', '.join(differences)}")
    logits = file.sections.get("logits")
    return SequenceState(
        cells=file.sections["cells"],
        logits=None if logits is None else np.frombuffer(logits, np.float32),
        history=file.sections.get("history"),
    )


def config_settings(config: LMInfConfig | None) -> dict[str, Any]:
    """A configuration as settings."""
    if config is None:
        return {}
    settings = dataclasses.asdict(config)
    if config.middle is not None:
        # where the store lies may change; the list is what JSON makes of the tuple
        settings["middle"] = {**dataclasses.asdict(config.middle), "layers": list(config.middle.layers)}
        del settings["middle"]["path"]
    return settings
