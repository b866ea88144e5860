"""@openai/agents on Node: its realtime session over WebSocket, as agents.mjs drives it."""

import base64
import json
import os
import subprocess
from pathlib import Path

from tests.conformance.conftest import CLIENTS, NODE, check_kept, check_retold

HERE = Path(__file__).parent


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
    items = {item["id"]: item for item in told["items"]}
    for turn in told["turns"]:
        assert turn["heard"] == server.heard(base64.b64decode(items[turn["item"]]["content"][0]["audio"]))
    second, last = told["turns"][1], told["last"]
    for answer, item in ((second, second["kept"]), (last, items[last["answer"]])):
        check_kept(server, item, answer["said"], base64.b64decode(answer["sound"]))
    assert second["said"] == second["deltas"]
    check_retold(server, told["items"])
    assert items[told["cut"]]["role"] == "assistant"
    assert told["interruptions"] >= 1
    assert [type(minutes) for minutes in told["asked"]] == [int]
