"""A precision that the device emulates is not used: a CPU without bfloat16 arithmetic computes in float32."""

import pytest
import torch
from torch import nn

from common import precision
from common.precision import autocast, tell_precision, working_precision

CPU = torch.device("cpu")


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_autocast_computes_in_the_named_precision(name: str) -> None:
    with autocast(CPU, name):
        assert nn.Linear(3, 3)(torch.ones(2, 3)).dtype == getattr(torch, name)


def test_emulated_bfloat16_is_not_used_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    with autocast(CPU, "bfloat16"):
        assert nn.Linear(3, 3)(torch.ones(2, 3)).dtype == torch.float32
    assert [working_precision(name, CPU) for name in ("float32", "float16")] == ["float32", "float16"]
    tell_precision("bfloat16", CPU)
    assert "this CPU has no bfloat16 arithmetic; float32 is used instead" in capsys.readouterr().out
    tell_precision("float32", CPU)
    assert not capsys.readouterr().out


def test_the_question_has_an_answer_here() -> None:
    assert isinstance(precision.has_bfloat16(CPU), bool)
