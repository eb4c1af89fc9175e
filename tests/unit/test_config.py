"""The settings: set from wherever they are seen, and checked when they are set."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad.config import Config, config

module: Any = importlib.import_module("distgrad.config")


def test_config_set_through_the_package_is_in_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.trace_graph
    monkeypatch.setattr(dg.config, "trace_graph", True)
    assert config.trace_graph is dg.config.trace_graph is True
    recorded = (dg.tensor(np.ones(2), requires_grad=True) * 2.0).grad_fn
    assert any(__file__ in str(note) for note in recorded.metadata.values())
    monkeypatch.undo()
    assert config.trace_graph is dg.config.trace_graph is before
    assert "trace_graph" not in vars(module)


def test_config_set_through_the_package_is_checked() -> None:
    with pytest.raises(ValueError, match="cannot set rpc_timeout to -1"):
        module.rpc_timeout = -1
    with pytest.raises(AttributeError, match="no such setting; is trace_graph meant"):
        module.trace_grpah = True


def test_config_unknown_setting_is_refused() -> None:
    with pytest.raises(AttributeError, match="cannot set timeout: "):
        Config().timeout = 3.0
    with pytest.raises(AttributeError, match="has no attribute 'timeout'"):
        print(module.timeout)


def test_config_names_of_the_module_are_its_own() -> None:
    assert module.config is config
    assert {"config", "Config", "rpc_timeout"} <= set(dir(module))
