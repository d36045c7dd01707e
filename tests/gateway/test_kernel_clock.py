"""The kernel's word on its clock: asked on this machine, and the layout that the question depends on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gateway.kernel_clock import UNKNOWN_ERROR_NS, Discipline, kernel_discipline
from gateway.samples import NS_PER_S, ClockState


def test_this_machines_kernel_gives_a_sane_answer() -> None:
    said = kernel_discipline()
    assert said.state in ClockState
    assert 0 < said.error_ns <= 3600 * NS_PER_S
    if said.state is not ClockState.SYNCED:
        assert said.error_ns >= UNKNOWN_ERROR_NS


def test_a_kernel_that_forbids_the_question_leaves_the_state_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidding:
        def adjtimex(self, _timex: object) -> int:
            return -1

    monkeypatch.setattr("gateway.kernel_clock._libc", Forbidding())
    assert kernel_discipline() == Discipline(ClockState.UNKNOWN, UNKNOWN_ERROR_NS)


def test_the_layout_of_timex_is_the_compilers(tmp_path: Path) -> None:
    """Ask the C library's own header, as far as a compiler is there."""
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/timex.h>\n"
        "int main(void) { struct timex t; (void)t;\n"
        ' printf("%zu %zu %zu %zu", offsetof(struct timex, maxerror), offsetof(struct timex, esterror),'
        " offsetof(struct timex, status), sizeof(struct timex)); return 0; }\n"
    )
    try:
        subprocess.run(["cc", "-o", str(tmp_path / "layout"), str(source)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler on this machine: the layout of struct timex is not checked")
    said = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    code = (
        "import ctypes; from gateway.kernel_clock import _Timex as T;"
        "print(T.maxerror.offset, T.esterror.offset, T.status.offset, ctypes.sizeof(T))"
    )
    ours = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert said.split()[:3] == ours[:3]
    assert int(ours[3]) >= int(said.split()[3])
