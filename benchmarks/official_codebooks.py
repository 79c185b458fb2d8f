"""The layers of the official codebook package, loaded without what their file imports and they do not need."""

import sys
import types
from typing import Any

import pytest
import torch


def stand_in(name: str, kind: type) -> types.ModuleType:
    """A module whose every attribute is ``kind``."""
    module = types.ModuleType(name)

    def get(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return kind

    module.__getattr__ = get  # type: ignore[method-assign]
    return module


def official_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``codebook_features.models``; the test is skipped where the package is not installed."""
    official = pytest.importorskip("codebook_features")
    import transformers

    monkeypatch.setattr(transformers, "PreTrainedModel", torch.nn.Module, raising=False)
    monkeypatch.setattr(transformers, "PretrainedConfig", object, raising=False)
    for name in ("transformer_lens", "transformer_lens.loading_from_pretrained", "transformer_lens.hook_points"):
        monkeypatch.setitem(sys.modules, name, stand_in(name, torch.nn.Module))
    for name in ("mod_model_classes", "tl_mods", "utils"):
        made = stand_in(name, object)
        monkeypatch.setitem(sys.modules, f"codebook_features.{name}", made)
        monkeypatch.setattr(official, name, made, raising=False)
    monkeypatch.delitem(sys.modules, "codebook_features.models", raising=False)
    import codebook_features.models as models

    return models
