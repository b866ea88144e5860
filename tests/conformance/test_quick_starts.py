"""The quick starts of docs/server.md, as they stand there."""

import os
import re
import subprocess
import sys

import pytest

from tests.conformance.conftest import CLIENTS, NODE, ROOT, asked_in_writing, told

PAGE = (ROOT / "docs/server.md").read_text(encoding="utf-8")
STARTS = re.findall(
    r"^`([^`]+)`(?:[^\n]|\n(?!\n))*:\n\n```\w*\n(.*?)^```", PAGE.split("### Quick starts")[1], re.DOTALL | re.MULTILINE
)
AWAITING = """
import ast, asyncio, inspect, sys
made = eval(compile(sys.argv[1], "quick start", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), {})
asyncio.run(made) if inspect.iscoroutine(made) else None
"""


def test_each_client_has_one_of_five_lines():
    names = ["openai[realtime]", "openai-agents", "livekit-plugins-openai", "pipecat-ai[openai]", "@openai/agents"]
    assert [name for name, _ in STARTS] == names
    for name, code in STARTS:
        assert len([line for line in code.splitlines() if line]) <= 5, name


@pytest.mark.parametrize(("client", "code"), STARTS, ids=[name for name, _ in STARTS])
def test_it_runs_and_prints_an_answer(server, client, code):
    if client.startswith("pipecat"):
        whole = (ROOT / "examples/pipecat_question.py").read_text(encoding="utf-8")
        assert set(code.splitlines()) <= set(whole.splitlines())
        code = whole
    code = code.replace("127.0.0.1:8000", server.host)
    is_node = client.startswith("@")
    done = subprocess.run(
        [NODE, "--input-type=module", "--eval", code] if is_node else [sys.executable, "-c", AWAITING, code],
        cwd=CLIENTS,  # where Node finds its packages
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()[-1]
    if "bytes" in printed:
        assert int(printed.split()[0]) > 0
    elif "instructions=" in code or '"instructions"' in code:
        assert printed == told(server, [], instructions="Say what day it is.")[0] != ""
    else:
        assert printed == told(server, [asked_in_writing("What is three plus four?")])[0] != ""
