"""Stands in for hypothesis where that is not installed: test files import as they are, property tests are skipped."""

import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

import pytest


def given(*_, **__):
    """Instead of hypothesis.given: a mark that skips the test, before anybody asks where its arguments come from."""
    return pytest.mark.skip(reason="hypothesis is not installed")


class Settings:
    """Instead of hypothesis.settings, also for torch.testing, which registers profiles where it finds hypothesis."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, test):
        return test

    register_profile = load_profile = staticmethod(lambda *_, **__: None)


def install() -> None:
    module = types.ModuleType("hypothesis")
    module.__spec__ = importlib.machinery.ModuleSpec("hypothesis", None)  # torch._dynamo asks for it
    module.given, module.settings, module.strategies = given, Settings, MagicMock()
    module.HealthCheck = module.Verbosity = module.assume = MagicMock()
    sys.modules["hypothesis"], sys.modules["hypothesis.strategies"] = module, module.strategies
